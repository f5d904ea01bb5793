"""Looks, and answers as they are written: what is shown is what the models used and wrote.

Weights are random and large, so that a wrong layer, row, head or scale shows; the reference is
transformers' eager attention, and torch's own MultiheadAttention for the fusion.
"""

import base64
import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import oracle
import pytest
import torch
from conftest import ROOT, gemma
from PIL import Image
from torch import nn

import data
import eval as scoring
from fusion import GatedFusion, MultimodalT5
from model import DETR, T5, PaliGemma, T5Config, decode
from support.dataset.features import Features
from support.dataset.tokenizers import load_tokenizer, plain_ids
from support.evaluation import decode_cache as decoding
from support.evaluation import looking
from support.evaluation.models import image_features
from support.training.settings import parse_args

T5_FOLDER, DETR_FOLDER, PALIGEMMA = (ROOT / "demo" / n for n in ("t5", "detr", "paligemma"))
REAL = Path(os.environ["NANOCOT_DATA"]) / "tokenizers"


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
    seen, given = [], []
    for layer in pair.pg.language_model.layers:
        layer.self_attn.softmax.register_forward_hook(lambda m, args, w: seen.append(w))
        layer.self_attn.register_forward_hook(lambda m, args, out: given.append((args[0], out)))
    pair.pg(**batch)
    for layer in pair.pg.language_model.layers:
        layer.self_attn.softmax._forward_hooks.clear()
        layer.self_attn._forward_hooks.clear()
    theirs, _ = attentions(pair.hf, **batch)
    valid = batch["attention_mask"].bool()
    for layer, w, (x, out), their in zip(
        pair.pg.language_model.layers, seen, given, theirs, strict=True
    ):
        for row in range(len(x)):
            close(w.flatten(1, 2)[row][:, valid[row]], their[row][:, valid[row]], 1e-5)
        v = layer.self_attn.v_proj(x).unflatten(-1, (2, 8)).transpose(1, 2)  # (B, K, S, H)
        made = (w @ v[:, :, None]).flatten(1, 2).transpose(1, 2).flatten(2)  # (B, T, N * H)
        close(layer.self_attn.o_proj(made), out, 1e-5)
    assert len(seen) == 4 and w.std() > 0.05  # not uniform


def test_a_look_is_the_attention_of_the_row_that_predicts_the_token(pair):
    pixels, image = oracle.uniform("look", (1, 3, 28, 28), -1.0, 1.0), pair.pg.config
    prompt = [image.image_token_index] * 4 + [2, 11, 12, 13, oracle.NEWLINE]
    ids = [21, 22, 23, 24, 25, 26, 27]
    features = pair.pg.image_features(pixels)[0].detach().numpy()
    example = {"id": "1", "input_ids": prompt, "token_type_ids": [0] * len(prompt)}
    example["image_features"] = features
    look = looking.paligemma_look(pair.pg, example, ids, Words())
    kinds = torch.tensor([[0] * len(prompt) + [1] * len(ids)])
    whole = torch.tensor([prompt + ids])
    given = {"input_ids": whole, "attention_mask": torch.ones_like(whole), "token_type_ids": kinds}
    theirs, logits = attentions(pair.hf, **given, pixel_values=pixels)
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
    blind = looking.paligemma_look(pair.pg, example, ids, Words())
    assert blind["maps"] == {} and blind["p"] != look["p"]


def test_which_tokens_get_a_map():
    text = "There are 1 2 5 red dots.\n|Answer|:| B"
    tokens = text.replace(" ", "| ").replace("||", "|").split("|")
    chosen = [tokens[i] for i in looking.worth_a_map(tokens)]
    assert chosen == ["There", " 1", " 2", " 5", " dots.\n", "Answer", " B"]  # "red" is short
    assert [tokens[i] for i in looking.worth_a_map(tokens, 2)] == ["Answer", " B"]
    assert [tokens[i] for i in looking.worth_a_map(tokens, 4)] == [" 1", " 2", "Answer", " B"]
    assert looking.worth_a_map(["B"]) == [0] and looking.worth_a_map([]) == []
    assert len(looking.worth_a_map([f" word{i}" for i in range(50)])) == 24


def test_ids_are_those_the_answer_was_written_behind(monkeypatch):
    """Of a loop one round, then the cue, then the answer: as the model had them."""
    tokenizer = load_tokenizer(PALIGEMMA)
    config = vars(parse_args(["--model", "paligemma", "--device", "cpu"]))
    loop = [100, 101] + [110, 111, 112] * 9
    texts = iter([("loop", loop), ("eos", [120])])

    def continued(model, examples, tokenizer, *rest, **how):
        stop, ids = next(texts)
        said = {"response": tokenizer.decode(ids), "ids": ids, "stop": stop, "tokens": len(ids)}
        return {e["id"]: dict(said) for e in examples}

    monkeypatch.setattr(scoring, "continued", continued)
    weight = SimpleNamespace(weight=torch.zeros(1))
    stub = SimpleNamespace(
        language_model=SimpleNamespace(embed_tokens=weight),
        config=SimpleNamespace(image_token_index=308),
    )
    (told,) = scoring.predict([stub], [asked()], config, tokenizer, None)
    cue = plain_ids(tokenizer, "\nAnswer:")
    assert told["ids"] == [100, 101, 110, 111, 112, *cue, 120]
    assert told["response"].startswith(tokenizer.decode(loop))


# ---- tokens as text -----------------------------------------------------------------------------

ODD = "Die Höhe ist 中文, 😀 é\n\n x²  two  spaces\tتهران हिन्दी"


@pytest.mark.parametrize("folder", [T5_FOLDER, PALIGEMMA, REAL / "t5", REAL / "paligemma"])
def test_tokens_join_to_the_text_and_characters_stay_whole(folder):
    if not folder.is_dir():
        pytest.skip(f"no tokenizer in {folder}; set NANOCOT_DATA")
    tokenizer = gemma() if folder == REAL / "paligemma" else load_tokenizer(folder)
    for text in (ODD, "The answer is (B)."):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        pieces = decoding.spelled(tokenizer, ids)
        assert len(pieces) == len(ids) and "".join(pieces) == tokenizer.decode(ids)
        assert "\ufffd" not in "".join(pieces) and sum(map(bool, pieces)) > 4
    if folder == REAL / "paligemma":
        assert "".join(pieces) == text
        whole = [tokenizer.token_to_id(f"<0x{b:02X}>") for b in "\U0001fae8".encode()]
        assert decoding.spelled(tokenizer, whole) == ["", "", "", "\U0001fae8"]
        odd = [*whole[:2], tokenizer.token_to_id("▁the"), whole[3]]  # no UTF-8: no error either
        assert "the" in "".join(decoding.spelled(tokenizer, odd))


# ---- the fusion ---------------------------------------------------------------------------------


def asked(id="1", **other):
    fields = {"image": None, "hint": "", "lecture": "", "solution": "It is so."} | other
    meta = {"answer_index": 0, "caption": "", "has_image": bool(fields["image"])}
    return data.Problem(
        id=id,
        question=f"Which is {id}?",
        choices=("red", "blue"),
        answer="red",
        meta=meta,
        **fields,
    )


@pytest.fixture(scope="module")
def fused():
    """Two random models of a two-stage run on DETR's 36 x 64, and what two problems were told."""
    torch.manual_seed(0)
    tokenizer = load_tokenizer(T5_FOLDER)
    size = {"vocab_size": tokenizer.get_vocab_size(), "d_model": 24, "d_kv": 8, "d_ff": 32}
    models = []
    for _ in range(2):
        t5 = T5(T5Config(**size, num_layers=2, num_heads=3))
        t5.init_weights()
        made = MultimodalT5(t5, GatedFusion(24, 64)).eval()
        for p in made.fusion.parameters():
            p.data.mul_(2).add_(0.1 * torch.randn_like(p))
        models.append(made)
    problems = [asked("1", image="a.png"), asked("2")]
    features = Features(np.random.default_rng(0).normal(size=(1, 36, 64)).astype("f2"), {"1": 0})
    flags = ["--model", "mmcot", "--device", "cpu", "--vision-weights", str(DETR_FOLDER)]
    told = [
        {"id": p.id, "response": "x", "rationale": f"Solution: number {p.id}."} for p in problems
    ]
    return SimpleNamespace(models=models, tokenizer=tokenizer, problems=problems, told=told,
                           features=features, config=vars(parse_args(flags)))  # fmt: skip


def look_at(fused, **changed):
    given = fused.models, fused.problems, fused.told, fused.tokenizer, fused.features
    return looking.looks(fused.config | changed, *given)


@torch.no_grad()
def test_gate_and_attention_are_those_of_the_fusion(fused):
    """Against torch's MultiheadAttention and Eq. 5; with Eq. 6 they give what the decoder reads."""
    looks = look_at(fused)
    assert json.loads(json.dumps(looks)) == looks and list(looks) == ["1", "2"]
    for p, told in zip(fused.problems, fused.told, strict=True):
        for stage, model, look in zip(
            ("rationale", "answer"), fused.models, looks[p.id], strict=True
        ):
            fmt = "QCM-LE" if stage == "rationale" else "QCMG-A"
            source = data.prompt(p, fmt, told["rationale"])[0]
            assert look["stage"] == stage and "".join(look["tokens"]) == f"{source}</s>"
            assert (f"number {p.id}" in source) == (stage == "answer")  # what was really written
            ids = torch.tensor([fused.tokenizer.encode(source).ids])
            seen = torch.from_numpy(fused.features[p.id])[None]  # (1, P, F)
            mha = nn.MultiheadAttention(24, 1, batch_first=True).eval()
            mha.load_state_dict(model.fusion.mha_layer.state_dict())
            H = model.t5.encode(ids, torch.ones_like(ids))
            vision = model.fusion.image_dense(seen)
            got, attention = mha(H, vision, vision, need_weights=True)
            gate = torch.sigmoid(model.fusion.gate_dense(torch.cat((H, got), -1)))  # (1, T, D)
            close((1 - gate) * H + gate * got, model.encode(ids, torch.ones_like(ids), seen), 1e-5)
            close(torch.tensor(look["gate"]), gate[0].mean(-1), 6e-4)
            assert len(look["gate"]) == len(look["attention"]) == ids.shape[1] > 10
            if p.image is None:  # zeros were looked at: a gate, and no picture
                assert look["boxes"] == look["labels"] == [] and set(
                    map(len, look["attention"])
                ) == {0}
                continue
            best = attention[0].sum(0).topk(8).indices
            close(torch.tensor(look["attention"]), attention[0][:, best], 6e-4)
            logits, boxes = DETR.from_pretrained(DETR_FOLDER).detect(seen[0])
            close(torch.tensor(look["boxes"]), boxes[best], 6e-4)
            names = {31: "no object"} | {i: fused_label(i) for i in range(31)}
            assert look["labels"] == [names[int(i)] for i in logits.argmax(-1)[best]]


def fused_label(i):
    return json.loads((DETR_FOLDER / "config.json").read_text())["id2label"][str(i)]


def test_without_detr_there_are_no_boxes_and_without_a_picture_no_looks(fused):
    with_boxes = look_at(fused)["1"]
    look = look_at(fused, features="detr.npy")["1"][0]
    assert "boxes" not in look and look["attention"] == with_boxes[0]["attention"]
    assert len(look["labels"]) == 8 and all(x.startswith("position ") for x in look["labels"])
    blind = SimpleNamespace(**vars(fused) | {"features": None})
    assert look_at(blind) == {}


def test_detr_keeps_the_names_of_its_classes(tmp_path):
    detr = DETR.from_pretrained(DETR_FOLDER)
    config = json.loads((DETR_FOLDER / "config.json").read_text())
    detr.save_pretrained(tmp_path)
    named = config["id2label"] | {"0": "a cup"}
    (tmp_path / "config.json").write_text(json.dumps(config | {"id2label": named}))
    DETR.from_pretrained(tmp_path).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["id2label"] == named


# ---- streaming ----------------------------------------------------------------------------------


def test_decode_tells_each_token_as_it_is_chosen():
    script = torch.tensor([[5, 6, 1, 0], [7, 8, 9, 4]])
    heard, state = [], SimpleNamespace(t=0, rows=script)

    def logits():
        return nn.functional.one_hot(state.rows[:, state.t], 10).float()

    def step(ids, cache):
        state.t += 1
        return logits()

    state.keep = lambda alive: setattr(state, "rows", state.rows[alive])
    listen = lambda t, ids: heard.append((t, ids.tolist()))  # noqa: E731
    out, stops = decode(logits(), step, state, 4, 1, on_token=listen)
    assert heard == [(0, [5, 7]), (1, [6, 8]), (2, [1, 9]), (3, [4])]
    assert out.tolist() == script.tolist() and stops == ["eos", "length"]


@pytest.mark.slow
def test_text_appears_in_whole_characters_as_it_is_written(monkeypatch):
    if not (REAL / "paligemma").is_dir():
        pytest.skip("no tokenizer of PaliGemma; set NANOCOT_DATA")
    tokenizer, writes = gemma(), []
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(write=writes.append, flush=lambda: None))
    on_token = decoding.printer(tokenizer, "\nAnswer:")
    emoji = [tokenizer.token_to_id(f"<0x{b:02X}>") for b in "\U0001fae8".encode()]
    words, end, answer = (plain_ids(tokenizer, x) for x in ("Two red dots ", " \n", " B"))
    for ids in (words + emoji + end, answer):
        for t, id in enumerate([*ids, 1]):
            on_token(t, torch.tensor([id]))
    assert "".join(writes) == "Two red dots \U0001fae8\nAnswer: B"
    assert len([w for w in writes if w]) >= 6 and not any("\ufffd" in w for w in writes)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Run folders of both models as they are before training; of the fusion with random weights."""
    folder = tmp_path_factory.mktemp("runs")
    torch.manual_seed(1)
    t5 = T5.from_pretrained(T5_FOLDER)
    mm = MultimodalT5(t5, GatedFusion(t5.config.d_model, 64))
    mm.fusion.image_dense.weight.data.mul_(9)  # else a picture changes no word
    for stage in ("rationale", "answer"):
        mm.save_pretrained(folder / "mm" / stage)
        shutil.copy(T5_FOLDER / "tokenizer.json", folder / "mm" / stage)
    (folder / "pali").mkdir()
    for name, flags in {
        "mm": "mmcot --max-output 12 6",
        "pali": "paligemma --max-output 6 2",
    }.items():
        given = ["--device", "cpu", "--features-cache", str(folder / f"cache-{name}"), "--model"]
        config = vars(parse_args([*given, *flags.split()]))
        (folder / name / "config.json").write_text(json.dumps(config))
    Image.new("RGB", (96, 96), "red").save(folder / "red.png")
    return folder


@pytest.mark.parametrize("name", ["mm", "pali"])
def test_what_is_streamed_is_the_prediction(runs, name, capsys, monkeypatch):
    """With a picture and without; and where the answer had to be asked for, that is said."""
    kept = []
    predict = scoring.predict
    monkeypatch.setattr(
        scoring, "predict", lambda *given: kept.extend(predict(*given)) or kept[-1:]
    )
    for image in ([], ["--image", str(runs / "red.png")]):
        choices = ["--choices", "red", "blue"]
        scoring.main([str(runs / name), "--question", "Which colour is it?", *choices, *image])
        said, x = capsys.readouterr(), kept[-1]
        told = ([x["rationale"]] if name == "mm" else []) + [x["response"].rstrip()]
        assert said.out.rstrip("\n").removesuffix("  (red)").removesuffix("  (blue)") == "\n".join(
            told
        )
        if name == "pali":
            assert x["forced_after"] == "length"
            assert said.err == "(stopped: length; then made to answer)\n"
        else:
            assert said.err == ("" if x["stop"] == "eos" else f"(stopped: {x['stop']})\n")
    assert kept[0] != kept[1]


def test_errors_of_asking_are_sentences(runs, tmp_path, capsys):
    (tmp_path / "bad.png").write_bytes(b"no picture")
    ask = ["--question", "What?"]
    for flags, error, words in [
        ([runs / "mm", *ask, "--image", tmp_path / "no.png"], FileNotFoundError, "does not exist"),
        ([runs / "mm", *ask, "--image", tmp_path / "bad.png"], ValueError, "cannot be read"),
        ([runs / "mm", *ask, "--choices", *"abcdefghijk"], ValueError, "11 choices are too many"),
        ([tmp_path, *ask], FileNotFoundError, "no run folder: it has no config.json"),
        ([T5_FOLDER, *ask], ValueError, "no run folder: its config.json is none of train.py's"),
    ]:
        with pytest.raises(error, match=words):
            scoring.main(list(map(str, flags)))
    for flags in (["--image", "x.png"], ["--choices", "a"], ["another", *ask], ["--question", ""]):
        with pytest.raises(SystemExit):
            scoring.main([str(runs / "mm"), *flags])
        assert "--question TEXT" in capsys.readouterr().err


# ---- files --------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mm", "pali"])
def test_a_decoded_run_keeps_looks_and_the_same_predictions(runs, name, tmp_path):
    shutil.copytree(runs / name, tmp_path / "run")
    config, models, tokenizer = scoring.load_run(tmp_path / "run")
    problems = data.load("demo", "test")[:3]
    model = models[0] if name == "pali" else None
    features = image_features(config, problems, model)
    written = {}
    for looks in ("0", "2"):
        how = scoring.parse_args([str(tmp_path / "run"), "--looks", looks])
        how.skipped = None
        scoring.evaluate(tmp_path / "run", models, problems, config, tokenizer, features, how)
        files = ("predictions.jsonl", "metrics.json", "looks.json")
        written[looks] = [(tmp_path / "run" / file).read_text() for file in files]
    assert written["0"][:2] == written["2"][:2] and '"ids"' not in written["2"][0]
    assert json.loads(written["0"][2]) == {}
    looks = json.loads(written["2"][2])
    assert list(looks) == [p.id for p in problems[:2]]
    for line in map(json.loads, written["2"][0].splitlines()[:2]):
        look = looks[line["id"]]
        if name == "pali":
            assert "".join("".join(look["tokens"]).split()) == "".join(line["response"].split())
            assert len(look["p"]) == len(look["tokens"]) and all(0 <= p <= 1 for p in look["p"])
        else:
            assert [x["stage"] for x in look] == ["rationale", "answer"]
            assert line["rationale"].strip() in " ".join("".join(look[1]["tokens"]).split())
