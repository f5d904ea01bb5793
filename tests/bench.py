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
import functools
import gc
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.setdefault("NANOCOT_DATA", str(ROOT.parent / "shared" / "data"))
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")

import torch  # noqa: E402

import model as nano  # noqa: E402
import oracle  # noqa: E402

GIB = 2**30


# ---- sides, rows and clocks ----------------------------------------------------------------------


@dataclass
class Side:
    """build() makes everything one side needs and returns run(), which does the work once.

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
    runs = {name: side.build() for name, side in sides.items()}
    outputs = {name: run() for name, run in runs.items()}  # warms up as well
    for name in theirs:
        check(outputs["ours"], outputs[name])
    del outputs
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


def take_turns(runs, args, what):
    """{name: seconds of each repeat}: A B A B, each timed until the device has finished."""
    seconds = {name: [] for name in runs}
    for repeat in range(args.repeats):
        for name, run in runs.items():
            progress(f"{what}: {repeat + 1} of {args.repeats}, {name}")
            seconds[name].append(clock(run, args.device, args.clock))
    return seconds


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
    run = side.build()
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


# ---- all items, in the order of the table --------------------------------------------------------
# An item takes the flags and yields rows; `compare` makes them, or it builds `Row`s of its own.

ITEMS = {
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
