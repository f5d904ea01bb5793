"""Low-rank adapters for any of our models: LoRA, rsLoRA and DoRA, in PEFT's own file format.

LoRA    Hu et al. 2021, arXiv 2106.09685      h = W0 x + s B A x,  s = alpha / r          Eq. 3
rsLoRA  Kalajdzievski 2023, arXiv 2312.03732  s = alpha / sqrt(r)
DoRA    Liu et al. 2024, arXiv 2402.09353     W' = m (W0 + s B A) / ||W0 + s B A||        Eq. 5

What is worth knowing before reading:
  * A is (r, I) and B is (O, r), as in PEFT. B starts at zero, so an adapted model starts as its
    base. DoRA's m and norm are one number per output, as in its authors' code and PEFT.
  * Adapters are fp32 whatever the base is: in bf16 a small learning rate rounds to no step.
  * SigLIP has q_proj, k_proj and v_proj too. Names reach only into the language model here; a
    whole path or a regular expression may reach anywhere.
  * Adapters saved with transformers 4 call the layers by other paths. A model's key table knows
    every spelling, and loading is strict: nothing is silently left out.

Left out on purpose: several adapters in one model, adapters on embeddings and on the output layer
(our models multiply by its weight without calling it), trained biases, quantised bases, and
initialisations that change the base (PiSSA, OLoRA, CorDA, LoftQ): all refused with a sentence.

Axes: I input width, O output width, r rank; `...` any axes before the last, n all of them in one.
"""

import json
import math
import re
import sys
from collections import Counter
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

# ----------------------------------------------------------------------------------------------
# One layer
# ----------------------------------------------------------------------------------------------


class LoRALinear(nn.Linear):
    """A frozen nn.Linear with a low-rank adapter beside it.

    The base keeps its names `weight` (O, I) and `bias` (O); added are `lora_A.weight` (r, I),
    `lora_B.weight` (O, r) and, with DoRA, `lora_magnitude_vector` (O).
    Dropout is on the adapter's input alone. (PEFT's DoRA, in training with dropout, drops the
    base's input as well; without dropout, and in eval mode, the two are equal.)
    """

    def __init__(self, base, r, alpha, dropout=0.0, rslora=False, dora=False):
        if not isinstance(r, int) or r < 1:
            raise ValueError(f"The rank r is {r!r}; it must be a whole number of at least 1.")
        super().__init__(base.in_features, base.out_features, base.bias is not None, device="meta")
        self.r, self.alpha, self.dropout, self.rslora = r, alpha, dropout, rslora
        # Eq. scaling (rsLoRA)
        self.scaling = alpha / math.sqrt(r) if rslora else alpha / r  # s
        self.original = None  # while merged: the base's own weight
        kind = dict(bias=False, device=base.weight.device, dtype=torch.float32)
        self.lora_A = nn.Linear(self.in_features, r, **kind)  # inits to kaiming_uniform(a=sqrt(5))
        self.lora_B = nn.Linear(r, self.out_features, **kind)
        nn.init.zeros_(self.lora_B.weight)
        norm = base.weight.detach().float().norm(dim=1) if dora else None  # (O,), as B is zero
        self.lora_magnitude_vector = nn.Parameter(norm) if dora else None
        adopt(self, base)

    def adapter(self):
        """{name: parameter} of what was added, by PEFT's names."""
        return {n: p for n, p in self.named_parameters() if n.startswith("lora_")}

    def delta(self):
        """s B A: (O, I), fp32."""
        return self.scaling * (self.lora_B.weight @ self.lora_A.weight)

    def gain(self):
        """DoRA's m / ||W0 + s B A||, (O,). The norm is a constant to autograd (section 4.3)."""
        with torch.no_grad():
            norm = (self.weight + self.delta()).norm(dim=1)  # (O,)
        return self.lora_magnitude_vector / norm

    def forward(self, x):
        """(..., I) -> (..., O), in the dtype the base gives."""
        out = F.linear(x, self.weight, self.bias)  # (..., O)
        if self.original is not None:  # merged: the adapter is in `weight`
            return out
        x = F.dropout(x.to(self.lora_A.weight.dtype), self.dropout, self.training)
        low = self.lora_B(self.lora_A(x) * self.scaling)  # (..., r) -> (..., O)
        if self.lora_magnitude_vector is None:
            # Eq. 3 (LoRA)
            return (out + low).to(out.dtype)  # (..., O)
        bias = 0 if self.bias is None else self.bias
        # Eq. 5 (DoRA)
        return (self.gain() * (out - bias + low) + bias).to(out.dtype)  # (..., O)

    @torch.no_grad()
    def merge(self):
        """Put the adapter into `weight`, summed in fp32 and rounded once to the base's dtype."""
        merged = self.weight + self.delta()  # (O, I), fp32
        if self.lora_magnitude_vector is not None:
            merged = self.gain()[:, None] * merged
        self.original, self.weight.data = self.weight.data, merged.to(self.weight.dtype)

    def unmerge(self):
        self.weight.data, self.original = self.original.to(self.weight), None


def adopt(new, old):
    """Give the Linear `new` the parameters of `old`, the same tensors, and its mode; `new`."""
    new.weight, new.bias = old.weight, old.bias
    return new.train(old.training)


def swap(model, path, new):
    """Put the module `new` at this path of the model."""
    parent, _, leaf = path.rpartition(".")
    setattr(model.get_submodule(parent), leaf, new)


# ----------------------------------------------------------------------------------------------
# A whole model
# ----------------------------------------------------------------------------------------------

GEMMA_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
T5_TARGETS = ("q_proj", "v_proj")  # of every attention block; PEFT's choice for T5


def adapters(model):
    """{path: LoRALinear} of a model, in its own order."""
    return {n: m for n, m in model.named_modules() if isinstance(m, LoRALinear)}


def inject(model, r=8, alpha=16, targets=None, dropout=0.0, rslora=False, dora=False):
    """Adapt the Linear layers that `targets` names; returns their paths, in the model's order.

    targets  None: q, k, v, o, gate, up and down of PaliGemma's language model, every q and v of a
             T5 (PEFT's default for it). A list of names: a whole path takes that one layer, a
             shorter name every layer whose path ends in it, in the language model. A string: a
             regular expression for whole paths, anywhere. Paths are ours or transformers' (T5: "q"
             is "q_proj").
    All else is frozen, the fusion of a MultimodalT5 too: to train it beside the adapters, set
    `model.fusion.requires_grad_(True)` afterwards.
    Raises ValueError if the model has adapters already or a target names no layer.
    """
    how = (r, alpha, dropout, rslora, dora)
    paths = select(model, targets)
    return install(model, {p: LoRALinear(model.get_submodule(p), *how) for p in paths})


def install(model, layers):
    """Put {path: LoRALinear} in place and freeze all but the adapters; returns the paths."""
    model.requires_grad_(False)
    for path, layer in layers.items():
        swap(model, path, layer)
    return list(layers)


def linears(model):
    """Paths of what can be adapted: each Linear but the output layer; ValueError if any was."""
    if adapters(model):
        raise ValueError(
            f"This {type(model).__name__} already has adapters. Build it anew, or put them into "
            "its weights for good with merge(model, remove=True)."
        )
    paths = (n for n, m in model.named_modules() if isinstance(m, nn.Linear))
    return [path for path in paths if path.rpartition(".")[2] != "lm_head"]


def home(model):
    """Where the language model is: "language_model." in PaliGemma, "t5." in MultimodalT5."""
    return next((f"{n}." for n, _ in model.named_children() if n in ("language_model", "t5")), "")


def select(model, targets):
    """The paths that `targets` means, see `inject`; each target must name something."""
    paths, inside = linears(model), home(model)
    if targets is None:
        targets = GEMMA_TARGETS if inside == "language_model." else T5_TARGETS

    def fits(path, target):
        names = {path, model.hub_path(path)}
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


def describe(model):
    """What was adapted, a line for each kind of layer, and how many parameters train."""
    layers = in_state(model)
    kinds = Counter(re.sub(r"\.\d+\.", ".{}.", path) for path in layers)
    ranks = ", ".join(str(r) for r in sorted({layer.r for layer in layers.values()}))
    total = sum(p.numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    lines = [f"Adapters of rank {ranks} on {len(layers)} Linear layers:"]
    lines += [f"  {count} x {kind}" for kind, count in kinds.items()]
    lines += [f"{trained:,} of {total:,} parameters train ({100 * trained / total:.2f} %)."]
    return "\n".join(lines)


def merge(model, remove=False):
    """Put every adapter into its layer's weight: same outputs, at the base's speed.

    The base's weights are kept until `unmerge`, which is exact in every dtype for that; while
    merged the adapted layers take twice their memory. remove=True keeps nothing: the layers become
    plain nn.Linear again, and `model.save_pretrained` writes a plain checkpoint. (With adapters in
    it, it would not.) Raises ValueError without adapters, or if they are merged already.
    """
    for path, layer in in_state(model, merged=False).items():
        layer.merge()
        if remove:
            sizes = layer.in_features, layer.out_features, layer.bias is not None
            swap(model, path, adopt(nn.Linear(*sizes, device="meta"), layer))
            layer.original = None  # or all of them would stay until the last is done


def unmerge(model):
    """Give every layer the weight it had before `merge`; ValueError if nothing is merged."""
    for layer in in_state(model, merged=True).values():
        layer.unmerge()


def in_state(model, merged=None):
    """The model's adapters; ValueError if there are none, or they are not (un)merged as asked."""
    layers = adapters(model)
    if not layers:
        raise ValueError(f"This {type(model).__name__} has no adapters: inject or load them first.")
    states = {layer.original is not None for layer in layers.values()}
    if merged is not None and states != {merged}:
        state = "not merged" if merged else "merged already; unmerge them first"
        raise ValueError(f"The adapters of this {type(model).__name__} are {state}.")
    return layers


# ----------------------------------------------------------------------------------------------
# Files, as PEFT writes and reads them
# ----------------------------------------------------------------------------------------------

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
NUMBER = int | float
KINDS = {  # of the settings that are obeyed: the type, and that of the parts
    "r": (int, None),
    "lora_alpha": (NUMBER, None),
    "lora_dropout": (NUMBER, None),
    "use_rslora": (bool, None),
    "use_dora": (bool, None),
    "rank_pattern": (dict, int),
    "alpha_pattern": (dict, NUMBER),
    "target_modules": (str | list, str),
    "exclude_modules": (str | list, str),
    "layers_to_transform": (int | list, int),
}
# Settings of adapter_config.json that are let through: those obeyed, those that change nothing, and
# two whose values `refuse_unsupported` looks at. Any other that is set (not null, false or empty)
# may change the outputs: refused.
KNOWN = [
    *KINDS,
    *"""peft_type task_type auto_mapping peft_version revision base_model_name_or_path
    inference_mode megatron_core qalora_group_size runtime_config bias init_lora_weights""".split(),
]
HARMLESS_INITS = (True, False, "gaussian", "orthogonal")  # the others change the base as well


def file_path(model, path):
    """What the Hub's weight files and transformers 4 call one of our modules."""
    return model.KEYS.to_file(f"{path}.weight").removesuffix(".weight")


def save(model, folder, base=None):
    """Write adapter_model.safetensors and adapter_config.json as PEFT does, merged or not.

    Layers are named as in transformers 5, and by whole paths, so that no other fits. `base` is the
    base model's Hub id or folder, for the config.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    layers = {model.hub_path(path): layer for path, layer in in_state(model).items()}
    tensors = {
        f"base_model.model.{path}.{name}": p.detach().cpu().contiguous()
        for path, layer in layers.items()
        for name, p in layer.adapter().items()
    }
    save_file(tensors, folder / WEIGHTS, {"format": "pt"})
    (folder / WEIGHTS).chmod(0o644)  # the library writes for the owner alone
    first = next(iter(layers.values()))
    exact = {f"^{re.escape(path)}": layer for path, layer in layers.items()}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if home(model) == "language_model." else "SEQ_2_SEQ_LM",
        "base_model_name_or_path": base and str(base),
        "inference_mode": True,
        "r": first.r,
        "lora_alpha": first.alpha,
        "lora_dropout": first.dropout,
        "bias": "none",
        "use_rslora": first.rslora,
        "use_dora": first.lora_magnitude_vector is not None,
        "rank_pattern": {path: x.r for path, x in exact.items() if x.r != first.r},
        "alpha_pattern": {path: x.alpha for path, x in exact.items() if x.alpha != first.alpha},
        "target_modules": list(layers),
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load(model, folder):
    """Inject the adapters of a PEFT folder, ours or anyone's; returns the adapted paths.

    Paths may be spelled as transformers 4 or 5 has them. The adapters can be trained on, the rest
    is frozen. Raises FileNotFoundError without the two files, and ValueError for torn ones, for
    settings that are not supported or match no layer, and for tensors that are missing, unexpected
    or misshaped, each by name; the model is then as it was.
    """
    config, stored = read(folder)
    names = names_in_file(model, stored)
    settings = {
        path: layer_settings(config, name)
        for path, name in names.items()
        if is_target(config, name)
    }
    wanted = {  # before anything of that size is made: the rank may be any number
        f"base_model.model.{names[path]}.{part}": shape
        for path, how in settings.items()
        for part, shape in adapter_shapes(model.get_submodule(path), how).items()
    }
    problems = {
        "missing": sorted(wanted.keys() - stored.keys()),
        "unexpected": sorted(stored.keys() - wanted.keys()),
        "of another shape": [
            f"{key}: file {list(stored[key].shape)}, model {shape}"
            for key, shape in wanted.items()
            if key in stored and list(stored[key].shape) != shape
        ],
        "without finite floating-point numbers": sorted(
            key
            for key, t in stored.items()
            if not t.is_floating_point() or not t.float().isfinite().all()
        ),
    }
    if any(problems.values()):
        listed = "; ".join(f"{len(v)} {k}: {', '.join(v)}" for k, v in problems.items() if v)
        reader = f"this {type(model).__name__} and their own {CONFIG}"
        raise ValueError(f"The adapters in {folder} do not fit {reader}. Tensors {listed}.")
    refuse_unmatched(config, [names[path] for path in settings], folder)
    layers = {path: LoRALinear(model.get_submodule(path), *how) for path, how in settings.items()}
    for path, layer in layers.items():
        for part, p in layer.adapter().items():
            p.data.copy_(stored[f"base_model.model.{names[path]}.{part}"])
    return install(model, layers)


def adapter_shapes(base, how):
    """{name: shape} of the tensors LoRALinear(base, *how) will have."""
    r, dora = how[0], how[-1]
    shapes = {"lora_A.weight": [r, base.in_features], "lora_B.weight": [base.out_features, r]}
    return shapes | ({"lora_magnitude_vector": [base.out_features]} if dora else {})


def read(folder):
    """adapter_config.json and {key: tensor} of a PEFT folder."""
    config, weights = Path(folder) / CONFIG, Path(folder) / WEIGHTS
    for path in (config, weights):
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} does not exist. An adapter is a folder with {CONFIG} and {WEIGHTS} (PEFT "
                "loads an old adapter_model.bin and saves it so)."
            )
    try:
        settings = json.loads(config.read_text(encoding="utf-8-sig"))
        tensors = load_file(weights)
    except (ValueError, RecursionError, SafetensorError, OSError, AttributeError, KeyError) as e:
        raise ValueError(
            f"The adapter in {folder} cannot be read ({type(e).__name__}: {e}). Get it again."
        ) from e
    refuse_unsupported(settings, config)
    settings = {key: value for key, value in settings.items() if value is not None}
    check_settings(settings, config)
    return settings, tensors


def refuse_unsupported(config, path):
    """ValueError if the adapter_config.json at `path` asks for what is not done here."""
    kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
    if kind != "LORA":
        raise ValueError(f"{path} describes {kind!r}; only peft_type 'LORA' is supported here.")
    refused = {k: v for k, v in config.items() if v and k not in KNOWN}
    for key, allowed in (("bias", ("none",)), ("init_lora_weights", HARMLESS_INITS)):
        if config.get(key, allowed[0]) not in allowed:
            refused[key] = config[key]
    if not config.get("target_modules"):
        refused["target_modules"] = config.get("target_modules")
    if refused:
        listed = ", ".join(f"{name} = {value!r}" for name, value in refused.items())
        raise ValueError(
            f"{path} asks for what is not supported here: {listed}. Only LoRA, rsLoRA and DoRA on "
            "named Linear layers are: merge this adapter with PEFT and load the merged model."
        )


def check_settings(config, path):
    """ValueError for a setting of another type than PEFT writes, and for a pattern that could be
    matched for ever: patterns come with the file, and Python's engine backtracks."""

    def is_a(value, kind):
        if isinstance(value, bool) or not isinstance(value, kind):
            return kind is bool and isinstance(value, bool)
        return not isinstance(value, float) or math.isfinite(value)

    for key, (kind, part) in KINDS.items():
        value = config.get(key)
        parts = value.values() if isinstance(value, dict) else value
        parts = () if part is None or isinstance(parts, str | int | float | None) else parts
        if key in config and not (is_a(value, kind) and all(is_a(x, part) for x in parts)):
            raise ValueError(f"{path}: {key} is {value!r:.60}, which is of the wrong type.")
    if not 0 <= config.get("lora_dropout", 0) < 1:
        raise ValueError(f"{path}: lora_dropout is {config['lora_dropout']}, which is no share.")
    patterns = [x for x in map(config.get, ("target_modules", "exclude_modules")) if x]
    patterns = [x for x in patterns if isinstance(x, str)]
    for pattern in [*patterns, *config.get("rank_pattern", ()), *config.get("alpha_pattern", ())]:
        try:
            re.compile(pattern)
        except (re.error, OverflowError, RecursionError) as e:
            raise ValueError(f"{path}: {pattern!r:.60} is no pattern ({e}).") from e
        if re.search(r"\)[*+{]", pattern) or len(re.findall(r"[*+{]", pattern)) > 5:
            raise ValueError(f"{path}: {pattern!r:.60} has more repetitions than are matched here.")


def names_in_file(model, stored):
    """{our path: path in the file} of all layers that can be adapted. One that the file lacks is
    called as transformers 5 does if any other is, else as the Hub's weight files do."""
    paths, theirs = linears(model), {}
    for key in stored:
        name = key.removeprefix("base_model.model.").partition(".lora_")[0]
        ours = (model.KEYS.to_ours(f"{name}.weight") or "").removesuffix(".weight")
        theirs |= {ours: name} if ours in paths else {}
    newer = any(model.hub_path(path) == name for path, name in theirs.items())
    return {
        path: theirs.get(path) or (model.hub_path(path) if newer else file_path(model, path))
        for path in paths
    }


def matches(pattern, name):
    """As PEFT matches the keys of rank_pattern and alpha_pattern: to the end of a name."""
    return re.match(rf"(.*\.)?({pattern})$", name)


def refuse_unmatched(config, names, folder):
    """ValueError for targets, ranks or alphas of which none fits a layer: the defaults would stand
    in their place. If only some do not, that is said (PEFT warns too)."""
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = list(config.get(key) or {})
        unknown = [p for p in patterns if not any(matches(p, name) for name in names)]
        if unknown:
            told = f"{folder}: {key} {unknown!r:.60} matches none of the adapted layers."
            if len(unknown) == len(patterns):
                raise ValueError(f"{told} Was the adapter made for another model?")
            print(told, file=sys.stderr)
    if not names:
        targets = f"{config['target_modules']!r:.60}"
        raise ValueError(f"{folder}: target_modules {targets} matches none of the layers here.")


def layer_settings(config, name):
    """LoRALinear's arguments for the layer a file calls `name`; patterns match ends of names."""

    def of_layer(key, default):
        patterns = (config.get(key) or {}).items()
        return next((v for p, v in patterns if matches(p, name)), default)

    r = of_layer("rank_pattern", config.get("r", 8))
    alpha = of_layer("alpha_pattern", config.get("lora_alpha", 8))
    dropout = config.get("lora_dropout") or 0.0
    return r, alpha, dropout, bool(config.get("use_rslora")), bool(config.get("use_dora"))


def is_target(config, name):
    """Whether PEFT, told by `config`, adapts the layer a file calls `name`."""

    def fits(rule):
        if isinstance(rule, str):
            return rule == "all-linear" or bool(re.fullmatch(rule, name))
        return any(name == entry or name.endswith(f".{entry}") for entry in rule)

    targets, only = config["target_modules"], config.get("layers_to_transform")
    if fits(config.get("exclude_modules") or []) or not fits(targets):
        return False
    if isinstance(targets, str) or name in targets or only is None or only == []:
        return True
    index = re.match(r".*?\.[^.]*\.(\d+)\.", name)
    return bool(index) and int(index[1]) in ([only] if isinstance(only, int) else only)
