"""Tables of many runs: which runs a command has, and what each of them changes."""

from dataclasses import asdict
from pathlib import Path

import pytest
from small_runs import settings

import fusion
from support.training.ablations import (
    BASELINES,
    DECODED_ONLY,
    MMCOT_ABLATION,
    PALIGEMMA_ABLATION,
    lines_of,
    table_of,
)


@pytest.mark.parametrize(
    "system, flags, table",
    [
        ("paligemma", [], BASELINES),
        ("paligemma", ["--alone"], None),
        ("paligemma", ["--recipe", "answer"], None),  # three of four lines would be the same
        ("paligemma", ["--epochs", "0"], None),
        ("paligemma", ["--ablation"], PALIGEMMA_ABLATION),
        ("mmcot", [], None),
        ("mmcot", ["--ablation"], MMCOT_ABLATION),
    ],
)
def test_the_table_of_a_command(system, flags, table):
    assert table_of(settings(system, *flags)) is table


def test_the_last_baseline_is_the_run_itself_and_the_others_are_trained_as_long():
    lines = lines_of(settings("paligemma", "--out", "runs/x", "--lr", "0.5"), BASELINES)
    assert [line.epochs[0] > 0 for line in lines.values()] == [False, False, True, True]
    assert {line.lr for line in lines.values()} == {(0.5,)}
    folders = [line.out for line in lines.values()]
    names = ["base", "base--asked-to-reason", "answer-only"]
    assert folders == [*(f"runs/x/{name}" for name in names), "runs/x"]


@pytest.mark.parametrize(
    "table, flags",
    [
        (PALIGEMMA_ABLATION, "paligemma"),
        (PALIGEMMA_ABLATION, "paligemma --full"),
        (MMCOT_ABLATION, "mmcot"),
    ],
)
def test_an_ablation_changes_one_thing_at_a_time(table, flags):
    run = settings(*flags.split(), "--ablation", "--out", "runs/all")
    lines = lines_of(run, table)
    assert len({line.out for line in lines.values()}) == len(table) == len(lines)
    itself = [name for name, line in lines.items() if line.out == run.out]
    assert len(itself) == 1 and lines[itself[0]] == run
    for name, changed in table.items():
        line = asdict(lines[name])
        differs = {key: x for key, x in line.items() if asdict(run)[key] != x and key != "out"}
        if name in DECODED_ONLY:  # of the run itself, which comes before; --full has no adapter
            full = "--full" in flags
            changed = changed | ({"weights": (run.out,)} if full else {"adapter": run.out})
            assert list(lines).index(itself[0]) < list(lines).index(name)
        assert differs == changed
        assert name == itself[0] or Path(line["out"]).parent == Path(run.out)
        assert run.model == "paligemma" or line["recipe"] in fusion.RECIPES
