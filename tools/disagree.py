"""Where two files of verdicts disagree, for a person to read; the person's labels are kept.

    python tools/disagree.py A B --data DIR [--split S] [--labels FILE] [--ask]

A and B: eval.py's graded predictions.jsonl, or any JSON or JSONL of records with an id (or pid) and
"correct", "true_false" or "verdict". --ask takes a key for each disagreement: r and w, the reply is
right or wrong; s, skip; q, quit. What has a label ({"id", "correct"} lines) is not asked again.
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data  # noqa: E402
from support import files  # noqa: E402
from support.dataset.choices import lettered  # noqa: E402

VERDICTS = ("correct", "true_false", "verdict")


def read_verdicts(path: str | Path) -> dict[str, dict]:
    """{id: {"correct", "parsed", "how", "response"}}. ValueError names the record without them."""
    content = files.regular_file(path).read_bytes()
    try:
        whole = files.parsed(content)
    except ValueError:
        whole = [record for _, record in files.json_lines(path)]
    if isinstance(whole, dict):
        whole = [x | {"id": i} if isinstance(x, dict) else {} for i, x in whole.items()]
    found = {}
    for number, record in enumerate(whole, 1):
        verdict = next((record[key] for key in VERDICTS if key in record), None)
        if isinstance(verdict, dict):  # a trace's
            verdict = verdict.get("correct")
        name = record.get("id", record.get("pid"))
        if name is None or not isinstance(verdict, bool | None):
            raise ValueError(f"{path}, record {number} has no id with one of {VERDICTS}.")
        if verdict is not None:
            kept = {key: record.get(key) for key in ("parsed", "how", "response", "answer")}
            found[str(name)] = {"correct": verdict} | kept
    return found


def shown(problem: data.Problem, a: dict, b: dict, width: int = 300) -> str:
    """One disagreement in at most a dozen lines."""
    reply = a["response"] or b["response"] or a["answer"] or b["answer"] or ""
    reply = " ".join(reply.split())
    if len(reply) > 2 * width:
        reply = f"{reply[:width]} [...] {reply[-width:]}"
    asked = " ".join(problem.question.split())[-width:]
    lines = [f"{problem.id}: {asked}", lettered(problem)]
    lines += [f"gold: {problem.answer}", f"reply: {reply}"]
    for name, x in (("A", a), ("B", b)):
        why = f", read {x['parsed']} ({x['how']})" if x["how"] else ""
        lines.append(f"{name}: {'right' if x['correct'] else 'wrong'}{why}")
    return "\n".join(filter(None, lines))


def ask(path: Path, apart: list[str], texts: dict[str, str], labels: dict[str, bool]) -> None:
    """Ask about each disagreement without a label; each answer is written at once."""
    keys = {"r": True, "w": False}
    with open(path, "a", encoding="utf-8") as file:
        for i, name in enumerate(apart, 1):
            if name in labels:
                continue
            print(f"\n[{i} of {len(apart)}] {texts[name]}")
            answer = ""
            while answer not in ("r", "w", "s", "q"):
                answer = input("the reply is r(ight), w(rong), s(kip), q(uit): ").strip().lower()
            if answer == "q":
                return
            if answer in keys:
                labels[name] = keys[answer]
                file.write(json.dumps({"id": name, "correct": labels[name]}) + "\n")
                file.flush()


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="disagree.py", description=__doc__.split("\n")[0])
    parser.add_argument("a", metavar="A", help="a file of verdicts")
    parser.add_argument("b", metavar="B", help="another one")
    parser.add_argument("--data", required=True, metavar="DIR", help="the problems")
    parser.add_argument("--split", default="test", help="their split (%(default)s)")
    parser.add_argument("--labels", type=Path, metavar="FILE", help="JSONL of a person's labels")
    parser.add_argument("--ask", action="store_true", help="ask for labels; needs --labels")
    args = parser.parse_args(argv)
    if args.ask and not args.labels:
        parser.error("--ask writes to --labels FILE, which is missing")
    first = read_verdicts(args.a)
    second = read_verdicts(args.b)
    problems = {p.id: p for p in data.load(args.data, args.split)}
    common = [i for i in first if i in second and i in problems]
    apart = [i for i in common if first[i]["correct"] != second[i]["correct"]]
    texts = {i: shown(problems[i], first[i], second[i]) for i in apart}
    lines = files.json_lines(args.labels) if args.labels and args.labels.is_file() else ()
    labels = {str(x["id"]): x["correct"] for _, x in lines}
    if args.ask:
        ask(args.labels, apart, texts, labels)
    print("\n\n".join(() if args.ask else texts.values()))
    print(f"\n{len(apart)} of {len(common)} verdicts differ")
    for name, verdicts in ((args.a, first), (args.b, second)):
        same = [verdicts[i]["correct"] == labels[i] for i in apart if i in labels]
        if same:
            print(f"{name}: {sum(same)} of {len(same)} labelled disagreements as the person says")


if __name__ == "__main__":
    files.run_command("disagree.py", main)
