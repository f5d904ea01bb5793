"""decoding.py: interrupted decoding resumes to the same bits; ids become text as they come."""

import os
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, gemma
from graded import REAL
from torch import nn

import data
import eval as evaluation
import train
from model import decode
from support.dataset.tokenizers import load_tokenizer, plain_ids
from support.evaluation import decoding
from support.evaluation.decode_cache import DecodeCache
from support.evaluation.models import image_features, load_paligemma
from support.training.settings import parse_args

T5_FOLDER = ROOT / "demo/t5"
PALIGEMMA = ROOT / "demo/paligemma"


# --- resumed
@pytest.fixture(scope="module")
def talker():
    """PaliGemma's demo with adapters that make it talk at random."""
    flags = "--model paligemma --device cpu --max-output 8 3 --lora-r 2 --eval-batch-size 3"
    args = parse_args(flags.split())
    model = load_paligemma(args)
    train.make_trainable(args, model)
    generator = torch.Generator().manual_seed(3)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data.normal_(0, 0.15, generator=generator)
    problems = data.load("demo", "test")[:7]
    features = image_features(args, problems, model)
    tokenizer = load_tokenizer(args.weights[0])

    def talk(folder=None, **changed):
        settings = SimpleNamespace(**vars(args) | changed)
        cache = DecodeCache(folder, [model]) if folder else None
        inputs = ([model.eval()], problems, settings, tokenizer, features)
        return evaluation.predict(*inputs, cache=cache)

    return talk


@pytest.mark.slow
@pytest.mark.parametrize("samples, temperature, batches", [(1, 0.0, 6), (2, 1.0, 12)])
def test_decoding_resumes_where_it_was(
    samples, temperature, batches, talker, tmp_path, monkeypatch
):
    options = {"samples": samples, "temperature": temperature}
    expected = talker(**options)
    decoded = []
    continue_batch = decoding.Decoder.continue_batch

    def dies_once(decoder, *inputs):
        decoded.append(inputs)
        if len(decoded) == 5:
            raise KeyboardInterrupt
        return continue_batch(decoder, *inputs)

    monkeypatch.setattr(decoding.Decoder, "continue_batch", dies_once)
    with pytest.raises(KeyboardInterrupt):
        talker(tmp_path, **options)
    path = tmp_path / "predictions.part.jsonl"
    os.truncate(path, path.stat().st_size - 9)  # three complete lines and a torn one
    assert talker(tmp_path, **options) == expected
    assert len(decoded) == 5 + batches - 3 and len(path.read_text().splitlines()) == batches
    assert talker(tmp_path, **options) == expected and len(decoded) == 5 + batches - 3
    if samples > 1:  # a seed of its own for each
        assert talker(tmp_path, **options | {"seed": 1}) != expected
        assert len(decoded) > 5 + batches - 3


# --- forced answers
def test_ids_are_those_the_answer_was_written_after(monkeypatch):
    """Of a loop one round, then the cue, then the answer: as the model had them."""
    tokenizer = load_tokenizer(PALIGEMMA)
    settings = parse_args(["--model", "paligemma", "--device", "cpu"])
    loop = [100, 101] + [110, 111, 112] * 9
    texts = iter([("loop", loop), ("eos", [120])])

    def continued(decoder, examples, *options, **more):
        stop, ids = next(texts)
        result = {"response": tokenizer.decode(ids), "ids": ids, "stop": stop, "tokens": len(ids)}
        return {e["id"]: dict(result) for e in examples}

    monkeypatch.setattr(decoding.Decoder, "continued", continued)
    stub = SimpleNamespace(config=SimpleNamespace(image_token_index=308))
    meta = {"answer_index": 0, "caption": ""}
    problem = data.Problem("1", "Which?", ("red", "blue"), "red", "", None, "", "", meta)
    [result] = evaluation.predict([stub], [problem], settings, tokenizer, None)
    cue = plain_ids(tokenizer, "\nAnswer:")
    assert result["ids"] == [100, 101, 110, 111, 112, *cue, 120]
    assert result["response"].startswith(tokenizer.decode(loop))


# --- ids as text
ODD = "Die Höhe ist 中文, 😀 é\n\n x²  two  spaces\tتهران हिन्दी"
EMOJI = "\U0001fae8"  # four byte tokens in PaliGemma's vocabulary


def byte_ids(tokenizer):
    return [tokenizer.token_to_id(f"<0x{b:02X}>") for b in EMOJI.encode()]


def needs_gemma():
    if not (REAL / "tokenizers/paligemma").is_dir():
        pytest.skip("no tokenizer of PaliGemma; set NANOCOT_DATA")
    return gemma()


@pytest.mark.parametrize("folder", [T5_FOLDER, PALIGEMMA, REAL / "tokenizers/t5", "gemma"])
def test_tokens_join_to_the_text_and_characters_stay_whole(folder):
    if folder != "gemma" and not folder.is_dir():
        pytest.skip(f"no tokenizer in {folder}; set NANOCOT_DATA")
    tokenizer = needs_gemma() if folder == "gemma" else load_tokenizer(folder)
    for text in (ODD, "The answer is (B)."):
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        pieces = decoding.token_texts(tokenizer, ids)
        assert len(pieces) == len(ids) and "".join(pieces) == tokenizer.decode(ids)
        assert "\ufffd" not in "".join(pieces) and sum(map(bool, pieces)) > 4


def test_bytes_of_a_character_are_text_when_it_is_complete():
    tokenizer = needs_gemma()
    emoji = byte_ids(tokenizer)
    assert decoding.token_texts(tokenizer, emoji) == ["", "", "", EMOJI]
    odd = [*emoji[:2], tokenizer.token_to_id("▁the"), emoji[3]]  # no UTF-8: no error either
    assert "the" in "".join(decoding.token_texts(tokenizer, odd))


def test_on_token_gets_each_token_as_it_is_chosen():
    script = torch.tensor([[5, 6, 1, 0], [7, 8, 9, 4]])
    heard = []
    state = SimpleNamespace(t=0, rows=script)

    def logits():
        return nn.functional.one_hot(state.rows[:, state.t], 10).float()

    def step(ids, cache):
        state.t += 1
        return logits()

    state.keep = lambda alive: setattr(state, "rows", state.rows[alive])
    listen = lambda t, ids: heard.append((t, ids.tolist()))  # noqa: E731
    model = SimpleNamespace(config=SimpleNamespace(eos_token_id=1, pad_token_id=0), step=step)
    out = decode(model, logits(), state, 4, on_token=listen)
    assert heard == [(0, [5, 7]), (1, [6, 8]), (2, [1, 9]), (3, [4])]
    assert out.tolist() == script.tolist()
    assert [decoding.stop_reason(row, 1, 0) for row in out] == ["eos", "length"]


@pytest.mark.slow
def test_text_is_printed_in_whole_characters_as_it_is_written(monkeypatch):
    tokenizer = needs_gemma()
    writes = []
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(write=writes.append, flush=lambda: None))
    on_token = decoding.token_printer(tokenizer, "\nAnswer:")
    words, end, answer = (plain_ids(tokenizer, x) for x in ("Two red dots ", " \n", " B"))
    for ids in (words + byte_ids(tokenizer) + end, answer):
        for t, token_id in enumerate([*ids, 1]):
            on_token(t, torch.tensor([token_id]))
    assert "".join(writes) == f"Two red dots {EMOJI}\nAnswer: B"
    assert len([w for w in writes if w]) >= 6 and not any("\ufffd" in w for w in writes)
