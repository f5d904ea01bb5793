"""README.md and docs/: commands are accepted, files and equations exist, numbers come from runs.

tests/results/ has what commands of this repository wrote or printed; nothing there is typed. Each
table under a line <!-- NAME --> is made from it, and every number with two decimals in README.md or
docs/ must be in it. After new runs:

    python tests/test_readme.py keep runs/ABLATION        a finished table
    python tests/test_readme.py keep runs/ONE runs/TWO    the accuracy of runs with several seeds
    python tests/test_readme.py keep bench.json ...       what bench.py --json wrote
    python tests/test_readme.py keep graded/A graded/B    pali_reason's outputs (docs/results.md)
    python tests/evaluation/test_errors.py > tests/results/kinds.txt   what a command prints
    python tests/test_readme.py write                     the tables again; pytest names the prose
"""

import argparse
import ast
import json
import re
import shlex
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "tests/results"
sys.path[:0] = [str(ROOT)]

import eval as evaluation  # noqa: E402
import teacher  # noqa: E402
from support.evaluation import tables  # noqa: E402
from support.training import ablations, settings  # noqa: E402

README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
SEEDED_ROWS = {  # label: (file, its row, row of seeds.json or None)
    "mmcot: answer only, with the image": ("mmcot", "QCM->A, vision", None),
    "mmcot: two stages, text only": ("mmcot", "two-stage, text only", "mmcot, text only"),
    "mmcot: one stage, with the image": ("mmcot", "one-stage QCM->RA, vision", None),
    "mmcot: two stages, with the image": ("mmcot", "two-stage, vision", "mmcot, vision"),
    "paligemma: before training": ("paligemma", "base", None),
    "paligemma: trained on answers alone": ("paligemma", "answer-only", "paligemma, answer"),
    "paligemma: distilled, 32 traces only": ("paligemma", "32 traces", None),
    "paligemma: distilled": ("paligemma", "distilled", "paligemma, reason"),
}
PUBLISHED_OUTPUTS = {  # file of pali_reason: the model that wrote it
    "results": "PaliGemma 2 3B pt-448, as released",
    "results_finetuned": "PaliGemma 2 3B, fine-tuned",
    "results_smol": "SmolVLM-Instruct, as released",
    "results_finetuned_smol": "SmolVLM-Instruct, fine-tuned",
    "results_finetuned_smol_v2": "SmolVLM-Instruct, fine-tuned again",
}


@cache
def result(name):
    return json.loads((RESULTS / f"{name}.json").read_text())


# --- the tables, by the name in the comment above them
def markdown(*rows):
    """Rows of strings, the first of them the head, as a markdown table."""
    rule = ["---"] + ["---:"] * (len(rows[0]) - 1)
    return "\n".join(f"| {' | '.join(row)} |" for row in (rows[0], rule, *rows[1:]))


def fenced(text):
    return f"```\n{text}\n```"


def interval(ends):
    return "{:.2f} - {:.2f}".format(*ends)


def seeds_table():
    """Eight runs of the two ablations, with the accuracy of other seeds where there are any."""
    rows = [["run", "seed 42", "95 % interval", "seed 43", "seed 44"]]
    for label, (file, name, seeded) in SEEDED_ROWS.items():
        scores = result(file)["rows"][name]
        by_seed = result("seeds").get(seeded, {})
        others = [
            f"{by_seed[seed]['accuracy']['avg']:.2f}" if seed in by_seed else "-"
            for seed in ("43", "44")
        ]
        rows.append([label, f"{scores['accuracy']['avg']:.2f}", interval(scores["ci95"]), *others])
    return markdown(*rows)


def version_table():
    """What version 2 of Multimodal-CoT changed, one thing at a time, on the demo."""
    rows = [["run", "seed 42", "seed 43", "seed 44"]]
    labels = {
        "": "stage 1 learns QCM-LE, the last epoch, no captions",
        ", captions": "and captions in the context (`--captions demo`)",
        ", QCM-E": "stage 1 learns QCM-E (`--recipe two-stage-e`)",
        ", best epoch": "the best epoch of each stage (`--keep-epoch best`)",
    }
    for name, label in labels.items():
        by_seed = result("seeds")[f"mmcot, vision{name}"]
        rows.append([label, *(f"{by_seed[seed]['accuracy']['avg']:.2f}" for seed in by_seed)])
    return markdown(*rows)


def run_table():
    """What one mmcot run prints at its end, without the rows of single families."""
    scores = result("mmcot")["rows"]["two-stage, vision"]
    lines = tables.table({"demo-two-stage-detr": scores}).splitlines()
    shown = ("demo", "accuracy", "avg", "TXT", "IMG", "ROUGE-L", "false r", "answers", "  ")
    return fenced("\n".join(line for line in lines if line.startswith(shown)))


def baselines_table():
    """What one paligemma run prints at its end."""
    rows = result("paligemma")["rows"]
    names = ("base", "base, asked to reason", "answer-only", "distilled")
    return fenced(tables.runs_table({name: rows[name] for name in names}))


def published_table():
    rows = [["model (file in outputs/)", "accuracy %", "95 % interval", "choices %", "no answer %"]]
    for file, model in PUBLISHED_OUTPUTS.items():
        scores = result("pali_reason")[file]
        numbers = [scores["accuracy"]["avg"], scores["choices"], scores["parse_failures"]]
        accuracy, choices, failures = (f"{x:.2f}" for x in numbers)
        name = f"{model} (`{file}.csv`)"
        rows.append([name, accuracy, interval(scores["ci95"]), choices, failures])
    return markdown(*rows)


def speeds_table():
    rows = [["what", "against", "ours", "theirs", "ratio", "range"]]
    for x in result("bench")["rows"]:
        if x["unit"] not in ("times", "GiB") and x["spread"]:
            sides = (x["ours"], x["theirs"])
            ours, theirs = (f"{n:,.0f}" if n >= 1000 else f"{n:.4g}" for n in sides)
            span = "{:.2f}-{:.2f}".format(*x["spread"])
            name = f"{x['item']}: {x['case']}"
            rows.append(
                [name, x["against"], f"{ours} {x['unit']}", theirs, f"{x['ratio']:.2f}", span]
            )
    return markdown(*rows)


def kinds_table():
    text = (RESULTS / "kinds.txt").read_text()
    return fenced(text[text.index("all: ") : text.index("\nlabel -> rule")].rstrip())


TABLES = {
    "seeds": seeds_table,
    "versions": version_table,
    "run": run_table,
    "baselines": baselines_table,
    "mmcot": lambda: fenced(tables.runs_table(result("mmcot")["rows"])),
    "paligemma": lambda: fenced(tables.runs_table(result("paligemma")["rows"])),
    "pali_reason": published_table,
    "speeds": speeds_table,
    "kinds": kinds_table,
}
TABLE = re.compile(r"^<!-- (\w+) -->\n((?:```\n.*?^```|\|[^\n]*(?:\n\|[^\n]*)*))", re.M | re.S)


def found_tables():
    return [(path, *found) for path in PAGES for found in TABLE.findall(path.read_text())]


def test_every_table_has_a_place():
    assert sorted(name for _, name, _ in found_tables()) == sorted(TABLES)


@pytest.mark.parametrize("path, name, text", found_tables(), ids=lambda x: str(x)[-20:])
def test_a_table_is_what_its_runs_wrote(path, name, text):
    assert text == TABLES[name]()


# --- numbers
PUBLISHED = {  # by others, and where
    "85.31": "Multimodal-CoT base, FLAN-Alpaca + ViT + captions (TMLR version, Table 4)",
    "82.55": "the same with UnifiedQA",
    "83.16": "the same with DETR features",
    "82.62": "the same in one stage (Table 6)",
    "84.91": "Multimodal-CoT base, UnifiedQA + DETR, teacher-forced rationales (v1, Table 4)",
    "82.57": "the same in one stage (v1, Table 6)",
    "96.97": "ROUGE-L of its rationales (v1)",
    "93.46": "ROUGE-L of the TMLR version's",
    **dict.fromkeys(
        ["80.40", "67.86", "69.77", "70.53", "71.12", "91.68", "84.81", "84.77", "85.85"],
        "other rows of v1's Tables 2 to 4 and of its features and backbones",
    ),
    **dict.fromkeys(
        ["81.63", "69.32", "69.68", "78.57", "79.37", "90.45", "84.27", "82.86", "83.19"],
        "the same rows of the TMLR version",
    ),
    "47.86": "A-OKVQA without rationale (TMLR version, Table 5)",
    "50.57": "and with",
    "85.95": "the released base weights, decoded by kaede-mori/mmcot-fusion",
    "6.47": "pali_reason's own score of its base model (answer_eval.ipynb)",
    "18.18": "and of its fine-tuned one",
}


def numbers(result):
    """Every number in a result, with two decimals, and those in its texts."""
    if isinstance(result, dict):
        return set().union(*map(numbers, result.values()), numbers(list(result)))
    if isinstance(result, list):
        return set().union(*map(numbers, result))
    if isinstance(result, str):
        return {f"{float(x):.2f}" for x in re.findall(r"\d+\.\d\d+", result)}
    return {f"{abs(result):.2f}"} if isinstance(result, int | float) else set()


def stated(text):
    """The numbers with just two decimals in a page."""
    return set(re.findall(r"(?<![\d.])\d+\.\d\d(?![\d.]*\d)", text))


@cache
def measured():
    texts = [path.read_text() for path in RESULTS.glob("*.txt")]
    texts += [make() for make in TABLES.values()]
    return numbers(texts + [json.loads(path.read_text()) for path in RESULTS.glob("*.json")])


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_number_was_measured(path):
    known = measured() | PUBLISHED.keys()
    if path.name == "hacking.md":  # test_hacks.py compares the lines that it shows
        known |= stated("\n".join(code_blocks(path.read_text())))
    lines = enumerate(path.read_text().splitlines(), 1)
    unknown = [f"{n}: {x}" for n, line in lines for x in sorted(stated(line) - known)]
    assert not unknown, f"{path.name}: not in {RESULTS}: {', '.join(unknown)}"


def test_the_numbers_of_others_are_used():
    assert PUBLISHED.keys() <= set().union(*(stated(path.read_text()) for path in PAGES))


# --- what the pages name
def code_blocks(text):
    return re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def commands():
    """(page, words) of each command line that calls one of our own scripts. Those of hacking.md
    are for changed code, and test_hacks.py runs them."""
    for path in [path for path in PAGES if path.name != "hacking.md"]:
        text = path.read_text()
        lines = "\n".join(code_blocks(text)).replace("\\\n", " ").splitlines()
        lines += re.findall(r"`([^`\n]+)`", text)
        for line in lines:
            for part in re.split(r"&&|\s#\s|\s>\s", line):
                words = shlex.split(part) if "python " in part else []
                if words[:1] == ["python"] and words[1].endswith(".py"):
                    yield path.name, words[1:]


@pytest.mark.parametrize("page, words", commands(), ids=str)
def test_a_command_is_accepted(page, words):
    script, *arguments = words
    assert (ROOT / script).is_file()
    if arguments == ["--help"]:
        return
    parsers = {"train.py": settings.parse_args, "eval.py": evaluation.parse_args}
    parsers["teacher.py"] = teacher.parse_args
    if script in parsers:
        parsers[script](arguments)
    else:  # their parser is in main: each word that starts with -- must be in their text
        text = (ROOT / script).read_text()
        assert all(word in text for word in arguments if word.startswith("--"))


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_the_files_that_a_page_links_or_names_exist(page):
    text = page.read_text()
    links = [page.parent / x for x in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text)]
    rows = re.findall(r"^\| `([\w./]+)` \|", text, re.MULTILINE)
    missing = [str(x) for x in (*links, *(ROOT / row for row in rows)) if not x.exists()]
    assert not missing, f"{page.name} names {', '.join(missing)}"


def test_the_file_table_is_complete():
    rows = set(re.findall(r"^\| `([\w./]+)` \|", README.read_text(), re.MULTILINE))
    support = [path for path in (ROOT / "support").iterdir() if path.name[0] not in "_."]
    wings = {f"support/{path.name}" + "/" * path.is_dir() for path in support}
    assert {path.name for path in ROOT.glob("*.py")} | wings <= rows


def equations():
    """(tag, file, function) of each row of README's table of equations."""
    row = r"^\|[^\n]*\| `# (Eq\. [^`]+)` \| `(\w+\.py)`, `([\w.]+)` \|$"
    return re.findall(row, README.read_text(), re.MULTILINE)


@pytest.mark.parametrize("tag, file, function", equations())
def test_an_equation_is_in_the_function_that_is_named(tag, file, function):
    source = (ROOT / file).read_text()
    node = ast.parse(source)
    for name in function.split("."):
        node = next(x for x in node.body if getattr(x, "name", None) == name)
    assert f"# {tag}" in ast.get_source_segment(source, node)


def test_there_are_equations():
    assert len(equations()) == 6


# --- keeping results
def read_metrics(folder):
    return json.loads((Path(folder) / "metrics.json").read_text())


def write_result(name, content):
    (RESULTS / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")


def differences(folders):
    """{name: folder} -> eval.py's paired differences to the first, in its words."""
    command = [sys.executable, ROOT / "eval.py", *folders.values(), "--no-report"]
    lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    text = "\n".join(line for line in lines if "McNemar" in line)
    for name, folder in sorted(folders.items(), key=lambda item: -len(str(item[1]))):
        text = text.replace(str(folder), name)  # the longest first: one may begin another
    return text


def keep_ablation(folder, model):
    folder = Path(folder)
    named = {"mmcot": ablations.MMCOT_ABLATION, "paligemma": ablations.PALIGEMMA_ABLATION}[model]
    folders = {}
    for name, changed in named.items():
        plain = re.sub(r"[^a-zA-Z0-9]", "-", name.replace("->", "-"))
        folders[name] = folder / plain if changed else folder
    (itself,) = (name for name, changed in named.items() if not changed)
    rows = {name: read_metrics(place) for name, place in folders.items()}
    ordered = {itself: folder} | folders
    write_result(model, {"differences": differences(ordered), "rows": rows})


def keep_seeds(folders, configs):
    path = RESULTS / "seeds.json"
    kept = json.loads(path.read_text()) if path.is_file() else {}
    names = {("mmcot", "none"): "mmcot, text only", ("mmcot", "detr"): "mmcot, vision"}
    for folder, config in zip(folders, configs, strict=True):
        vision = (config["model"], config.get("vision"))
        name = names.get(vision, f"paligemma, {config['recipe']}")
        changed = {
            "captions": config.get("captions", "none") != "none",
            "QCM-E": config["recipe"] == "two-stage-e",
            "best epoch": "best" in config.get("keep_epoch", ()),
        }
        name = ", ".join([name, *(key for key in changed if changed[key])])
        scores = read_metrics(folder)
        kept.setdefault(name, {})[str(config["seed"])] = {
            key: scores[key] for key in ("n", "accuracy", "ci95", "chance")
        }
    write_result("seeds", kept)


def keep_published(folders):
    """eval.py --out's folders of pali_reason's outputs, named after their files."""
    kept = {}
    for folder in folders:
        scores = read_metrics(folder)
        kept[Path(folder).name] = {
            "n": scores["n"],
            "chance": scores["chance"],
            "accuracy": {"avg": scores["accuracy"]["avg"]},
            "ci95": scores["ci95"],
            "choices": scores["accuracy"]["question type: multi_choice"],
            "choices_n": scores["n_by"]["question type: multi_choice"],
            "choices_chance": scores["chance_by"]["question type: multi_choice"],
            "parse_failures": scores["parse_failures"],
            "failure_modes": scores["failure_modes"],
        }
    pali = {name: folder for name, folder in zip(kept, folders, strict=True) if "smol" not in name}
    smol = {name: folder for name, folder in zip(kept, folders, strict=True) if "smol" in name}
    kept["differences"] = f"{differences(pali)}\n{differences(smol)}"
    write_result("pali_reason", kept)


def keep_speeds(paths):
    parts = [json.loads(Path(path).read_text()) for path in paths]
    rows = [row for part in parts for row in part["rows"]]
    write_result("bench", {"machines": [part["machine"] for part in parts], "rows": rows})


def keep(paths):
    if paths[0].endswith(".json"):
        return keep_speeds(paths)
    if not (Path(paths[0]) / "config.json").is_file():
        return keep_published(paths)
    configs = [json.loads((Path(path) / "config.json").read_text()) for path in paths]
    if len(paths) > 1:
        return keep_seeds(paths, configs)
    keep_ablation(paths[0], configs[0]["model"])


def write():
    """Put the tables of tests/results/ into the pages."""
    for path in PAGES:
        text = path.read_text()
        path.write_text(TABLE.sub(lambda m: f"<!-- {m[1]} -->\n{TABLES[m[1]]()}", text))


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("action", choices=("keep", "write"))
    parser.add_argument("paths", nargs="*")
    args = parser.parse_args()
    keep(args.paths) if args.action == "keep" else write()
