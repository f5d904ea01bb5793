"""Many runs in one table: the papers' ablations, and the baselines of a distilled PaliGemma.

A table is {name: changed settings}, a line for each run. The one that changes nothing is the run
itself; train.py trains and decodes each.
"""

from dataclasses import replace
from pathlib import Path

import data
from support.distributed import rank
from support.evaluation import report, tables
from support.training.examples import bad_records
from support.training.settings import Settings

Table = dict[str, dict]

MMCOT_ABLATION = {  # the paper's Tables 2, 3 and 6
    "QCM->A": {"recipe": "answer", "vision": "none"},
    "QCM->RA": {"recipe": "reason", "vision": "none"},
    "QCM->AR": {"recipe": "explain", "vision": "none"},
    "two-stage, text only": {"vision": "none"},
    "two-stage, captions": {"vision": "none", "captions": "scienceqa"},
    "two-stage, vision": {},
    "two-stage, vision, no picture masked": {"no_image": "mask"},
    "two-stage, vision, own rationales": {"stage2_rationales": "generated"},
    "one-stage QCM->RA, vision": {"recipe": "reason"},
    "QCM->A, vision": {"recipe": "answer"},
}
BASELINES = {  # what a distilled PaliGemma is compared with; the last is the run itself
    "base": {"recipe": "answer", "epochs": (0.0,)},
    "base, asked to reason": {"epochs": (0.0,)},
    "answer-only": {"recipe": "answer"},
    "distilled": {},
}
PALIGEMMA_ABLATION = BASELINES | {  # one part changed in each
    "unfiltered traces": {"keep": "all"},
    "judged traces": {"keep": "correct"},
    "EOS not in the loss": {"eos_in_loss": False},
    "BOS after the question": {"layout": "seed"},
    "32 traces": {"limit_traces": 32},
    "no loop stop, no forced answer": {"epochs": (0.0,), "loop_stop": False, "force_answer": False},
    "vote of 5": {"epochs": (0.0,), "samples": 5, "temperature": 0.7},
}
# Lines that train nothing and decode the run's own weights in another way.
DECODED_ONLY = ("no loop stop, no forced answer", "vote of 5")


def table_of(settings: Settings) -> Table | None:
    """The table that a command makes; None for a run alone."""
    if settings.ablation:
        return {"mmcot": MMCOT_ABLATION, "paligemma": PALIGEMMA_ABLATION}[settings.model]
    if settings.model == "mmcot" or settings.alone:
        return None
    # A run that learns no reasoning would be compared with itself.
    return BASELINES if settings.recipe == "reason" and settings.epochs[0] else None


def lines_of(settings: Settings, table: Table) -> dict[str, Settings]:
    """{name: settings} of every line of a table. The run itself is in `settings.out`; the others
    have folders in it."""
    lines = {}
    for name, changed in table.items():
        line = replace(settings, **changed)
        if changed:
            plain = "".join(c if c.isalnum() else "-" for c in name.replace("->", "-"))
            line = replace(line, out=str(Path(settings.out) / plain))
        if name in DECODED_ONLY:
            trained = {"weights": (settings.out,)} if settings.full else {"adapter": settings.out}
            line = replace(line, **trained)
        lines[name] = line
    return lines


def show(settings: Settings, lines: dict[str, Settings], rows: dict[str, dict]) -> None:
    """Print the summary of a table whose lines have these `rows`, {name: metrics}, and each line's
    paired difference to the run itself; write the report of all to `settings.out`."""
    if rank():
        return
    print(f"\n{tables.runs_table(rows)}")
    problems = data.load(settings.data, settings.test_split, bad_records(settings.on_error))
    problems = problems[: settings.limit]
    columns = {}
    for name in sorted(lines, key=lambda name: lines[name].out != settings.out):  # itself first
        out = Path(lines[name].out)
        if (out / "predictions.jsonl").is_file():
            graded = tables.graded_folder(out, problems)
            columns[name] = tables.Column(rows[name], graded, out)
    if len(columns) > 1:
        print(f"\n{tables.differences(columns)[1]}")
        report.write_report(settings.out, columns)
