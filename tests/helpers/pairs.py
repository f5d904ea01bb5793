"""Tiny models next to their references: a T5 and a PaliGemma of transformers, adapters of PEFT."""

import copy
import json
import re
from types import SimpleNamespace

import oracle
import torch
import torch.nn.functional as F
from oracle import ATOL
from safetensors.torch import load_file, save_file

from model import T5, PaliGemma
from support.checkpoints import peft

VERSIONS = ("v1.0", "v1.1")


def close(ours, theirs, atol=ATOL):
    torch.testing.assert_close(ours, theirs, atol=atol, rtol=0)


def padded(rows, length):
    """Generated ids (B, U), with pads up to `length`."""
    return F.pad(rows, (0, length - rows.shape[1]))


def file_names(table, module):
    """{name in a Hub file: shape} of one of our modules."""
    return {table.to_file(name): tuple(t.shape) for name, t in module.state_dict().items()}


# ---- T5: fixtures -------------------------------------------------------------------------------


def make_t5(folder, version, **overrides):
    config, hf = oracle.tiny_t5(version, **overrides)
    oracle.write_checkpoint(folder, config, oracle.t5_stored(hf))
    return SimpleNamespace(
        folder=folder, config=config, hf=hf, t5=T5.from_pretrained(folder), version=version
    )


@torch.no_grad()
def t5_logits(hf, ids, mask, decoder_ids):
    return hf(input_ids=ids, attention_mask=mask, decoder_input_ids=decoder_ids).logits


@torch.no_grad()
def assert_same_logits(folder, hf, batch=None, atol=ATOL):
    batch = batch or oracle.t5_batch(vocab=hf.config.vocab_size)
    theirs = t5_logits(hf, *batch)
    assert theirs.std() > 0.5  # else the tolerance would mean nothing
    close(T5.from_pretrained(folder)(*batch), theirs, atol)


# ---- adapters ----

VARIANTS = {"lora": {}, "rslora": {"use_rslora": True}, "dora": {"use_dora": True}}  # to PEFT
OURS = {v: {k.removeprefix("use_"): on for k, on in kw.items()} for v, kw in VARIANTS.items()}
IMAGE = 57  # id of <image>
LANGUAGE = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


def tiny_paligemma():
    """transformers' PaliGemma 2: sizes that differ, large weights, a window below the length."""
    from transformers import PaliGemmaConfig, PaliGemmaForConditionalGeneration

    text = dict(model_type="gemma2", vocab_size=60, hidden_size=24, intermediate_size=40)
    text |= dict(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8)
    text |= dict(query_pre_attn_scalar=8, sliding_window=6)
    vision = dict(model_type="siglip_vision_model", hidden_size=32, intermediate_size=48)
    vision |= dict(num_hidden_layers=2, num_attention_heads=4, patch_size=14, image_size=28)
    config = PaliGemmaConfig(
        text_config=text,
        vision_config=vision | {"vision_use_head": False},
        image_token_index=IMAGE,
        projection_dim=24,
    )
    hf = PaliGemmaForConditionalGeneration._from_config(config, attn_implementation="eager")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in hf.named_parameters():
            scale = 0.3 if p.dim() == 1 or "embed_" in name else 1.5 * p[0].numel() ** -0.5
            layer_norm = re.search(r"layer_?norm\d?\.weight", name) and "vision" in name
            p.normal_(float(bool(layer_norm)), scale, generator=generator)  # Gemma's are offsets
    return hf.eval()


def paligemma_inputs():
    """Two rows of four picture tokens, prefix and suffix; the second is padded on the left."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 50, (2, 14), generator=generator)
    kinds, mask = torch.zeros_like(ids), torch.ones_like(ids)
    ids[0, :4], ids[1, 3:7], ids[1, :3], mask[1, :3] = IMAGE, IMAGE, 0, 0
    kinds[:, 9:] = 1
    pixels = torch.randn(2, 3, 28, 28, generator=generator)
    return dict(input_ids=ids, pixel_values=pixels, attention_mask=mask, token_type_ids=kinds)


def make_tiny(name, folder):
    """A reference model and its folder; fresh copies of it, ours and theirs; one batch."""
    if name == "paligemma":
        hf, ours, inputs, targets = tiny_paligemma(), PaliGemma, paligemma_inputs(), LANGUAGE
        hf.save_pretrained(folder)
    else:
        config, hf = oracle.tiny_t5("v1.1")
        oracle.write_checkpoint(folder, config, oracle.t5_stored(hf))
        names = ("input_ids", "attention_mask", "decoder_input_ids")
        inputs = dict(zip(names, oracle.t5_batch(), strict=True))
        ours, targets = T5, ["q", "v", "wi_1", "wo"]
    return SimpleNamespace(
        name=name,
        folder=folder,
        inputs=inputs,
        targets=targets,
        ours=lambda **kw: ours.from_pretrained(folder, **kw),
        theirs=lambda: copy.deepcopy(hf),
    )


def run(model, tiny):
    """Logits at the tokens that are no pads."""
    inputs = dict(tiny.inputs)
    if tiny.name == "paligemma":
        inputs["pixel_values"] = inputs["pixel_values"].to(next(model.parameters()).dtype)
    out = model(**inputs)
    logits = getattr(out, "logits", out)
    return logits if tiny.name == "t5" else logits[inputs["attention_mask"].bool()]


def scramble(model, seed=0):
    """Adapters as after training: B not zero, magnitudes off the norms."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_magnitude" in name:
                p.mul_(torch.rand(p.shape, generator=generator) + 0.5)
            elif "lora_" in name:
                p.normal_(0, 0.2, generator=generator)
    return model


def peft_model(tiny, r=3, alpha=5, **config):
    from peft import LoraConfig, get_peft_model  # seconds to import

    config = {"target_modules": tiny.targets} | config
    kind = "CAUSAL_LM" if tiny.name == "paligemma" else "SEQ_2_SEQ_LM"
    config = LoraConfig(r=r, lora_alpha=alpha, task_type=kind, **config)
    return scramble(get_peft_model(tiny.theirs(), config)).eval()


def peft_file(tiny, folder, **config):
    """An adapter folder as PEFT writes it, and the PEFT model."""
    theirs = peft_model(tiny, **config)
    theirs.save_pretrained(folder)
    return theirs


def rewrite(folder, rename=None, **settings):
    """Change tensors (a function of {key: tensor}) and settings of an adapter folder."""
    weights, config = folder / peft.WEIGHTS, folder / peft.CONFIG
    if rename:
        tensors = {k: t.clone() for k, t in load_file(weights).items()}
        save_file(rename(tensors), weights, {"format": "pt"})
    config.write_text(json.dumps(json.loads(config.read_text()) | settings))
    return folder
