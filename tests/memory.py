"""How many bytes a training step holds at its peak, counted without holding them.

Weights and activations are fake: they have a shape, a dtype and a life, but no numbers. Every
operation's outputs are counted when they are born and when the last reference to them dies, so a
3B model's step takes seconds, repeats to the byte, and needs no GPU. Ids, masks and positions stay
real, so that the code under test takes the branches it would take.

What is counted is what the program holds (live bytes): weights, activations, gradients, AdamW's
moments and every temporary between two operations. What is not: an allocator's rounding and
fragments, and what a kernel borrows while it runs.
"""

import weakref

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

GIB = 2**30
FAKE = FakeTensorMode(allow_non_fake_inputs=True)
# The published 3B at 448 pixels.
VISION = dict(hidden_size=1152, intermediate_size=4304, num_hidden_layers=27)
VISION |= dict(num_attention_heads=16, patch_size=14, image_size=448)
TEXT = dict(vocab_size=257216, num_hidden_layers=26)
PREFIX, SUFFIX, IMAGE = 100, 300, 257152
PROJECTIONS = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages alive while it is entered: `now`, `peak`, and `where` that was.

    An operation runs for real if all its tensors are real, else on shapes alone; a boolean index
    becomes places first, as it says how many there are.
    """

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.where, self.alive = "", {}

    def count(self, tensors):
        for tensor in tree_iter(tensors):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.alive:
                    self.alive[storage._cdata] = storage.nbytes()
                    self.now += storage.nbytes()
                    weakref.finalize(storage, self.forget, storage._cdata)

    def forget(self, key):
        self.now -= self.alive.pop(key)

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        if op is torch.ops.aten.index.Tensor:
            args = args[0], [p for i in args[1] for p in places(i)], *args[2:]
        out = op(*args, **(kwargs or {}))
        self.count(out)
        if self.now > self.peak:
            self.peak, self.where = self.now, str(op)
        return out


def places(index):
    masked = index is not None and index.dtype == torch.bool and type(index) is torch.Tensor
    return index.nonzero().unbind(1) if masked else (index,)


def made_of_nothing(model):
    """A model of the meta device, its tensors replaced by fake ones (buffers of ids: by zeros)."""
    fakes = {}
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, t in table.items():
                if t is not None:
                    table[name] = fakes.setdefault(id(t), t) if id(t) in fakes else fake(t)
                    fakes[id(t)] = table[name]
    return model


def fake(t):
    if not t.is_floating_point():
        return torch.zeros_like(t, device="cpu")
    with FAKE:
        made = torch.empty_like(t, device="cpu")
    return torch.nn.Parameter(made, t.requires_grad) if isinstance(t, torch.nn.Parameter) else made
