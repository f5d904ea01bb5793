"""What is fast and by how much: each item beside the strongest opponent, in the same run.

    python tests/bench.py                        # every item; at full width, cut in depth on a CPU
    python tests/bench.py --only detr --repeats 9 --json bench.json

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
import functools
import gc
import io
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.setdefault("NANOCOT_DATA", str(ROOT.parent / "shared" / "data"))
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import numpy as np  # noqa: E402
import oracle  # noqa: E402
import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
from torch import nn  # noqa: E402

import data  # noqa: E402
import fusion  # noqa: E402
import model as nano  # noqa: E402
import train  # noqa: E402

GIB = 2**30
SHORTEST = 0.3  # seconds of a turn
REAL = Path(os.environ["NANOCOT_DATA"])
DEMO_T5 = ROOT / "demo/t5"
FEATURES = 100, 256  # DETR's: positions and width


# ---- sides, rows and clocks ----------------------------------------------------------------------


@dataclass
class Side:
    """build() makes everything one side needs and returns run(), which does the work once, or
    (run, probe), where it is probe's output that is compared with the other side's.

    amount  units of work in one run, for a rate; None: the row gives seconds.
    target  what the ratio of ours over this opponent should be.
    """

    build: callable
    amount: float = None
    target: float = None


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
    spread: tuple = None
    target: float = None
    memory: tuple = None
    at_most: bool = False  # the target is a ceiling (memory), not a floor


def compare(args, item, case, unit, ours, theirs, check):
    """A row for each opponent in `theirs`, {name: Side}. check(our output, their output) raises
    AssertionError where they differ. In the child that measures memory it never returns, or does
    nothing because another case is wanted."""
    sides = {"ours": ours} | theirs
    if args.side:
        wanted = args.side.split("/")
        if wanted[:2] == [item, case]:
            measure_memory(sides[wanted[2]], args.device)
        return []
    progress(f"{item}, {case}: setting up")
    runs, probes = {}, {}
    for name, side in sides.items():
        runs[name], probes[name] = run_and_probe(side)
    expected = probes["ours"]()
    for name in theirs:
        check(expected, probes[name]())
    del expected, probes
    seconds = take_turns(runs, args, f"{item}, {case}")
    del runs
    gc.collect()
    memory = {name: peak_memory(args, f"{item}/{case}/{name}") for name in sides}
    made = []
    for name, side in theirs.items():
        pair = {"ours": ours, name: side}
        values = [rates(pair[n], seconds[n]) for n in pair]
        middle = [statistics.median(v) for v in values]
        ratios = [b / a if unit == "s" else a / b for a, b in zip(*values, strict=True)]
        ratio = middle[1] / middle[0] if unit == "s" else middle[0] / middle[1]
        spread, peak = (min(ratios), max(ratios)), (memory["ours"], memory[name])
        row = Row(item, case, name, *middle, unit, ratio, spread, side.target, peak)
        progress(line(row), keep=True)
        made.append(row)
    return made


def run_and_probe(side):
    made = side.build()
    return made if isinstance(made, tuple) else (made, made)


def take_turns(runs, args, what):
    """{name: seconds of each repeat}: A B A B, each timed until the device has finished. A run
    that takes milliseconds is repeated within its turn."""
    seconds, times = {name: [] for name in runs}, {}
    for name, run in runs.items():
        progress(f"{what}: warming up, {name}")
        times[name] = max(1, min(50, int(SHORTEST / clock(run, args.device))))
    for repeat in range(args.repeats):
        for name, run in runs.items():
            progress(f"{what}: {repeat + 1} of {args.repeats}, {name}")
            turn = functools.partial(again, run, times[name])
            seconds[name].append(clock(turn, args.device, args.clock) / times[name])
    return seconds


def again(run, times):
    for _ in range(times):
        run()


def clock(run, device, now=time.perf_counter):
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    start = now()
    run()
    if device.startswith("cuda"):
        torch.cuda.synchronize()
    return now() - start


def rates(side, seconds):
    return [side.amount / s if side.amount else s for s in seconds]


def peak_memory(args, side):
    """Bytes at the peak of one run of a side, in a process of its own; None with --no-memory."""
    if not args.memory:
        return None
    progress(f"memory of {side}")
    command = [sys.executable, __file__, "--side", side, "--folder", str(args.folder), *args.given]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"The process that measures {side} failed:\n{done.stderr[-2000:]}")
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
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM := VmRSS
        run()
        status = Path("/proc/self/status").read_text()
        peak = int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024
    print(json.dumps({"peak": peak}))
    sys.exit(0)


def progress(text, keep=False):
    """One running line on a terminal; what is kept is a line of its own, anywhere."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="\n" if keep else "", file=sys.stderr, flush=True)
    elif keep:
        print(text, file=sys.stderr, flush=True)


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
    """Features of pictures 224 high and 304 wide by the released DETR-R101-DC5's shape."""
    config = oracle.TINY_DETR if args.quick else oracle.DETR_CONFIGS["detr-resnet-101-dc5"]
    size = (64, 96) if args.quick else (224, 304)
    folder = made_once(args, "detr", functools.partial(write_detr, config))
    for B in (1, 8):
        pixels = oracle.uniform(f"bench/{B}", (B, 3, *size), -2.0, 2.0).to(args.device)  # (B,3,H,W)
        case = f"batch {B}, {size[0]}x{size[1]}"

        def ours(pixels=pixels):
            model = nano.DETR.from_pretrained(folder).to(args.device)
            return lambda: no_grad(model.features, pixels)

        def theirs(layout, pixels=pixels):
            model = hf_detr(folder).to(args.device, memory_format=layout)
            given = pixels.contiguous(memory_format=layout)
            return lambda: no_grad(model, given).last_hidden_state

        opponents = {
            "transformers": Side(functools.partial(theirs, torch.contiguous_format), B, 1.25),
            "transformers, channels last": Side(functools.partial(theirs, torch.channels_last), B),
        }
        yield from compare(args, "detr", case, "images/s", Side(ours, B), opponents, close(1e-3))


@torch.inference_mode()
def no_grad(function, *given, **named):
    return function(*given, **named)


def write_detr(config, folder):
    with torch.device("meta"):
        tensors = nano.DETR(nano.DETRConfig.from_hub(config)).state_dict()
    shapes = {nano.DETR_KEYS.to_file(name): t.shape for name, t in tensors.items()}
    oracle.write_checkpoint(folder, config, oracle.seeded_weights(shapes))


def hf_detr(folder):
    """transformers' DetrModel with its own ResNet. It takes DC5 only from timm, which has no build
    beside a CPU torch; so stage 4 is told to dilate, and `check` sees whether that is DC5."""
    from safetensors.torch import load_file
    from transformers import DetrConfig, DetrModel, ResNetConfig

    config = json.loads((folder / "config.json").read_text())
    depths, widths = nano.DETRConfig.from_hub(config).resnet
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
        return nano.from_config(nano.T5Config, json.loads((DEMO_T5 / "config.json").read_text()))
    return nano.T5Config(d_model=768, d_ff=3072, num_heads=12, num_layers=layers)


def write_t5(config, folder):
    """A multimodal T5 checkpoint with the oracle's weights: greedy texts go on changing."""
    with torch.device("meta"):
        t5 = nano.T5(config)
        model = fusion.MultimodalT5(t5, fusion.GatedFusion(config.d_model, FEATURES[1]))
    shapes = {fusion.MULTIMODAL_KEYS.to_file(n): t.shape for n, t in model.state_dict().items()}
    architecture = t5.hub_config("T5ForMultimodalGeneration") | {"no_image": "zero"}
    oracle.write_checkpoint(folder, architecture, oracle.seeded_weights(shapes))


def hf_multimodal(folder, device):
    """transformers' T5 with the paper's fusion behind its encoder: Eq. 3-6 from torch's own parts,
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
            batch = train.to_device(batch, self.device)
            given = {name: batch[name] for name in ("input_ids", "attention_mask")}
            text, e = self.encoder(**given).last_hidden_state, self.encoder
            picture = e.image_dense(batch["image_features"])
            seen, _ = e.mha_layer(text, picture, picture, need_weights=False)
            gate = e.gate_dense(torch.cat((text, seen), -1)).sigmoid()
            states = BaseModelOutput(last_hidden_state=(1 - gate) * text + gate * seen)
            return {"encoder_outputs": states, "attention_mask": given["attention_mask"]}

        def loss(self, batch):
            labels = batch["labels"].to(self.device)
            return self(**self.fused(batch), labels=labels, use_cache=False).loss

    return MultimodalHF.from_pretrained(folder).to(device).eval()


class Questions:
    """Problems, tokenizer and features: ScienceQA's from NANOCOT_DATA, the demo's with --quick."""

    def __init__(self, split, demo=False):
        self.problems = data.load("demo" if demo else REAL / "scienceqa", split)
        self.tokenizer = data.load_tokenizer(DEMO_T5 if demo else REAL / "tokenizers/t5")
        pictured = [p.id for p in self.problems if p.image is not None]
        random = np.random.default_rng(0).standard_normal((64, *FEATURES), np.float32)
        rows = {id: i % 64 for i, id in enumerate(pictured)}  # 64 pictures are enough to copy from
        self.features = data.Features(random.astype(np.float16), rows)

    def examples(self, fmt, generated=None, limit=None):
        how = {"vision": "detr", "faithful_text": False, "max_input": 512, "max_output": [512, 64]}
        problems = self.problems[:limit]
        return data.examples(problems, fmt, self.tokenizer, self.features, generated, how)


def mmcot_train(args):
    """Samples a second of both stages' training with dropout on, optimizer and collation included.

    As published: every source padded to 512 tokens, every target to 512 (rationale) or 64 (answer),
    pads in the loss. Multimodal-CoT's code cannot be in this repository, so its padding and loss
    are rebuilt on transformers' T5. The other two opponents are the same T5 with dynamic padding:
    in our batches, which are of like length, and in random ones, as most people run it.
    """
    layers = 12 if args.full_depth else 3
    config = t5_config(args, layers)
    folder = made_once(args, f"t5-{layers}", functools.partial(write_t5, config))
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
            name: Side(functools.partial(training.theirs, batches), amount, target)
            for name, (batches, amount, target) in opponents.items()
        }
        ours = Side(training.ours, len(training.examples))
        case = f"{name}, {depth}, batch {B} (published: {padded_B})"
        yield from compare(args, "mmcot-train", case, "samples/s", ours, sides, training.check)


class Training:
    """One stage: its examples, and the sides that train on them."""

    def __init__(self, args, folder, questions, stage, B, padded_B, count=4):
        flags = ["--model", "mmcot", "--data", "scienceqa", "--batch-size", str(B)]
        self.flags = train.parse_args([*flags, "--device", args.device])
        self.folder, self.device = folder, args.device
        every = questions.examples(fusion.RECIPES["two-stage"][stage])
        lengths = [len(e["input_ids"]) + len(e["labels"]) for e in every]
        generator = torch.Generator().manual_seed(0)
        made = data.batches(lengths, B, generator)  # the whole split's: what an epoch is made of
        made = [rows for rows in made if len(rows) == B]
        made.sort(key=lambda rows: sum(lengths[i] for i in rows))
        made = made[len(made) // (2 * count) :: len(made) // count][:count]  # evenly, by length
        self.same = [[every[i] for i in rows] for rows in made]
        self.examples = [example for rows in self.same for example in rows]
        order = torch.randperm(len(self.examples), generator=generator).tolist()
        self.random = [[self.examples[i] for i in order[at::count]] for at in range(count)]
        self.published = [self.examples[:: max(1, len(self.examples) // padded_B)][:padded_B]]
        self.sizes = 512, 512 if stage == 0 else 64
        self.shared = {}

    def ours(self):
        model = fusion.MultimodalT5.from_pretrained(self.folder).to(self.device)
        self.flags.vocabulary = model.t5.config.vocab_size

        def run():
            with silence():
                log = io.StringIO()
                train.fit(model, self.examples, lambda model: {}, self.flags, "bench", 1.0, log)

        def probe():
            batch = train.to_device(data.collate(self.same[0]), self.device)
            loss, count = train.t5_loss(model.eval(), batch, self.flags)
            row = train.to_device(self.pad(self.same[0][:1]), self.device)
            names = ("input_ids", "attention_mask", "image_features", "decoder_input_ids")
            logits = no_grad(model, *(row[name] for name in names))  # (1, U, V)
            padded = F.cross_entropy(logits[0], row["labels"][0])
            return {"loss and gradient": with_norm(model, loss / count), "published": padded}

        return run, probe

    def theirs(self, kind):
        model = self.shared.get("hf") or hf_multimodal(self.folder, self.device)
        self.shared["hf"] = model  # one for all three: they take turns
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
    model.zero_grad(set_to_none=True)
    return torch.stack([loss.detach(), torch.nn.utils.get_total_norm(grads)])


def hf_fit(model, batches, collate, flags):
    """A plain training loop, with the optimizer transformers' Trainer takes today: fused AdamW."""
    how = {"lr": flags.lr, "weight_decay": flags.weight_decay, "fused": True}
    optimizer = torch.optim.AdamW(model.parameters(), **how)
    for rows in batches:
        model.train()
        model.loss(collate(rows)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


@contextlib.contextmanager
def silence():
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield


def mmcot_decode(args):
    """Tokens a second through both stages, greedy: question, rationale, question again with the
    rationale in it, answer. Rows never end early (the weights know no end of a text), so that both
    sides do the same steps; what it is worth that finished rows leave comes on top.
    """
    for size in ("base", "demo"):
        demo = size == "demo" or args.quick
        config = replace(t5_config(argparse.Namespace(quick=demo)), eos_token_id=-1)
        folder = made_once(args, f"t5-{size}-endless", functools.partial(write_t5, config))
        questions = Questions("test", demo)
        lengths = (8, 2) if args.quick else (64, 8)
        for B in (1, 16):
            targets = {"base": (1.25, 1.25), "demo": (3.0, 2.0)}[size]
            amount, target = B * sum(lengths), targets[B > 1]
            loop = functools.partial(two_stages, args, folder, questions, lengths, B)
            caches = ("dynamic", "static") if args.device.startswith("cuda") else ("dynamic",)
            opponents = {
                f"generate, {cache} cache": Side(functools.partial(loop, cache), amount, target)
                for cache in caches
            }
            case = f"{size}, batch {B}, {lengths[0]} + {lengths[1]} tokens"
            ours = Side(loop, amount)
            yield from compare(args, "mmcot-decode", case, "tokens/s", ours, opponents, same)


def two_stages(args, folder, questions, lengths, B, cache=None):
    """The two-stage loop over the first B problems: fusion's own, or the same around `generate`
    with such a cache (static means compiled on a GPU; on a CPU it was no faster than dynamic)."""

    def make_batches(generated):
        fmt = fusion.RECIPES["two-stage"][generated is not None]
        yield data.collate(questions.examples(fmt, generated, B))

    if cache is None:
        model = fusion.MultimodalT5.from_pretrained(folder).to(args.device)
        given = (model, model, make_batches, questions.tokenizer, lengths)

        def texts():
            told = fusion.two_stage(*given)
            assert sum(t["tokens"] for t in told.values()) == B * sum(lengths)
            return {id: (t["rationale"], t["response"]) for id, t in told.items()}

        def ids(batch):
            batch = train.to_device(batch, args.device)
            names = ("input_ids", "attention_mask", "image_features")
            return model.generate(**{n: batch[n] for n in names}, max_new_tokens=lengths[0])
    else:
        model = hf_multimodal(folder, args.device)
        model.generation_config.eos_token_id = None

        def ids(batch, length=lengths[0]):
            how = {"max_new_tokens": length, "do_sample": False, "cache_implementation": cache}
            return no_grad(lambda: model.generate(**model.fused(batch), **how))[:, 1:]

        def write(generated, length):
            [batch] = make_batches(generated)
            rows = zip(batch["ids"], ids(batch, length).tolist(), strict=True)
            return {id: questions.tokenizer.decode(row) for id, row in rows}

        def texts():
            rationales = write(None, lengths[0])
            answers = write(rationales, lengths[1])
            return {id: (rationale, answers[id]) for id, rationale in rationales.items()}

    return texts, lambda: (ids(next(make_batches(None))).tolist(), texts())


def same(ours, theirs):
    assert ours == theirs, f"the sides wrote different things: {ours!s:.200} and {theirs!s:.200}"


# ---- all items, in the order of the table --------------------------------------------------------
# An item takes the flags and yields rows; `compare` makes them, or it builds `Row`s of its own.

ITEMS = {
    "mmcot-train": mmcot_train,
    "mmcot-decode": mmcot_decode,
    "detr": detr,
}


# ---- table and command line ----------------------------------------------------------------------


def line(row):
    """A row as text."""
    ours, theirs = (f"{x:.4g}" for x in (row.ours, row.theirs))
    spread = f"{row.spread[0]:.2f}-{row.spread[1]:.2f}" if row.spread else ""
    target = f"{'<=' if row.at_most else '>='} {row.target:g}" if row.target else ""
    if row.target:
        met = row.ratio <= row.target if row.at_most else row.ratio >= row.target
        target += "" if met else " missed"
    memory = " / ".join("-" if m is None else f"{m / GIB:.2f}" for m in row.memory or ())
    name = f"{row.item}: {row.case}"
    return (
        f"{name:58} {row.against:34} {ours:>8} {theirs:>8} {row.unit:10} {row.ratio:6.2f}x "
        f"{spread:11} {target:14} {memory}"
    )


def head():
    names = f"{'item':58} {'against':34} {'ours':>8} {'theirs':>8} {'unit':10} {'ratio':>7} "
    return names + f"{'spread':11} {'target':14} GiB ours / theirs"


def machine(args):
    """Where this was measured, and what the machine can do at best: fp32 products and copies."""
    a, b = (torch.randn(2048, 2048, device=args.device) for _ in range(2))
    flops = 2 * 2048**3 / min(clock(lambda: a @ b, args.device) for _ in range(5))
    source = torch.randn(2**26, device=args.device)  # 256 MiB: no cache holds it
    target = torch.empty_like(source)
    copied = 2 * 2**28 / min(clock(lambda: target.copy_(source), args.device) for _ in range(5))
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
    parser = argparse.ArgumentParser(prog="tests/bench.py", description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=ITEMS, default=list(ITEMS), metavar="ITEM")
    cuda = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=cuda, help="(%(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="turns of each side (%(default)s)")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="CPU threads")
    parser.add_argument("--json", metavar="FILE", help="write machine and rows there as well")
    deep = "all layers on a CPU too: hours, and 24 GB"
    parser.add_argument("--full-depth", action="store_true", help=deep)
    tiny = "toy sizes: tries the program, says nothing about speed"
    parser.add_argument("--quick", action="store_true", help=tiny)
    busy = "count CPU seconds, not the wall clock's: for a machine that others use; --threads 1"
    parser.add_argument("--cpu-time", action="store_true", help=busy)
    none = "no processes to measure memory"
    parser.add_argument("--no-memory", dest="memory", action="store_false", help=none)
    parser.add_argument("--side", help=argparse.SUPPRESS)  # ITEM/CASE/SIDE: the child's orders
    parser.add_argument("--folder", help=argparse.SUPPRESS)  # where its parent's files are
    args = parser.parse_args(argv)
    args.clock = time.process_time if args.cpu_time else time.perf_counter
    args.full_depth |= args.device.startswith("cuda")
    sizes = [flag for flag in ("full_depth", "quick") if getattr(args, flag)]
    args.given = [f"--{flag.replace('_', '-')}" for flag in sizes]
    args.given += ["--device", args.device, "--threads", str(args.threads)]
    return args


def main(argv=None):
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    if args.side:
        return list(ITEMS[args.side.split("/")[0]](args))
    with tempfile.TemporaryDirectory(prefix="nanocot-bench-") as args.folder:
        where = machine(args)
        print(", ".join(f"{k} {v}" for k, v in where.items()), flush=True)
        rows = [row for name in args.only for row in ITEMS[name](args)]
    print("\n".join([head(), *map(line, rows)]))
    if args.json:
        result = {"machine": where, "rows": [asdict(row) for row in rows]}
        Path(args.json).write_text(json.dumps(result, indent=1) + "\n")
    return rows


if __name__ == "__main__":
    main()
