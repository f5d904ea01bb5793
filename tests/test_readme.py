"""README.md: its commands exist, its file list is the files', its numbers are what runs gave.

    python tests/test_readme.py runs/ABLATION        keeps a finished table for these tests
    python tests/test_readme.py runs/ONE runs/TWO    keeps the accuracy of runs of several seeds
    python tests/test_readme.py bench.json ...       keeps what bench.py --json wrote

tests/results/ has what the tables of the README were made from: the metrics.json of every line of
an ablation, and the paired differences. What it says elsewhere (speed, the teacher, the soak) is
printed by the commands named beside it and is not looked at here, but for tests/results/bench.json.
"""

import argparse
import json
import re
import shlex
import sys
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "tests/results"
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import test_house as house  # noqa: E402

import data  # noqa: E402
import eval as evaluation  # noqa: E402
import teacher  # noqa: E402
from support.evaluation import tables
from support.training import ablations  # noqa: E402
from support.training import settings as flags

README = (ROOT / "README.md").read_text()


def blocks(text=README):
    return re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def section(title):
    return re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", README, re.DOTALL | re.MULTILINE)[1]


def commands():
    """The README's command lines of our own scripts, as lists of words."""
    lines = "\n".join(blocks()).replace("\\\n", " ").splitlines()
    lines += re.findall(r"`([^`\n]+)`", README)
    for line in lines:
        for part in re.split(r"&&|\s#\s", line):
            words = shlex.split(part) if "python " in part else []
            if words[:1] == ["python"] and words[1].endswith(".py"):
                yield words[1:]


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_a_command_is_taken(words, monkeypatch):
    script, *given = words
    assert (ROOT / script).is_file()
    parsers = {"train.py": flags.parse_args, "eval.py": evaluation.parse_args}
    parsers |= {"teacher.py": teacher.parse_args}
    if script in parsers:
        parsers[script](given)
    else:  # those that have their parser in main: no word that starts with -- is unknown to them
        text = (ROOT / script).read_text()
        assert all(word in text for word in given if word.startswith("--"))


def test_the_file_list_is_the_files():
    """Each file of the product has a row with its number of lines, in this README."""
    rows = dict(
        re.findall(r"^\| `([\w/]+\.py)` \| ([\d,]+) \|", section("The files"), re.MULTILINE)
    )
    assert {name: int(n.replace(",", "")) for name, n in rows.items()} == {
        str(path): house.counts(path)[0] for path in house.PRODUCT
    }


@cache
def result(name):
    return json.loads((RESULTS / f"{name}.json").read_text())


@pytest.mark.parametrize("name", ["mmcot", "paligemma"])
def test_a_table_is_what_its_runs_gave(name):
    assert f"{tables.runs_table(result(name)['rows'])}\n" in blocks()


def numbers(found):
    """Every number of a result as README writes it, and of the texts in it."""
    if isinstance(found, dict):
        return set().union(*map(numbers, found.values()), numbers(list(found)))
    if isinstance(found, list):
        return set().union(*map(numbers, found)) if found else set()
    if isinstance(found, str):
        return set(re.findall(r"\d+\.\d\d\b", found))
    return {f"{abs(found):.2f}"} if isinstance(found, int | float) else set()


def test_every_share_was_measured():
    """Numbers with two decimals in "What it finds" stand in a result, or in NOTES.md."""
    known = numbers([result(name) for name in ("mmcot", "paligemma", "seeds")])
    known |= numbers([tables.runs_table(result(name)["rows"]) for name in ("mmcot", "paligemma")])
    known |= numbers((ROOT / "NOTES.md").read_text())
    told = numbers(section("What it finds"))
    assert len(told) > 60 and told <= known, sorted(told - known)


def test_the_seeds():
    """The rows of the table of seeds."""
    lines = section("What it finds").splitlines()
    for name, by_seed in result("seeds").items():
        cells = [f"{scores['accuracy']['avg']:.2f}" for _, scores in sorted(by_seed.items())]
        assert any(line.startswith(f"| {name} | {' | '.join(cells)} |") for line in lines), name


def speeds(rows):
    """bench.py's rows as the README has them."""
    for x in rows:
        if x["unit"] not in ("times", "GiB") and x["spread"]:
            what, span = f"{x['item']}: {x['case']}", "{:.2f}-{:.2f}".format(*x["spread"])
            ours, theirs = (
                f"{n:,.0f}" if n >= 1000 else f"{n:.4g}" for n in (x["ours"], x["theirs"])
            )
            pair = f"{ours} {x['unit']} | {theirs}"
            yield f"| {what} | {x['against']} | {pair} | {x['ratio']:.2f} | {span} |"


def test_the_speeds_are_those_of_one_run_of_the_bench():
    made = list(speeds(result("bench")["rows"]))
    told = [line for line in README.splitlines() if line.startswith(tuple(x[:12] for x in made))]
    assert len(told) > 10 and told == made


def keep(folders):
    """Writes what these run folders have to say into tests/results/."""
    configs = [json.loads((Path(folder) / "config.json").read_text()) for folder in folders]
    if len(folders) > 1:
        return keep_seeds(folders, configs)
    args = argparse.Namespace(**configs[0] | {"ablation": True, "out": str(folders[0])})
    lines = ablations.lines_of(args, ablations.table_of(args))
    rows = {name: tables.read_metrics(Path(line.out)) for name, line in lines.items()}
    problems, columns = data.load(args.data, args.test_split), {}
    for name in sorted(rows, key=lambda name: lines[name].out != args.out):
        graded = tables.graded_folder(Path(lines[name].out), problems)
        columns[name] = tables.Column(rows[name], graded, lines[name].out)
    kept = {"differences": tables.differences(columns)[1], "rows": rows}
    (RESULTS / f"{args.model}.json").write_text(json.dumps(kept, indent=1) + "\n")


def keep_seeds(folders, configs):
    path = RESULTS / "seeds.json"
    kept = json.loads(path.read_text()) if path.is_file() else {}
    for folder, config in zip(folders, configs, strict=True):
        names = {("mmcot", "none"): "mmcot, text only", ("mmcot", "detr"): "mmcot, vision"}
        name = names.get((config["model"], config["vision"]), f"paligemma, {config['recipe']}")
        scores = tables.read_metrics(Path(folder))
        kept.setdefault(name, {})[str(config["seed"])] = {
            key: scores[key] for key in ("n", "accuracy", "ci95", "chance")
        }
    path.write_text(json.dumps(kept, indent=1) + "\n")


def keep_speeds(paths):
    """The files of bench.py --json as one; prints the README's rows."""
    parts = [json.loads(Path(path).read_text()) for path in paths]
    rows = [row for part in parts for row in part["rows"]]
    kept = {"machines": [part["machine"] for part in parts], "rows": rows}
    (RESULTS / "bench.json").write_text(json.dumps(kept, indent=1) + "\n")
    print(*speeds(rows), sep="\n")


if __name__ == "__main__":
    given = sys.argv[1:]
    (keep_speeds if given[0].endswith(".json") else keep)(given)
