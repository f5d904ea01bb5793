"""Attention maps: what is shown is what the models used and wrote.

Weights are random and large, so that a wrong layer, row, head or scale shows; the reference is
transformers' eager attention, and torch's own MultiheadAttention for the fusion.
"""

import base64
import json
from types import SimpleNamespace

import numpy as np
import oracle
import pytest
import torch
from conftest import ROOT
from torch import nn

import data
import eval as evaluation
from fusion import GatedFusion, MultimodalT5
from model import DETR, T5, PaliGemma, T5Config
from support.dataset.features import Features
from support.dataset.tokenizers import load_tokenizer
from support.evaluation import report
from support.training.settings import parse_args

T5_FOLDER = ROOT / "demo/t5"
DETR_FOLDER = ROOT / "demo/detr"


def close(ours, theirs, atol):
    torch.testing.assert_close(ours, theirs, atol=atol, rtol=0)


class Words:
    """Each id is a word of its own."""

    def decode(self, ids, skip_special_tokens):
        return "".join(f" word{i}" for i in ids)


# ---- PaliGemma ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    pytest.importorskip("transformers", reason="the live oracle")
    config, hf = oracle.tiny_paligemma()
    folder = tmp_path_factory.mktemp("pair")
    oracle.write_checkpoint(folder, config, oracle.paligemma_stored(hf))
    return SimpleNamespace(hf=hf, pg=PaliGemma.from_pretrained(folder))


def attentions(hf, **inputs):
    """Of each layer (B, N, T, S), and the logits."""
    hf.set_attn_implementation("eager")
    with torch.no_grad():
        out = hf(**inputs, output_attentions=True)
    return out.attentions, out.logits


@torch.no_grad()
def test_the_weights_a_hook_sees_are_those_of_the_layer(pair):
    """Of each layer, window and soft-cap included; and with its values they make its output."""
    batch = oracle.paligemma_batch("left")
    batch.pop("labels")
    seen = []
    outputs = []
    for layer in pair.pg.language_model.layers:
        layer.self_attn.softmax.register_forward_hook(lambda m, args, w: seen.append(w))
        layer.self_attn.register_forward_hook(lambda m, args, out: outputs.append((args[0], out)))
    pair.pg(**batch)
    for layer in pair.pg.language_model.layers:
        layer.self_attn.softmax._forward_hooks.clear()
        layer.self_attn._forward_hooks.clear()
    theirs, _ = attentions(pair.hf, **batch)
    valid = batch["attention_mask"].bool()
    for layer, w, (x, out), their in zip(
        pair.pg.language_model.layers, seen, outputs, theirs, strict=True
    ):
        for row in range(len(x)):
            close(w.flatten(1, 2)[row][:, valid[row]], their[row][:, valid[row]], 1e-5)
        v = layer.self_attn.v_proj(x).unflatten(-1, (2, 8)).transpose(1, 2)  # (B, K, S, H)
        mixed = (w @ v[:, :, None]).flatten(1, 2).transpose(1, 2).flatten(2)  # (B, T, N * H)
        close(layer.self_attn.o_proj(mixed), out, 1e-5)
    assert len(seen) == 4 and w.std() > 0.05  # not uniform


def test_a_map_is_the_attention_of_the_row_that_predicts_the_token(pair):
    pixels, image = oracle.uniform("look", (1, 3, 28, 28), -1.0, 1.0), pair.pg.config
    prompt = [image.image_token_index] * 4 + [2, 11, 12, 13, oracle.NEWLINE]
    ids = [21, 22, 23, 24, 25, 26, 27]
    features = pair.pg.image_features(pixels)[0].detach().numpy()
    example = {"id": "1", "input_ids": prompt, "token_type_ids": [0] * len(prompt)}
    example["image_features"] = features
    look = report.paligemma_map(pair.pg, example, ids, Words())
    types = torch.tensor([[0] * len(prompt) + [1] * len(ids)])
    both = torch.tensor([prompt + ids])
    inputs = {"input_ids": both, "attention_mask": torch.ones_like(both), "token_type_ids": types}
    theirs, logits = attentions(pair.hf, **inputs, pixel_values=pixels)
    start = len(prompt) - 1
    p = logits[0, start:-1].softmax(-1)[torch.arange(len(ids)), ids]
    assert look["tokens"] == [f" word{i}" for i in ids] and look["grid"] == [2, 2]
    close(torch.tensor(look["p"]), p, 6e-4)
    last = torch.stack([theirs[2], theirs[3]]).mean((0, 1, 2))  # (T, S): 4 layers, from the third
    assert list(look["maps"]) == list(look["share"]) == [str(i) for i in range(len(ids))]
    for i in range(len(ids)):
        patches = last[start + i, :4]
        drawn = np.frombuffer(base64.b64decode(look["maps"][str(i)]), np.uint8).astype(int)
        assert abs(drawn - (patches / patches.max() * 255).numpy()).max() < 0.51
        assert abs(look["share"][str(i)] - float(patches.sum())) < 6e-4
    assert not any(
        layer.self_attn.softmax._forward_hooks for layer in pair.pg.language_model.layers
    )
    del example["image_features"]
    example["input_ids"] = prompt[4:]
    example["token_type_ids"] = [0] * 5
    blind = report.paligemma_map(pair.pg, example, ids, Words())
    assert blind["maps"] == {} and blind["p"] != look["p"]


def test_which_tokens_get_a_map():
    text = "There are 1 2 5 red dots.\n|Answer|:| B"
    tokens = text.replace(" ", "| ").replace("||", "|").split("|")
    chosen = [tokens[i] for i in report.worth_a_map(tokens)]
    assert chosen == ["There", " 1", " 2", " 5", " dots.\n", "Answer", " B"]  # "red" is short
    assert [tokens[i] for i in report.worth_a_map(tokens, 2)] == ["Answer", " B"]
    assert [tokens[i] for i in report.worth_a_map(tokens, 4)] == [" 1", " 2", "Answer", " B"]
    assert report.worth_a_map(["B"]) == [0] and report.worth_a_map([]) == []
    assert len(report.worth_a_map([f" word{i}" for i in range(50)])) == 24


# ---- the fusion ---------------------------------------------------------------------------------


def asked(id="1", image=None):
    meta = {"answer_index": 0, "caption": "", "has_image": bool(image)}
    texts = {"hint": "", "lecture": "", "solution": "It is so.", "answer": "red"}
    return data.Problem(
        id=id, question=f"Which is {id}?", choices=("red", "blue"), image=image, meta=meta, **texts
    )


@pytest.fixture(scope="module")
def fused():
    """Two random models of a two-stage run on DETR's 36 x 64, and the rationales they wrote."""
    torch.manual_seed(0)
    tokenizer = load_tokenizer(T5_FOLDER)
    size = {"vocab_size": tokenizer.get_vocab_size(), "d_model": 24, "d_kv": 8, "d_ff": 32}
    models = []
    for _ in range(2):
        t5 = T5(T5Config(**size, num_layers=2, num_heads=3))
        t5.init_weights()
        model = MultimodalT5(t5, GatedFusion(24, 64)).eval()
        for p in model.fusion.parameters():
            p.data.mul_(2).add_(0.1 * torch.randn_like(p))
        models.append(model)
    problems = [asked("1", image="a.png"), asked("2")]
    features = Features(np.random.default_rng(0).normal(size=(1, 36, 64)).astype("f2"), {"1": 0})
    flags = ["--model", "mmcot", "--device", "cpu", "--vision-weights", str(DETR_FOLDER)]
    written = [{"id": p.id, "rationale": f"Solution: number {p.id}."} for p in problems]
    return SimpleNamespace(models=models, tokenizer=tokenizer, problems=problems, written=written,
                           features=features, settings=parse_args(flags))  # fmt: skip


def maps_of(fused, **changed):
    settings = SimpleNamespace(**vars(fused.settings) | changed)
    inputs = (fused.models, fused.problems, fused.written, settings, fused.tokenizer)
    return evaluation.attention_maps_of(*inputs, fused.features)


@torch.no_grad()
def test_gate_and_attention_are_those_of_the_fusion(fused):
    """Against torch's MultiheadAttention and Eq. 5; with Eq. 6 they give what the decoder reads."""
    maps = maps_of(fused)
    assert json.loads(json.dumps(maps)) == maps and list(maps) == ["1", "2"]
    for p, written in zip(fused.problems, fused.written, strict=True):
        stages = zip(("rationale", "answer"), ("QCM-LE", "QCMG-A"), fused.models, strict=True)
        for (stage, fmt, model), shown in zip(stages, maps[p.id], strict=True):
            source = data.prompt(p, fmt, written["rationale"])[0]
            assert shown["stage"] == stage and "".join(shown["tokens"]) == f"{source}</s>"
            assert (f"number {p.id}" in source) == (stage == "answer")  # what was really written
            ids = torch.tensor([fused.tokenizer.encode(source).ids])
            features = torch.from_numpy(fused.features[p.id])[None]  # (1, P, F)
            mha = nn.MultiheadAttention(24, 1, batch_first=True).eval()
            mha.load_state_dict(model.fusion.mha_layer.state_dict())
            H = model.t5.encode(ids, torch.ones_like(ids))
            vision = model.fusion.image_dense(features)
            got, attention = mha(H, vision, vision, need_weights=True)
            gate = torch.sigmoid(model.fusion.gate_dense(torch.cat((H, got), -1)))  # (1, T, D)
            mixed = (1 - gate) * H + gate * got
            close(mixed, model.encode(ids, torch.ones_like(ids), features), 1e-5)
            close(torch.tensor(shown["gate"]), gate[0].mean(-1), 6e-4)
            assert len(shown["gate"]) == len(shown["attention"]) == ids.shape[1] > 10
            if p.image is None:  # it read zeros: a gate, and no image
                assert shown["boxes"] == shown["labels"] == []
                assert set(map(len, shown["attention"])) == {0}
                continue
            best = attention[0].sum(0).topk(8).indices
            close(torch.tensor(shown["attention"]), attention[0][:, best], 6e-4)
            logits, boxes = DETR.from_pretrained(DETR_FOLDER).detect(features[0])
            close(torch.tensor(shown["boxes"]), boxes[best], 6e-4)
            names = json.loads((DETR_FOLDER / "config.json").read_text())["id2label"]
            expected = [names.get(str(int(i)), "no object") for i in logits.argmax(-1)[best]]
            assert shown["labels"] == expected


def test_without_detr_there_are_no_boxes_and_without_features_no_maps(fused):
    with_boxes = maps_of(fused)["1"][0]
    for other in ({"features": "detr.npy"}, {"vision": "clip"}):
        shown = maps_of(fused, **other)["1"][0]
        assert "boxes" not in shown and shown["attention"] == with_boxes["attention"]
        assert len(shown["labels"]) == 8
        assert all(x.startswith("position ") for x in shown["labels"])
    assert maps_of(SimpleNamespace(**vars(fused) | {"features": None})) == {}


def test_detr_keeps_the_names_of_its_classes(tmp_path):
    detr = DETR.from_pretrained(DETR_FOLDER)
    config = json.loads((DETR_FOLDER / "config.json").read_text())
    detr.save_pretrained(tmp_path)
    named = config["id2label"] | {"0": "a cup"}
    (tmp_path / "config.json").write_text(json.dumps(config | {"id2label": named}))
    DETR.from_pretrained(tmp_path).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["id2label"] == named
