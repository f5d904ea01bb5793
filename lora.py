"""Low-rank adapters for any of our models: LoRA, rsLoRA and DoRA, in PEFT's file format.

LoRA    Hu et al. 2021, arXiv 2106.09685      h = W0 x + s B A x,  s = alpha / r          Eq. 3
rsLoRA  Kalajdzievski 2023, arXiv 2312.03732  s = alpha / sqrt(r)
DoRA    Liu et al. 2024, arXiv 2402.09353     W' = m (W0 + s B A) / ||W0 + s B A||        Eq. 5

A is (r, I) and B is (O, r), as in PEFT. B starts at zero, so an adapted model starts as its base.
DoRA's m and norm are one number per output. Adapters are fp32 whatever the base is: in bf16 a step
of a small learning rate is rounded away.

Not supported, and refused: several adapters in one model, adapters on embeddings and on the output
layer, trained biases, quantised bases, and initialisations that change the base (PiSSA, OLoRA ...).

Axes: I input width, O output width, r rank; `...` any axes before the last, n all of them in one.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# ---- One layer -----------------------------------------------------------------------------------


class LoRALinear(nn.Linear):
    """A frozen nn.Linear plus a low-rank adapter.

    The base keeps its names `weight` (O, I) and `bias` (O); added are `lora_A.weight` (r, I),
    `lora_B.weight` (O, r) and, with DoRA, `lora_magnitude_vector` (O).
    Dropout is on the adapter's input alone. (PEFT's DoRA, in training with dropout, drops the
    base's input as well; without dropout, and in eval mode, the two are equal.)
    """

    def __init__(
        self,
        base: nn.Linear,
        r: int,
        alpha: float,
        dropout: float = 0.0,
        rslora: bool = False,
        dora: bool = False,
    ) -> None:
        if not isinstance(r, int) or r < 1:
            raise ValueError(f"The rank r is {r!r}; it must be a whole number of at least 1.")
        # No memory for a weight of its own: `adopt` puts the base's in its place.
        super().__init__(base.in_features, base.out_features, base.bias is not None, device="meta")
        self.r = r
        self.alpha = alpha
        self.dropout = dropout
        self.rslora = rslora
        # Eq. scaling (rsLoRA)
        self.scaling = alpha / math.sqrt(r) if rslora else alpha / r  # s
        self.original = None  # while merged: the base's own weight
        device = base.weight.device
        # nn.Linear draws A from kaiming_uniform(a=sqrt(5)), as PEFT does.
        self.lora_A = nn.Linear(self.in_features, r, bias=False, device=device).float()
        self.lora_B = nn.Linear(r, self.out_features, bias=False, device=device).float()
        nn.init.zeros_(self.lora_B.weight)
        norm = base.weight.detach().float().norm(dim=1) if dora else None  # (O,), of W0 + 0
        self.lora_magnitude_vector = nn.Parameter(norm) if dora else None
        adopt(self, base)

    def adapter(self) -> dict[str, nn.Parameter]:
        """{name: parameter} of the adapter, by PEFT's names."""
        return {n: p for n, p in self.named_parameters() if n.startswith("lora_")}

    def delta(self) -> Tensor:
        """s B A: (O, I), fp32."""
        return self.scaling * (self.lora_B.weight @ self.lora_A.weight)

    def gain(self) -> Tensor:
        """DoRA's m / ||W0 + s B A||, (O,). The norm is a constant to autograd (section 4.3)."""
        with torch.no_grad():
            norm = (self.weight + self.delta()).norm(dim=1)  # (O,)
        return self.lora_magnitude_vector / norm

    def forward(self, x: Tensor) -> Tensor:
        """(..., I) -> (..., O), in the base's dtype."""
        out = F.linear(x, self.weight, self.bias)  # (..., O)
        if self.original is not None:  # merged: the adapter is in `weight`
            return out
        x = F.dropout(x.to(self.lora_A.weight.dtype), self.dropout, self.training)
        low = self.lora_B(self.lora_A(x) * self.scaling)  # (..., r) -> (..., O)
        if self.lora_magnitude_vector is None:
            # Eq. 3 (LoRA)
            return (out + low).to(out.dtype)  # (..., O)
        bias = 0 if self.bias is None else self.bias  # added last: m / norm scales weights alone
        # Eq. 5 (DoRA)
        return (self.gain() * (out - bias + low) + bias).to(out.dtype)  # (..., O)

    @torch.no_grad()
    def merge(self) -> None:
        """Put the adapter into `weight`, summed in fp32 and rounded once to the base's dtype."""
        merged = self.weight + self.delta()  # (O, I), fp32
        if self.lora_magnitude_vector is not None:
            merged = self.gain()[:, None] * merged
        self.original = self.weight.data
        self.weight.data = merged.to(self.weight.dtype)

    def unmerge(self) -> None:
        self.weight.data = self.original.to(self.weight)  # the model may have moved meanwhile
        self.original = None


def adopt(new: nn.Linear, old: nn.Linear) -> nn.Linear:
    """Returns the Linear `new` with the parameters of `old` (the same tensors) and its mode."""
    new.weight = old.weight
    new.bias = old.bias
    return new.train(old.training)


def swap(model: nn.Module, path: str, new: nn.Module) -> None:
    """Put the module `new` in the place of the one at this path."""
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, new)


# ---- A whole model -------------------------------------------------------------------------------

GEMMA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
T5_TARGETS = ("q_proj", "v_proj")  # of every attention block; PEFT's choice for T5


def adapters(model: nn.Module) -> dict[str, LoRALinear]:
    """{path: LoRALinear} of a model, in its order of modules."""
    return {n: m for n, m in model.named_modules() if isinstance(m, LoRALinear)}


def inject(
    model: nn.Module,
    r: int = 8,
    alpha: float = 16,
    targets: str | Sequence[str] | None = None,
    dropout: float = 0.0,
    rslora: bool = False,
    dora: bool = False,
) -> list[str]:
    """Adapt the Linear layers that `targets` names; returns their paths, in the model's order.

    targets  None: q, k, v, o, gate, up and down of PaliGemma's language model, every q and v of a
             T5 (PEFT's default for it). A list of names: a whole path takes that one layer, a
             shorter name every layer whose path ends in it, in the language model. A string: a
             regular expression for whole paths, anywhere. Paths are ours or transformers' (T5: "q"
             is "q_proj").
    All else is frozen, the fusion of a MultimodalT5 too: to train it with the adapters, set
    `model.fusion.requires_grad_(True)` afterwards.
    Raises ValueError if the model has adapters already or a target names no layer.
    """
    layers = {}
    for path in select(model, targets):
        base = model.get_submodule(path)
        layers[path] = LoRALinear(base, r, alpha, dropout, rslora, dora)
    return install(model, layers)


def install(model: nn.Module, layers: dict[str, LoRALinear]) -> list[str]:
    """Put {path: LoRALinear} in place and freeze all but the adapters; returns the paths."""
    model.requires_grad_(False)
    for path, layer in layers.items():
        swap(model, path, layer)
    return list(layers)


def linears(model: nn.Module) -> list[str]:
    """Paths of all Linear layers except the output layer; ValueError if any has an adapter."""
    if adapters(model):
        raise ValueError(
            f"This {type(model).__name__} already has adapters. Load it again, or put them "
            "into its weights for good with merge(model, remove=True)."
        )
    paths = (n for n, m in model.named_modules() if isinstance(m, nn.Linear))
    return [path for path in paths if path.rpartition(".")[2] != "lm_head"]


def home(model: nn.Module) -> str:
    """Prefix of the language model's paths: "language_model." in PaliGemma, "t5." in MultimodalT5,
    "" in a T5."""
    return next((f"{n}." for n, _ in model.named_children() if n in ("language_model", "t5")), "")


def select(model: nn.Module, targets: str | Sequence[str] | None) -> list[str]:
    """The paths that `targets` stands for, see `inject`; ValueError if one names no layer."""
    from support.checkpoints.keys import transformers_path

    paths = linears(model)
    # Short names mean the language model only: SigLIP has q_proj, k_proj and v_proj too, but image
    # features can be cached only while its tower stays frozen.
    inside = home(model)
    if targets is None:
        targets = GEMMA_TARGETS if inside == "language_model." else T5_TARGETS

    def fits(path: str, target: str) -> bool:
        names = {path, transformers_path(type(model), path)}
        if isinstance(targets, str):
            return any(re.fullmatch(target, name) for name in names)
        ends = path.startswith(inside) and any(name.endswith(f".{target}") for name in names)
        return ends or target in names

    each = [targets] if isinstance(targets, str) else list(targets)
    unknown = [target for target in each if not any(fits(path, target) for path in paths)]
    if unknown or not each:
        kinds = sorted({re.sub(r"\.\d+\.", ".{}.", path) for path in paths})
        where = inside.rstrip(".") or "the model"
        raise ValueError(
            f"No Linear layer of this {type(model).__name__} that can be adapted fits {unknown}. A "
            "list holds names or whole paths, a string is a regular expression for a whole path; "
            f"names mean layers in {where}. There are: {', '.join(kinds)}."
        )
    return [path for path in paths if any(fits(path, target) for target in each)]


def describe(model: nn.Module) -> str:
    """The adapted layers, a line for each kind, and how many parameters are trained."""
    layers = in_state(model)
    kinds = Counter(re.sub(r"\.\d+\.", ".{}.", path) for path in layers)
    ranks = ", ".join(str(r) for r in sorted({layer.r for layer in layers.values()}))
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    lines = [f"Adapters of rank {ranks} on {len(layers)} Linear layers:"]
    lines += [f"  {count} x {kind}" for kind, count in kinds.items()]
    lines += [f"{trained:,} of {total:,} parameters train ({100 * trained / total:.2f} %)."]
    return "\n".join(lines)


def merge(model: nn.Module, remove: bool = False) -> None:
    """Add every adapter to its layer's weight: same outputs, at the base's speed.

    The base's weights are kept, so that `unmerge` is exact in every dtype; while merged, adapted
    layers take twice their memory. remove=True keeps nothing: the layers become plain nn.Linear
    again, and `model.save_pretrained` writes a plain checkpoint, which it refuses with adapters.
    Raises ValueError without adapters, or if they are merged already.
    """
    for path, layer in in_state(model, merged=False).items():
        layer.merge()
        if remove:
            bias = layer.bias is not None
            bare = nn.Linear(layer.in_features, layer.out_features, bias, device="meta")
            swap(model, path, adopt(bare, layer))
            layer.original = None  # else all of them would be in memory at once


def unmerge(model: nn.Module) -> None:
    """Give every layer the weight it had before `merge`; ValueError if nothing is merged."""
    for layer in in_state(model, merged=True).values():
        layer.unmerge()


def in_state(model: nn.Module, merged: bool | None = None) -> dict[str, LoRALinear]:
    """The model's adapters; ValueError if there are none, or not (un)merged as required."""
    layers = adapters(model)
    if not layers:
        raise ValueError(f"This {type(model).__name__} has no adapters: inject or load them first.")
    states = {layer.original is not None for layer in layers.values()}
    if merged is not None and states != {merged}:
        state = "not merged" if merged else "merged already; unmerge them first"
        raise ValueError(f"The adapters of this {type(model).__name__} are {state}.")
    return layers


# ---- Files; support/checkpoints/peft.py knows their format ---------------------------------------


def save(model: nn.Module, folder: str | Path, base: str | Path | None = None) -> None:
    """Write adapter_model.safetensors and adapter_config.json as PEFT does, merged or not. `base`
    is the base model's Hub id or folder, for the config."""
    from support.checkpoints import peft

    written = {}
    for path, layer in in_state(model).items():
        dora = layer.lora_magnitude_vector is not None
        settings = peft.Settings(layer.r, layer.alpha, layer.dropout, layer.rslora, dora)
        written[path] = peft.Adapter(settings, layer.adapter())
    peft.write(type(model), written, folder, base)


def load(model: nn.Module, folder: str | Path) -> list[str]:
    """Inject the adapters of a PEFT folder, ours or anyone's; returns the adapted paths.

    The adapters can be trained on, the rest is frozen. Raises FileNotFoundError and ValueError, see
    `peft.read`, for what does not fit; the model is then as it was.
    """
    from support.checkpoints import peft

    shapes = {path: tuple(model.get_submodule(path).weight.shape) for path in linears(model)}
    layers = {}
    for path, (settings, tensors) in peft.read(type(model), shapes, folder).items():
        layers[path] = LoRALinear(model.get_submodule(path), **settings._asdict())
        for name, parameter in layers[path].adapter().items():
            parameter.data.copy_(tensors[name])
    return install(model, layers)
