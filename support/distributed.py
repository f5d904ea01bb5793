"""Many devices: `torchrun --nproc-per-node N train.py ...` does what one device does, sooner.

Under torchrun every process runs train.py, on a device of its own, and knows the whole plan: what
differs is which rows it is dealt, and that only the first one (rank 0) writes and is heard. The
steps are those of one device: N of them change the time, the last bits of sums, and dropout.
Adapters and mmcot train under DDP, --full under FSDP2 (arXiv 2304.11277).

All must see one disk. Their results are put together by `gather_dicts`.

Left out: tensor and pipeline parallelism, offloading, elastic restarts (--resume goes on with any
number).
"""

import contextlib
import datetime
import functools
import itertools
import os
import time

import torch
import torch.distributed as dist

from support.dataset import images as pictures
from support.training.optim import trained


def world() -> int:
    """How many processes train and decode together; 1 without torchrun."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """The number of this process, from 0."""
    return dist.get_rank() if world() > 1 else 0


def gather_dicts(results: list[dict]) -> dict:
    """One dict of the results of all processes, the same in each.

    `results` has one dict per batch of this process, which are the batches rank, rank + world ...
    of all; the merged dict has them in the order of the batches.
    """
    gathered = [results]
    if world() > 1:
        gathered = [None] * world()
        dist.all_gather_object(gathered, results)
    merged = {}
    for batches in itertools.zip_longest(*gathered, fillvalue={}):
        for batch in batches:
            merged.update(batch)
    return merged


def check_device(device):
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(
            f"There is no device {device!r} that this torch can use: try --device cpu."
        )


def under_torchrun():
    """Whether torchrun started this process; its group may not be there yet, see `together`."""
    return dist.is_available() and dist.is_torchelastic_launched()


@contextlib.contextmanager
def together(args):
    """As one of torchrun's processes, if it started this one."""
    if not under_torchrun():
        yield
        return
    if args.device not in ("cpu", "cuda"):
        raise ValueError(f"--device {args.device} under torchrun: give cpu or cuda, it picks each.")
    if args.device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    backend = "cpu:gloo,cuda:nccl" if args.device == "cuda" else "gloo"
    dist.init_process_group(backend, timeout=datetime.timedelta(hours=1))
    try:
        with contextlib.ExitStack() as silence:
            if rank():
                null = silence.enter_context(open(os.devnull, "w"))
                silence.enter_context(contextlib.redirect_stdout(null))
                silence.enter_context(contextlib.redirect_stderr(null))
            yield
    except Exception:
        if rank():  # the first one may say the same; then torchrun ends this one meanwhile
            time.sleep(5)
        raise
    dist.destroy_process_group()


def on_devices(loss_of):
    """train.py's `LossOf` with gradients averaged over all devices: by DDP, which has all of the
    model on each, or (--full) by FSDP, which leaves each a part of weights, gradients, moments."""
    if world() == 1:
        return loss_of
    model, args = loss_of.model, loss_of.args
    if args.full:
        from torch.distributed.device_mesh import init_device_mesh  # seconds to import
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh(args.device, (world(),))
        for layer in (*model.vision_tower.encoder.layers, *model.language_model.layers):
            fully_shard(layer, mesh=mesh)
        return fully_shard(loss_of, mesh=mesh)
    ids = [torch.cuda.current_device()] if args.device == "cuda" else None
    # A batch without pictures gives the image tower and the projector no gradient.
    unseen = any("vision_tower" in n or "projector" in n for n in trained(model))
    ddp = torch.nn.parallel.DistributedDataParallel
    return ddp(loss_of, device_ids=ids, find_unused_parameters=unseen)


def dealt(window):
    """A window's batches as this process gets them: every `world()` of them become one, and its
    rows are dealt. So a device never has more than --batch-size at once, and all have as many
    batches.

    Who gets no row, or no picture where others train the image tower on one (it waits for all
    devices), gets one more without labels: it is in no loss, and in no gradient."""
    batches = []
    for start in range(0, len(window), world()):
        rows = [e for batch in window[start : start + world()] for e in batch]
        mine, seen = rows[rank() :: world()], [e for e in rows if trains_on_picture(e)]
        if not mine or (seen and not any(map(trains_on_picture, mine))):
            watched = (seen or rows)[0]
            mine = [*mine, watched | {"labels": [-100] * len(watched["labels"])}]
        batches.append(mine)
    return batches


def trains_on_picture(example):
    return isinstance(example.get("image_features"), pictures.LazyImage)


def own_dropout(args, done):
    """The first process draws as a single one; each other has a generator of its own."""
    if rank():
        torch.manual_seed(args.seed + (rank() << 40) + (done << 20))


# ---- what all of them know -----------------------------------------------------------------------


def summed(tensor):
    """A tensor's sum over all processes, for each of them."""
    if world() > 1:
        dist.all_reduce(tensor)
    return tensor


def agreed(*flags):
    """The flags, each set if any process has set it."""
    if world() == 1:
        return flags
    return summed(torch.tensor(flags, dtype=torch.int32)).bool().tolist()


@contextlib.contextmanager
def in_turn():
    """The first process alone, then the others, which find its files."""
    if rank():
        dist.barrier(patient_group())
    yield
    if world() > 1 and not rank():
        dist.barrier(patient_group())


@functools.cache
def patient_group():
    """The first one may be making features, or a report, for longer than a step may ever take."""
    return dist.new_group(backend="gloo", timeout=datetime.timedelta(days=7))


# ---- of what FSDP gave each device a part --------------------------------------------------------


def whole(tensor):
    """A tensor of which FSDP gave each device a part; any other as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def own_part(tensor):
    """This device's part of a tensor that FSDP dealt; any other as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


def on_first(tensor):
    """As `whole`, for a state file: in the memory of the first process; None in all others."""
    if not hasattr(tensor, "full_tensor"):
        return tensor
    tensor = tensor.full_tensor()
    return None if rank() else tensor.cpu()


def part_like(tensor, other):
    """This device's part of a whole tensor, if it has only that of `other`."""
    if not hasattr(other, "full_tensor") or tensor.shape != other.shape:
        return tensor
    from torch.distributed.tensor import distribute_tensor

    tensor = tensor.to(other.device)
    return distribute_tensor(tensor, other.device_mesh, other.placements, src_data_rank=None)


def whole_model(model):
    """A model of which FSDP gave each device a part, put together; any other as it is. Devices
    decode texts of their own, and none can wait there for the others' layers."""
    if not hasattr(next(model.parameters()), "full_tensor"):
        return model
    with torch.device("meta"):
        made = type(model)(model.config)
    tensors = {name: whole(p.detach()) for name, p in model.named_parameters()}
    made.load_state_dict(tensors, assign=True)
    return made
