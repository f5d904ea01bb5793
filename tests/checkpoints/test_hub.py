"""Checkpoint folders: every layout of a T5, pickles, the Hub, and errors that are sentences."""

import json
import os
import pickle

import oracle
import pytest
import torch
from pairs import VERSIONS, assert_same_logits, close, make_t5, t5_logits
from safetensors import safe_open
from safetensors.torch import load_file

from fusion import GatedFusion, MultimodalT5
from model import DETR, T5, PaliGemma
from support.checkpoints import hub


@pytest.fixture(scope="module", params=VERSIONS)
def pair(request, tmp_path_factory):
    return make_t5(tmp_path_factory.mktemp("t5"), request.param)


@pytest.fixture(scope="module")
def t5(tmp_path_factory):
    return make_t5(tmp_path_factory.mktemp("t5"), "v1.1")


# ---- T5: every file layout ----------------------------------------------------------------------


def hub_file(folder, config, hf):
    """A: as transformers 4 wrote it."""
    oracle.write_checkpoint(folder, config, oracle.t5_stored(hf))


def file_of_transformers_5(folder, config, hf):
    """B: its config says tie_word_embeddings=true even for v1.1, and scale_decoder_outputs."""
    hf.save_pretrained(folder)
    written = json.loads((folder / "config.json").read_text())
    assert written["tie_word_embeddings"] is True
    assert written["scale_decoder_outputs"] is (config.get("tie_word_embeddings") is not False)


def state_dict_of_transformers_5(folder, config, hf):
    """C: with every alias of the embedding spelled out."""
    state = hf.state_dict()
    assert {"encoder.embed_tokens.weight", "lm_head.weight"} <= state.keys()
    oracle.write_checkpoint(folder, config, state)


def old_file(folder, config, hf):
    """Tensors that old versions stored and that must not be used."""
    stored = dict(oracle.t5_stored(hf))
    name = "decoder.block.0.layer.1.EncDecAttention.relative_attention_bias.weight"
    stored[name] = 5 * torch.ones(32, config["num_heads"])
    stored["encoder.position_ids"] = torch.arange(9)
    stored["encoder.embed_tokens.weight"] = hf.shared.weight
    oracle.write_checkpoint(folder, config, stored)


def sharded(folder, config, hf):
    oracle.write_shards(folder, config, oracle.t5_stored(hf))


def pytorch_bin(folder, config, hf):
    """UnifiedQA's only file: a pickle, its aliases sharing storage."""
    torch.save(hf.state_dict(), folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(config))


def old_zipless_bin(folder, config, hf):
    state = {name: t.detach() for name, t in hf.state_dict().items()}
    torch.save(state, folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    (folder / "config.json").write_text(json.dumps(config))


def bin_with_an_alias_first(folder, config, hf):
    state = hf.state_dict()
    first = ("decoder.embed_tokens.weight", "lm_head.weight", "encoder.embed_tokens.weight")
    state = {name: state[name] for name in first} | dict(state)
    assert next(iter(state)) == first[0]
    torch.save(state, folder / "pytorch_model.bin")
    (folder / "config.json").write_text(json.dumps(config))


LAYOUTS = (
    hub_file,
    file_of_transformers_5,
    state_dict_of_transformers_5,
    old_file,
    sharded,
    pytorch_bin,
    old_zipless_bin,
    bin_with_an_alias_first,
)


@pytest.mark.parametrize("write", LAYOUTS, ids=lambda write: write.__name__)
def test_t5_layouts(pair, write, tmp_path):
    write(tmp_path, pair.config, pair.hf)
    assert_same_logits(tmp_path, pair.hf)


@pytest.mark.parametrize("write", (file_of_transformers_5, state_dict_of_transformers_5))
def test_t5_saves_hub_layout_whatever_it_read(pair, write, tmp_path):
    write(tmp_path, pair.config, pair.hf)
    T5.from_pretrained(tmp_path).save_pretrained(tmp_path / "out")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    assert stored.keys() == oracle.t5_stored(pair.hf).keys()
    assert_same_logits(tmp_path / "out", pair.hf)


def test_t5_round_trip_through_the_reference(pair, tmp_path):
    from transformers import T5ForConditionalGeneration

    pair.t5.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt"}
    back, info = T5ForConditionalGeneration.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    batch = oracle.t5_batch()
    close(t5_logits(back.eval(), *batch), t5_logits(pair.hf, *batch))
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["tie_word_embeddings"] is (pair.version == "v1.0")  # what 4.x goes by


def test_saving_over_a_loaded_checkpoint(tmp_path):
    """Weights are memory-mapped: overwriting their own file must not change them midway."""
    made = make_t5(tmp_path, "v1.0")
    made.t5.save_pretrained(tmp_path)
    made.t5.save_pretrained(tmp_path)
    assert_same_logits(tmp_path, made.hf)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["config.json", "model.safetensors"]


def test_loaded_weights_do_not_write_into_their_file(tmp_path):
    made = make_t5(tmp_path, "v1.0")
    with torch.no_grad():
        for p in made.t5.parameters():
            p.zero_()
    assert_same_logits(tmp_path, made.hf)


# ---- T5: pickles --------------------------------------------------------------------------------


def test_bin_is_converted_once_and_again_when_it_has_changed(pair, tmp_path):
    pytorch_bin(tmp_path, pair.config, pair.hf)
    converted, source = tmp_path / "model.safetensors", tmp_path / "pytorch_model.bin"
    assert_same_logits(tmp_path, pair.hf)
    stamp, first = converted.stat().st_mtime_ns, converted.read_bytes()
    os.utime(source)  # another time, but the same contents
    assert_same_logits(tmp_path, pair.hf)
    assert converted.stat().st_mtime_ns == stamp
    state = {name: t.detach() * 2 for name, t in pair.hf.state_dict().items()}
    torch.save(state, source)
    doubled = T5.from_pretrained(tmp_path)
    assert torch.equal(doubled.shared.weight, pair.hf.shared.weight * 2)
    pytorch_bin(tmp_path, pair.config, pair.hf)
    assert_same_logits(tmp_path, pair.hf)
    assert converted.read_bytes() == first  # the same pickle, the same file


def test_a_file_that_was_not_converted_here_is_never_replaced(pair, tmp_path):
    pair.t5.save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"not read")
    assert_same_logits(tmp_path, pair.hf)
    (tmp_path / "model.safetensors.source.json").write_text("{}")  # of another file
    assert_same_logits(tmp_path, pair.hf)


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("modern", [True, False])
def test_a_pickle_with_code_is_refused(modern, tmp_path):
    config, hf = oracle.tiny_t5()
    state = dict(oracle.t5_stored(hf)) | {"payload": Payload(str(tmp_path / "pwned"))}
    path = tmp_path / "pytorch_model.bin"
    torch.save(state, path, _use_new_zipfile_serialization=modern)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="pytorch_model.bin is not a plain file of tensors.*refus"):
        T5.from_pretrained(tmp_path)
    assert not (tmp_path / "pwned").exists()
    assert not (tmp_path / "model.safetensors").exists()
    torch.load(path, weights_only=False)  # the payload is live: the test could have failed
    assert (tmp_path / "pwned").exists()


# ---- errors are sentences -----------------------------------------------------------------------


SIZES = {T5: oracle.TINY_T5, DETR: oracle.TINY_DETR, PaliGemma: oracle.TINY_PALIGEMMA}
KINDS = (T5, MultimodalT5, DETR, PaliGemma)


@pytest.fixture(scope="module", params=KINDS, ids=lambda kind: kind.__name__)
def saved(request, tmp_path_factory):
    """A model class, and the folder and the tensors of a checkpoint of it."""
    kind = request.param
    if kind is MultimodalT5:
        model = MultimodalT5(T5(hub.model_config(T5, SIZES[T5])), GatedFusion(24, 10))
    else:
        model = kind(hub.model_config(kind, SIZES[kind]))
    folder = tmp_path_factory.mktemp("saved")
    model.save_pretrained(folder)
    return kind, folder, load_file(folder / "model.safetensors")


def test_each_wrong_tensor_is_named(saved, tmp_path):
    kind, folder, tensors = saved
    config = json.loads((folder / "config.json").read_text())
    gone = sorted(tensors)[1::9]
    narrow = [name for name, t in tensors.items() if t.dim() == 2 and name not in gone][-1]
    sizes = list(tensors[narrow].shape)
    changed = {name: t for name, t in tensors.items() if name not in gone}
    changed |= {"something.else": torch.ones(3), narrow: torch.ones(sizes[0], sizes[1] + 1)}
    oracle.write_checkpoint(tmp_path, config, changed)
    with pytest.raises(ValueError, match=str(tmp_path)) as error:
        kind.from_pretrained(tmp_path)
    first = ", ".join(gone[:5])  # the rest is a number
    more = f" and {len(gone) - 5} more" if len(gone) > 5 else ""
    assert str(error.value).endswith(
        f"Tensors {len(gone)} missing: {first}{more}; 1 unexpected: something.else; 1 of another "
        f"shape: {narrow}: file {[sizes[0], sizes[1] + 1]}, model {sizes}."
    )


def test_fp16_another_architecture_and_damaged_weights_are_refused(saved, tmp_path):
    kind, folder, _ = saved
    with pytest.raises(ValueError, match="float16.*bfloat16"):
        kind.from_pretrained(folder, dtype=torch.float16)
    config = (folder / "config.json").read_text()
    (tmp_path / "config.json").write_text(config)
    with pytest.raises(FileNotFoundError, match="neither model.safetensors"):
        kind.from_pretrained(tmp_path)
    whole = (folder / "model.safetensors").read_bytes()
    for damaged in (whole[:1000], whole[:-100], b"", b"\xff" * 64):
        (tmp_path / "model.safetensors").write_bytes(damaged)
        with pytest.raises(ValueError, match="model.safetensors cannot be read"):
            kind.from_pretrained(tmp_path)
    other = json.loads(config) | {"model_type": "bart"}
    oracle.write_checkpoint(tmp_path, other, {})
    with pytest.raises(ValueError, match="model_type 'bart'.*is needed"):
        kind.from_pretrained(tmp_path)


def test_a_refusal_is_short_and_names_the_cause(t5, tmp_path):
    stored = oracle.t5_stored(t5.hf)
    bits = {"quantization_config": {"quant_method": "bitsandbytes"}}
    quantised = {name: t.to(torch.int8) for name, t in stored.items()}
    quantised |= {f"{name}_absmax": torch.ones(1) for name in stored}
    wrapped = {f"module._orig_mod.{name}": t for name, t in stored.items()}
    cases = (bits, quantised, "bitsandbytes"), ({}, wrapped, "'module._orig_mod.'")
    for config, tensors, reason in cases:
        oracle.write_checkpoint(tmp_path, t5.config | config, tensors)
        with pytest.raises(ValueError, match=reason) as error:
            T5.from_pretrained(tmp_path)
        assert len(str(error.value)) < 1500


def test_a_detr_saved_without_timm_is_named(tmp_path):
    from transformers import DetrConfig, DetrForObjectDetection, ResNetConfig

    resnet = ResNetConfig(
        embedding_size=8, hidden_sizes=[8, 8, 8, 8], depths=[1, 1, 1, 1], out_features=["stage4"]
    )
    sizes = dict(d_model=32, encoder_layers=1, decoder_layers=1, num_queries=3)
    config = DetrConfig(use_timm_backbone=False, backbone_config=resnet, backbone=None, **sizes)
    DetrForObjectDetection(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="use_timm_backbone") as error:
        DETR.from_pretrained(tmp_path)
    assert len(str(error.value)) < 1500


@pytest.mark.parametrize(
    "text, sentence",
    [
        (None, "config.json does not exist"),
        ('{"model_type": "t5", ', "config.json is not complete JSON"),
        ("[]", "not a JSON object"),
        ("{}", "model_type None"),
        ('{"model_type": "detr"}', "model_type 'detr'"),
    ],
)
def test_a_bad_config(text, sentence, tmp_path):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=sentence):
        T5.from_pretrained(tmp_path)


BAD_VALUES = [  # one of each kind; tests/test_fuzz.py has the rest
    ("num_layers", "six"),
    ("num_layers", 10**9),
    ("num_layers", True),
    ("d_model", -3),
    ("vocab_size", 10**30),
    ("layer_norm_epsilon", float("nan")),
    ("feed_forward_proj", "gated-silu"),
    ("scale_decoder_outputs", 1),
    ("relative_attention_num_buckets", 10**12),
    ("decoder_start_token_id", 10**6),
    ("relative_attention_max_distance", 4),
]


@pytest.mark.parametrize("name, value", BAD_VALUES)
def test_a_config_value_no_model_has(t5, name, value, tmp_path):
    oracle.write_checkpoint(tmp_path, t5.config | {name: value}, oracle.t5_stored(t5.hf))
    with pytest.raises(ValueError, match="config.json"):
        T5.from_pretrained(tmp_path)


INDEXES = {
    "no map": "{}",
    "a list": '{"weight_map": ["a"]}',
    "another folder": '{"weight_map": {"a": "../model.safetensors"}}',
    "the root": '{"weight_map": {"a": "/etc/passwd"}}',
    "the folder above": '{"weight_map": {"a": ".."}}',
    "NUL": '{"weight_map": {"a": "\\u0000"}}',
    "too long": '{"weight_map": {"a": "%s"}}' % ("a" * 5000),
    "cut": '{"weight_map": {',
}


@pytest.mark.parametrize("text", INDEXES.values(), ids=INDEXES)
def test_a_bad_index(t5, text, tmp_path):
    oracle.write_checkpoint(tmp_path / "a", t5.config, oracle.t5_stored(t5.hf))
    (tmp_path / "a/model.safetensors.index.json").write_text(text)
    with pytest.raises(ValueError, match=r"index\.json|cannot be read as safetensors") as caught:
        T5.from_pretrained(tmp_path / "a")
    assert type(caught.value) is ValueError


def test_what_is_no_file_is_not_waited_for(t5, tmp_path):
    sharded(tmp_path, t5.config, t5.hf)
    shard = tmp_path / "model-00002-of-00003.safetensors"
    makers = (os.mkfifo, os.mkdir, lambda path: os.symlink("/dev/zero", path), lambda path: None)
    for make in makers:
        shard.unlink()
        make(shard)
        with pytest.raises(ValueError, match="model-00002-of-00003"):
            T5.from_pretrained(tmp_path)
        shard.rmdir() if shard.is_dir() else shard.unlink(missing_ok=True)
        shard.touch()


def test_loading_draws_no_weights(t5, monkeypatch):
    """On the meta device a first draw would cost nothing but the import of torch's compiler."""
    for name in ("normal_", "uniform_"):
        monkeypatch.setattr(torch.Tensor, name, lambda *_, **__: pytest.fail("drawn"))
    T5.from_pretrained(t5.folder)


def test_large_finite_weights_are_weights(t5, tmp_path):
    """Their sum overflows."""
    stored = {name: t.detach().clone() for name, t in oracle.t5_stored(t5.hf).items()}
    stored["shared.weight"].fill_(3e38)
    oracle.write_checkpoint(tmp_path, t5.config, stored)
    assert T5.from_pretrained(tmp_path).shared.weight.min() > 2.9e38


@pytest.mark.parametrize("bad", (float("nan"), float("inf"), -float("inf"), 3))
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_weights_that_are_not_finite_are_named(t5, bad, dtype, tmp_path):
    stored = {name: t.detach().clone() for name, t in oracle.t5_stored(t5.hf).items()}
    name = "decoder.block.0.layer.2.DenseReluDense.wo.weight"
    stored[name][3, 5] = bad
    stored[name] = stored[name].to(torch.int8) if bad == 3 else stored[name]
    oracle.write_checkpoint(tmp_path, t5.config, stored)
    with pytest.raises(ValueError, match=f"1 tensors: {name}"):
        T5.from_pretrained(tmp_path, dtype)


base = torch.arange(6.0)
ODD_STATES = {
    "terabytes in four bytes": {"a": torch.zeros(1).expand(10**6, 10**6)},
    "numbers for names": {1: torch.ones(2)},
    "sparse": {"a": torch.eye(3).to_sparse()},
    "no memory": {"a": torch.ones(3, device="meta")},
    "overlapping": {"a": base[:4], "b": base[2:]},
    "nothing": b"",
    "no pickle": b"\x80\x04not a pickle",
    "a list": pickle.dumps([1, 2]),
}


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("state", ODD_STATES.values(), ids=ODD_STATES)
def test_a_bin_of_odd_tensors_is_refused(state, tmp_path):
    path = tmp_path / "pytorch_model.bin"
    path.write_bytes(state) if isinstance(state, bytes) else torch.save(state, path)
    (tmp_path / "config.json").write_text(json.dumps(oracle.TINY_T5))
    with pytest.raises(ValueError, match="pytorch_model.bin"):
        T5.from_pretrained(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"pytorch_model.bin", "config.json"}


# ---- the Hub ------------------------------------------------------------------------------------


def test_a_hub_id_without_network_is_one_sentence():
    with pytest.raises(ConnectionError) as error:
        T5.from_pretrained("nobody/has-this-one")
    said = str(error.value)
    assert "nobody/has-this-one" in said and "could not be reached" in said
    assert "\n" not in said


@pytest.mark.parametrize("where", ["no/such/folder", "./missing", "plain-name"])
def test_a_path_that_is_nothing(where):
    with pytest.raises(FileNotFoundError, match="neither a folder"):
        hub.resolve(where)


def test_an_adapter_and_a_folder_of_checkpoints_are_said_to_be_that(tmp_path):
    for name in ("checkpoint-9", "checkpoint-10"):
        (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match="checkpoint-10"):
        T5.from_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    with pytest.raises(ValueError, match="org/base"):
        T5.from_pretrained(tmp_path)


def fake_hub(monkeypatch, repository, folder):
    """snapshot_download over a dict {file: bytes}; returns the list of files fetched."""
    import fnmatch

    import huggingface_hub

    fetched = []

    def snapshot_download(repo_id, allow_patterns, **_):
        for name, content in repository.items():
            if any(fnmatch.fnmatch(name, pattern) for pattern in allow_patterns):
                (folder / name).write_bytes(content)
                fetched.append(name)
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return fetched


@pytest.mark.parametrize("weights", ["model.safetensors", "pytorch_model.bin"])
def test_the_hub_gives_the_pickle_only_where_there_is_nothing_else(weights, monkeypatch, tmp_path):
    names = ["config.json", "tokenizer.json", "spiece.model", "flax_model.msgpack", "tf_model.h5"]
    files = dict.fromkeys([*names, weights, "pytorch_model.bin"], b"x")
    fetched = fake_hub(monkeypatch, files, tmp_path)
    assert hub.resolve("allenai/unifiedqa-t5-base") == tmp_path
    assert set(fetched) == {*names[:3], weights}


@pytest.mark.parametrize(
    "name, kind, sentence",
    [
        ("GatedRepoError", PermissionError, "org/name is gated.*licence.*HF_TOKEN"),
        ("RepositoryNotFoundError", FileNotFoundError, "no repository org/name"),
    ],
)
def test_gated_and_missing_repositories(name, kind, sentence, monkeypatch):
    import huggingface_hub
    from huggingface_hub import errors

    def snapshot_download(*_, **__):
        raise getattr(errors, name).__new__(getattr(errors, name))

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(kind, match=sentence):
        hub.resolve("org/name")


def test_a_folder_inside_a_repository(monkeypatch, tmp_path):
    """Only its files are asked for: a trainer's checkpoint-500/ stays where it is."""
    import huggingface_hub

    asked = []

    def snapshot_download(repo_id, allow_patterns, ignore_patterns):
        asked.append((repo_id, allow_patterns, ignore_patterns))
        (tmp_path / "models/answer").mkdir(parents=True, exist_ok=True)
        (tmp_path / "models/answer/config.json").write_text("{}")
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert hub.resolve("org/name/models/answer") == tmp_path / "models/answer"
    for repository, allowed, ignored in asked:
        assert repository == "org/name" and ignored == ["models/answer/*/*"]
        assert all(pattern.startswith("models/answer/") for pattern in allowed)
    hub.resolve("org/other")
    assert asked[-1][2] == ["*/*"]


def test_a_zip_file_is_unpacked_once(t5, monkeypatch, tmp_path):
    """A local one, with a folder inside; a trainer's checkpoint in it is not taken for it."""
    import zipfile

    monkeypatch.setenv("NANOCOT_CACHE", str(tmp_path / "cache"))
    hub_file(tmp_path, t5.config, t5.hf)
    archive = tmp_path / "mm-cot-base-ans.zip"
    with zipfile.ZipFile(archive, "w") as file:
        for name in ("config.json", "model.safetensors"):
            file.write(tmp_path / name, f"mm-cot-base-ans/{name}")
        file.writestr("mm-cot-base-ans/checkpoint-500/config.json", "{}")
    assert_same_logits(archive, t5.hf)
    [folder] = (tmp_path / "cache/unpacked").iterdir()
    before = (folder / "mm-cot-base-ans/config.json").stat().st_mtime_ns
    assert hub.resolve(str(archive)) == folder / "mm-cot-base-ans"
    assert (folder / "mm-cot-base-ans/config.json").stat().st_mtime_ns == before


@pytest.mark.parametrize("name", ["../config.json", "/etc/config.json", "a/b.txt"])
def test_a_zip_file_that_is_no_checkpoint(name, monkeypatch, tmp_path):
    import zipfile

    monkeypatch.setenv("NANOCOT_CACHE", str(tmp_path / "cache"))
    archive = tmp_path / "x.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr(name, "{}")
    with pytest.raises(ValueError, match="x.zip"):
        T5.from_pretrained(archive)
    archive.write_bytes(b"no zip")
    with pytest.raises(ValueError, match="x.zip"):
        T5.from_pretrained(archive)
