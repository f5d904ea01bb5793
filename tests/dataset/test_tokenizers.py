"""support/dataset/tokenizers.py: T5 from spiece.model, bad files, special tokens in a text."""

import json
import re
from base64 import b64decode, b64encode

import pytest
import sentencepiece
from conftest import gemma
from samples import (
    REAL,
    SENTENCES,
    STRINGS,
    by_pid,
    field,
    needs,
    needs_data,
    needs_tokenizer,
    needs_traces,
    real,
)

import data
from support.dataset.tokenizers import encode, load_tokenizer, plain_ids, special_ids
from support.dataset.traces import load_traces


def test_tokenizer_from_spiece_equals_sentencepiece(spiece):
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(spiece / "spiece.model"))
    ours = load_tokenizer(spiece)
    for text in STRINGS + SENTENCES:
        assert ours.encode(text).ids == [*theirs.encode(text), 1], text
    assert ours.decode(ours.encode(SENTENCES[0]).ids) == SENTENCES[0]
    assert ours.token_to_id("<extra_id_0>") == 219 and ours.token_to_id("<extra_id_99>") == 120
    assert ours.encode("<extra_id_1> x").ids[0] == 218


def test_bad_spiece_models(spiece, tmp_path):
    with pytest.raises(ValueError, match="<eos>, <bos>, <image>"):  # T5's is not PaliGemma's
        data.sequence(load_tokenizer(spiece), "a", "b")
    with pytest.raises(FileNotFoundError, match="tokenizer.json .*spiece.model"):
        load_tokenizer(tmp_path)
    file, whole = tmp_path / "spiece.model", (spiece / "spiece.model").read_bytes()
    names = [(b"<pad>", 3), (b"</s>", 3), (b"<unk>", 2), ("▁a".encode(), 1)]
    pieces = b"".join(field(1, field(1, n) + field(2, 0.0) + field(3, t)) for n, t in names)
    file.write_bytes(pieces + field(3, field(1, b"identity")))
    assert load_tokenizer(tmp_path).encode("a").ids == [3, 1]
    evil_charsmap = field(1, field(1, b"a")) + field(3, field(2, b"\xff" * 40))
    broken = [pieces, whole[: len(whole) // 2], whole[:-3], b"", b"<html>", evil_charsmap]
    for content in broken:
        file.write_bytes(content)
        with pytest.raises(ValueError, match="spiece.model"):
            load_tokenizer(tmp_path)
    file.write_bytes(b"\xff" * 300_000)  # a number that never ends
    with pytest.raises(ValueError, match="spiece.model.* 64 "):
        load_tokenizer(tmp_path)


def test_bad_and_odd_tokenizer_json(spiece, tmp_path):
    file, tokenizer = tmp_path / "tokenizer.json", load_tokenizer(spiece)
    tokenizer.enable_truncation(5)
    tokenizer.enable_padding(length=40)
    tokenizer.save(str(file))  # as released checkpoints may have it
    assert len(load_tokenizer(tmp_path).encode("the longer rope has more mass").ids) in range(6, 40)
    content = json.loads(file.read_text())
    normalizer = {"type": "Precompiled", "precompiled_charsmap": b64encode(b"\xff" * 40).decode()}
    no_unk = content | {"model": content["model"] | {"unk_id": None}}
    for changed in ({}, no_unk, content | {"normalizer": normalizer}):
        file.write_text(json.dumps(changed))
        with pytest.raises(ValueError, match="tokenizer.json"):
            load_tokenizer(tmp_path)


SPECIAL = "</s> <pad> <extra_id_0> <extra_id_99> <<pad> </<pad>s> </s></s> ＜/s>".split()


@pytest.mark.parametrize("text", SPECIAL)
def test_special_tokens_in_a_text_are_text(spiece, text):
    ours = load_tokenizer(spiece)
    [ids] = encode(ours, [f"the rope {text} the belt"], 99)
    special = {ours.token_to_id(name) for name in SPECIAL[:4]}
    assert not special & set(ids[:-1]) and ids[-1] == 1  # its own </s>, at the end
    plain = re.sub("[<＜]", "\N{SNOWMAN}", text)  # another character that is in no piece
    assert ids == encode(ours, [f"the rope {plain} the belt"], 99)[0]


@pytest.mark.slow
@needs_data
def test_tokenizer_from_spiece_equals_real_t5(tmp_path):
    """The real T5 vocabulary, written back as spiece.model, gives the ids of its tokenizer.json."""
    file = json.loads((REAL / "tokenizers/t5/tokenizer.json").read_text())
    model = b""
    for i, (piece, score) in enumerate(file["model"]["vocab"][:32000]):
        kind = {0: 3, 1: 3, 2: 2}.get(i, 1)  # control, control, unknown, normal
        model += field(1, field(1, piece.encode()) + field(2, float(score)) + field(3, kind))
    charsmap = b64decode(file["normalizer"]["normalizers"][0]["precompiled_charsmap"])
    model += field(2, field(3, 1)) + field(3, field(1, b"nmt_nfkc") + field(2, charsmap))
    (tmp_path / "spiece.model").write_bytes(model)
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "spiece.model"))
    ours, real_t5 = load_tokenizer(tmp_path), load_tokenizer(REAL / "tokenizers/t5")
    assert ours.get_vocab() == real_t5.get_vocab()
    texts = STRINGS + [text for p in real("val") for text in (p.question, p.hint, p.lecture)]
    for text in texts:
        assert ours.encode(text).ids == [*theirs.encode(text), 1], text
        assert ours.encode(text.rstrip()).ids == real_t5.encode(text.rstrip()).ids, text


def test_encode_keeps_the_cue(spiece, capsys):
    tokenizer = load_tokenizer(spiece)
    short, long = "Answer:", "a very long rationale " * 40 + "Answer:"
    whole = tokenizer.encode(long).ids
    rows = encode(tokenizer, [short, long], 50)
    assert [len(row) for row in rows] == [len(tokenizer.encode(short).ids), 50]
    assert rows[1][:34] == whole[:34] and rows[1][34:] == whole[-16:]
    assert tokenizer.decode(rows[1]).endswith("Answer:") and rows[1][-1] == 1
    assert "1 of 2 texts were cut to 50 tokens" in capsys.readouterr().err
    published = encode(tokenizer, [long], 50, tail=1)[0]
    assert published == whole[:49] + [1]  # right truncation, </s> kept: the cue is gone
    assert encode(tokenizer, [long], 8)[0] == whole[-8:]


HOSTILE = [
    "<eos>", "<bos><pad><unk>", "<image><image>", "a<loc0001>b <seg001><loc1023>",
    "<<eos>> <ima<image>ge> <eos", "<start_of_turn>user<end_of_turn>",
    "[@BOS@] [2, 3] <mask> <2mass> <unused7>", "0<x<10, y>3, <b>bold</b>",
    "one\n\n\ntwo   three\t<eos>\n", "<|eos|> < eos> ＜eos＞ \u200b<eos>",
]  # fmt: skip


@needs_tokenizer
@pytest.mark.parametrize("text", HOSTILE)
def test_no_text_is_a_special_token(text):
    added = gemma().get_added_tokens_decoder().items()
    control = {id for id, token in added if token.content.strip("\n▁")}
    assert len(control) == 1370 - 31 - 30 and set(special_ids(gemma()).values()) <= control
    ids = plain_ids(gemma(), text)
    assert not control & set(ids)
    assert gemma().decode(ids, skip_special_tokens=False) == text
    row = data.sequence(gemma(), text, text, image_tokens=3)["input_ids"]
    assert [row.count(id) for id in (257152, 2, 1, 0)] == [3, 1, 1, 0]
    assert row[-1] == 1


@needs_tokenizer
def test_hostile_texts_are_hostile():
    """Without the cut they do become special tokens, also where the library offers to stop it."""
    naive = [gemma().encode(text, add_special_tokens=False).ids for text in HOSTILE]
    assert sum(bool({0, 1, 2, 3, 257152} & set(ids)) for ids in naive) >= 6
    gemma().encode_special_tokens = True
    careful = gemma().encode(HOSTILE[3], add_special_tokens=False).ids
    gemma().encode_special_tokens = False
    assert 256001 in careful


@pytest.mark.slow
@needs_tokenizer
@needs_traces
@needs("scienceqa/problems.json")
def test_ordinary_text_has_the_ids_it_always_had():
    texts = [one["thought"] for one in load_traces(REAL / "pali_reason/training_correct.csv")]
    for problem in data.load(REAL / "scienceqa", "val") + list(by_pid().values())[::4]:
        texts += [data.pali_prefix(problem, "reason"), problem.solution]
    for text in texts:
        assert plain_ids(gemma(), text) == gemma().encode(text, add_special_tokens=False).ids
