"""python model.py --keys and --summary: what they print, against the files and real passes."""

import json
import re
import shutil
import sys

import pytest
import torch
from conftest import ROOT
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from fusion import GatedFusion, MultimodalT5
from model import DETR, T5, PaliGemma
from support.checkpoints import hub, summary

PLAIN = {"t5": T5, "detr": DETR, "paligemma": PaliGemma}
MULTIMODAL = {"t5": MultimodalT5}
KINDS = [*PLAIN, "mmcot"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """The demo's three folders, and its T5 with a fusion."""
    folder = tmp_path_factory.mktemp("mmcot")
    MultimodalT5(T5.from_pretrained(ROOT / "demo/t5"), GatedFusion(64, 23)).save_pretrained(folder)
    return {name: ROOT / "demo" / name for name in PLAIN} | {"mmcot": folder}


@pytest.fixture
def asked(monkeypatch, capsys):
    """(status, lines of stdout, stderr) of the command."""

    def ask(*arguments, architectures=PLAIN):
        monkeypatch.setattr(sys, "argv", ["model.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            summary.main(architectures)
        said, code = capsys.readouterr(), end.value.code
        return int(code) if isinstance(code, int) else 1, said.out.splitlines(), str(code)

    return ask


def known(name):
    return MULTIMODAL if name == "mmcot" else PLAIN


def loaded(name, folder):
    return (MultimodalT5 if name == "mmcot" else PLAIN[name]).from_pretrained(folder)


# ---- the weight table ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", KINDS)
def test_the_table_is_what_the_loader_does(name, folders, asked):
    """Each line against the file's own header, and its tensor against what was loaded."""
    status, lines, _ = asked("--keys", folders[name], architectures=known(name))
    state, seen = loaded(name, folders[name]).state_dict(), []
    with safe_open(folders[name] / "model.safetensors", "pt") as file:
        for line in lines[1:-1]:
            ours, theirs, shape, dtype, fate = re.split(r"  +", line)
            header = file.get_slice(theirs)
            assert fate == "matched" and dtype == header.get_dtype() == "F32"
            assert shape == str(header.get_shape()) == str(list(state[ours].shape))
            assert torch.equal(state[ours], file.get_tensor(theirs))
            seen.append((ours, theirs))
        assert sorted(theirs for _, theirs in seen) == sorted(file.keys())
    assert [ours for ours, _ in seen] == list(state)
    assert status == 0
    assert re.search(rf": {len(seen)} tensors, {len(seen)} matched$", lines[-1])


def test_what_does_not_fit_is_shown_and_listed_as_the_loader_says_it(folders, asked, tmp_path):
    shutil.copy(folders["t5"] / "config.json", tmp_path)
    tensors = load_file(folders["t5"] / "model.safetensors")
    gone = "decoder.final_layer_norm.weight"
    narrow = "encoder.block.1.layer.1.DenseReluDense.wo.weight"
    del tensors[gone]
    tensors[narrow] = torch.ones(64, 5).bfloat16()
    tensors |= {"something.else": torch.ones(3), "encoder.embed_tokens.weight": torch.ones(2)}
    save_file(tensors, tmp_path / "model.safetensors")
    status, lines, _ = asked("--keys", tmp_path)
    rows = {row[1]: row for row in (re.split(r"  +", line) for line in lines[1:-2])}
    assert len(rows) == len(tensors) + 1
    ours = "decoder.final_layer_norm.weight"
    assert rows[gone] == [ours, gone, "[64]", "-", "missing"]
    assert rows["something.else"] == ["-", "something.else", "[3]", "F32", "unexpected"]
    wrong = ["[64, 5], not [64, 192]", "BF16", "of another shape"]
    assert rows[narrow] == ["encoder.block.1.ffn.wo.weight", narrow, *wrong]
    assert rows["encoder.embed_tokens.weight"][2:] == ["[2]", "F32", "skipped"]
    assert status == 1 and "1 skipped" in lines[-2] and "44 matched" not in lines[-1]
    with pytest.raises(ValueError) as error:
        T5.from_pretrained(tmp_path)
    assert str(error.value).endswith(lines[-1]) and lines[-1].startswith("Tensors 1 missing")


def test_a_t5_with_a_fusion_is_sent_to_its_table(folders, asked):
    status, lines, _ = asked("--keys", folders["mmcot"])
    assert status == 1 and "8 unexpected" in lines[-2] and "python fusion.py --keys" in lines[-1]


def test_the_files_end_in_the_call_that_the_other_tests_make():
    known = {
        "model.py": '"t5": T5, "detr": DETR, "vit_large_patch32_384": ViT, "paligemma": PaliGemma'
    }
    for name, classes in (known | {"fusion.py": '"t5": MultimodalT5'}).items():
        text = (ROOT / name).read_text(encoding="utf-8")
        assert text.endswith(f"    summary.main({{{classes}}})\n")


@pytest.mark.parametrize("flag", ["--keys", "--summary"])
@pytest.mark.parametrize(
    "content, sentence",
    [
        (None, "is neither a folder with config.json and weights nor a Hub id"),
        ("", "config.json is not complete JSON"),
        ("{}", "says model_type None, but 't5' or 'detr' or 'paligemma' is needed"),
        ('{"model_type": "bert"}', "says model_type 'bert'"),
        ('{"model_type": "t5", "d_model": -1}', "d_model is -1, which no T5Config has"),
    ],
)
def test_errors_are_sentences(flag, content, sentence, tmp_path, asked):
    where = tmp_path / "there"
    if content is not None:
        where.mkdir()
        (where / "config.json").write_text(content)
    status, lines, told = asked(flag, where)
    assert status == 1 and not lines and sentence in told


def test_without_weights_there_is_no_table(folders, asked, tmp_path):
    shutil.copy(folders["t5"] / "config.json", tmp_path)
    status, lines, told = asked("--keys", tmp_path)
    assert status == 1 and not lines and "has neither model.safetensors" in told


# ---- the architecture ----------------------------------------------------------------------------

REAL = {"B": 2, "T": 53, "U": 11, "Y": 64, "X": 96, "P": 24}  # P: of DETR, and of the fusion


def real_pass(name, m):
    """{module: shape} of a pass of real numbers, as it is in use."""
    made = {}

    def note(module, given, out):
        made.setdefault(module, tuple((out[0] if isinstance(out, tuple) else out).shape))

    hooks = [module.register_forward_hook(note) for module in m.modules()]
    ids, mask, target = torch.full((2, 53), 7), torch.ones(2, 53), torch.full((2, 11), 7)
    if name == "t5":  # with gradients: without, a CPU may pass a module by
        m(ids, mask, target)
    elif name == "mmcot":
        m(ids, mask, torch.randn(2, 24, 23), target)
    elif name == "detr":
        m(torch.randn(2, 3, 64, 96))
    else:
        ids[:, : m.config.image_tokens] = m.config.image_token_index
        m(ids, torch.randn(2, 3, *[m.config.vision.image_size] * 2))
    for hook in hooks:
        hook.remove()
    return made


def parts(lines):
    """{module's path: (class, shape or None, parameters)} of a summary, its groups taken apart."""
    found, above = {}, []
    for line in lines:
        told = re.fullmatch(r"( *)(?:(\S.*?)  )?(?:(\d+) x )?(\w+) +(?:\((.*)\))? *(.*)", line)
        indent, names, count, kind, shape, size = told.groups()
        del above[len(indent) // 2 :]
        if numbered := re.fullmatch(r"(.*?)(\d+)-(\d+)", names or ""):
            first, last = int(numbered[2]), int(numbered[3])
            names = [f"{numbered[1]}{i}" for i in range(first, last + 1)]
        else:
            names = names.split(", ") if names else [""]
        paths = [f"{before}.{name}".strip(".") for before in above[-1:] or [""] for name in names]
        assert len(names) == int(count or 1)
        each = int(size.rpartition(" x ")[2].replace(",", ""))
        for path in paths:
            found[path] = (kind, shape, each)
        above.append(paths[0])  # equal to the others below as well
    return found


@pytest.mark.parametrize("name", KINDS)
def test_the_summary_is_that_of_a_real_pass(name, folders, asked):
    status, lines, _ = asked("--summary", folders[name], architectures=known(name))
    m = loaded(name, folders[name])
    total = sum(p.numel() for p in m.parameters())
    assert status == 0 and lines[-1].startswith(f"{total:,} parameters")
    real, found = real_pass(name, m), parts(lines[:-1])
    for path, (kind, shape, size) in found.items():
        module = m.get_submodule(path)
        assert (kind, size) == (type(module).__name__, sum(p.numel() for p in module.parameters()))
        if shape is None:
            assert module not in real or path == ""  # PaliGemma's parts are walked one by one
        else:
            sizes = tuple(int(eval(x, {}, REAL)) for x in shape.split(", "))
            assert sizes == real[module], path
    weighing = {
        re.sub(r"\.\d+", ".0", n) for n, x in m.named_modules() if list(x.parameters(False))
    }
    assert weighing == {re.sub(r"\.\d+", ".0", n) for n in found} & weighing


def test_unequal_layers_are_not_one_line():
    """Of three layers the last is wider: two lines, and no sum is lost."""
    layers = [nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, 5)]
    m = nn.Sequential(nn.ModuleList(layers))
    lines = summary.summary(m, lambda m: [layer(torch.ones(3, 4)) for layer in layers])
    assert [re.split(r"  +", line.strip()) for line in lines[1:-1]] == [
        ["0.0-1", "2 x Linear", "(3, 4)", "2 x 20"],
        ["0.2", "Linear", "(3, 5)", "25"],
    ]
    assert lines[-1] == "65 parameters"


@pytest.mark.parametrize("name", PLAIN)
def test_config_json_is_enough_for_a_summary(name, folders, asked, tmp_path):
    shutil.copy(folders[name] / "config.json", tmp_path)
    assert asked("--summary", tmp_path) == asked("--summary", folders[name])


def test_three_billion_parameters_take_no_memory(asked, tmp_path):
    """PaliGemma 2 3B at 224 pixels, as released, from its config alone."""
    vision = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27}
    vision |= {"num_attention_heads": 16, "patch_size": 14}
    config = {"model_type": "paligemma", "vision_config": vision}
    config["text_config"] = {"model_type": "gemma2", "vocab_size": 257216}
    (tmp_path / "config.json").write_text(json.dumps(config))
    built = hub.build(PaliGemma, tmp_path)
    assert {p.device.type for p in built.parameters()} == {"meta"}
    _, lines, _ = asked("--summary", tmp_path)
    assert lines[-1] == "3,032,242,416 parameters"
    assert any("26 x GemmaLayer" in line for line in lines)
