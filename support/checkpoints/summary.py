"""What a checkpoint holds, as text and without loading it: `--keys` and `--summary`.

`python model.py --keys DIR_OR_HUB_ID` prints the weight table that loading goes by, `--summary` the
architecture, for which config.json is enough. fusion.py does both for a T5 with a fusion.

Axes, as the summary prints them: B batch, T source length, U target length, P feature pixels,
Y X pixels of an image, down and across.
"""

import argparse
import itertools
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import nn

from support.checkpoints.hub import build, read_config, resolve
from support.checkpoints.keys import T5_KEYS, architecture, table_of
from support.checkpoints.weights import UNFIT, cause, unfit, weight_rows

# What stands for a shape's letters: large primes, which no config has; an image's sides are 32
# times one, as DETR divides them by up to that.
AXIS_SIZES = {"B": 1009, "T": 1013, "U": 1019, "P": 1021, "Y": 32 * 1031, "X": 32 * 1033}
AXIS_LETTERS = {size: letter for letter, size in AXIS_SIZES.items()}
AXIS_LETTERS |= {AXIS_SIZES[axis] // n: f"{axis}/{n}" for axis in "YX" for n in (2, 4, 8, 16, 32)}
AXIS_LETTERS |= {AXIS_SIZES["Y"] * AXIS_SIZES["X"] // n**2: "P" for n in (16, 32)}


# ---- The weight table ----------------------------------------------------------------------------


def keys(model: nn.Module, folder: Path) -> tuple[list[str], int]:
    """The weight table of a folder as lines, in the model's order, and how many tensors are unfit.

    A shape is the file's; the model's follows where it is another."""
    order = {name: i for i, name in enumerate(model.state_dict())}
    rows = weight_rows(model, folder)
    rows.sort(key=lambda row: (order.get(row.ours, len(order)), row.theirs))
    table = [("ours", "in the file", "shape", "dtype", "")]
    for row in rows:
        in_file = row.header.shape if row.header else None
        shapes = dict.fromkeys(x for x in (in_file, row.shape) if x is not None)
        shape = ", not ".join(str(list(x)) for x in shapes)
        dtype = row.header.dtype if row.header else "-"
        table.append((row.ours or "-", row.theirs, shape, dtype, row.fate))
    fates = Counter(row.fate for row in rows)
    counts = ", ".join(f"{n} {fate}" for fate, n in fates.items())
    lines = [*aligned(table), f"{type(model).__name__}: {len(rows)} tensors, {counts}"]
    problems = unfit(rows)
    if problems:
        lines.append(f"{cause(rows, folder, table_of(type(model)))}Tensors {problems}.")
    if re.search("image_dense|mha_layer|gate_dense", problems) and table_of(type(model)) is T5_KEYS:
        lines.append("Multimodal-CoT's fusion has its own table: python fusion.py --keys.")
    return lines, sum(fates[fate] for fate in UNFIT)


def aligned(table: Iterable[tuple[str, ...]], right: tuple[int, ...] = ()) -> Iterator[str]:
    """Rows of texts as lines; the columns with these numbers are flush right."""
    rows = list(table)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = [
            text.rjust(width) if i in right else text.ljust(width)
            for i, (text, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  ".join(cells).rstrip()


# ---- The architecture ----------------------------------------------------------------------------


def ones(*axes: str | int) -> torch.Tensor:
    """Integers on the meta device, of a shape given by letters of AXIS_SIZES and numbers."""
    return torch.ones([AXIS_SIZES.get(a, a) for a in axes], dtype=torch.long, device="meta")


def walk(model: nn.Module) -> None:
    """A forward pass on the meta device."""
    kind = architecture(type(model))
    text = ones("B", "T")
    if kind == "T5":
        model(text, text, ones("B", "U"))
    elif kind == "MultimodalT5":
        fusion = model.fusion
        features = fusion and ones("B", "P", fusion.image_dense.in_features)
        model(text, text, features, ones("B", "U"))
    elif kind == "DETR":
        model(ones("B", 3, "Y", "X").float())
    elif kind == "ViT":
        side = model.config.image_size
        model(ones("B", 3, side, side).float())
    else:  # image and text each: on the meta device nobody can count the <image> tokens
        side = model.config.vision.image_size
        model.image_features(ones("B", 3, side, side))
        embedded = model.language_model.embed(text)
        model.head(model.language_model(embedded, text.bool(), text.bool()))


class Branch(NamedTuple):
    """A module as the summary shows it; equal ones that follow each other become one line."""

    kind: str
    shape: str
    parameters: int
    children: list[tuple[str, Self]]


def summary(model: nn.Module, walk: Callable[[nn.Module], None] = walk) -> list[str]:
    """The architecture as lines: module, shape of its output, parameters. Sizes that the config
    fixes are numbers, the others letters; equal neighbours are one line."""
    shapes = {}

    def note(module: nn.Module, inputs: tuple, output: Any) -> None:
        output = output[0] if isinstance(output, tuple) else output
        shapes.setdefault(module, [str(AXIS_LETTERS.get(n, n)) for n in output.shape])

    hooks = [module.register_forward_hook(note) for module in model.modules()]
    with torch.no_grad():
        walk(model.eval())
    for hook in hooks:
        hook.remove()
    total = sum(p.numel() for p in model.parameters())
    constants = sum(b.numel() for b in model.buffers())
    more = f", {constants:,} constants" if constants else ""
    tree = rows_of("", [branch(model, shapes)], "")
    return [*aligned(tree, right=(2,)), f"{total:,} parameters{more}"]


def branch(module: nn.Module, shapes: dict[nn.Module, list[str]]) -> Branch:
    """A module's branch. Containers that compute nothing give their children their name; what has
    no weights is left out."""
    children = []
    for name, child in module.named_children():
        inner = branch(child, shapes)
        if type(child) in (nn.Module, nn.ModuleList):
            children += [(f"{name}.{inner_name}", x) for inner_name, x in inner.children]
        elif child.state_dict():
            children.append((name, inner))
    shape = f"({', '.join(shapes[module])})" if module in shapes else ""
    size = sum(p.numel() for p in module.parameters())
    return Branch(type(module).__name__, shape, size, children)


def rows_of(name: str, equal: list[Branch], indent: str) -> Iterator[tuple[str, str, str]]:
    """Rows (module, shape, parameters) of neighbours whose branches are all equal."""
    kind, shape, size, children = equal[0]
    times = f"{len(equal)} x " if len(equal) > 1 else ""
    yield f"{indent}{name}{times}{kind}", shape, f"{times}{size:,}"
    for _, group in itertools.groupby(children, key=lambda child: child[1]):
        names, branches = zip(*group, strict=True)
        joined = ", ".join(names)
        last = names[-1].rpartition(".")[2]
        if len(names) > 1 and last.isdecimal():
            joined = f"{names[0]}-{last}"  # layers.0-11
        if len(joined) <= 40:
            yield from rows_of(f"{joined}  ", branches, indent + "  ")
        else:
            for child_name, child in zip(names, branches, strict=True):
                yield from rows_of(f"{child_name}  ", [child], indent + "  ")


# ---- The command line of model.py and fusion.py --------------------------------------------------


def main(architectures: dict[str, type]) -> None:
    """`--keys`: the weight table, exit status 1 if a tensor does not fit; `--summary`: the modules.
    `architectures` are the model classes by the model_type of config.json."""
    parser = argparse.ArgumentParser(description="What a checkpoint holds, without loading it.")
    wanted = parser.add_mutually_exclusive_group(required=True)
    wanted.add_argument("--keys", metavar="DIR_OR_HUB_ID", help="its tensors, and where each goes")
    wanted.add_argument("--summary", metavar="DIR_OR_HUB_ID", help="the architecture as text")
    args = parser.parse_args()
    problems = 0
    try:
        folder = resolve(args.keys or args.summary)
        config = read_config(folder, *architectures)
        model = build(architectures[config["model_type"]], folder)
        if args.keys:
            lines, problems = keys(model, folder)
        else:
            lines = summary(model)
    except (ValueError, OSError) as error:
        sys.exit(f"{parser.prog}: {error}")
    try:
        print("\n".join(lines), flush=True)
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(problems > 0)
