"""Many runs in one table: the papers' ablations, and the baselines of a distilled PaliGemma.

A table is {name: changed flags}, a line for each run: Multimodal-CoT's Tables 2, 3 and 6 (Zhang et
al., arXiv 2302.00923), what a distilled PaliGemma must be compared with, and what each part of the
distillation buys. The line that changes nothing is the run itself.

Left out: the runs (train.py trains and decodes each line), and the numbers of a table
(support/evaluation/metrics.py, support/evaluation/tables.py).
"""

import argparse
from pathlib import Path

import data
from support.distributed import rank
from support.evaluation import report, tables
from support.training import examples as records

MMCOT_ABLATION = {  # name: changed flags; the paper's Tables 2, 3 and 6
    "QCM->A": {"recipe": "answer", "vision": "none"},
    "QCM->RA": {"recipe": "reason", "vision": "none"},
    "QCM->AR": {"recipe": "explain", "vision": "none"},
    "two-stage, text only": {"vision": "none"},
    "two-stage, captions": {"vision": "caption"},
    "two-stage, vision": {},
    "two-stage, vision, no picture masked": {"no_image": "mask"},
    "two-stage, vision, own rationales": {"stage2_rationales": "generated"},
    "one-stage QCM->RA, vision": {"recipe": "reason"},
    "QCM->A, vision": {"recipe": "answer"},
}
BASELINES = {  # what a distilled PaliGemma is compared with; the last is the run itself
    "base": {"recipe": "answer", "epochs": [0.0]},
    "base, asked to reason": {"epochs": [0.0]},
    "answer-only": {"recipe": "answer"},
    "distilled": {},
}
PALIGEMMA_ABLATION = BASELINES | {  # one part changed in each
    "unfiltered traces": {"keep": "all"},
    "judged traces": {"keep": "correct"},
    "EOS not in the loss": {"eos_in_loss": False},
    "BOS after the question": {"layout": "seed"},
    "32 traces": {"limit_traces": 32},
    "no loop stop, no forced answer": {"loop_stop": False, "force_answer": False, "epochs": [0.0]},
    "vote of 5": {"samples": 5, "temperature": 0.7, "epochs": [0.0]},
}
DECODED_AGAIN = ("no loop stop, no forced answer", "vote of 5")  # the weights of the run itself


def table_of(args):
    """{name: changed flags} of the table that a command makes; None for a run alone."""
    if args.ablation:
        return {"mmcot": MMCOT_ABLATION, "paligemma": PALIGEMMA_ABLATION}[args.model]
    distilled = args.model == "paligemma" and args.recipe == "reason" and args.epochs[0]
    return BASELINES if distilled and not args.alone else None


def lines_of(args, table):
    """{name: flags} of every line of a table. The one that changes nothing is the run itself, in
    `args.out`; the others have folders in it."""
    lines = {}
    for name, changed in table.items():
        plain = "".join(c if c.isalnum() else "-" for c in name.replace("->", "-"))
        out = Path(args.out) / plain if changed else Path(args.out)
        changed = changed | {"out": str(out)}
        if name in DECODED_AGAIN:
            changed |= {"weights": [args.out]} if args.full else {"adapter": args.out}
        lines[name] = argparse.Namespace(**vars(args) | changed)
    return lines


def show(args, lines, rows):
    """Print the summary of a table whose lines have these `rows`, {name: metrics}, and each line's
    paired difference to the run itself; write the report of all to `args.out`."""
    if rank():
        return
    print(f"\n{tables.runs_table(rows)}")
    bad, columns = records.bad_records(vars(args)), {}
    problems = data.load(args.data, args.test_split, bad)[: args.limit]
    places = {name: Path(line.out) for name, line in lines.items()}
    for name in sorted(places, key=lambda name: places[name] != Path(args.out)):  # itself first
        if (places[name] / "predictions.jsonl").is_file():
            graded = tables.graded_folder(places[name], problems)
            columns[name] = tables.Column(rows[name], graded, places[name])
    if len(columns) > 1:
        print(f"\n{tables.differences(columns)[1]}")
        report.write_report(args.out, columns)
