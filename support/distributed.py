"""Several devices: `torchrun --nproc-per-node N train.py ...` trains as one device does, faster.

Every process runs train.py on a device of its own and knows the whole plan: what differs is its
shard of the rows, and that only the first one (rank 0) writes files and prints. N devices change
the time, the last bits of sums, and dropout. Adapters and mmcot train under DDP, --full under FSDP2
(arXiv 2304.11277). All must see the same disk; --resume takes any number of processes.
"""

import contextlib
import datetime
import functools
import itertools
import os
import time
from collections.abc import Iterator

import torch
import torch.distributed as dist

from support.dataset.images import LazyImage


def world() -> int:
    """How many processes train and decode together; 1 without torchrun."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if world() > 1 else 0


def gather_dicts(results: list[dict]) -> dict:
    """One dict of the results of all processes, the same in each. `results` has one dict per batch
    of this process, which are the batches rank, rank + world ... of all; it keeps their order."""
    gathered = [results]
    if world() > 1:
        gathered = [None] * world()
        dist.all_gather_object(gathered, results)
    merged = {}
    for batches in itertools.zip_longest(*gathered, fillvalue={}):
        for batch in batches:
            merged.update(batch)
    return merged


def check_device(device: str) -> None:
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(
            f"There is no device {device!r} that this torch can use: try --device cpu."
        )


def under_torchrun() -> bool:
    """Whether torchrun started this process; the group may not exist yet, see `together`."""
    return dist.is_available() and dist.is_torchelastic_launched()


@contextlib.contextmanager
def together(device: str) -> Iterator[None]:
    """As one of torchrun's processes, if it started this one; `device` is "cpu" or "cuda" then."""
    if not under_torchrun():
        yield
        return
    if device not in ("cpu", "cuda"):
        raise ValueError(f"--device {device} under torchrun: give cpu or cuda, it picks each.")
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=datetime.timedelta(hours=1))
    try:
        with contextlib.ExitStack() as silence:
            if rank():
                null = silence.enter_context(open(os.devnull, "w"))
                silence.enter_context(contextlib.redirect_stdout(null))
                silence.enter_context(contextlib.redirect_stderr(null))
            yield
    except Exception:
        if rank():  # the first one may print the same; then torchrun ends this one meanwhile
            time.sleep(5)
        raise
    dist.destroy_process_group()


def on_devices(loss_of: torch.nn.Module, shard: bool) -> torch.nn.Module:
    """train.py's `LossOf` with gradients averaged over all devices: by DDP, which has the whole
    model on each, or by FSDP, which leaves each a shard of weights, gradients and moments."""
    if world() == 1:
        return loss_of
    device = loss_of.settings.device  # "cpu" or "cuda"
    if shard:
        from torch.distributed.device_mesh import init_device_mesh  # seconds to import
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(device, (world(),))
        model = loss_of.model
        for layer in (*model.vision_tower.encoder.layers, *model.language_model.layers):
            fully_shard(layer, mesh=mesh)
        return fully_shard(loss_of, mesh=mesh)
    # A batch without images gives the image tower and the projector no gradient.
    may_be_unused = any(
        p.requires_grad and ("vision_tower" in name or "projector" in name)
        for name, p in loss_of.named_parameters()
    )
    return torch.nn.parallel.DistributedDataParallel(
        loss_of,
        device_ids=[torch.cuda.current_device()] if device == "cuda" else None,
        find_unused_parameters=may_be_unused,
    )


def shard_batches(window: list[list[dict]]) -> list[list[dict]]:
    """This process's shard of a window: batches of its rows.

    DDP and FSDP wait for every device at every backward pass, and for the image tower's gradients
    if one device has them. So all get equally many batches, and each of them something to compute:
    every `world()` batches become one, whose rows the processes share (never more than --batch-size
    each). Where a process has no row, or no image while others train the image tower on one, it
    gets a row of another's without labels: that adds nothing to loss or gradient."""
    shards = []
    for start in range(0, len(window), world()):
        rows = [e for batch in window[start : start + world()] for e in batch]
        shard = rows[rank() :: world()]
        images = [e for e in rows if trains_on_image(e)]
        if not shard or (images and not any(map(trains_on_image, shard))):
            filler = (images or rows)[0]
            shard = [*shard, filler | {"labels": [-100] * len(filler["labels"])}]
        shards.append(shard)
    return shards


def trains_on_image(example: dict) -> bool:
    """Whether the image tower is trained on this row: it has pixels to read, not features."""
    return isinstance(example.get("image_features"), LazyImage)


def own_dropout(seed: int, steps_done: int) -> None:
    """The first process draws as a single one would; the others have generators of their own."""
    if rank():
        torch.manual_seed(seed + (rank() << 40) + (steps_done << 20))


# ---- what all of them know -----------------------------------------------------------------------


def summed(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor's sum over all processes, for each of them."""
    if world() > 1:
        dist.all_reduce(tensor)
    return tensor


def any_rank(*flags: bool) -> tuple | list:
    """The flags, each set if any process has set it."""
    if world() == 1:
        return flags
    return summed(torch.tensor(flags, dtype=torch.int32)).bool().tolist()


@contextlib.contextmanager
def in_turn() -> Iterator[None]:
    """Run a block in the first process alone, then in the others, which find its files."""
    if rank():
        dist.barrier(patient_group())
    yield
    if world() > 1 and not rank():
        dist.barrier(patient_group())


@functools.cache
def patient_group() -> dist.ProcessGroup:
    """The first one may compute features, or write a report, for longer than any step takes."""
    return dist.new_group(backend="gloo", timeout=datetime.timedelta(days=7))


# ---- tensors that FSDP has sharded ---------------------------------------------------------------


def full_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of which each device has a shard, put together; any other as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def own_shard(tensor: torch.Tensor) -> torch.Tensor:
    """This device's shard of a tensor; one that is not sharded as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def on_first(tensor: torch.Tensor) -> torch.Tensor | None:
    """As `full_tensor`, for a state file: in the memory of the first process; None in others."""
    if not hasattr(tensor, "full_tensor"):
        return tensor
    tensor = tensor.full_tensor()
    return None if rank() else tensor.cpu()


def shard_like(tensor: torch.Tensor, other: torch.Tensor | None) -> torch.Tensor:
    """This device's shard of a full tensor, if `other` is sharded and has its shape."""
    if not hasattr(other, "full_tensor") or tensor.shape != other.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    tensor = tensor.to(other.device)
    return distribute_tensor(tensor, other.device_mesh, other.placements, src_data_rank=None)


def full_model(model: torch.nn.Module) -> torch.nn.Module:
    """A new, whole copy on each device if FSDP has sharded the model; else the model itself.
    Devices decode texts of their own, and none can wait there for the others' layers."""
    if not hasattr(next(model.parameters()), "full_tensor"):
        return model
    with torch.device("meta"):
        full = type(model)(model.config)
    tensors = {name: full_tensor(p.detach()) for name, p in model.named_parameters()}
    full.load_state_dict(tensors, assign=True)
    return full
