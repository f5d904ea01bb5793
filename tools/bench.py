"""What is fast and by how much: each item next to the strongest alternative, in the same run.

    python tools/bench.py                        # every item; at full width, cut in depth on a CPU
    python tools/bench.py --only detr --repeats 9 --json bench.json

How it is measured. Both sides get the same weight files and inputs, and their outputs are compared
before anything is timed: a side that computes something else stops the program. Then they take
turns (A B A B ...), `--repeats` times, in one process. "ours" and "theirs" are medians; the ratio
says how many times as fast ours is; the spread is the smallest and the largest ratio of two runs
that were neighbours in time. Peak memory is the resident set (on a GPU: what was allocated) of one
run in a process of its own, weights included, loading not. Targets are printed, not asserted.

The opponents are transformers and peft (tests/requirements.txt), set up as well as their own
options allow. Where the published code cannot be here, its docstring says how it was rebuilt.
"""

import argparse
import contextlib
import gc
import io
import json
import math
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests/helpers")]
os.environ.setdefault("NANOCOT_DATA", str(ROOT.parent / "shared" / "data"))
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import memory
import numpy as np
import oracle
import torch
import torch.nn.functional as F
from torch import nn

import data
import fusion
import lora
import model as nano
import train
from support import kernels
from support.checkpoints import hub
from support.checkpoints.keys import TABLES, transformers_path
from support.dataset.features import Features
from support.dataset.tokenizers import load_tokenizer
from support.training import checks, optim
from support.training.runs import Checkpoints
from support.training.settings import parse_args as train_flags

GIB = 2**30
SHORTEST = 0.3  # seconds of a turn
CLEAR_REFS = Path("/proc/self/clear_refs")
REAL = Path(os.environ["NANOCOT_DATA"])
DEMO_T5 = ROOT / "demo/t5"
FEATURES = 100, 256  # DETR's: positions and width


# ---- sides, rows and clocks ----------------------------------------------------------------------


@dataclass
class Side:
    """build() makes everything one side needs and returns run(), which does the work once, or
    (run, probe), where it is probe's output that is compared with the other side's."""

    build: Callable
    amount: float = 1.0  # units of work in one run; 1 where the unit is "s"
    target: float | None = None  # what the ratio of ours over this opponent should be


@dataclass
class Row:
    """A line of the table. ours, theirs: medians, in `unit`; memory in bytes."""

    item: str
    case: str
    against: str
    ours: float
    theirs: float
    unit: str
    ratio: float
    spread: tuple[float, float] | None = None
    target: float | None = None
    memory: tuple | None = None
    at_most: bool = False  # the target is a ceiling (memory), not a floor


def compare(args, item: str, case: str, unit: str, ours: Side, opponents: dict, check) -> list[Row]:
    """A row for each opponent, {name: Side}. check(our output, their output) raises AssertionError
    where they differ. In the child that measures memory it never returns, or does nothing because
    another case is wanted."""
    sides = {"ours": ours} | opponents
    if args.side:
        wanted_item, wanted_case, name = args.side.split("/", 2)
        if (wanted_item, wanted_case) == (item, case):
            measure_memory(sides[name], args.device)
        return []
    label = f"{item}, {case}"
    progress(f"{label}: setting up")
    built = {name: run_and_probe(side) for name, side in sides.items()}
    outputs, warm = {}, {}
    for name, (_, probe) in built.items():
        progress(f"{label}: warming up, {name}")
        start = time.perf_counter()
        outputs[name] = probe()
        warm[name] = time.perf_counter() - start
        check(outputs["ours"], outputs[name])
    seconds = take_turns({name: run for name, (run, _) in built.items()}, args, label, warm)
    del built, outputs
    gc.collect()
    peaks = {name: peak_memory(args, f"{item}/{case}/{name}") for name in sides}
    rows = []
    for name, side in opponents.items():
        speed = [ours.amount / s for s in seconds["ours"]]
        their_speed = [side.amount / s for s in seconds[name]]
        ratios = [a / b for a, b in zip(speed, their_speed, strict=True)]
        medians = [statistics.median(speed), statistics.median(their_speed)]
        shown = [1 / x for x in medians] if unit == "s" else medians
        row = Row(item, case, name, shown[0], shown[1], unit, medians[0] / medians[1])
        row.spread, row.target = (min(ratios), max(ratios)), side.target
        row.memory = (peaks["ours"], peaks[name])
        rows.append(row)
    return rows


def ready(model: nn.Module, device: str) -> nn.Module:
    """Ours as it is trained and evaluated: with the kernels that prove equal to the formulas."""
    model = model.to(device)
    kernels.enable(model)
    return model


@contextlib.contextmanager
def in_the_middle():
    """`train.fit` without what it does once a training: the leak test before the first step, the
    look at moved weights in the first two."""
    kept = checks.stop_if_it_leaks, checks.steepest
    checks.stop_if_it_leaks = lambda *_: None
    checks.steepest = lambda model: {}
    try:
        yield
    finally:
        checks.stop_if_it_leaks, checks.steepest = kept


def fit(model: nn.Module, rows: list[dict], settings) -> None:
    """An epoch of train.py on these rows; nothing is saved."""
    settings = replace(settings, epochs=(1.0,))
    plan = train.make_plan(settings, "bench", model, rows, lambda loss_of: {})
    train.fit(plan, Checkpoints(io.StringIO()))


def to_device(batch: dict, device: str) -> dict:
    return {k: v.to(device) if torch.is_tensor(v) else v for k, v in batch.items()}


def run_and_probe(side: Side) -> tuple[Callable, Callable]:
    built = side.build()
    return built if isinstance(built, tuple) else (built, built)


def take_turns(runs: dict, args, label: str, warm: dict[str, float]) -> dict[str, list[float]]:
    """Seconds of each repeat: A B A B, each timed until the device has finished. A run that takes
    milliseconds (by the seconds of its warm-up) is repeated within its turn."""
    seconds = {name: [] for name in runs}
    for repeat in range(args.repeats):
        for name, run in runs.items():
            progress(f"{label}: {repeat + 1} of {args.repeats}, {name}")
            times = max(1, min(50, int(SHORTEST / warm[name])))
            seconds[name].append(clock(run, args.clock, times) / times)
    return seconds


def cpu_seconds() -> float:
    """Of this process and of those it waited for."""
    return time.process_time() + sum(os.times()[2:4])


def clock(run: Callable, now: Callable = time.perf_counter, times: int = 1) -> float:
    """Seconds of so many runs, a GPU's work included."""
    wait = torch.cuda.synchronize if torch.cuda.is_available() else lambda: None
    wait()
    start = now()
    for _ in range(times):
        run()
    wait()
    return now() - start


def peak_memory(args, side):
    """Bytes at the peak of one run of a side, in a process of its own; None with --no-memory, and
    on a CPU where there is no Linux to ask."""
    if args.no_memory or not (args.device.startswith("cuda") or CLEAR_REFS.exists()):
        return None
    progress(f"memory of {side}")
    command = [sys.executable, __file__, "--side", side, "--folder", str(args.folder), *args.child]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(
            f"The process that measures the memory of {side} failed:\n{done.stderr[-2000:]}"
        )
    return json.loads(done.stdout.splitlines()[-1])["peak"]


def measure_memory(side, device):
    """In the child: build, forget the peak so far, run once, print the peak and leave."""
    run, _ = run_and_probe(side)
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
        run()
        peak = torch.cuda.max_memory_allocated()
    else:
        CLEAR_REFS.write_text("5")  # VmHWM := VmRSS
        run()
        status = Path("/proc/self/status").read_text()
        peak = int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024
    print(json.dumps({"peak": peak}))
    sys.exit(0)


def progress(text):
    """The running line of a terminal."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


# ---- what both sides share -----------------------------------------------------------------------


def close(tolerance):
    """A check: two tensors (or tuples of them) nowhere further apart than `tolerance`."""

    def check(ours, theirs):
        pairs = [(ours, theirs)] if torch.is_tensor(ours) else zip(ours, theirs, strict=True)
        for a, b in pairs:
            assert a.shape == b.shape, f"outputs have shapes {list(a.shape)} and {list(b.shape)}"
            apart = (a.float() - b.float()).abs().max().item()
            assert apart <= tolerance, f"outputs are {apart:.3g} apart, more than {tolerance:g}"

    return check


def made_once(args, name, make):
    """The folder `name` of this run, filled by make(folder) unless it is there already: the child
    processes find what their parent made."""
    folder = Path(args.folder) / name
    if not folder.is_dir():
        progress(f"making {name}")
        part = folder.with_name(f"{name}.part")
        part.mkdir()
        make(part)
        part.rename(folder)
    return folder


# ---- DETR ----------------------------------------------------------------------------------------


def detr(args):
    """Features of images 224 high and 304 wide by the released DETR-R101-DC5's shape."""
    config = oracle.TINY_DETR if args.quick else oracle.DETR_CONFIGS["detr-resnet-101-dc5"]
    size = (64, 96) if args.quick else (224, 304)
    folder = made_once(args, "detr", partial(write_detr, config))
    for B in (1, 8):
        pixels = oracle.uniform(f"bench/{B}", (B, 3, *size), -2.0, 2.0).to(args.device)  # (B,3,H,W)
        case = f"batch {B}, {size[0]}x{size[1]}"

        def ours(pixels=pixels):
            model = ready(nano.DETR.from_pretrained(folder), args.device)
            return lambda: no_grad(model.features, pixels)

        def theirs(layout, pixels=pixels):
            model = hf_detr(folder).to(args.device, memory_format=layout)
            inputs = pixels.contiguous(memory_format=layout)
            return lambda: no_grad(model, inputs).last_hidden_state

        opponents = {
            "transformers": Side(partial(theirs, torch.contiguous_format), B, 1.25),
            "transformers, channels last": Side(partial(theirs, torch.channels_last), B),
        }
        yield from compare(args, "detr", case, "images/s", Side(ours, B), opponents, close(1e-3))


@torch.inference_mode()
def no_grad(function, *args, **kwargs):
    return function(*args, **kwargs)


def write_detr(config, folder):
    with torch.device("meta"):
        tensors = nano.DETR(hub.model_config(nano.DETR, config)).state_dict()
    shapes = {TABLES["DETR"].to_file(name): t.shape for name, t in tensors.items()}
    oracle.write_checkpoint(folder, config, oracle.seeded_weights(shapes))


def hf_detr(folder):
    """transformers' DetrModel with its own ResNet. It takes DC5 only from timm, which has no build
    for a CPU torch; so stage 4 is set to dilate, and `check` sees whether that is DC5."""
    from safetensors.torch import load_file
    from transformers import DetrConfig, DetrModel, ResNetConfig

    config = json.loads((folder / "config.json").read_text())
    depths, widths = hub.model_config(nano.DETR, config).resnet
    wide = [4 * width for width in widths]
    resnet = ResNetConfig(
        depths=list(depths), hidden_sizes=wide, embedding_size=64, out_features=["stage4"]
    )
    kept = {k: v for k, v in config.items() if k not in ("backbone", "backbone_kwargs", "dilation")}
    hf = DetrModel(DetrConfig(**kept, backbone_config=resnet))
    if config.get("dilation"):
        for j, block in enumerate(hf.backbone.model.encoder.stages[3].layers):
            if hasattr(block.shortcut, "convolution"):
                block.shortcut.convolution.stride = (1, 1)
            middle = block.layer[1].convolution
            middle.stride = (1, 1)
            if j:
                middle.dilation = middle.padding = (2, 2)
    stored = load_file(folder / "model.safetensors")
    named = {hf_detr_name(n): t for n, t in stored.items() if n.startswith("model.")}
    hf.load_state_dict(named)
    return hf.eval()


def hf_detr_name(name):
    """A Hub file's name of a DETR tensor -> that of DetrModel over transformers' own ResNet."""
    name = oracle.detr_layout_c(name).removeprefix("model.")
    name = re.sub(r"model\.(conv1|bn1)", r"model.embedder.embedder.\1", name)
    name = re.sub(
        r"model\.layer(\d)\.(\d+)",
        lambda m: f"model.encoder.stages.{int(m[1]) - 1}.layers.{m[2]}",
        name,
    )
    kinds = {"conv": "convolution", "bn": "normalization"}
    if "embedder" in name:
        return re.sub(r"(conv|bn)1", lambda m: kinds[m[1]], name)
    name = re.sub(r"(conv|bn)(\d)", lambda m: f"layer.{int(m[2]) - 1}.{kinds[m[1]]}", name)
    return name.replace("downsample.0", "shortcut.convolution").replace(
        "downsample.1", "shortcut.normalization"
    )


# ---- mm-cot: training and decoding ---------------------------------------------------------------


def t5_config(args, layers=12):
    """T5-base's config with so many layers in encoder and decoder; the demo's with --quick."""
    if args.quick:
        return hub.model_config(nano.T5, json.loads((DEMO_T5 / "config.json").read_text()))
    return nano.T5Config(d_model=768, d_ff=3072, num_heads=12, num_layers=layers)


def write_t5(config, folder):
    """A multimodal T5 checkpoint with the oracle's weights: greedy texts go on changing."""
    with torch.device("meta"):
        t5 = nano.T5(config)
        model = fusion.MultimodalT5(t5, fusion.GatedFusion(config.d_model, FEATURES[1]))
    shapes = {TABLES["MultimodalT5"].to_file(n): t.shape for n, t in model.state_dict().items()}
    oracle.write_checkpoint(folder, hub.config_json(model), oracle.seeded_weights(shapes))


def hf_multimodal(folder, device, attention=None):
    """transformers' T5 with the paper's fusion after its encoder: Eq. 3-6 from torch's own parts,
    under the released names, as Multimodal-CoT subclasses it. The published code ran on
    transformers 4.30; this runs on today's, which is faster."""
    from transformers import T5ForConditionalGeneration
    from transformers.modeling_outputs import BaseModelOutput

    class MultimodalHF(T5ForConditionalGeneration):
        def __init__(self, config):
            super().__init__(config)
            D, encoder = config.d_model, self.encoder
            encoder.image_dense = nn.Linear(FEATURES[1], D)
            encoder.mha_layer = nn.MultiheadAttention(D, 1, batch_first=True)
            encoder.gate_dense = nn.Linear(2 * D, D)

        def fused(self, batch):
            """What the decoder reads, and the mask that goes with it."""
            batch = to_device(batch, self.device)
            mask, e = batch["attention_mask"], self.encoder
            text = e(input_ids=batch["input_ids"], attention_mask=mask).last_hidden_state
            image = e.image_dense(batch["image_features"])
            attn, _ = e.mha_layer(text, image, image, need_weights=False)
            gate = e.gate_dense(torch.cat((text, attn), -1)).sigmoid()
            states = BaseModelOutput(last_hidden_state=(1 - gate) * text + gate * attn)
            return {"encoder_outputs": states, "attention_mask": mask}

        def loss(self, batch):
            labels = batch["labels"].to(self.device)
            return self(**self.fused(batch), labels=labels, use_cache=False).loss

    model = MultimodalHF.from_pretrained(folder, attn_implementation=attention)
    return model.to(device).eval()


class Questions:
    """Problems, tokenizer and features: ScienceQA's from NANOCOT_DATA, the demo's with --quick."""

    def __init__(self, split, demo=False):
        self.problems = data.load("demo" if demo else REAL / "scienceqa", split)
        self.tokenizer = load_tokenizer(DEMO_T5 if demo else REAL / "tokenizers/t5")
        pictured = [p.id for p in self.problems if p.image is not None]
        random = np.random.default_rng(0).standard_normal((64, *FEATURES), np.float32)
        rows = {id: i % 64 for i, id in enumerate(pictured)}  # 64 images are enough to copy from
        self.features = Features(random.astype(np.float16), rows)

    def examples(self, fmt, generated=None, limit=None):
        longest = 64 if "G" in fmt else 512
        problems = self.problems[:limit]
        return data.examples(
            problems,
            fmt,
            self.tokenizer,
            self.features,
            generated,
            max_input=512,
            max_output=longest,
        )


def mmcot_train(args):
    """Samples a second of both stages' training with dropout on, optimizer and collation included.

    As published: every source padded to 512 tokens, every target to 512 (rationale) or 64 (answer),
    pads in the loss. Multimodal-CoT's code cannot be in this repository, so its padding and loss
    are rebuilt on transformers' T5, with eager attention: 4.30, which it ran on, has no other. The
    two other opponents are the same T5 with fused attention and dynamic padding: in our batches,
    which are of like length, and in random ones, as most people run it.
    """
    layers = 12 if args.full_depth else 3
    config = t5_config(args, layers)
    folder = made_once(args, f"t5-{layers}", partial(write_t5, config))
    questions = Questions("train", args.quick)
    depth = "demo size" if args.quick else f"base, {layers} + {layers} layers"
    B, padded_B = (8, 8 if args.full_depth else 4) if not args.quick else (4, 2)
    for stage, name in enumerate(("rationale", "answer")):
        training = Training(args, folder, questions, stage, B, padded_B)
        opponents = {
            "as published (rebuilt)": ("published", padded_B, (6.0, 4.0)[stage]),
            "transformers, same batches": ("same", len(training.examples), 1.15),
            "transformers, random batches": ("random", len(training.examples), 1.8),
        }
        sides = {
            name: Side(partial(training.theirs, batches), amount, target)
            for name, (batches, amount, target) in opponents.items()
        }
        ours = Side(training.ours, len(training.examples))
        case = f"{name}, {depth}, batch {B} (published: {padded_B})"
        yield from compare(args, "mmcot-train", case, "samples/s", ours, sides, training.check)


class Training:
    """One stage: its examples, and the sides that train on them."""

    def __init__(self, args, folder, questions, stage, B, padded_B, count=4):
        flags = ["--model", "mmcot", "--data", "scienceqa", "--batch-size", str(B)]
        self.flags = train_flags([*flags, "--device", args.device])
        self.folder, self.device = folder, args.device
        every = questions.examples(fusion.RECIPES["two-stage"][stage])
        lengths = [len(e["input_ids"]) + len(e["labels"]) for e in every]
        generator = torch.Generator().manual_seed(0)
        made = data.batches(lengths, B, generator)  # the whole split's: what an epoch is made of
        made = [rows for rows in made if len(rows) == B]
        made.sort(key=lambda rows: sum(lengths[i] for i in rows))
        made = made[len(made) // (2 * count) :: len(made) // count][:count]  # evenly, by length
        chosen = sorted((i for rows in made for i in rows), key=lambda i: lengths[i])
        self.examples = [every[i] for i in chosen]  # which `fit` will split in the same way:
        self.same = [self.examples[at : at + B] for at in range(0, len(chosen), B)]
        order = torch.randperm(len(self.examples), generator=generator).tolist()
        self.random = [[self.examples[i] for i in order[at::count]] for at in range(count)]
        self.published = [self.examples[:: max(1, len(self.examples) // padded_B)][:padded_B]]
        self.sizes = 512, 512 if stage == 0 else 64
        self.shared = {}

    def ours(self):
        model = ready(fusion.MultimodalT5.from_pretrained(self.folder), self.device)

        def run():
            with silence(), in_the_middle():
                fit(model, self.examples, self.flags)

        def probe():
            batch = to_device(data.collate(self.same[0]), self.device)
            loss, count = train.t5_loss(model.eval(), batch, self.flags.weighting)
            row = to_device(self.pad(self.same[0][:1]), self.device)
            names = ("input_ids", "attention_mask", "image_features", "decoder_input_ids")
            logits = no_grad(model, *(row[name] for name in names))  # (1, U, V)
            padded = F.cross_entropy(logits[0], row["labels"][0])
            return {"loss and gradient": with_norm(model, loss / count), "published": padded}

        return run, probe

    def theirs(self, kind):
        attention = "eager" if kind == "published" else None
        if attention not in self.shared:  # one model for two opponents: they take turns
            self.shared[attention] = hf_multimodal(self.folder, self.device, attention)
        model = self.shared[attention]
        batches, collate = getattr(self, kind), self.pad if kind == "published" else data.collate

        def run():
            hf_fit(model, batches, collate, self.flags)

        def probe():
            model.eval()
            if kind == "published":
                return {"published": no_grad(model.loss, self.pad(self.same[0][:1]))}
            return {"loss and gradient": with_norm(model, model.loss(data.collate(self.same[0])))}

        return run, probe

    def pad(self, rows):
        """A batch as published: fixed lengths, pads (0) among the labels."""
        batch = data.collate(rows)
        (T, U), pad = self.sizes, F.pad
        for name in ("input_ids", "attention_mask"):
            batch[name] = pad(batch[name], (0, T - batch[name].shape[1]))  # (B, T)
        labels = pad(batch["labels"], (0, U - batch["labels"].shape[1]), value=-100)
        batch["labels"] = labels.masked_fill(labels == -100, 0)  # (B, U)
        batch["decoder_input_ids"] = pad(batch["labels"], (1, -1))
        return batch

    @staticmethod
    def check(ours, theirs):
        for name, value in theirs.items():
            apart = ((ours[name] - value).abs() / value.abs()).max().item()
            assert apart < 1e-3, f"{name}: {ours[name].tolist()} and {value.tolist()}"


def with_norm(model, loss):
    """Loss and the norm of its gradient, (2,)."""
    loss.backward()
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    model.zero_grad()
    return torch.stack([loss.detach(), torch.nn.utils.get_total_norm(grads)])


def hf_fit(model, batches, collate, flags):
    """A plain training loop, with the optimizer transformers' Trainer takes today: fused AdamW."""
    parameters, decay = model.parameters(), flags.weight_decay
    optimizer = torch.optim.AdamW(parameters, flags.lr[0], weight_decay=decay, fused=True)
    for rows in batches:
        model.train()
        model.loss(collate(rows)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


@contextlib.contextmanager
def silence():
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def mmcot_decode(args):
    """Tokens a second through both stages, greedy: question, rationale, question again with the
    rationale in it, answer. Rows never end early (the weights know no end of a text), so that both
    sides do the same steps; what it is worth that finished rows leave comes on top.
    """
    for size in ("demo",) if args.quick else ("base", "demo"):
        folder = t5_folder(args, size)
        questions = Questions("test", size == "demo" or args.quick)
        lengths = (8, 2) if args.quick else (100, 8)  # ScienceQA's have 204 and 7 in the mean
        for B in (1, 16):
            targets = {"base": (1.25, 1.25), "demo": (3.0, 2.0)}[size]
            amount, target = B * sum(lengths), targets[B > 1]
            loop = partial(two_stages, args, folder, questions, lengths, B)
            opponents = {
                f"generate, {cache} cache": Side(partial(loop, cache), amount, target)
                for cache in caches(args)
            }
            case = f"{size}, batch {B}, {lengths[0]} + {lengths[1]} tokens"
            ours = Side(loop, amount)
            yield from compare(args, "mmcot-decode", case, "tokens/s", ours, opponents, same)


def t5_folder(args, size):
    """A T5 of base or demo size that writes no end of a text."""
    demo = argparse.Namespace(quick=size == "demo" or args.quick)
    config = replace(t5_config(demo), eos_token_id=-1)
    return made_once(args, f"t5-{size}", partial(write_t5, config))


def two_stages(args, folder, questions, lengths, B, cache=None):
    """The two-stage loop over the first B problems: fusion's own, or the same around `generate`
    with such a cache (static means compiled on a GPU; on a CPU it was no faster than dynamic)."""

    def make_batches(generated):
        fmt = fusion.RECIPES["two-stage"][generated is not None]
        yield data.collate(questions.examples(fmt, generated, B))

    if cache is None:
        model = ready(fusion.MultimodalT5.from_pretrained(folder), args.device)

        def run():
            spoken = Spoken(questions.tokenizer)

            def generate(length, generated=None):
                [batch] = make_batches(generated)
                return fusion.generate_texts(model, batch, spoken, length)

            fusion.two_stage(partial(generate, lengths[0]), partial(generate, lengths[1]))
            return spoken.rows
    else:
        model = hf_multimodal(folder, args.device)
        model.generation_config.eos_token_id = None

        def write(generated, length, spoken):
            [batch] = make_batches(generated)
            options = greedy(length, cache)
            ids = no_grad(lambda: model.generate(**model.fused(batch), **options))[:, 1:].tolist()
            return {id: spoken.decode(row) for id, row in zip(batch["ids"], ids, strict=True)}

        def run():
            spoken = Spoken(questions.tokenizer)
            write(write(None, lengths[0], spoken), lengths[1], spoken)
            return spoken.rows

    return run


def greedy(length, cache):
    return {"max_new_tokens": length, "do_sample": False, "cache_implementation": cache}


def caches(args):
    """What `generate` can keep keys and values in."""
    return ("dynamic", "static") if args.device.startswith("cuda") else ("dynamic",)


class Spoken:
    """A tokenizer that keeps the rows of ids it was asked to decode."""

    def __init__(self, tokenizer):
        self.tokenizer, self.rows = tokenizer, []

    def decode(self, ids, skip_special_tokens=True):
        self.rows.append(ids)
        return self.tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)


def same(ours, theirs):
    assert ours == theirs, f"the sides wrote different things: {ours!s:.200} and {theirs!s:.200}"


# ---- PaliGemma: adapters, decoding, memory -------------------------------------------------------


def pali_folder(args):
    """PaliGemma2-3B's files: on a CPU of 224 pixels and two layers in each tower, on a GPU of 448
    and all; the width and the 257,216 words are always its own."""
    if args.quick:
        return ROOT / "demo/paligemma"
    if args.full_depth:
        write = partial(write_paligemma, 26, 27, side=448)
        return made_once(args, "paligemma-448", write)
    return made_once(args, "paligemma", partial(write_paligemma, 2, 2))


def pali_case(args, folder):
    config = json.loads((folder / "config.json").read_text())
    depth = [config[f"{part}_config"]["num_hidden_layers"] for part in ("text", "vision")]
    dtype = torch.bfloat16 if args.device.startswith("cuda") else torch.float32
    return "demo size" if args.quick else f"{depth[0]} + {depth[1]} layers", dtype


def hf_paligemma(folder, dtype, device):
    from transformers import PaliGemmaForConditionalGeneration

    with silence():
        return PaliGemmaForConditionalGeneration.from_pretrained(folder, dtype=dtype).to(device)


def pali_step(args):
    """Rows a second of a LoRA step, adapters of rank 8 on all projections of the language model:
    forward, backward, clipping and AdamW. On a CPU a 224-pixel image (256 tokens), 100 tokens of
    question and 100 that are learned; on a GPU 1024, 100 and 300. Depth is cut on a CPU, which
    flatters nobody's layers but makes the vocabulary layer count for more than it does in the 3B.

    First both sides compute the image's features; then ours has them cached, as train.py does.
    """
    folder = pali_folder(args)
    tuning = Tuning(args, folder)
    own, kept = {}, {"suffix_logits": True}
    plain = {"as people run it": (own, 1.2), "suffix logits": (kept, 1.0)}
    again = {"checkpointing": True}
    both = {"checkpointing": (again, 1.2), "suffix logits + checkpointing": (kept | again, 1.0)}
    for name, ours, opponents in (
        ("picture computed", {}, plain),
        ("features cached", {"cached": True}, plain),
        ("features cached, checkpointing", {"cached": True} | again, both),
    ):
        sides = {
            opponent: Side(partial(tuning.theirs, **options), 1, target)
            for opponent, (options, target) in opponents.items()
        }
        case = f"{tuning.depth}, {name}"
        ours = Side(partial(tuning.ours, **ours), 1)
        yield from compare(args, "pali-step", case, "steps/s", ours, sides, tuning.check)


class Tuning:
    """One row to learn, the adapters to begin with, and the sides that train on it."""

    def __init__(self, args, folder):
        self.args, self.folder, self.shared = args, folder, {}
        self.depth, self.dtype = pali_case(args, folder)
        model = nano.PaliGemma.from_pretrained(folder, self.dtype)
        config, side = model.config, model.config.vision.image_size
        prefix, suffix = (4, 6) if args.quick else (100, 300 if side == 448 else 100)
        words = torch.randint(5, 250, (prefix + suffix,), generator=torch.manual_seed(0)).tolist()
        ids = [config.image_token_index] * config.image_tokens + words
        labels = [-100] * (len(ids) - suffix) + words[prefix:]
        kinds = [int(label != -100) for label in labels]
        self.pixels = oracle.uniform("bench/pali", (3, side, side), -1.0, 1.0)
        self.row = {"id": "1", "input_ids": ids, "token_type_ids": kinds, "labels": labels}
        self.suffix, self.adapter = suffix, made_once(args, "adapter", self.write_adapter)
        self.features = no_grad(model.image_features, self.pixels[None])[0].float().numpy()
        flags = ["--model", "paligemma", "--data", "none", "--device", args.device]
        self.flags = train_flags(flags)

    def write_adapter(self, folder):
        model = nano.PaliGemma.from_pretrained(self.folder, self.dtype)
        lora.inject(model, r=8, alpha=16)
        for name, p in model.named_parameters():
            if "lora_" in name:  # as after training: B is not zero
                p.data = oracle.uniform(name, p.shape, -0.02, 0.02)
        lora.save(model, folder)

    def ours(self, cached=False, checkpointing=False):
        model = self.shared.get("ours")
        if model is None:
            model = nano.PaliGemma.from_pretrained(self.folder, self.dtype)
            lora.load(model, self.adapter)
            self.shared["ours"] = ready(model, self.args.device)
            self.begun = copies(model)
        example = self.row | {"image_features": self.features if cached else self.pixels.numpy()}

        def run():
            model.language_model.checkpointing = checkpointing
            with silence(), in_the_middle():
                fit(model, [example], self.flags)

        def probe():
            batch = to_device(data.pali_collate([example]), self.args.device)

            def loss():
                total, count = train.paligemma_loss(model.train(), batch, self.flags.weighting)
                return total / count

            name_of = partial(transformers_path, nano.PaliGemma)
            return loss_and_adapters(model, self.begun, loss, name_of)

        return run, probe

    def theirs(self, suffix_logits=False, checkpointing=False):
        from peft import PeftModel

        model = self.shared.get("hf")
        if model is None:
            hf = hf_paligemma(self.folder, self.dtype, self.args.device)
            share(hf, self.shared.get("ours"))
            model = PeftModel.from_pretrained(hf, self.adapter, is_trainable=True).train()
            self.shared["hf"] = model
            self.their_begun = copies(model)
        batch = data.pali_collate([self.row | {"image_features": self.pixels.numpy()}])
        batch["pixel_values"] = batch["pixel_values"].to(self.dtype)
        batch = to_device({k: v for k, v in batch.items() if k != "ids"}, self.args.device)
        labels = batch["labels"][0, -self.suffix :]
        trained = [p for p in model.parameters() if p.requires_grad]

        def loss():
            if not suffix_logits:
                return model(**batch, use_cache=False).loss
            inputs = {name: t for name, t in batch.items() if name != "labels"}
            out = model(**inputs, use_cache=False, logits_to_keep=self.suffix + 1)
            return F.cross_entropy(out.logits[0, :-1].float(), labels)

        def run():
            if checkpointing:
                model.gradient_checkpointing_enable({"use_reentrant": False})
            else:
                model.gradient_checkpointing_disable()
            optimizer = torch.optim.AdamW(trained, self.flags.lr[0], fused=True)
            loss().backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()

        def probe():
            begun, name = self.their_begun, len("base_model.model.")
            return loss_and_adapters(model, begun, loss, lambda n: n[name:])

        return run, probe

    def check(self, ours, theirs):
        bound = 1e-3 if self.dtype == torch.float32 else 5e-2
        assert ours.keys() == theirs.keys(), f"{len(ours)} and {len(theirs)} gradients"
        for name, value in theirs.items():
            apart = ((ours[name] - value).abs().max() / value.abs().max()).item()
            assert apart < bound, f"{name} is {apart:.2g} of its largest value apart"


def copies(model):
    return [p.detach().clone() for p in model.parameters() if p.requires_grad]


def share(hf, ours):
    """Let transformers' model use the frozen tensors of ours: both would take 6 GB."""
    own = dict(ours.named_parameters()) if ours else {}
    for name, p in hf.named_parameters():
        p.data = own.get(name.removeprefix("model."), p).data


def loss_and_adapters(model, begun, loss_of, called):
    """{name: gradient} of every adapter, named as in PEFT's files, and the loss; both as `begun`,
    since a case before this one trained the same model."""
    for p, first in zip((p for p in model.parameters() if p.requires_grad), begun, strict=True):
        p.data.copy_(first)
    loss = loss_of()
    loss.backward()
    grads = {called(n): p.grad for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return {n.replace(".default", ""): g for n, g in grads.items()} | {"loss": loss.detach()}


def pali_decode(args):
    """Tokens a second, greedy. No step can be faster than weights can be read, so batch 1 is
    compared with that bound too: the language model's bytes over the GB/s of copying and reading.
    Prompts are short texts; rows never end early, so that both sides do the same steps."""
    folder = pali_folder(args)
    depth, dtype = pali_case(args, folder)
    length = 8 if args.quick else 256 if args.full_depth else 24
    shapes = hub.build(nano.PaliGemma, folder).language_model.parameters()
    weights = sum(math.prod(p.shape) for p in shapes)
    bounds = {} if args.side else memory_gb_s(args)
    for B in (1, 16):
        ids = torch.randint(5, 250, (B, 16), generator=torch.manual_seed(0)).to(args.device)
        loop = partial(writes, args, folder, dtype, ids, length)
        opponents = {
            f"generate, {cache} cache": Side(partial(loop, cache), B * length)
            for cache in caches(args)
        }
        if args.device.startswith("cuda"):
            opponents["generate, dynamic cache"].target = 5.0
        case = f"{depth}, batch {B}, {length} tokens"
        ours = Side(loop, B * length)
        rows = list(compare(args, "pali-decode", case, "tokens/s", ours, opponents, same))
        yield from rows
        for kind, gb_s in bounds.items() if B == 1 and rows else ():
            bound = gb_s * 1e9 / (weights * dtype.itemsize)
            against, ratio = f"{kind} at {gb_s:.1f} GB/s", rows[0].ours / bound
            row = Row("pali-decode", case, against, rows[0].ours, bound, "tokens/s", ratio)
            if kind == "copying":
                row.target = 0.9 if dtype == torch.float32 else 0.6
            yield row


def memory_gb_s(args):
    """How fast memory is copied (bytes read and written) and read: the best of several turns."""
    numbers = torch.ones(2**27, device=args.device)  # 512 MiB
    target = torch.empty_like(numbers)
    turns = {"copying": (2, lambda: target.copy_(numbers)), "reading": (1, numbers.sum)}
    return {
        name: times * 2**29 / 1e9 / min(clock(run, args.clock) for _ in range(7))
        for name, (times, run) in turns.items()
    }


def writes(args, folder, dtype, ids, length, cache=None):
    """Ours, or `generate` with such a cache; returns a run that gives the new ids."""
    if cache is None:
        model = ready(nano.PaliGemma.from_pretrained(folder, dtype), args.device)
        model.config = replace(model.config, eos_token_id=-1)
        return lambda: model.generate(ids, max_new_tokens=length).tolist()
    model = hf_paligemma(folder, dtype, args.device).eval()
    model.generation_config.eos_token_id = None
    options = {"attention_mask": torch.ones_like(ids), "token_type_ids": torch.zeros_like(ids)}
    options |= greedy(length, cache)

    def run():
        return no_grad(lambda: model.generate(ids, **options))[:, ids.shape[1] :].tolist()

    return run


def live_bytes(args):
    """Bytes alive at the peak of the real 3B's LoRA step in bf16, counted on tensors without
    numbers (memory.py): 1024 image tokens, 100 of question, 300 learned; exact, on any machine."""
    layers = 2 if args.quick else memory.LAYERS
    peaks = {name: memory.theirs(layers, **options) for name, options in memory.THEIRS.items()}
    both = "suffix logits + checkpointing"
    for case, options, targets in (
        ("features cached", {}, {"as people run it": 0.45, "suffix logits": None}),
        ("features cached, checkpointing", {"checkpointing": True}, {both: 0.85}),
        ("picture computed", {"cached": False}, {"as people run it": None}),
        ("picture computed, checkpointing", {"cached": False, "checkpointing": True}, {both: None}),
    ):
        progress(f"memory, {case}")
        peak = memory.ours(layers, **options) / GIB
        for against, target in targets.items():
            theirs = peaks[against] / GIB
            row = Row("memory", case, against, peak, theirs, "GiB", peak / theirs)
            row.target, row.at_most = target, True
            yield row


# ---- loading and start-up ------------------------------------------------------------------------


def loading(args):
    """Seconds from a folder in the page cache to a model that can be called, and to one of which
    every page was read as well. Both sides map the file, so the second has the first use in it."""
    from transformers import PaliGemmaForConditionalGeneration

    layers = (26, 27) if args.full_depth else (2, 2)
    t5 = t5_folder(args, "base")
    pali = made_once(args, "paligemma", partial(write_paligemma, *layers))
    models = {
        f"mm-cot T5-base, fp32, {gigabytes(t5)}": (
            lambda: fusion.MultimodalT5.from_pretrained(t5),
            lambda: hf_multimodal(t5, "cpu"),
        ),
        f"PaliGemma2, {layers[0]} + {layers[1]} layers, bf16, {gigabytes(pali)}": (
            lambda: nano.PaliGemma.from_pretrained(pali, torch.bfloat16),
            lambda: PaliGemmaForConditionalGeneration.from_pretrained(pali, dtype=torch.bfloat16),
        ),
    }
    for name, loads in models.items():
        for read in (False, True):
            ours, theirs = (Side(partial(loader, load, args.device, read)) for load in loads)
            theirs.target = None if read else 3.0
            case = f"{name}, read" if read else name
            yield from compare(args, "loading", case, "s", ours, {"from_pretrained": theirs}, same)


def loader(load, device, read):
    def run():
        with silence():
            model = load().to(device)
        if read:
            sum(p.detach().view(-1)[::1024].float().sum() for p in model.parameters())

    def probe():
        """Every bit of every tensor, whatever the tensors are called."""
        kind = {4: torch.int32, 2: torch.int16}
        parameters = [p.detach() for p in load().parameters()]
        bits = [p.contiguous().view(kind[p.element_size()]) for p in parameters]
        return sorted((str(p.shape), str(p.dtype), p.sum().item()) for p in bits)

    return run, probe


def write_paligemma(text_layers, vision_layers, folder, side=224):
    """PaliGemma2-3B at `side` pixels, full width, so many layers, bf16."""
    text = nano.Gemma2Config(vocab_size=257216, num_hidden_layers=text_layers)
    vision = nano.SigLIPConfig(1152, 4304, vision_layers, 16, image_size=side, patch_size=14)
    with torch.device("meta"):
        model = nano.PaliGemma(nano.PaliGemmaConfig(vision, text))
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.empty(p.shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=generator)
        for name, p in model.named_parameters()
    }
    model.load_state_dict(weights, assign=True)
    model.save_pretrained(folder)


def gigabytes(folder):
    return f"{(folder / 'model.safetensors').stat().st_size / 1e9:.2f} GB"


OUR_START = """
import io, json, os, sys
import torch
import data, lora, model, train
from support.training.settings import parse_args
from support.training.runs import Checkpoints
from support.dataset.tokenizers import load_tokenizer
folder, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
flags = ["--model", "paligemma", "--data", "none", "--lr", "0.001", "--epochs", "1"]
flags = parse_args([*flags, "--device", "cpu"])
pg, tokenizer = model.PaliGemma.from_pretrained(folder), load_tokenizer(folder)
lora.inject(pg, r=8, alpha=16)
example = data.sequence(tokenizer, "answer What is it?", "A cat.", pg.config.image_tokens)
side = pg.config.vision.image_size
pixels = torch.linspace(-1, 1, 3 * side * side).view(1, 3, side, side)
example |= {"id": "1", "image_features": pg.image_features(pixels)[0].detach().numpy()}
log = io.StringIO()
plan = train.make_plan(flags, "start", pg, [example], lambda loss_of: {})
train.fit(plan, Checkpoints(log))
print(json.loads(log.getvalue().splitlines()[-1])["loss"], flush=True)
os._exit(0)
"""
THEIR_START = """
import os, sys
import torch
from peft import LoraConfig, get_peft_model
from transformers import PaliGemmaForConditionalGeneration, PreTrainedTokenizerFast
folder, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
pg = PaliGemmaForConditionalGeneration.from_pretrained(folder)
tokenizer = PreTrainedTokenizerFast(tokenizer_file=folder + "/tokenizer.json")
names = ".*language_model.*(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
pg, config = get_peft_model(pg, LoraConfig(r=8, lora_alpha=16, target_modules=names)), pg.config
side, count = config.vision_config.image_size, config.text_config.num_image_tokens
pixels = torch.linspace(-1, 1, 3 * side * side).view(1, 3, side, side)
def ids(text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]
prefix = [config.image_token_id] * count + [2] + ids("answer What is it?") + ids("\\n")
suffix = ids("A cat.") + [1]
row = torch.tensor([prefix + suffix])
kinds = torch.tensor([[0] * len(prefix) + [1] * len(suffix)])
batch = dict(input_ids=row, attention_mask=torch.ones_like(row), pixel_values=pixels,
             token_type_ids=kinds, labels=row.masked_fill(kinds == 0, -100))
"""
THEIR_LOOP = """
optimizer = torch.optim.AdamW([p for p in pg.parameters() if p.requires_grad], lr=0.001)
pg.train()
loss = pg(**batch).loss
loss.backward()
torch.nn.utils.clip_grad_norm_(pg.parameters(), 1.0)
optimizer.step()
print(loss.item(), flush=True)
os._exit(0)
"""
THEIR_TRAINER = """
from transformers import Trainer, TrainingArguments
how = TrainingArguments(output_dir=os.path.join(os.environ["SCRATCH"], "trainer"), max_steps=1,
                        learning_rate=0.001, report_to="none", disable_tqdm=True, use_cpu=True,
                        remove_unused_columns=False, save_strategy="no")
rows = [{name: value[0] for name, value in batch.items()}]
print(Trainer(pg, how, train_dataset=rows).train().training_loss, flush=True)
os._exit(0)
"""
STARTUP = {  # the same job from the start of Python to the end of its first training step
    "ours": OUR_START,
    "transformers + peft, own loop": THEIR_START + THEIR_LOOP,
    "transformers + peft, Trainer": THEIR_START + THEIR_TRAINER,
}


def start_up(args):
    """Seconds from the start of Python to the end of the first training step: LoRA on the demo's
    PaliGemma, one row. What counts is what has to be imported."""
    folder, threads = str(ROOT / "demo/paligemma"), str(args.threads)

    def script(name):
        command = [sys.executable, "-c", STARTUP[name], folder, threads]
        # pip compiled their files; ours are compiled by the warm-up, if Python may write that down
        environment = os.environ | {"SCRATCH": str(args.folder), "PYTHONDONTWRITEBYTECODE": ""}
        done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
        if done.returncode:
            raise RuntimeError(f"The start-up script of {name} failed:\n{done.stderr[-2000:]}")
        return torch.tensor(float(done.stdout.split()[-1]))

    sides = {name: Side(partial(partial, script, name), target=2.5) for name in STARTUP}
    ours = sides.pop("ours")
    case = "first LoRA step of a small PaliGemma2"
    args = argparse.Namespace(**vars(args) | {"no_memory": True})
    yield from compare(args, "start-up", case, "s", ours, sides, close(1e-4))


# ---- how cost grows ------------------------------------------------------------------------------


def live_peak(run, before):
    """Peak of the bytes that run() makes, beyond the tensors `before`."""
    counter = memory.LiveBytes()
    counter.count(before)
    there = counter.now
    with counter:
        run()
    return counter.peak - there


def t5_step(length, B, V):
    """A step of a small T5: `length` source tokens, 32 target tokens."""
    config = nano.T5Config(V, d_model=256, d_kv=32, d_ff=1024, num_layers=2, num_heads=8)
    torch.manual_seed(0)
    model = fusion.MultimodalT5(nano.T5(config), fusion.GatedFusion(256, FEATURES[1])).train()
    ids = torch.randint(2, V, (B, length + 32), generator=torch.Generator().manual_seed(0))
    batch = {"input_ids": ids[:, :length], "attention_mask": torch.ones(B, length).long()}
    batch |= {"labels": ids[:, length:], "decoder_input_ids": ids[:, length:]}
    batch["image_features"] = torch.ones(B, *FEATURES)
    return step_of(ready(model, "cpu"), train.t5_loss, batch)


def lora_step(length, B, V):
    """A step of a small PaliGemma: 16 image tokens, `length` of text, the last quarter learned."""
    text = nano.Gemma2Config(V, 256, 1024, 4, 4, 2, 64, 64)
    vision = nano.SigLIPConfig(64, 128, 1, 4, image_size=56, patch_size=14)
    torch.manual_seed(0)
    model = nano.PaliGemma(nano.PaliGemmaConfig(vision, text, image_token_index=V - 1))
    model.init_weights()
    lora.inject(model, r=8, alpha=16)
    ids = torch.randint(2, V - 1, (B, 16 + length), generator=torch.Generator().manual_seed(0))
    ids[:, :16] = V - 1
    kinds = (torch.arange(16 + length) >= 16 + length - length // 4).long().expand(B, -1)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "token_type_ids": kinds}
    batch["labels"] = ids.masked_fill(kinds == 0, -100)
    batch["image_features"] = torch.ones(B, 16, 256)
    return step_of(ready(model.train(), "cpu"), train.paligemma_loss, batch, "example")


def loss_of(length, B, V, chunked=True):
    """The loss alone: `length` x B states of width 256, all supervised, a frozen vocabulary."""
    torch.manual_seed(0)
    weight = torch.randn(V, 256) / 16
    states = torch.randn(B, length, 256, requires_grad=True)
    labels = torch.randint(2, V, (B, length))

    def run():
        if chunked:
            loss, count = train.cross_entropy(lambda x: x @ weight.T, weight, states, labels)
            (loss / count).backward()
        else:
            F.cross_entropy((states @ weight.T).flatten(0, 1), labels.flatten()).backward()
        states.grad = None

    return run, [weight, states, labels]


def step_of(model, loss_function, batch, weighting="token"):
    with silence():
        optimizer = optim.make_optimizer(model, 0.01)

    def run():
        loss, count = loss_function(model, batch, weighting)
        (loss / count).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step(1e-4)
        optimizer.zero_grad()

    run()  # AdamW makes its moments
    moments = [t for state in optimizer.state.values() for t in state.values()]
    inputs = [t for t in batch.values() if torch.is_tensor(t)]
    return run, [*model.parameters(), *model.buffers(), *moments, *inputs]


GROWTH = {  # name: (function of tokens, batch, vocabulary; colour)
    "T5 training step": (t5_step, "#1b6ca8"),
    "PaliGemma LoRA step": (lora_step, "#c4572b"),
    "loss, in chunks": (loss_of, "#2f7d32"),
    "loss, all logits at once": (partial(loss_of, chunked=False), "#8a8a8a"),
}
AXES = {  # which of (tokens, batch, vocabulary) grows, and through what; the others stay
    "text tokens": [(n, 2, 4096) for n in (64, 128, 256, 512, 1024)],
    "batch": [(128, n, 4096) for n in (1, 2, 4, 8, 16)],
    "vocabulary": [(256, 2, n) for n in (4096, 16384, 65536, 131072, 257216)],
}


def growth(args):
    """Time and peak live bytes (beyond weights and moments) of a step over its sizes, at toy width
    so that the sizes can be real ones. A row says how many times the peak grew over the larger half
    of the sizes, and how many times they did; --plot FILE draws it all."""
    panels = {}
    for column, (axis, points) in enumerate(AXES.items()):
        points = points[:2] if args.quick else points
        sizes = [point[column] for point in points]
        for name, (make, colour) in GROWTH.items():
            seconds, peaks = [], []
            for point in points:
                progress(f"growth over {axis}: {name}, {point[column]}")
                run, before = make(*point)
                seconds.append(min(clock(run, args.clock) for _ in range(args.repeats)))
                peaks.append(live_peak(run, before))
            mib = [peak / 2**20 for peak in peaks]
            panels.setdefault(("seconds", axis), {})[name] = sizes, seconds, colour
            panels.setdefault(("MiB at the peak", axis), {})[name] = sizes, mib, colour
            half = len(points) // 2  # what is constant no longer shows in the larger sizes
            grown, size = peaks[-1] / peaks[half], sizes[-1] / sizes[half]
            case = f"{name}: peak, {axis} {sizes[half]} to {sizes[-1]}"
            flat = axis == "vocabulary" and "chunks" in name
            row = Row("growth", case, "growth of the size", grown, size, "times", grown / size)
            row.target, row.at_most = (1.1 / size if flat else None), True
            yield row
    if args.plot:
        Path(args.plot).write_text("\n".join(svg(panels)))


W, H = 300, 210  # of a panel
LINEAR = 'stroke="#777" stroke-dasharray="2 4"'


def svg(panels):
    """Panels, {(y label, x label): {name: (xs, ys, colour)}}, as rows by y and columns by x; both
    axes logarithmic, and the thin line in each has slope one: linear growth."""
    rows, columns = (list(dict.fromkeys(key[i] for key in panels)) for i in (0, 1))
    width, height = len(columns) * (W + 80) + 40, len(rows) * (H + 75) + 70
    font = 'font-family="Helvetica, Arial, sans-serif" font-size="13"'
    yield f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" {font}>'
    yield f'<rect width="{width}" height="{height}" fill="white"/>'
    names = {name: colour for lines in panels.values() for name, (*_, colour) in lines.items()}
    styles = {name: f'stroke="{colour}" stroke-width="3"' for name, colour in names.items()}
    for i, (name, style) in enumerate((styles | {"linear": LINEAR}).items()):
        yield f'<path d="M{60 + 230 * i},26h24" {style}/>'
        yield f'<text x="{92 + 230 * i}" y="30">{name}</text>'
    for (y, x), lines in panels.items():
        left, top = 70 + columns.index(x) * (W + 80), 60 + rows.index(y) * (H + 75)
        yield f'<g transform="translate({left},{top})">'
        yield from panel(lines, x, y)
        yield "</g>"
    yield "</svg>\n"


def panel(lines, x_label, y_label):
    xs = sorted({x for points, _, _ in lines.values() for x in points})
    ys = sorted({y for _, points, _ in lines.values() for y in points})
    x0, x1, y0, y1 = xs[0] / 1.15, xs[-1] * 1.15, ys[0] / 1.15, ys[-1] * 1.15

    def place(x, y):
        right = W * math.log(x / x0) / math.log(x1 / x0)
        return f"{right:.1f}", f"{H - H * math.log(y / y0) / math.log(y1 / y0):.1f}"

    yield f'<rect width="{W}" height="{H}" fill="none" stroke="#444"/>'
    for x in xs:
        across, _ = place(x, y0)
        yield f'<path d="M{across},{H}v5" stroke="#444"/>'
        yield f'<text x="{across}" y="{H + 19}" text-anchor="middle">{short(x)}</text>'
    for y in (m * 10.0**e for e in range(-6, 7) for m in ((1, 3) if y1 / y0 > 30 else (1, 2, 5))):
        if y0 <= y <= y1:
            _, up = place(x0, y)
            yield f'<path d="M0,{up}h{W}" stroke="#ddd"/>'
            yield f'<text x="-6" y="{up}" dy="4" text-anchor="end">{short(y)}</text>'
    span = min(x1 / x0, y1 / y0)  # a line of slope one, from the lower left corner
    yield f'<path d="M0,{H}L{",".join(place(x0 * span, y0 * span))}" {LINEAR}/>'
    for values, heights, colour in lines.values():
        points = [place(x, y) for x, y in zip(values, heights, strict=True)]
        path = " ".join(",".join(point) for point in points)
        yield f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>'
        yield from (f'<circle cx="{x}" cy="{y}" r="3" fill="{colour}"/>' for x, y in points)
    yield f'<text x="{W / 2}" y="{H + 38}" text-anchor="middle">{x_label}</text>'
    turned = f'transform="translate(-50,{H / 2}) rotate(-90)" text-anchor="middle"'
    yield f"<text {turned}>{y_label}</text>"


def short(n):
    return f"{n / 1000:.0f}k" if n > 2000 else f"{n:g}"


# ---- all items, in the order of the table --------------------------------------------------------
# An item takes the flags and yields rows; `compare` makes them, or it builds `Row`s of its own.

ITEMS = {
    "mmcot-train": mmcot_train,
    "mmcot-decode": mmcot_decode,
    "pali-step": pali_step,
    "pali-decode": pali_decode,
    "memory": live_bytes,
    "detr": detr,
    "loading": loading,
    "start-up": start_up,
    "growth": growth,
}


# ---- table and command line ----------------------------------------------------------------------


def line(row):
    """A row as text."""
    ours, theirs = (f"{x:.4g}" for x in (row.ours, row.theirs))
    spread = f"{row.spread[0]:.2f}-{row.spread[1]:.2f}" if row.spread else ""
    target = ""
    if row.target:
        met = row.ratio <= row.target if row.at_most else row.ratio >= row.target
        target = f"{'<=' if row.at_most else '>='} {row.target:g}{'' if met else ' missed'}"
    memory = " / ".join("-" if m is None else f"{m / GIB:.2f}" for m in row.memory or ())
    name = f"{row.item}: {row.case}"
    return (
        f"{name:67} {row.against:31} {ours:>8} {theirs:>8} {row.unit:10} {row.ratio:6.2f}x "
        f"{spread:11} {target:14} {memory}"
    )


def head():
    names = f"{'item':67} {'against':31} {'ours':>8} {'theirs':>8} {'unit':10} {'ratio':>7} "
    return names + f"{'spread':11} {'target':14} GiB ours / theirs"


def machine(args):
    """Where this was measured, and what the machine can do at best: fp32 products and copies."""
    n, size = (256, 2**20) if args.quick else (2048, 2**26)  # 256 MiB: no cache holds it
    a, b = (torch.randn(n, n, device=args.device) for _ in range(2))
    flops = 2 * n**3 / min(clock(lambda: a @ b) for _ in range(5))
    source = torch.randn(size, device=args.device)
    target = torch.empty_like(source)
    copied = 8 * size / min(clock(lambda: target.copy_(source)) for _ in range(5))
    device = platform.processor() or platform.machine()
    if args.device.startswith("cuda"):
        device = torch.cuda.get_device_name(args.device)
    return {
        "device": device,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "torch": str(torch.__version__),
        "matmul_gflops": round(flops / 1e9, 1),
        "copy_gb_s": round(copied / 1e9, 1),
        "repeats": args.repeats,
        "clock": args.clock.__name__,
    }


def parse_args(argv):
    parser = argparse.ArgumentParser(prog="tools/bench.py", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--only",
        nargs="+",
        choices=ITEMS,
        default=list(ITEMS),
        metavar="ITEM",
        help="parts to measure (all)",
    )
    cuda = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=cuda, help="where to run (%(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each side (%(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--json", metavar="FILE", help="also write the machine and the rows here")
    parser.add_argument("--plot", metavar="FILE", help="draw how cost grows (item growth), as SVG")
    for flag, text in (
        ("--full-depth", "all layers on a CPU too: hours, and 24 GB"),
        ("--quick", "toy sizes: tries the program, says nothing about speed"),
        ("--cpu-time", "count CPU seconds: for a machine that others use; with --threads 1"),
        ("--no-memory", "start no processes to measure memory"),
    ):
        parser.add_argument(flag, action="store_true", help=text)
    parser.add_argument("--side", help=argparse.SUPPRESS)  # ITEM/CASE/SIDE, for the child
    parser.add_argument("--folder", help=argparse.SUPPRESS)  # where its parent's files are
    args = parser.parse_args(argv)
    args.clock = cpu_seconds if args.cpu_time else time.perf_counter
    args.full_depth |= args.device.startswith("cuda")
    sizes = [flag for flag in ("full_depth", "quick") if getattr(args, flag)]
    args.child = [f"--{flag.replace('_', '-')}" for flag in sizes]
    args.child += ["--device", args.device, "--threads", str(args.threads)]
    return args


def main(argv=None):
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    torch.backends.cudnn.allow_tf32 = False  # fp32 is fp32, on both sides
    if args.side:
        return list(ITEMS[args.side.split("/")[0]](args))
    with tempfile.TemporaryDirectory(prefix="nanocot-bench-") as args.folder:
        where, rows = machine(args), []
        print(", ".join(f"{k} {v}" for k, v in where.items()))
        print(head(), flush=True)
        for name in args.only:
            for row in ITEMS[name](args):
                progress("")
                print(line(row), flush=True)
                rows.append(row)
            if args.json:  # after each item: the next may fail
                result = {"machine": where, "rows": [asdict(row) for row in rows]}
                Path(args.json).write_text(json.dumps(result, indent=1) + "\n")
    return rows


if __name__ == "__main__":
    main()
