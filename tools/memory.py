"""How many bytes a training step of the released PaliGemma 2 holds at its peak; none is held.

Weights and activations are fake: they have a shape, a dtype and a life, but no numbers. The outputs
of every operation are counted when they are born and when the last reference to them dies, so the
3B model's step takes seconds, repeats to the byte and needs no GPU. Ids, masks and positions are
real, so that the code takes the branches it would take.

Counted is what the program holds (live bytes): weights, activations, gradients, AdamW's moments and
every temporary between two operations. Not counted: an allocator's rounding and fragments, and what
a kernel borrows while it runs. tests/test_memory.py compares a count with the real allocator's.
"""

import weakref

import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

import lora
import train
from model import Gemma2Config, PaliGemma, PaliGemmaConfig, SigLIPConfig
from support import kernels

GIB = 2**30
FAKE = FakeTensorMode(allow_non_fake_inputs=True)
IMAGE, PREFIX, SUFFIX = 1024, 100, 300  # tokens: an image of 448 pixels, question, thought
LAYERS = 26
PROJECTIONS = "q_proj k_proj v_proj o_proj gate_proj up_proj down_proj".split()
LANGUAGE = rf".*language_model.*\.({'|'.join(PROJECTIONS)})"


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of storages that are alive: `now`, and `peak` at most, while entered."""

    def __init__(self):
        super().__init__()
        self.alive, self.now, self.peak = {}, 0, 0

    def count(self, tensors):
        """Tensors that were there before; all that is made from now on is counted by itself."""
        for t in tree_iter(tensors):
            if torch.is_tensor(t) and t.untyped_storage()._cdata not in self.alive:
                storage = t.untyped_storage()
                self.alive[storage._cdata] = storage.nbytes()
                self.now += storage.nbytes()
                weakref.finalize(storage, self.forget, storage._cdata)
        self.peak = max(self.peak, self.now)

    def forget(self, key):
        self.now -= self.alive.pop(key)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.index.Tensor:  # a mask becomes places: it says how many
            args = args[0], [place for i in args[1] for place in places(i)], *args[2:]
        made = function(*args, **kwargs or {})
        self.count(made)
        return made


def places(index):
    masks = type(index) is torch.Tensor and index.dtype == torch.bool
    return index.nonzero().unbind(1) if masks else (index,)


def made_fake(model):
    """A model of the meta device with fake tensors in it; buffers of ids are real zeros."""
    made = {}
    for module in model.modules():
        for table in (module._parameters, module._buffers):
            for name, t in table.items():
                if t is not None:
                    key = id(t)  # tied weights stay one
                    table[name] = made[key] = made[key] if key in made else fake(t)
                    made[id(made[key])] = made[key]
    return model


def fake(t):
    if not t.is_floating_point():
        return torch.zeros_like(t, device="cpu")
    with FAKE:
        empty = torch.empty_like(t, device="cpu")
    return nn.Parameter(empty, t.requires_grad) if isinstance(t, nn.Parameter) else empty


def step_peak(model, loss_of, batch):
    """Live bytes at the peak of one step, AdamW's moments being there from the steps before."""
    trained = [p for p in model.parameters() if p.requires_grad]
    live, optimizer = LiveBytes(), torch.optim.AdamW(trained)
    live.count([*model.parameters(), *model.buffers(), *batch.values()])
    with live:
        for p in trained:
            p.grad = torch.zeros_like(p)
        optimizer.step()
        optimizer.zero_grad()
        live.peak = live.now
        loss_of(model, batch).backward()
        optimizer.step()
        optimizer.zero_grad()
    return live.peak


# ---- the step: PaliGemma2-3B at 448 pixels, bf16, adapters of rank 8 on all projections ----------


def text(layers):
    return Gemma2Config(vocab_size=257216, num_hidden_layers=layers)


def vision():
    return SigLIPConfig(1152, 4304, 27, 16, image_size=448, patch_size=14)


def batch(**picture):
    """One row; everything is real except the image."""
    ids = torch.full((1, IMAGE + PREFIX + SUFFIX), 5)
    ids[:, :IMAGE] = PaliGemmaConfig.image_token_index
    kinds = torch.zeros_like(ids)
    kinds[:, -SUFFIX:] = 1
    labels = ids.masked_fill(kinds == 0, -100)
    made = {name: fake(torch.empty(1, *shape, device="meta")) for name, shape in picture.items()}
    names = dict(input_ids=ids, attention_mask=torch.ones_like(ids), token_type_ids=kinds)
    return names | {"labels": labels} | made


def ours(layers=LAYERS, checkpointing=False, cached=True, quick=True):
    """Peak of train.py's step. Features that are `cached` come from the disk, and the image tower
    is not there: that is what train.py does unless the tower itself is trained."""
    with torch.device("meta"):
        model = PaliGemma(PaliGemmaConfig(vision(), text(layers))).to(torch.bfloat16)
    lora.inject(model, r=8, alpha=16)
    if quick:
        kernels.enable(model)
    model.language_model.checkpointing = checkpointing
    if cached:
        model.vision_tower = model.multi_modal_projector = None

    def loss_of(model, batch):
        loss, count = train.paligemma_loss(model, batch)
        return loss / count

    picture = {"image_features": (IMAGE, 2304)} if cached else {"pixel_values": (3, 448, 448)}
    return step_peak(made_fake(model).train(), loss_of, batch(**picture))


def theirs(layers=LAYERS, checkpointing=False, suffix_logits=False, targets=LANGUAGE):
    """The same step by transformers and peft. Suffix logits: `logits_to_keep`, and a loss of one's
    own. `targets` by name (PROJECTIONS) adapt the image tower's q, k and v as well."""
    from peft import LoraConfig, get_peft_model

    with torch.device("meta"):
        model = hf_model(layers)
        config = LoraConfig(r=8, lora_alpha=16, target_modules=targets)
        model = made_fake(get_peft_model(model, config)).train()
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})

    def loss_of(model, batch):
        if not suffix_logits:
            return model(**batch, use_cache=False).loss
        given = {name: t for name, t in batch.items() if name != "labels"}
        logits = model(**given, use_cache=False, logits_to_keep=SUFFIX + 1).logits[0, :-1]
        return F.cross_entropy(logits.float(), batch["labels"][0, -SUFFIX:])

    given = batch(pixel_values=(3, 448, 448))
    given["pixel_values"] = given["pixel_values"].bfloat16()
    return step_peak(model, loss_of, given)


def hf_model(layers):
    from dataclasses import asdict

    from transformers import PaliGemmaConfig as HFConfig
    from transformers import PaliGemmaForConditionalGeneration
    from transformers.initialization import no_init_weights

    kept = {k: v for k, v in asdict(text(layers)).items() if v is not None and k != "rope_theta"}
    config = HFConfig(
        text_config=kept | {"model_type": "gemma2"},
        vision_config=asdict(vision()) | {"model_type": "siglip_vision_model"},
        image_token_index=PaliGemmaConfig.image_token_index,
        projection_dim=2304,
    )
    config.vision_config.vision_use_head = False
    with no_init_weights():
        hf = PaliGemmaForConditionalGeneration._from_config(config, dtype=torch.bfloat16)
    hf.tie_weights()
    return hf


THEIRS = {  # name: how
    "as people run it": {},
    "suffix logits": {"suffix_logits": True},
    "checkpointing": {"checkpointing": True},
    "suffix logits + checkpointing": {"suffix_logits": True, "checkpointing": True},
}
