"""--dry-run: what a training takes, measured on one step of its longest batch; nothing is written.

What is kept for the way back grows by the same amount with each row, so it is counted on one and
on two rows of the longest batch (unique storages of the saved tensors) and goes from there to the
batch: nothing is tried that may not fit. Pictures are not looked at: features of zeros stand for
them.

Left out, and so not in the sum: what a kernel needs while it runs, validation and decoding, many
devices.
"""

import contextlib
import ctypes
import gc
import math
import os
import time
from pathlib import Path

import torch

import lora
from support.checkpoints.hub import resolve
from support.checkpoints.weights import headers
from support.dataset.features import Features
from support.evaluation import models as loading
from support.training import optim as optimizing
from support.training.optim import trained

GIB = 2**30


def blank_features(args, problems, model=None):
    """Features of zeros in the shape that these problems' pictures will have."""
    if model is not None:
        inside = all(name.startswith("language_model.") for name in lora.adapters(model))
        if args.full or not inside:
            return loading.image_features(args, problems, model)  # pixels, read when used
        shape = model.config.image_tokens, model.config.text.hidden_size
    elif args.vision in loading.NO_VISION or args.features:
        return loading.image_features(args, problems)
    else:
        folder = resolve(args.vision_weights)
        count = sum(math.prod(header.shape) for header in headers(folder).values())
        print(f"  {folder}: {count:,} numbers, frozen; it sees each picture once, before training")
        encoder = loading.feature_extractor(args)
        shape = encoder.extract([torch.zeros(3, encoder.size, encoder.size)])[0].shape
    rows = {p.id: 0 for p in problems if p.image is not None}
    return Features(torch.zeros(1, *shape).numpy(), rows)


def dry_step(loss_of, optimizer, plan):
    """Print what a training takes and what the device has; then, if that fits, one step. `loss_of`
    is train.py's `LossOf`: it makes a batch of rows, and gives the loss of one."""
    model, args = loss_of.model, loss_of.args
    if not plan:
        return print("  nothing is trained: it only decodes")
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):  # glibc keeps what another stage gave back
        ctypes.CDLL(None).malloc_trim(0)
    before = held(args.device)
    total = sum(p.numel() for p in model.parameters())
    learned = sum(p.numel() for p in trained(model).values())
    rows = max((rows for window in plan for rows in window), key=tokens)
    source, target = longest_row(rows)
    print(f"  {learned:,} parameters trainable, {total - learned:,} frozen")
    sizes = memory(loss_of, rows)
    sizes["program and data"] = max(0, before - sizes["weights"])
    for name, size in (sizes | {"in all": sum(sizes.values())}).items():
        print(f"    {name:18} {size / GIB:8.3f} GiB")
    print(f"    the longest batch: {len(rows)} rows of {source} + {target} tokens")
    cache = cache_size(model, source, args)
    print(f"    (decoding {args.eval_batch_size} rows: a cache of {cache / GIB:.3f} GiB)")
    free_now, has = device_memory(args.device)
    print(f"    {args.device} has {has / GIB:.1f} GiB, {free_now / GIB:.1f} GiB of it free")
    if (needed := sum(sizes.values())) > free_now + before:
        return print(
            f"  Not tried: {needed / GIB:.1f} GiB are more than there are. Take a smaller "
            "--batch-size (with --accumulate the result is the same), --checkpointing or a "
            "smaller model."
        )
    shortest = min((rows for window in plan for rows in window), key=tokens)
    timed_step(loss_of, optimizer, [shortest])  # makes AdamW's moments
    seconds, peak = timed_step(loss_of, optimizer, [rows] * min(2, args.accumulate))
    off = 100 * (needed / peak - 1)
    print(f"  one step of it: {seconds:.2f} s, peak {peak / GIB:.3f} GiB, estimated {off:+.0f} %")
    rate = seconds / tokens(rows) / min(2, args.accumulate)
    whole = rate * sum(tokens(rows) for window in plan for rows in window)
    print(f"  {len(plan)} steps: {whole / 60:.1f} minutes, without validation and decoding")


def tokens(rows):
    """How many tokens a batch has, with its pads."""
    return len(rows) * sum(longest_row(rows))


def longest_row(rows):
    """The longest source and target of a batch; PaliGemma's target is in its source."""
    target = 0 if "token_type_ids" in rows[0] else max(len(e["labels"]) for e in rows)
    return max(len(e["input_ids"]) for e in rows), target


# ---- memory --------------------------------------------------------------------------------------


def memory(loss_of, rows):
    """{what: bytes} of a training step on these rows, the program itself left out."""
    model, args = loss_of.model, loss_of.args
    tensors = [*model.parameters(), *model.buffers()]
    learned = sum(p.numel() * p.element_size() for p in trained(model).values())
    sizes = {"weights": sum(t.numel() * t.element_size() for t in tensors)}
    sizes |= {"gradients": learned, "AdamW's moments": 2 * learned}
    if args.model == "paligemma":
        sizes["best epoch"] = learned
    longest = max(rows, key=lambda e: len(e["input_ids"]))
    if args.model == "mmcot":
        longest = longest | {"labels": max((e["labels"] for e in rows), key=len)}
    text = getattr(model, "language_model", None)
    recomputed = 0
    one, two = (saved(loss_of, [longest] * n) for n in (1, 2))
    if text is not None and text.checkpointing:  # on the way back one layer has all of it again
        text.checkpointing = False
        plain = [saved(loss_of, [longest] * n) for n in (1, 2)]
        text.checkpointing = True
        recomputed = plain[0] - one + (len(rows) - 1) * (plain[1] - plain[0] - two + one)
        recomputed //= len(text.layers)
    sizes["activations"] = one + (len(rows) - 1) * (two - one) + recomputed
    count = sum(label != -100 for e in rows for label in e["labels"])
    logits = min(optimizing.LOGITS, count * text_config(model).vocab_size)
    sizes["logits"] = 3 * 4 * logits  # themselves, their softmax and their gradient
    return sizes


def saved(loss_of, rows):
    """Bytes that a forward pass keeps for the way back, logits and weights left out."""
    model, batch, sizes = loss_of.model, loss_of.batch(rows), {}
    part = max(1, sum(label != -100 for e in rows for label in e["labels"]) // 2)
    weights = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}

    def pack(tensor):
        storage = tensor.untyped_storage()
        sizes[storage.data_ptr()] = storage.nbytes()
        return tensor.detach()  # with its graph it would never be freed

    model.train()
    most = optimizing.LOGITS
    optimizing.LOGITS = part * text_config(model).vocab_size  # in chunks: no logits are kept
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss, _ = loss_of(batch)  # alive: all addresses differ
    finally:
        optimizing.LOGITS = most
    del loss
    return sum(size for place, size in sizes.items() if place not in weights)


def text_config(model):
    """Of the part that writes: T5, or PaliGemma's Gemma."""
    return model.t5.config if hasattr(model, "t5") else model.config.text


def cache_size(model, source, args):
    """Bytes of keys and values when --eval-batch-size rows are decoded at full length."""
    new, size = max(args.max_output), next(model.parameters()).element_size()
    c = text_config(model)
    if args.model == "mmcot":
        each = 2 * c.decoder_layers * c.num_heads * c.d_kv * (source + new)
    else:
        each = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim * (source + new)
    return args.eval_batch_size * each * size


# ---- one step ------------------------------------------------------------------------------------


def timed_step(loss_of, optimizer, window):
    """(seconds, peak bytes) of a step as train.py's `take_step` does it, without its guards."""
    model, device = loss_of.model, loss_of.args.device
    cuda = device.startswith("cuda")
    if cuda:
        torch.cuda.reset_peak_memory_stats(device)
    else:
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak starts anew
    start = time.monotonic()
    model.train()
    for rows in window:
        loss, count = loss_of(loss_of.batch(rows))
        (loss / count).backward()
    torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    optimizer.zero_grad()
    if cuda:
        torch.cuda.synchronize(device)
        return time.monotonic() - start, torch.cuda.max_memory_allocated(device)
    return time.monotonic() - start, held("peak")


def held(what):
    """Bytes that this process holds, on a GPU what its tensors take; "peak": the most it held."""
    if what.startswith("cuda"):
        return torch.cuda.memory_allocated(what)
    try:
        told = Path("/proc/self/status").read_text()
        line = "VmHWM:" if what == "peak" else "VmRSS:"
        return 1024 * int(told.split(line)[1].split()[0])
    except OSError:  # macOS tells only the most, in bytes
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def device_memory(device):
    """(bytes free, bytes in all) of a GPU, or of the machine; a container may have less."""
    if device.startswith("cuda"):
        free_now, has = torch.cuda.mem_get_info(device)
        return free_now + torch.cuda.memory_reserved(device) - held(device), has
    has = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    free_now = has
    with contextlib.suppress(OSError, IndexError):
        told = Path("/proc/meminfo").read_text()
        free_now = 1024 * int(told.split("MemAvailable:")[1].split()[0])
    with contextlib.suppress(OSError, ValueError):  # "max": no limit
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        has, free_now = min(has, limit), min(free_now, limit - used)
    return free_now, has
