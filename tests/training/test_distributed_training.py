"""train.py under torchrun: two processes over gloo do what one does.

Most tests fork what torchrun would start, which saves the seconds of its imports; the last ones
take the launcher itself. No GPU was at hand: NCCL has never run here.
"""

import faulthandler
import functools
import io
import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace

import pytest
import torch
from conftest import ROOT
from safetensors.torch import load_file
from small_runs import TINY, ended, plan_of, steps, t5_row, tiny_t5, without_seconds

import data
import train
from support import distributed
from support.checkpoints.weights import write_safetensors
from support.dataset.images import LazyImage
from support.dataset.tokenizers import load_tokenizer
from support.evaluation import models
from support.training import optim
from support.training.runs import Checkpoints, Stopped
from support.training.settings import parse_args

FLAGS = "--device cpu --limit 9 --epochs 2 --eval-batch-size 2 --max-output 6 4 --lr 3e-5".split()
MMCOT = """--model mmcot --batch-size 5 --stage2-rationales generated --teacher-forced""".split()
PALI = """--model paligemma --batch-size 2 --accumulate 3 --eval-problems 3 --alone""".split()
RUNS = {
    "mmcot": [*FLAGS, *MMCOT],
    "adapters": [*FLAGS, *PALI, *"--lora-r 2 --samples 2 --temperature 0.7".split()],
    "all of it": [*FLAGS, *PALI, "--full"],
}


@pytest.fixture(scope="module", autouse=True)
def demo():
    """Read once: the forked processes have it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "load", functools.cache(data.load))
        for split in ("train", "val", "test"):
            data.load("demo", split)
        yield


def forked(world, work, folder, limit=100):
    """`work()` in so many processes that are torchrun's but for the launcher; exit statuses. What
    goes wrong in them is in folder/error0 ..., and where they hang in out0 ..."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    folder.mkdir(exist_ok=True)
    pids = []
    for rank in range(world):
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_PORT": str(port)}
                os.environ |= {"WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1"}
                os.environ |= {"TORCHELASTIC_RUN_ID": "test"} if world > 1 else {}
                with open(folder / f"out{rank}", "w") as sys.stdout:
                    sys.stderr = sys.stdout
                    faulthandler.dump_traceback_later(limit, exit=True, file=sys.stdout)
                    work()
                status = 0
            except Stopped:
                status = 3
            except BaseException as error:
                (folder / f"error{rank}").write_text(repr(error))
            finally:
                os._exit(status)
        pids.append(pid)
    return [ended(pid) for pid in pids]


def errors(folder):
    return {path.name: path.read_text() for path in folder.glob("error*")}


def as_process(patch, rank, world):
    patch.setattr(distributed, "rank", lambda: rank)
    patch.setattr(distributed, "world", lambda: world)


# ---- parts -------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_every_row_of_a_window_is_in_one_shard(world, monkeypatch):
    """Seven rows in batches of at most 3; two have images, and the image tower is trained."""
    picture = LazyImage("x.png", 8)
    rows = [{"id": i, "labels": [-100, 5]} for i in range(7)]
    rows[2] |= {"image_features": picture}
    rows[5] |= {"image_features": picture}
    window, shards = [rows[:3], rows[3:6], rows[6:]], []
    for rank in range(world):
        as_process(monkeypatch, rank, world)
        shards.append(distributed.shard_batches(window))
        learned = [[e for e in batch if e["labels"] == [-100, 5]] for batch in shards[-1]]
        assert all(len(batch) <= 3 for batch in learned) and all(shards[-1])
    assert world > 1 or shards == [window]
    assert len({len(batches) for batches in shards}) == 1  # or they would wait for each other
    learned = [e["id"] for x in shards for batch in x for e in batch if e["labels"][1] == 5]
    assert sorted(learned) == list(range(7))
    for turn in zip(*shards, strict=True):
        assert len({any(map(distributed.trains_on_image, batch)) for batch in turn}) == 1


def test_a_process_that_fails_alone_is_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(distributed.time, "sleep", lambda seconds: None)

    def work():
        with distributed.together("cpu"):
            if distributed.rank():
                raise ValueError("found by the second alone")
            distributed.any_rank(False)

    assert forked(2, work, tmp_path) == [1, 1]
    assert "found by the second alone" in errors(tmp_path)["error1"]
    assert "Connection" in errors(tmp_path)["error0"]  # closed, or reset


def test_under_torchrun_a_device_is_not_named(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "test")
    with pytest.raises(ValueError, match="--device cuda:1"):
        distributed.together("cuda:1").__enter__()


# ---- gradients ---------------------------------------------------------------------------------


def mmcot_and_rows(chosen):
    rows = [t5_row(i, 3 + 2 * i, 2 + 5 * (i % 3)) for i in range(7)]
    return tiny_t5(replace(TINY, dropout_rate=0.0), seed=7), rows


def paligemma_and_rows(chosen):
    """Three rows without an image and four with: some batches have none, one has one."""
    model = models.load_paligemma(chosen)
    train.make_trainable(chosen, model)
    problems = sorted(data.load("demo", "train")[:40], key=lambda p: p.image is not None)
    problems = problems[:3] + problems[-4:]
    features = models.image_features(chosen, problems, model)
    traces = [{"thought": "x" * 3 * i, "verdict": {"correct": True}} for i in range(7)]
    rows = [data.TrainRow(p, "reason", t) for p, t in zip(problems, traces, strict=True)]
    tokenizer = load_tokenizer(chosen.weights[0])
    return model, data.pali_examples(rows, tokenizer, features, max_suffix=96)


TOWER = "q_proj vision_tower.encoder.layers.0.mlp.fc1 multi_modal_projector.linear"
CASES = {
    "mmcot": "--model mmcot --batch-size 3",  # 3, 3 and 1 rows: the last of one process alone
    "mmcot, by row": "--model mmcot --batch-size 2 --accumulate 3 --weighting example",
    "adapters": "--model paligemma --batch-size 2 --accumulate 3 --lora-r 2 --checkpointing",
    "tower adapted": f"--model paligemma --batch-size 2 --seed 1 --lora-targets {TOWER}",
    "all of it": "--model paligemma --batch-size 2 --full",
    "all, a window": "--model paligemma --batch-size 1 --accumulate 3 --full --checkpointing",
}


def fits(folder):
    """Each case; the loss and, as they are clipped, the gradients of every step."""
    with distributed.together("cpu"):
        assert distributed.world() == int(os.environ["WORLD_SIZE"])
        for name, flags in CASES.items():
            chosen = parse_args([*flags.split(), *"--lr 3e-7 --device cpu".split()])
            clipped, weights, log = fit(chosen)
            if not distributed.rank():
                write_safetensors(clipped, folder / f"{name}.gradients")
                write_safetensors(weights, folder / f"{name}.weights")
                (folder / f"{name}.log").write_text(log)


def fit(chosen):
    optim.LOGITS = 320 * 4  # some tokens at a time
    clipped, log, clip = [], io.StringIO(), torch.nn.utils.clip_grad_norm_
    model, rows = (mmcot_and_rows if chosen.model == "mmcot" else paligemma_and_rows)(chosen)

    def watch(parameters, limit):
        named = [(n, p.grad) for n, p in model.named_parameters() if p.grad is not None]
        clipped.append({n: distributed.full_tensor(grad).clone() for n, grad in named})
        return clip(parameters, limit)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.utils, "clip_grad_norm_", watch)
        trained = train.fit(plan_of(model, chosen, rows), Checkpoints(log))
    gradients = {f"{step}.{n}": p for step, each in enumerate(clipped) for n, p in each.items()}
    return gradients, trained.state_dict(), log.getvalue()


@pytest.fixture(scope="module")
def one_and_two(tmp_path_factory):
    import torch.distributed.fsdp  # noqa: F401  (once, for both processes)

    folders = [tmp_path_factory.mktemp(name) for name in ("one", "two")]
    for world, folder in enumerate(folders, 1):
        assert forked(world, functools.partial(fits, folder), folder) == [0] * world, errors(folder)
    return folders


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_the_gradients_of_two_processes_are_those_of_one(case, one_and_two):
    one, two = (load_file(folder / f"{case}.gradients") for folder in one_and_two)
    assert one.keys() == two.keys() and len(one) > 20
    largest = max(p.abs().max().item() for p in one.values())
    assert 1e-2 < largest < 20
    for name in one:
        torch.testing.assert_close(two[name], one[name], atol=1e-6 * largest, rtol=0, msg=name)
    one, two = (steps((folder / f"{case}.log").read_text()) for folder in one_and_two)
    assert len(one) == len(two) >= 2
    for a, b in zip(one, two, strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-5)
        assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-4)
        exact = a.keys() - {"loss", "grad_norm", "seconds"}
        assert {k: a[k] for k in exact} == {k: b[k] for k in exact}


def test_what_was_trained_is_a_plain_model(one_and_two):
    """Also of FSDP's parts: the same names, shapes and numbers."""
    for case in CASES:
        one, two = (load_file(folder / f"{case}.weights") for folder in one_and_two)
        assert one.keys() == two.keys()
        for name in one:
            torch.testing.assert_close(two[name], one[name], atol=2e-6, rtol=0, msg=name)


# ---- whole runs --------------------------------------------------------------------------------


def run(folder, flags, world=1, stop=None):
    """Exit statuses of a run, or a part: one process (`stop`: at its step, which) has a SIGTERM."""
    steps = []

    def report(*args):
        steps.append(args)
        if stop == (len(steps), distributed.rank()):
            os.kill(os.getpid(), signal.SIGTERM)

    def work():
        optim.show_step = report
        train.main([*flags, "--out", str(folder / "run")])

    return forked(world, work, folder)


def weights(folder):
    paths = sorted((folder / "run").rglob("*.safetensors"))
    return {f"{path.parent.name}.{n}": p for path in paths for n, p in load_file(path).items()}


def same(one, other):
    for name in ("predictions.jsonl", "metrics.json", "looks.json"):
        assert (one / "run" / name).read_bytes() == (other / "run" / name).read_bytes()
    logs = [without_seconds(folder / "run/log.jsonl") for folder in (one, other)]
    for a, b in zip(*logs, strict=True):
        assert (a.pop("stage"), a.keys()) == (b.pop("stage"), b.keys())
        assert list(b.values()) == pytest.approx(list(a.values()), rel=1e-4)
    a, b = weights(one), weights(other)
    assert a.keys() == b.keys() and len(a) > 20
    for name in a:
        # The softmax does not see a key's bias: AdamW makes steps out of what rounding leaves.
        most = 1e-4 if name.endswith("k_proj.bias") else 1e-5
        torch.testing.assert_close(b[name], a[name], atol=most, rtol=0, msg=name)
    files = [sorted(x.relative_to(f) for x in f.rglob("*") if "." in x.name) for f in (one, other)]
    assert files[0] == [x for x in files[1] if x.name != "out1"]  # none of the parts is left


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    @functools.cache
    def whole(case):
        folder = tmp_path_factory.mktemp("whole")
        assert run(folder, RUNS[case]) == [0], errors(folder)
        return folder

    return whole


@pytest.mark.slow
@pytest.mark.parametrize("case", RUNS)
def test_the_run_of_two_processes_is_that_of_one(case, whole, tmp_path):
    assert run(tmp_path, RUNS[case], 2) == [0, 0], errors(tmp_path)
    same(whole(case), tmp_path)
    assert (tmp_path / "out1").read_text() == ""


@pytest.mark.slow
@pytest.mark.parametrize(
    "case, stops", [("mmcot", (5, 4)), ("adapters", (1, 2)), ("all of it", (1, 2))]
)
def test_one_then_two_then_one_again(case, stops, whole, tmp_path):
    assert run(tmp_path, RUNS[case], 1, stop=(stops[0], 0)) == [3], errors(tmp_path)
    again = [*RUNS[case], "--resume"]
    assert run(tmp_path, again, 2, stop=(stops[1], 1)) == [3, 3], errors(tmp_path)
    assert "steps are done" in (tmp_path / "out0").read_text()
    assert run(tmp_path, again) == [0], errors(tmp_path)
    same(whole(case), tmp_path)


# ---- torchrun itself ---------------------------------------------------------------------------


def started(folder, *more, flags=RUNS["mmcot"]):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["train.py", *flags, "--save-every", "1", "--out", str(folder), *more]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait_for(folder, pattern):
    limit = time.monotonic() + 90
    while not list(folder.glob(pattern)):
        assert time.monotonic() < limit
        time.sleep(0.01)


@pytest.mark.slow
def test_torchrun_stopped_then_killed_then_to_the_end(whole, tmp_path):
    folder = tmp_path / "run"
    process = started(folder)
    wait_for(folder, "last/1-*.json")
    process.terminate()
    out, _ = process.communicate()
    assert out.count("after this step") == 1
    assert out.count("--resume") == 1
    process = started(folder, "--resume")
    wait_for(folder, "last/3-*.json")
    every = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True)
    pids = [process.pid, *map(int, every.stdout.split())]
    assert len(pids) == 3
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    process.communicate()
    assert run(tmp_path, [*RUNS["mmcot"], "--resume"]) == [0], errors(tmp_path)
    assert "steps are done" in (tmp_path / "out0").read_text()
    same(whole("mmcot"), tmp_path)


@pytest.mark.slow
def test_an_error_of_all_processes_is_printed_once(tmp_path):
    process = started(tmp_path / "a", "--weights", str(tmp_path / "nowhere"))
    out, _ = process.communicate(timeout=90)
    assert process.returncode and out.count("nowhere") == 1 and "process 0 of 2" in out
