"""--dry-run: what a training takes, measured on one step of its longest batch; nothing is written.

What is kept for the backward pass grows by the same amount with each row, so it is counted on one
and on two rows of the longest batch (unique storages of the saved tensors) and extrapolated to the
batch: nothing is tried that may not fit. Not in the sum: what a kernel needs while it runs,
validation and decoding, many devices.
"""

import contextlib
import ctypes
import gc
import math
import os
import time
from collections.abc import Iterable
from pathlib import Path

import torch

import data
import lora
from model import Gemma2Config, PaliGemma, T5Config
from support import kernels
from support.checkpoints.hub import resolve
from support.checkpoints.weights import headers
from support.dataset.features import Features
from support.evaluation import models
from support.training import optim
from support.training.examples import check_widths
from support.training.optim import AdamW, LossOf, Plan, Rows, trained
from support.training.settings import Settings

GIB = 2**30


def blank_features(
    settings: Settings, problems: list[data.Problem], model: PaliGemma | None = None
) -> data.ImageSource | None:
    """Features of zeros in the shape that these problems' images will have."""
    if settings.model == "mmcot":
        check_widths(settings)
    if model is not None:
        adapted = lora.adapters(model)
        if settings.full or not all(name.startswith("language_model.") for name in adapted):
            return models.image_features(settings, problems, model)  # pixels, read when used
        shape = (model.config.image_tokens, model.config.text.hidden_size)
    elif settings.vision == "none" or settings.features:
        return models.image_features(settings, problems)
    else:
        folder = resolve(settings.vision_weights)
        count = sum(math.prod(header.shape) for header in headers(folder).values())
        print(f"  {folder}: {count:,} numbers, frozen; it sees each image once, before training")
        shape = models.feature_shape(settings)
    rows = {p.id: 0 for p in problems if p.image is not None}
    return Features(torch.zeros(1, *shape).numpy(), rows)


def dry_run(settings: Settings, plans: Iterable[Plan]) -> None:
    """Print parameters, memory, one step and the time of each training of a run."""
    print(f"{settings.out}: recipe {settings.recipe}", flush=True)
    kept = []  # their models stay in memory, as in a run
    for plan in plans:
        kept.append(plan)
        if plan.windows:
            dry_step(plan)
    if not any(plan.windows for plan in kept):
        print("  nothing is trained: it only decodes")


def dry_step(plan: Plan) -> None:
    """Print what a training takes and what the device has; then, if that fits, take one step."""
    loss_of = plan.loss_of
    settings = loss_of.settings
    device = settings.device
    model = loss_of.model.to(device)
    if not settings.plain:
        kernels.enable(model)
    optimizer = optim.make_optimizer(model, settings.weight_decay)
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # glibc keeps what another stage freed
        ctypes.CDLL(None).malloc_trim(0)
    before = held(device)
    total = sum(p.numel() for p in model.parameters())
    learned = sum(p.numel() for p in trained(model).values())
    batches = [rows for window in plan.windows for rows in window]
    longest = max(batches, key=tokens)
    source, target = longest_row(longest)
    print(f"  {learned:,} parameters trainable, {total - learned:,} frozen")
    sizes = memory(loss_of, longest)
    sizes["program and data"] = max(0, before - sizes["weights"])
    needed = sum(sizes.values())
    for name, size in (sizes | {"in all": needed}).items():
        print(f"    {name:18} {size / GIB:8.3f} GiB")
    print(f"    the longest batch: {len(longest)} rows of {source} + {target} tokens")
    decoded = settings.eval_batch_size
    cache = decoded * cache_size(model, source + max(settings.max_output))
    print(f"    (decoding {decoded} rows: a cache of {cache / GIB:.3f} GiB)")
    free, capacity = device_memory(device)
    print(f"    {device} has {capacity / GIB:.1f} GiB, {free / GIB:.1f} GiB of it free")
    if needed > free + before:
        print(
            f"  Not tried: {needed / GIB:.1f} GiB are needed, more than is free. Take a smaller "
            "--batch-size (with --accumulate the result is the same), --checkpointing or a "
            "smaller model."
        )
        return
    timed_step(loss_of, optimizer, [min(batches, key=tokens)])  # makes AdamW's moments
    window = [longest] * min(2, len(plan.windows[0]))
    seconds, peak = timed_step(loss_of, optimizer, window)
    off = 100 * (needed / peak - 1)
    print(f"  one step of it: {seconds:.2f} s, peak {peak / GIB:.3f} GiB, estimated {off:+.0f} %")
    rate = seconds / tokens(longest) / len(window)
    minutes = rate * sum(map(tokens, batches)) / 60
    print(f"  {len(plan.windows)} steps: {minutes:.1f} minutes, without validation and decoding")


def tokens(rows: Rows) -> int:
    """How many tokens a batch has, with its pads."""
    return len(rows) * sum(longest_row(rows))


def longest_row(rows: Rows) -> tuple[int, int]:
    """The longest source and target of a batch; PaliGemma's target is in its source."""
    target = 0 if "token_type_ids" in rows[0] else max(len(e["labels"]) for e in rows)
    return max(len(e["input_ids"]) for e in rows), target


# ---- memory --------------------------------------------------------------------------------------


def memory(loss_of: LossOf, rows: Rows) -> dict[str, int]:
    """{name: bytes} of a training step on these rows, without the program itself."""
    model = loss_of.model
    tensors = [*model.parameters(), *model.buffers()]
    learned = sum(p.nbytes for p in trained(model).values())
    sizes = {
        "weights": sum(t.nbytes for t in tensors),
        "gradients": learned,
        "AdamW's moments": 2 * learned,
    }
    if is_paligemma(model) or loss_of.settings.keep_epoch[0] == "best":
        sizes["best epoch"] = learned
    sizes["activations"] = activations(loss_of, rows)
    logits = min(optim.LOGITS, optim.units([rows], "token") * text_config(model).vocab_size)
    sizes["logits"] = 3 * 4 * logits  # themselves, their softmax and their gradient
    return sizes


def activations(loss_of: LossOf, rows: Rows) -> int:
    """Bytes that a forward pass of these rows keeps: as many times the longest one."""
    model = loss_of.model
    longest = max(rows, key=lambda e: len(e["input_ids"]))
    if not is_paligemma(model):
        longest = longest | {"labels": max((e["labels"] for e in rows), key=len)}

    def extrapolated() -> int:
        one = saved(loss_of, [longest])
        return one + (len(rows) - 1) * (saved(loss_of, [longest] * 2) - one)

    size = extrapolated()
    text = getattr(model, "language_model", None)
    if text is not None and text.checkpointing:
        # In the backward pass one layer at a time has all of it again.
        text.checkpointing = False
        size += (extrapolated() - size) // len(text.layers)
        text.checkpointing = True
    return size


def saved(loss_of: LossOf, rows: Rows) -> int:
    """Bytes that a forward pass keeps for the backward pass, without logits and weights."""
    model = loss_of.model
    batch = loss_of.batch(rows)
    sizes = {}  # {address: bytes}
    weights = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # with its graph it would never be freed

    model.train()
    before = optim.LOGITS
    # Half of the tokens a chunk, so that the loss is taken in chunks and no logits are kept.
    chunk = max(1, optim.units([rows], "token") // 2)
    optim.LOGITS = chunk * text_config(model).vocab_size
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss, _ = loss_of(batch)  # kept alive: so all addresses differ
    finally:
        optim.LOGITS = before
    del loss
    return sum(size for address, size in sizes.items() if address not in weights)


def is_paligemma(model: torch.nn.Module) -> bool:
    return hasattr(model, "language_model")


def text_config(model: torch.nn.Module) -> T5Config | Gemma2Config:
    """The config of what writes: T5, or PaliGemma's Gemma."""
    return model.config.text if is_paligemma(model) else model.t5.config


def cache_size(model: torch.nn.Module, length: int) -> int:
    """Bytes of keys and values when one row of that length is decoded."""
    c = text_config(model)
    if is_paligemma(model):
        numbers = c.num_hidden_layers * c.num_key_value_heads * c.head_dim
    else:
        numbers = c.decoder_layers * c.num_heads * c.d_kv
    return 2 * numbers * length * next(model.parameters()).element_size()


# ---- one step ------------------------------------------------------------------------------------


def timed_step(loss_of: LossOf, optimizer: AdamW, window: list[Rows]) -> tuple[float, int]:
    """(seconds, peak bytes) of a step as train.py's `take_step` takes it, without its checks."""
    model = loss_of.model
    device = loss_of.settings.device
    on_gpu = device.startswith("cuda")
    if on_gpu:
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts again
    start = time.monotonic()
    model.train()
    for rows in window:
        loss, count = loss_of(loss_of.batch(rows))
        (loss / count).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step(lr=0.0)  # takes as long as with any other
    optimizer.zero_grad()
    if on_gpu:
        torch.cuda.synchronize(device)
    seconds = time.monotonic() - start
    return seconds, torch.cuda.max_memory_allocated(device) if on_gpu else process_memory("VmHWM:")


def held(device: str) -> int:
    """Bytes that this process holds; on a GPU, that its tensors take."""
    if device.startswith("cuda"):
        return torch.cuda.memory_allocated(device)
    return process_memory("VmRSS:")


def process_memory(line: str) -> int:
    """Bytes, of a line of Linux's /proc/self/status: VmRSS: now, VmHWM: at the peak."""
    try:
        text = Path("/proc/self/status").read_text()
        return 1024 * int(text.split(line)[1].split()[0])
    except OSError:  # macOS has only the peak, in bytes
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def device_memory(device: str) -> tuple[int, int]:
    """(bytes free, bytes in all) of a GPU, or of the machine; a container may have less."""
    if device.startswith("cuda"):
        free, capacity = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - held(device), capacity
    capacity = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    free = capacity
    with contextlib.suppress(OSError, IndexError):
        text = Path("/proc/meminfo").read_text()
        free = 1024 * int(text.split("MemAvailable:")[1].split()[0])
    with contextlib.suppress(OSError, ValueError):  # "max": no limit
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        capacity = min(capacity, limit)
        free = min(free, limit - used)
    return free, capacity
