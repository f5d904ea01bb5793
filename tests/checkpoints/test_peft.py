"""Adapter files against PEFT: read both ways, settings obeyed or refused, tensors that must fit."""

import shutil
from pathlib import Path

import pytest
import torch
from pairs import OURS, close, make_tiny, peft_file, rewrite, run, scramble
from peft import PeftModel
from safetensors.torch import load_file

import lora
from support.checkpoints import peft
from support.checkpoints.keys import transformers_path

VISION_Q = "vision_tower.encoder.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module", params=["paligemma", "t5"])
def tiny(request, tmp_path_factory):
    return make_tiny(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def paligemma(tmp_path_factory):
    return make_tiny("paligemma", tmp_path_factory.mktemp("paligemma"))


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    return make_tiny("t5", tmp_path_factory.mktemp("t5"))


@pytest.fixture(scope="module")
def t5_adapter(t5, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapter")
    peft_file(t5, folder)
    return folder


@pytest.fixture
def adapter(t5_adapter, tmp_path):
    """An adapter folder for the T5 as PEFT writes it, to be spoiled."""
    return Path(shutil.copytree(t5_adapter, tmp_path / "adapter"))


@pytest.mark.parametrize("variant", OURS)
@pytest.mark.slow
def test_peft_loads_ours(tiny, variant, tmp_path):
    ours = tiny.ours()
    names = lora.inject(ours, 3, 5, **OURS[variant])
    scramble(ours)
    lora.save(ours, tmp_path, base="org/name")
    theirs = PeftModel.from_pretrained(tiny.theirs(), tmp_path)
    close(run(ours, tiny), run(theirs, tiny))
    adapted = {n.split(".lora_A")[0] for n, _ in theirs.named_modules() if n.endswith("lora_A")}
    assert adapted == {f"base_model.model.{transformers_path(type(ours), path)}" for path in names}
    config = theirs.peft_config["default"]
    assert config.base_model_name_or_path == "org/name"
    assert config.task_type == ("SEQ_2_SEQ_LM" if tiny.name == "t5" else "CAUSAL_LM")


@pytest.mark.parametrize("variant", OURS)
def test_our_file_round_trip(tiny, variant, tmp_path):
    ours, again = tiny.ours(), tiny.ours()
    names = lora.inject(ours, 3, 5, dropout=0.25, **OURS[variant])
    lora.save(scramble(ours), tmp_path)
    assert lora.load(again, tmp_path) == names
    assert torch.equal(run(ours, tiny), run(again, tiny))
    for layer in lora.adapters(again).values():
        assert (layer.r, layer.alpha, layer.dropout) == (3, 5, 0.25)
        assert all(p.requires_grad for p in layer.adapter().values())
    assert (tmp_path / peft.WEIGHTS).stat().st_mode & 0o777 == 0o644


# ---- other people's files -----------------------------------------------------------------------

SPELLINGS = {
    "transformers 4": ("language_model.model.", "vision_tower.vision_model."),
    "transformers 4.53": ("model.language_model.", "model.vision_tower.vision_model."),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_older_key_spellings(paligemma, spelling, tmp_path):
    """["q_proj"] is both towers in PEFT."""
    theirs = peft_file(paligemma, tmp_path, target_modules=["q_proj"])
    text, vision = SPELLINGS[spelling]

    def older(key):
        key = key.replace("model.model.language_model.", f"model.{text}")
        return key.replace("model.model.vision_tower.", f"model.{vision}")

    rewrite(tmp_path, lambda tensors: {older(k): t for k, t in tensors.items()})
    assert any(vision in key for key in load_file(tmp_path / peft.WEIGHTS))
    ours = paligemma.ours()
    names = lora.load(ours, tmp_path)
    assert len(names) == 4 and VISION_Q in names
    close(run(ours, paligemma), run(theirs, paligemma))


@pytest.mark.parametrize("prefix", ("_orig_mod.", "module.", "base_model.model._orig_mod."))
def test_names_of_wrappers_are_stripped(t5, prefix, adapter):
    expected = t5.ours()
    lora.load(expected, adapter)
    start = "base_model.model." if prefix.startswith("base") else ""
    rewrite(adapter, lambda ts: {prefix + k.removeprefix(start): t for k, t in ts.items()})
    ours = t5.ours()
    lora.load(ours, adapter)
    assert torch.equal(run(ours, t5), run(expected, t5))


def test_a_layer_missing_from_an_old_spelling_is_seen(paligemma, tmp_path):
    peft_file(paligemma, tmp_path)
    new, old = "model.model.language_model.layers", "model.language_model.model.layers"
    rewrite(
        tmp_path,
        lambda ts: {k.replace(new, old): t for k, t in ts.items() if "1.mlp.up_proj" not in k},
        target_modules=r"language_model\.model\.layers\.\d\.mlp.*",
    )
    with pytest.raises(ValueError, match=r"2 missing: base_model\.model\.language_model\.model\."):
        lora.load(paligemma.ours(), tmp_path)


CONFIGS = {
    "patterns": {
        "rank_pattern": {r"0\..*q_proj": 5, "decoder.block.1.layer.0.SelfAttention.q": 2},
        "alpha_pattern": {"v_proj": 11, "SelfAttention.v": 11},
        "use_rslora": True,
    },
    "exclude list": {"exclude_modules": ["v_proj", "SelfAttention.v"]},
    "exclude regex": {"exclude_modules": r".*(self_attn\.q_proj|EncDecAttention.*)"},
    "gaussian": {"init_lora_weights": "gaussian"},
    "eva": {"init_lora_weights": "eva"},
    "one layer": {"layers_to_transform": 1, "target_modules": ["q_proj", "q"]},
    "layers": {"layers_to_transform": [0, 2], "target_modules": ["q_proj", "q"]},
    "all-linear": {"target_modules": "all-linear"},
}


@pytest.mark.slow
@pytest.mark.parametrize("config", CONFIGS)
def test_settings_are_obeyed(tiny, config, tmp_path):
    theirs, ours = peft_file(tiny, tmp_path / "peft", **CONFIGS[config]), tiny.ours()
    if config == "all-linear":  # PEFT writes what it found
        rewrite(tmp_path / "peft", target_modules="all-linear")
    lora.load(ours, tmp_path / "peft")
    expected = run(theirs, tiny)
    close(run(ours, tiny), expected)
    lora.save(ours, tmp_path / "ours")
    again = PeftModel.from_pretrained(tiny.theirs(), tmp_path / "ours")
    close(run(again, tiny), expected)
    if config == "patterns":
        assert len({layer.r for layer in lora.adapters(ours).values()}) > 1
        assert len({layer.alpha for layer in lora.adapters(ours).values()}) > 1


UNSUPPORTED = {
    "peft_type": "IA3",
    "bias": "lora_only",
    "lora_bias": True,
    "modules_to_save": ["lm_head"],
    "target_parameters": ["experts.weight"],
    "trainable_token_indices": [3],
    "layer_replication": [[0, 1]],
    "use_qalora": True,
    "fan_in_fan_out": True,
    "init_lora_weights": "pissa",
    "alora_invocation_tokens": [5],
    "target_modules": None,
    "something_new": 0.5,
}


@pytest.mark.parametrize("key", UNSUPPORTED)
def test_unsupported_settings_are_refused(t5, key, adapter):
    lora.load(t5.ours(), adapter)  # as PEFT writes it, all else in it is harmless
    rewrite(adapter, **{key: UNSUPPORTED[key]})
    match = "peft_type 'IA3', not 'LORA'" if key == "peft_type" else f"not supported here: {key} = "
    with pytest.raises(ValueError, match=match):
        lora.load(t5.ours(), adapter)


ENCODER = "base_model.model.encoder.block"
CROSS_V = "base_model.model.decoder.block.2.layer.1.EncDecAttention.v.lora_A.weight"
HEADS = [f"base_model.model.lm_head.lora_{x}.weight" for x in "AB"]
STRANGER = "base_model.model.vision_tower.q_proj.lora_A.weight"
SELF_Q, SELF_K = (f"{ENCODER}.0.layer.0.SelfAttention.{x}.lora_A.weight" for x in "qk")
GONE = f"{ENCODER}.1.layer.0.SelfAttention.q.lora_B.weight"
MISFITS = (
    {  # what changes, given the tensors, and what the refusal says
        "gone": (lambda ts: {k: t for k, t in ts.items() if k != GONE}, f"1 missing: {GONE}."),
        "a head": (
            lambda ts: ts | {name: torch.ones(3, 3) for name in HEADS},
            f"2 unexpected: {', '.join(HEADS)}.",
        ),
        "a stranger": (lambda ts: ts | {STRANGER: torch.ones(3, 3)}, f"1 unexpected: {STRANGER}."),
        "no target": (lambda ts: ts | {SELF_K: ts[SELF_Q].clone()}, f"1 unexpected: {SELF_K}."),
        "narrow": (
            lambda ts: ts | {CROSS_V: ts[CROSS_V][:2].contiguous()},
            f"1 of another shape: {CROSS_V}: file [2, 24], model [3, 24].",
        ),
    }
    | {
        f"{bad}": (
            lambda ts, bad=bad: ts | {GONE: spoiled(ts[GONE], bad)},
            f"1 without finite floating-point numbers: {GONE}.",
        )
        for bad in (float("nan"), float("inf"), 3)
    }
)


def spoiled(t, bad):
    t[0, 0] = bad
    return t.int() if bad == 3 else t


@pytest.mark.parametrize("change, sentence", MISFITS.values(), ids=MISFITS)
def test_tensors_that_do_not_fit_are_named(t5, change, sentence, adapter):
    rewrite(adapter, change)
    ours = t5.ours()
    with pytest.raises(ValueError) as error:
        lora.load(ours, adapter)
    assert str(error.value).endswith(sentence)
    assert not lora.adapters(ours) and all(p.requires_grad for p in ours.parameters())


def test_config_and_file_must_agree(t5, adapter):
    rewrite(adapter, target_modules=["q", "v", "wi_1", "wo", "k"])
    with pytest.raises(ValueError, match=r"16 missing: .*\.k\.lora_A"):  # 2 + 3 * 2 layers
        lora.load(t5.ours(), adapter)
    rewrite(adapter, target_modules=["q", "v", "wi_1", "wo"], use_dora=True)
    with pytest.raises(ValueError, match=r"26 missing: .*lora_magnitude_vector"):
        lora.load(t5.ours(), adapter)


@pytest.mark.parametrize("name", (peft.CONFIG, peft.WEIGHTS))
def test_absent_and_torn_files(t5, name, adapter):
    path = adapter / name
    for content in (path.read_bytes()[:-20], b"[" * 100_000, b"\xe9", b"[]", b""):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=name):
            lora.load(t5.ours(), adapter)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=f"{name} does not exist"):
        lora.load(t5.ours(), adapter)


WRONG_SETTINGS = [  # one of each kind; tests/test_fuzz.py has the rest
    ("r", "8", "wrong type"),
    ("r", True, "wrong type"),
    ("r", 10**12, "of another shape"),  # and nothing of that size is made
    ("lora_alpha", float("nan"), "wrong type"),
    ("lora_dropout", 7, "lora_dropout"),
    ("rank_pattern", {"q": "8"}, "wrong type"),
    ("alpha_pattern", {"(": 8}, "no pattern"),
    ("target_modules", ["q", None], "wrong type"),
    ("target_modules", "(a+)+$", "more repetitions"),
    ("target_modules", ".*.*.*.*.*.*x", "more repetitions"),
    ("layers_to_transform", [1, "2"], "wrong type"),
]


@pytest.mark.parametrize("key, value, sentence", WRONG_SETTINGS)
def test_wrong_settings_are_named(t5, key, value, sentence, adapter):
    rewrite(adapter, **{key: value})
    with pytest.raises(ValueError, match=sentence) as caught:
        lora.load(t5.ours(), adapter)
    assert str(adapter) in str(caught.value)
