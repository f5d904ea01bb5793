"""Tensors of a checkpoint folder: reading the headers, filling a model, writing, old pickles.

Everything is safetensors; a pytorch_model.bin is converted once, next to itself. Loading is strict:
a tensor that is missing, unexpected or of another shape is an error that names it.
"""

import contextlib
import functools
import itertools
import math
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from support.checkpoints.keys import KeyTable, table_of
from support.files import checksum, read_json, write_json

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
PICKLE = "pytorch_model.bin"
SOURCE = "model.safetensors.source.json"  # next to a converted pickle: checksums of the two
LISTED = 5  # names of each kind in a refusal; --keys prints all


def json_object(path: Path) -> dict:
    """The JSON object in a file; ValueError if it holds anything else."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise ValueError(f"{path} holds {type(value).__name__}, not a JSON object.")
    return value


def first_names(names: list[str]) -> str:
    """The first few names of a list, and how many more there are."""
    more = len(names) - LISTED
    return ", ".join(names[:LISTED]) + (f" and {more} more" if more > 0 else "")


def listed(problems: dict[str, list[str]]) -> str:
    """ "2 missing: a, b; 1 unexpected: c" for {kind: names}; "" if there are none."""
    return "; ".join(
        f"{len(x)} {kind}: {first_names(sorted(x))}" for kind, x in problems.items() if x
    )


# ---- Which files, and what their headers say -----------------------------------------------------


class Header(NamedTuple):
    path: Path
    shape: tuple[int, ...]
    dtype: str  # as safetensors calls it: "F32", "BF16"


def weight_files(folder: str | Path) -> list[Path]:
    """The safetensors files of a checkpoint folder, its pickle converted if it has nothing else.

    Raises FileNotFoundError without any, ValueError for an index that names no files.
    """
    folder = Path(folder)
    index = folder / INDEX
    if index.is_file():
        names = json_object(index).get("weight_map")
        names = list(names.values()) if isinstance(names, dict) else [None]
        # Files of its own folder only: an index from a stranger must not read anything else.
        if not all(isinstance(name, str) and Path(name).name == name for name in names):
            raise ValueError(f"{index} has no weight_map to files of its own folder. Get it again.")
        return sorted({folder / name for name in names})
    single = folder / SINGLE
    pickle = folder / PICKLE
    if pickle.is_file() and (not single.is_file() or is_outdated(single, pickle)):
        convert_pickle(pickle)
    if not single.is_file():
        raise FileNotFoundError(f"{folder} has neither {SINGLE}, {INDEX} nor {PICKLE}.")
    return [single]


def headers(folder: str | Path) -> dict[str, Header]:
    """{name in the file: its header} over every weight file of a checkpoint folder."""
    found = {}
    for path in weight_files(folder):
        with opened(path) as file:
            for name in file.keys():  # noqa: SIM118 (not a dict)
                header = file.get_slice(name)
                found[name] = Header(path, tuple(header.get_shape()), header.get_dtype())
    return found


@contextlib.contextmanager
def opened(path: Path) -> Iterator[safe_open]:
    """A safetensors file; whatever its reader finds wrong with it is a ValueError that names it."""
    try:
        if not path.is_file():
            raise FileNotFoundError("there is no such file")  # reading a pipe would never end
        with safe_open(path, "pt") as file:
            yield file
    except (SafetensorError, OSError, AttributeError, TypeError, RuntimeError) as e:
        raise ValueError(f"{path} cannot be read as safetensors ({e}). Get it again.") from e


def head_is_tied(folder: str | Path) -> bool:
    """False iff the files hold an lm_head that differs from the input embedding.

    The config cannot tell: transformers 5 writes tie_word_embeddings=true for FLAN-T5 as well, and
    PaliGemma2's says false of a text model whose head is the embedding.
    """
    stored = headers(folder)
    heads = [name for name in stored if name.endswith("lm_head.weight")]
    inputs = [name for name in stored if name.endswith(("shared.weight", "embed_tokens.weight"))]
    if not heads or not inputs:
        return True
    embedding = min(inputs, key=len)  # T5's copies of `shared` have longer names
    with opened(stored[heads[0]].path) as file:
        head = file.get_tensor(heads[0])
    with opened(stored[embedding].path) as file:
        embedding = file.get_tensor(embedding)
    return head.dtype == embedding.dtype and torch.equal(head, embedding)


# ---- Pickles -------------------------------------------------------------------------------------


def is_outdated(single: Path, pickle: Path) -> bool:
    """Whether `single` was converted here from other contents of the pickle next to it. A file of
    somebody else's is never replaced."""
    note = single.with_name(SOURCE)
    if not note.is_file():
        return False
    source = json_object(note)
    return source.get(PICKLE) != sha256(pickle) and source.get(SINGLE) == sha256(single)


def sha256(path: Path) -> str:
    """A file's checksum, computed once for each size and time of its last change."""
    stat = path.stat()
    return sha256_at(path, stat.st_size, stat.st_mtime_ns)


@functools.lru_cache
def sha256_at(path: Path, size: int, mtime: int) -> str:
    return checksum(path)


def convert_pickle(path: Path) -> None:
    """Convert pytorch_model.bin to model.safetensors next to it, and note what it was made from.

    Only tensors are unpickled (`weights_only=True`); a file that holds code is refused. Several
    names of one tensor (T5's tied embeddings) are stored once, as safetensors wants it.
    """
    source = sha256(path)  # before reading: if it changes meanwhile, it is converted again
    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # a broken pickle makes its reader raise almost anything
        reason = (str(e).strip() or type(e).__name__).splitlines()[0]
        raise ValueError(
            f"{path} is not a plain file of tensors and was not loaded ({reason}). Pickles that "
            "hold code are refused: use a safetensors version of these weights."
        ) from e
    named = isinstance(tensors, dict) and all(isinstance(name, str) for name in tensors)
    if not named or not all(map(is_plain, tensors.values())):
        raise ValueError(
            f"{path} does not hold a dict of tensors, so these are not the weights of a model."
        )
    kept = {}
    for name in sorted(tensors, key=len):  # of several names the shortest: "shared.weight"
        t = tensors[name]
        kept.setdefault((t.data_ptr(), t.shape, t.stride()) if t.numel() else name, name)
    unique = {name: tensors[name] for name in kept.values()}
    target = path.with_name(SINGLE)
    try:
        write_safetensors(unique, target)
    except (RuntimeError, ValueError, SafetensorError) as e:  # tensors that overlap in memory
        raise ValueError(f"{path} could not be converted to {SINGLE} next to it ({e}).") from e
    # Not in the file's own metadata, whose order is random: the same weights keep their checksum.
    write_json({PICKLE: source, SINGLE: sha256(target)}, path.with_name(SOURCE))


def is_plain(t: object) -> bool:
    """Whether a tensor from a pickle has its numbers in memory. A view that claims more of them
    than its storage holds would be written out in full: a few bytes that become terabytes."""
    if not torch.is_tensor(t) or t.layout != torch.strided or t.device.type != "cpu":
        return False
    return t.numel() * t.element_size() <= t.untyped_storage().nbytes()


# ---- From the files into a model -----------------------------------------------------------------


class Weight(NamedTuple):
    """A tensor of the files, or one of ours that they lack, and what becomes of it."""

    fate: str  # "matched", "skipped" or one of UNFIT
    theirs: str  # its name in the file, or the one it should have there
    ours: str | None
    header: Header | None  # None if the files lack it
    shape: tuple[int, ...] | None  # of our tensor

    def __str__(self) -> str:
        if self.fate != "of another shape":
            return self.theirs
        return f"{self.theirs}: file {list(self.header.shape)}, model {list(self.shape)}"


UNFIT = ("missing", "unexpected", "of another shape")


def weight_rows(module: nn.Module, folder: str | Path) -> list[Weight]:
    """A `Weight` for each tensor in `folder` and for each of the module that is not there."""
    table = table_of(type(module))
    wanted = {name: tuple(t.shape) for name, t in module.state_dict().items()}
    rows = []
    for theirs, header in headers(folder).items():
        ours = table.to_ours(theirs)
        shape = wanted.pop(ours, None)
        fate = "unexpected"  # or known by another spelling already
        if shape is not None:
            fate = "matched" if shape == header.shape else "of another shape"
        elif ours is None or re.fullmatch(r"(t5\.)?lm_head\.weight", ours):  # tied: a copy
            fate = "skipped"
        rows.append(Weight(fate, theirs, ours if shape is not None else None, header, shape))
    for ours, shape in wanted.items():
        rows.append(Weight("missing", table.to_file(ours), ours, None, shape))
    return rows


def unfit(rows: list[Weight]) -> str:
    """The rows that do not fit: for each fate the number and the first names; "" if all do."""
    return listed({fate: [str(row) for row in rows if row.fate == fate] for fate in UNFIT})


def cause(rows: list[Weight], folder: str | Path, table: KeyTable) -> str:
    """A sentence and a space on why the rows do not fit, where that is known, else ""."""
    config = Path(folder) / "config.json"
    quantization = json_object(config).get("quantization_config") if config.is_file() else None
    if quantization:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else None
        return f"They are quantised (quantization_config, {method}): use the original weights. "
    names = [row.theirs for row in rows if row.header is not None]
    if any(".encoder.stages." in name for name in names):
        return (
            "Their ResNet was saved by transformers (use_timm_backbone=false): use a DETR with "
            "timm's, as facebook/detr-resnet-50. "
        )
    if prefix := foreign_prefix(names, table):
        return f"Every name begins with {prefix!r}: save the model without its wrapper. "
    return ""


def foreign_prefix(names: list[str], table: KeyTable) -> str:
    """What begins all names, if the table knows them without it ("module.", "_orig_mod.")."""
    parts = names[0].split(".") if names else []
    for count in range(1, min(len(parts), 4)):
        prefix = ".".join(parts[:count]) + "."
        if not all(name.startswith(prefix) for name in names):
            return ""
        ours = [table.to_ours(name.removeprefix(prefix)) for name in names]
        if not any(name and name.startswith("?") for name in ours):
            return prefix
    return ""


def load_weights(module: nn.Module, folder: str | Path, dtype: torch.dtype) -> None:
    """Fill `module`, built on the meta device, from the checkpoint in `folder`; strict.

    Tensors are memory-mapped into place and copied only where `dtype` differs from the file's.
    Raises ValueError that says which tensors are missing, unexpected or of another shape, as the
    file calls them, or do not hold finite floating-point numbers; and for fp16.
    """
    if dtype == torch.float16:
        raise ValueError(
            "float16 is refused: T5 and Gemma overflow in it and small gradients vanish. Use "
            "bfloat16 where the device supports it well, else float32."
        )
    rows = weight_rows(module, folder)
    if problems := unfit(rows):
        raise ValueError(
            f"The weights in {folder} do not fit {type(module).__name__} as its config.json "
            f"describes it. {cause(rows, folder, table_of(type(module)))}Tensors {problems}."
        )
    matched = [row for row in rows if row.fate == "matched"]
    tensors = {}
    for path, group in itertools.groupby(matched, lambda row: row.header.path):
        with opened(path) as file, ThreadPoolExecutor(min(4, os.cpu_count() or 1)) as pool:
            of_file = list(group)
            read = pool.map(partial(usable_tensor, file, dtype), of_file)
            tensors |= dict(zip(of_file, read, strict=True))
    if bad := sorted(row.theirs for row, t in tensors.items() if t is None):
        raise ValueError(
            f"The weights in {folder} are not finite {dtype} numbers in {len(bad)} tensors: "
            f"{first_names(bad)}. They were stored as integers, or by a run that diverged."
        )
    module.load_state_dict({row.ours: t for row, t in tensors.items()}, assign=True)


def usable_tensor(file: safe_open, dtype: torch.dtype, row: Weight) -> torch.Tensor | None:
    """A tensor of a file in this dtype; None if it does not hold finite floating-point numbers.

    NaN and infinity show in the sum, which runs at the memory's speed; where only the sum has
    overflown, the extremes decide."""
    t = file.get_tensor(row.theirs)
    converted = t.to(dtype)
    finite = math.isfinite(converted.sum()) or all(map(math.isfinite, converted.aminmax()))
    return converted if t.is_floating_point() and finite else None


# ---- Writing -------------------------------------------------------------------------------------


def write_safetensors(tensors: dict[str, torch.Tensor], path: Path) -> None:
    """Write next to `path`, then rename: whoever has the old file mapped keeps a whole one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    contiguous = {name: t.detach().contiguous() for name, t in tensors.items()}
    try:
        save_file(contiguous, temporary, {"format": "pt"})
        temporary.chmod(0o644)  # the library writes for the owner alone
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def in_file_names(module: nn.Module) -> dict[str, torch.Tensor]:
    """{name in the files: tensor} of the module; ValueError if its table lacks one."""
    table = table_of(type(module))
    tensors = {table.to_file(name): t for name, t in module.state_dict().items()}
    if unknown := sorted(name[1:] for name in tensors if name.startswith("?")):
        raise ValueError(
            f"{type(module).__name__} has tensors that its table of file names has no row for: "
            f"{first_names(unknown)}. A layer of your own needs a row there. Adapters are saved "
            "with lora.save, or put into the weights first with lora.merge(model, remove=True)."
        )
    return tensors
