"""Run folders: how one begins, what --resume asks of it, and when it is complete.

config.json has every flag, the versions and the commit; last/ is there until the run is complete
(see support/journal.py). A run that cannot start leaves nothing.
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

import fusion
from model import rank, world
from support import files, tables
from support.journal import Journal

HERE = Path(__file__).parent.parent
VERSIONS = {"python": platform.python_version(), "torch": str(torch.__version__)}
# Flags that change no result, or (threads) only bits of it.
MAY_DIFFER = ("resume", "dry_run", "save_every", "out", "features_cache", "threads")


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
    git = ["git", "-C", str(HERE), "rev-parse", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or None
    config = config | {"versions": versions(), "commit": commit}
    kept = {k: v for k, v in config.items() if k not in ("resume", "dry_run")}
    files.write_json(kept, out / "config.json")


@contextlib.contextmanager
def opened_journal(args):
    path = Path(args.out) / "log.jsonl"
    mode = "r+" if args.resume and path.is_file() else "w+"
    with open(os.devnull if rank() else path, mode, encoding="utf-8") as file:
        yield Journal(file, path.parent / "last", args.save_every)


def complete(out):
    """last/ goes when all files of the run are on the disk."""
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
    started with, and without it nothing that was saved is written over."""
    if rank():
        return
    unfinished = [args for args in runs if (Path(args.out) / "last").is_dir()]
    for out in (Path(args.out) for args in runs if not args.resume):
        if saved := [*out.glob("last/*.json"), *out.glob("predictions.part*.jsonl")]:
            raise ValueError(
                f"{out} has a run that was interrupted: add --resume to go on with it, or delete "
                f"{' and '.join(map(str, saved))} to begin anew."
            )
    for args in unfinished or runs:
        if args.resume and (other := other_flags(args)):
            raise ValueError(f"{args.out} was begun otherwise: {'; '.join(other)}.")
    if runs[0].resume and not unfinished and not any(is_complete(args) for args in runs):
        print(f"{runs[-1].out}: nothing was saved; it starts from its beginning", flush=True)


def is_complete(args):
    """Whether --resume finds nothing to do in a run's folder."""
    out = Path(args.out)
    whole = bool(tables.metrics_then(out))
    if args.model == "mmcot" and args.stage == "rationale" != fusion.stage_names(args.recipe)[-1]:
        whole = (out / "rationale/model.safetensors").is_file()  # it has nothing to score
    return bool(args.resume and whole and not (out / "last").exists() and other_flags(args) == [])
