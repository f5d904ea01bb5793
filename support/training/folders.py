"""Run folders: how one begins, what --resume asks of it, when it is complete, and what it says.

config.json has every flag, the versions and the commit; last/ is there until the run is complete
(see journal.py). A run that cannot start leaves nothing. `run_config` reads the flags of a
folder that train.py wrote, or somebody else.

Left out: the states in last/ (journal.py), predictions and metrics (tables.py).
"""

import contextlib
import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import torch

import data
import fusion
from support import files
from support.distributed import rank, world
from support.evaluation import tables
from support.training.journal import Journal
from support.training.settings import RECIPES

VERSIONS = {"python": platform.python_version(), "torch": str(torch.__version__)}
# Flags that change no result, or (threads) only bits of it.
MAY_DIFFER = ("resume", "dry_run", "save_every", "out", "features_cache", "threads")
# A finished run and one with others of these belong together: parts of a table, or two stages.
GO_ON = ("--ablation ", "--alone ", "--teacher-forced ", "--stage ")
RUN_FLAGS = {  # of a run's config.json, what its readers (eval.py, loading.py ...) rely on
    "model": str, "recipe": str, "data": str, "test_split": str, "device": str, "weights": list,
    "epochs": list, "seed": int, "max_output": list, "eval_batch_size": int, "commit": str | None,
    "traces": str | None, "adapter": str | None, "on_error": str | None,
}  # fmt: skip
PARTS = {"weights": str, "epochs": int | float, "max_output": int}  # of those that are lists


def begin(args):
    """The folder of a run that can start, with config.json and last/."""
    if rank():
        return
    out, anew = Path(args.out), not args.resume or other_flags(args) != []
    if anew:
        (out / "config.json").unlink(missing_ok=True)
    (out / "last").mkdir(parents=True, exist_ok=True)  # from now on it is not complete
    if anew:
        write_config(vars(args), out)
    elif (then := files.read_json(out / "config.json")["versions"]) != (now := versions()):
        print(f"begun with {then}, goes on with {now}: bits may differ", file=sys.stderr)


def versions():
    """All that the last bits depend on, but for flags and machine."""
    return VERSIONS | {"threads": torch.get_num_threads(), "processes": world()}


def write_config(config, out):
    """config.json: every flag, the versions it ran with and the commit."""
    git = ["git", "-C", str(files.ROOT), "rev-parse", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or None
    config = config | {"versions": versions(), "commit": commit}
    kept = {k: v for k, v in config.items() if k not in ("resume", "dry_run")}
    files.write_json(kept, out / "config.json")


@contextlib.contextmanager
def opened_journal(args):
    """The run's `Journal`; without --resume log.jsonl begins anew. Only rank 0 writes it."""
    path = Path(args.out) / "log.jsonl"
    mode = "r+" if args.resume and path.is_file() else "w+"
    with open(os.devnull if rank() else path, mode, encoding="utf-8") as file:
        yield Journal(file, path.parent / "last", args.save_every)


def complete(out):
    """last/ goes, and so the run is complete, when all its files are on the disk."""
    if rank():
        return
    for path in out.iterdir():
        if path.is_file():
            files.flush(path)
    shutil.rmtree(out / "last")


def other_flags(args):
    """The flags that config.json has otherwise, as sentences; None if it has no flags."""
    try:
        config = files.read_json(Path(args.out) / "config.json")
    except (FileNotFoundError, ValueError):
        return None
    if "recipe" not in config:
        return None
    now = {k: v for k, v in json.loads(json.dumps(vars(args))).items() if k not in MAY_DIFFER}
    return [
        f"--{k.replace('_', '-')} was {config[k]}, is {v}"
        for k, v in now.items()
        if k in config and config[k] != v
    ]


def check_resume(runs):
    """Before anything is done: --resume goes with the flags that an unfinished run of these was
    started with. Without it nothing is written over: not what an interrupted run saved, and no
    finished run of other flags. Else a ValueError."""
    if rank():
        return
    unfinished = [args for args in runs if (Path(args.out) / "last").is_dir()]
    for out in (Path(args.out) for args in runs if not args.resume):
        if saved := [*out.glob("last/*.json"), *out.glob("predictions.part*.jsonl")]:
            raise ValueError(
                f"{out} has a run that was interrupted: add --resume to go on with it, or delete "
                f"{' and '.join(map(str, saved))} to begin anew."
            )
    for args in runs:
        other = None if args.resume or args in unfinished else other_flags(args)
        if other := [x for x in other or () if not x.startswith(GO_ON)]:
            raise ValueError(
                f"{args.out} has a finished run of other flags ({'; '.join(other)}): give this one "
                "another --out, or delete that folder."
            )
    for args in unfinished or runs:
        if args.resume and (other := other_flags(args)):
            raise ValueError(f"{args.out} was begun otherwise: {'; '.join(other)}.")
    if runs[0].resume and not unfinished and not any(is_complete(args) for args in runs):
        print(f"{runs[-1].out}: nothing was saved; it starts from its beginning", flush=True)


def is_complete(args):
    """Whether --resume finds nothing to do in a run's folder."""
    out = Path(args.out)
    whole = bool(tables.read_metrics(out))
    if args.model == "mmcot" and args.stage == "rationale" != fusion.stage_names(args.recipe)[-1]:
        whole = (out / "rationale/model.safetensors").is_file()  # it has nothing to score
    return bool(args.resume and whole and not (out / "last").exists() and other_flags(args) == [])


def run_config(folder):
    """A run folder's config.json; {} if it has none. ValueError for one that train.py never wrote.
    A flag that a run of an older version lacks is no fault here."""
    file = Path(folder) / "config.json"
    if not os.path.lexists(file):
        return {}
    config = files.read_json(file)
    if not isinstance(config, dict) or "model" not in config:
        raise ValueError(f"{folder} is no run folder: its config.json is none of train.py's.")
    for key in RUN_FLAGS.keys() & config.keys():
        value, part = config[key], PARTS.get(key)
        fits = isinstance(value, RUN_FLAGS[key]) and not isinstance(value, bool)
        if not fits or part and not (value and all(isinstance(x, part) for x in value)):
            raise ValueError(f"{file}: {key} is {value!r:.60}, which train.py never writes.")
    recipes = RECIPES.get(config["model"], ())
    if not recipes or config.get("recipe", "answer") not in recipes:
        kind = f"{config['model']!r:.40} with recipe {config.get('recipe')!r:.40}"
        raise ValueError(f"{file}: there is no model {kind}.")
    if config.get("test_split", "test") not in data.SPLITS:
        raise ValueError(f"{file}: there is no split {config['test_split']!r:.40}.")
    return config
