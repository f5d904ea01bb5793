"""demo/make.py and the checkpoints it made: size, files, and that they do what they are for."""

import pytest
import torch
from conftest import ROOT

import data
from demo import make, scenes
from model import DETR, T5, PaliGemma
from support.dataset.images import detr_pixels, siglip_pixels
from support.dataset.tokenizers import encode, load_tokenizer

T5_FOLDER, DETR_FOLDER, PG_FOLDER = (ROOT / "demo" / x for x in ("t5", "detr", "paligemma"))


def test_the_checkpoints_are_small_and_in_the_hub_layout():
    names = {"t5": {"config.json", "model.safetensors", "tokenizer.json"}}
    names["detr"], names["paligemma"] = names["t5"] - {"tokenizer.json"}, names["t5"]
    for folder, expected in names.items():
        assert {p.name for p in (ROOT / "demo" / folder).iterdir()} == expected
    files = [p for f in (T5_FOLDER, DETR_FOLDER) for p in f.iterdir()]
    assert sum(p.stat().st_size for p in files) <= 8e6
    assert sum(p.stat().st_size for p in PG_FOLDER.iterdir()) <= 6e6


def test_the_tokenizer_reads_every_text_of_the_benchmark():
    tokenizer = load_tokenizer(T5_FOLDER)
    assert [tokenizer.token_to_id(t) for t in ("<pad>", "</s>", "<unk>")] == [0, 1, 2]
    assert tokenizer.get_vocab_size() <= T5.from_pretrained(T5_FOLDER).config.vocab_size
    for problem in data.load("demo", "test"):
        for text in data.prompt(problem, "QCM-LE"):
            ids = tokenizer.encode(text).ids
            assert 2 not in ids and ids[-1] == 1
            assert tokenizer.decode(ids) == text
    strange = tokenizer.encode("Zebra? {x}=42%").ids
    assert 2 not in strange and tokenizer.decode(strange) == "Zebra? {x}=42%"


@torch.inference_mode()
def test_the_detector_names_the_objects_of_test_images():
    detr = DETR.from_pretrained(DETR_FOLDER)
    families = [f for f in scenes.FAMILIES if f != "text"]
    made = [scenes.problem(f, "test", 0, i) for f in families for i in range(8)]
    pixels = torch.stack([detr_pixels(s.image, make.SIDE) for s in made])
    logits, boxes = detr(pixels)
    targets = [make.detr_targets(s.objects) for s in made]
    classes, wanted = (torch.stack(t) for t in zip(*targets, strict=True))
    full = classes < len(scenes.CLASSES)
    assert (logits.argmax(-1) == classes)[full].float().mean() > 0.93
    assert (boxes - wanted)[full].abs().mean() * scenes.SIDE < 3


def test_the_text_model_finds_the_letter_of_an_answer():
    """It is not worth much on images: that is left to learn. But it can read."""
    t5, tokenizer = T5.from_pretrained(T5_FOLDER), load_tokenizer(T5_FOLDER)
    problems = [p for p in data.load("demo", "test") if p.meta["family"] != "position"][:120]
    sources, targets = zip(*(data.prompt(p, "QCMG-A") for p in problems), strict=True)
    rows = encode(tokenizer, list(sources), 256)
    batch = data.collate([{"id": "", "input_ids": row} for row in rows])
    rows = t5.generate(batch["input_ids"], batch["attention_mask"], 16).tolist()
    right = [tokenizer.decode(row) == t for row, t in zip(rows, targets, strict=True)]
    assert sum(right) / len(right) > 0.8


def test_pretraining_has_no_val_or_test_scene_and_no_held_out_family():
    assert not set(make.FAMILIES) & set(scenes.HELD_OUT)
    for index in range(40):
        record = scenes.problem(make.FAMILIES[index % 8], "train", make.SEED, index).record
        assert record["split"] == "train"
    source, target = make.text_question(3)
    assert source.startswith("Question:") and target


def test_batch_norms_swap_there_and_back():
    detr = DETR.from_pretrained(DETR_FOLDER)
    before = {k: v.clone() for k, v in detr.state_dict().items()}
    make.swap_norms(detr, make.FrozenBatchNorm, torch.nn.BatchNorm2d)
    assert any(isinstance(m, torch.nn.BatchNorm2d) for m in detr.modules())
    make.swap_norms(detr, torch.nn.BatchNorm2d, make.FrozenBatchNorm)
    after = detr.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[k], after[k]) for k in before)


@pytest.mark.slow
def test_the_documented_command_makes_all(tmp_path, monkeypatch):
    short = "--pictures 700 --texts 400 --detr-steps 2 --t5-steps 2 --threads 1".split()
    short += "--scenes 400 --paligemma-steps 3 --lookup-steps 1".split()
    monkeypatch.setattr("sys.argv", ["make.py", "--out", str(tmp_path), *short])
    make.main()
    DETR.from_pretrained(tmp_path / "detr")
    t5 = T5.from_pretrained(tmp_path / "t5")
    assert load_tokenizer(tmp_path / "t5").get_vocab_size() <= t5.config.vocab_size
    paligemma = PaliGemma.from_pretrained(tmp_path / "paligemma")
    tokenizer = load_tokenizer(tmp_path / "paligemma")
    assert tokenizer.token_to_id("<image>") == paligemma.config.image_token_index


@torch.inference_mode()
def test_the_paligemma_sees_and_finds_letters_but_never_reasoned_about_an_image():
    """Training has to add reasoning about the image."""
    lessons = [make.scene_lessons(i) for i in range(80)]
    thoughts = [x for group in lessons for x in group if "So the answer" in x.suffix]
    assert len(thoughts) == 80 and not any(x.pixels for x in thoughts)
    pg, tokenizer = PaliGemma.from_pretrained(PG_FOLDER), load_tokenizer(PG_FOLDER)
    families = [f for f in scenes.FAMILIES if f not in (*scenes.HELD_OUT, "text")]
    right = {"describe": [], "lookup": []}
    for made in (scenes.problem(f, "test", 0, i) for f in families for i in range(6)):
        pixels = siglip_pixels(made.image, make.SIDE)[None]
        answer = made.record["choices"][made.record["answer"]]
        for task, results in right.items():
            prefix, suffix, shown = make.lesson(task, made, f"So. So the answer is {answer}.")
            tokens = pg.config.image_tokens if shown else 0
            row = data.sequence(tokenizer, prefix, suffix, tokens)
            batch = data.pali_collate([{"id": ""} | row])
            labels = batch.pop("labels")[:, 1:]
            del batch["ids"]
            logits = pg(**batch, pixel_values=pixels if shown else None)[:, :-1]
            results += (logits.argmax(-1) == labels)[labels != -100].tolist()
    assert sum(right["describe"]) / len(right["describe"]) > 0.8
    assert sum(right["lookup"]) / len(right["lookup"]) > 0.98
