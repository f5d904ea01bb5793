"""Bad input by the thousand: every file the project reads, mutated, and what is made of it.

    python tests/test_fuzz.py --cases 20000              # all readers, a table
    python tests/test_fuzz.py --reader detr --case 17    # one case again, with its traceback

A case is a valid set of files of which one is changed: in its bytes (flip, cut, insert, duplicate,
splice, numbers, another encoding), in its structure (values of wrong types, keys renamed, doubled
and gone, lying headers, pictures with repaired checksums, zips with evil entries), or in what it is
(a folder, a pipe, a device, a link). The reader must take it or refuse it with a sentence: an error
of the kinds in SAID that names a file of the case and ends in a full stop. Everything else is a
violation: another error, more than 5 s, over a gigabyte, a file where none belongs, a process that
dies. A case is made from (seed, reader, number) alone, so each can be had again.
"""

import argparse
import contextlib
import copy
import csv
import gc
import io
import itertools
import json
import os
import pickle
import random
import resource
import select
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
import zlib
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT  # puts the repository on the path
from PIL import Image, PngImagePlugin
from samples import annotation, field

import data
import eval as evaluation
import lora
from fusion import GatedFusion, MultimodalT5
from model import (
    DETR,
    T5,
    DETRConfig,
    Gemma2Config,
    PaliGemma,
    PaliGemmaConfig,
    SigLIPConfig,
    T5Config,
)
from support import files
from support.dataset import sources
from support.dataset import tokenizers as tokenizing
from support.dataset.features import cached_features, published_features
from support.dataset.images import open_image, siglip_pixels, unusable
from support.dataset.traces import load_traces
from support.evaluation import metrics, report, tables
from support.teachers.cache import Ledger
from support.training import folders
from support.training.settings import parse_args

SAID = (  # the kinds of error that may leave a reader; a subclass (JSONDecodeError) may not
    ValueError,
    OSError,
    FileNotFoundError,
    PermissionError,
    IsADirectoryError,
    NotADirectoryError,
    ConnectionError,
)
SECONDS, BYTES = 5, 1 << 30

# ---- valid files ---------------------------------------------------------------------------------


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def pictures(folder):
    noise = np.random.default_rng(0).integers(0, 255, (9, 12, 3), dtype=np.uint8)
    rgb = Image.fromarray(noise)
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "a phone's"
    told = PngImagePlugin.PngInfo()
    told.add_text("a", "b" * 50, zip=True)
    told.add_itxt("c", "d" * 50, zip=True)
    rgb.save(folder / "rgb.png", pnginfo=told, exif=exif, icc_profile=bytes(200))
    rgb.convert("RGBA").save(folder / "rgba.png")
    rgb.quantize(5).save(folder / "palette.png", transparency=b"\x00\x80\xff")
    Image.fromarray(noise[..., 0].astype(np.uint16) * 257).save(folder / "deep.png")
    rgb.convert("1").save(folder / "bits.png")
    rgb.save(folder / "phone.jpg", exif=exif)
    rgb.convert("CMYK").save(folder / "cmyk.jpg")
    rgb.convert("L").save(folder / "progressive.jpg", progressive=True)
    rgb.save(folder / "moving.gif", save_all=True, append_images=[rgb.rotate(90)])
    rgb.save(folder / "a.webp", exif=exif)
    rgb.save(folder / "a.bmp")
    for kind in ("raw", "tiff_lzw", "jpeg"):
        rgb.save(folder / f"{kind}.tiff", compression=None if kind == "raw" else kind)


RECORD = {
    "question": "Which is longer?\nSay so.",
    "choices": ["rope", "belt"],
    "answer": 1,
    "hint": "Look.",
    "image": "image.png",
    "lecture": "Length.\nIs length.",
    "solution": "The belt.",
    "subject": "natural science",
    "grade": "grade2",
    "task": "closed choice",
}


def scienceqa(folder):
    write_json(folder / "problems.json", {pid: RECORD | {"split": "test"} for pid in "123"})
    write_json(folder / "pid_splits.json", {"train": ["2"], "test": ["1", "2", "3"]})
    write_json(folder / "captions.json", {"captions": {"1": "a rope"}, "model": "x"})


def mathvista(folder):
    entry = annotation(1)
    choice = entry | {"choices": ["2", "4"], "answer": "4", "answer_type": "integer"}
    write_json(folder / "annot_testmini.json", {"1": entry, "2": choice, "3": entry})


def lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def own(folder):
    caption = {"id": 2, "caption": "a belt", "image": None, "answer": "rope", "meta": {"a": [1]}}
    lines(folder / "own.jsonl", [{"id": "a"} | RECORD, RECORD | caption, {"id": "c"} | RECORD])


def trace_lines(folder):
    verdict = {"correct": True, "consistent": True, "by": "rule", "why": ""}
    trace = {"id": "1", "question": "q", "thought": "The belt.\nIs it.", "answer": "Answer: B"}
    trace |= {"gold": "belt", "verdict": verdict, "teacher": "demo", "usage": {"cost": 0.1}}
    trace |= {"key": "k1", "kept": True, "stop": "eos", "reply": {"thought": "t", "answer": "a"}}
    bare = {"id": 2, "question": "q", "thought": "t", "answer": "\\boxed{\\text{B}}", "key": "k2"}
    lines(folder / "traces.jsonl", [trace, bare, trace | {"verdict": None, "key": "k3"}])


def seed_csv(folder):
    names = ["questions", "thoughts", "generated_answers", "true_answers", "indexes", "validity"]
    with open(folder / "training.csv", "w", newline="") as file:
        table = csv.writer(file)
        table.writerows([names, ["q", "t\nt", "a, b", "B", "0", "yes"], list("qtaB") + ["7", "no"]])


def seed_dict(folder):
    suffix = "Thoughts:\nIt is.\nAnswer:\nB"
    columns = {"prefixes": ["q", "p"], "suffixes": [suffix, suffix], "images": ["3.png", "a/4.jpg"]}
    write_json(folder / "training_dict.json", columns)


def t5_tokenizer(folder):
    shutil.copy(ROOT / "demo/t5/tokenizer.json", folder)


def pali_tokenizer(folder):
    shutil.copy(ROOT / "demo/paligemma/tokenizer.json", folder)


def spiece(folder):
    names = ["<pad>", "</s>", "<unk>", *"▁abcdefghijklmnopqrstuvwxyz", "▁the", "rope"]
    pieces = [field(1, field(1, n.encode()) + field(2, -1.0 * i)) for i, n in enumerate(names)]
    charsmap = struct.pack("<I", 1024) + bytes(1024) + b"\0"  # a table with nothing in it
    normalizer = field(3, field(1, b"none") + field(2, charsmap))
    (folder / "spiece.model").write_bytes(b"".join(pieces) + field(2, field(3, 1)) + normalizer)


def charsmap(folder):
    spiece(folder)
    tokenizing.load_tokenizer(folder).save(f"{folder}/tokenizer.json")
    (folder / "spiece.model").unlink()


def published_npy(folder):
    write_json(folder / "name_map.json", {"1": "0", "2": 1})
    np.save(folder / "resnet.npy", np.ones((2, 2048), np.float16))


def published_pth(folder):
    write_json(folder / "name_map.json", {"1": "0"})
    torch.save(torch.ones(1, 145, 1024, dtype=torch.float16), folder / "vit.pth")


def image_problems(folder):
    """Two problems with pictures, one without."""
    for name in "ab":
        if not (folder / f"{name}.png").is_file():
            Image.new("RGB", (8, 8), (ord(name), 0, 0)).save(folder / f"{name}.png")
    paths = {"1": folder / "a.png", "2": folder / "b.png", "3": None}
    return [
        data.Problem(id, "q", (), "a", "", path and str(path), "", "", {})
        for id, path in paths.items()
    ]


def ledger(folder):
    trace_lines(folder)
    path = folder / "traces.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    lines(path, [record for record in records if record.get("verdict", 1)])


def extract(pixels):
    return [picture.mean((1, 2), keepdim=True)[..., 0].repeat(1, 4) for picture in pixels]


def feature_cache(folder):
    folder.mkdir(exist_ok=True)
    problems = image_problems(folder)
    cached_features(problems[:1], extract, "weights", 8, folder / "cache")
    for path in (folder / "cache").iterdir():
        path.rename(folder / path.name)


TINY_T5 = T5Config(vocab_size=40, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)


def tiny_t5():
    torch.manual_seed(0)
    return T5(TINY_T5)


def t5(folder):
    tiny_t5().save_pretrained(folder)


def t5_shards(folder):
    from safetensors.torch import load_file, save_file

    t5(folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    halves = [dict(list(tensors.items())[i::2]) for i in (0, 1)]
    for i, half in enumerate(halves):
        save_file(half, folder / f"part{i}.safetensors", {"format": "pt"})
    table = {name: f"part{i}.safetensors" for i, half in enumerate(halves) for name in half}
    write_json(folder / "model.safetensors.index.json", {"metadata": {}, "weight_map": table})


def t5_bin(folder, zipped=True):
    from safetensors.torch import load_file

    t5(folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)


def t5_old_bin(folder):
    t5_bin(folder, zipped=False)


def multimodal(folder):
    MultimodalT5(tiny_t5(), GatedFusion(8, 5, "mask")).save_pretrained(folder)


def detr(folder):
    resnet = {"layers": [1, 1, 1, 1], "channels": [2, 2, 2, 2]}
    sizes = dict(encoder_layers=1, decoder_layers=1, encoder_ffn_dim=4, decoder_ffn_dim=4)
    heads = dict(encoder_attention_heads=2, decoder_attention_heads=2, num_queries=3, num_labels=2)
    torch.manual_seed(0)
    DETR(DETRConfig(backbone_kwargs=resnet, d_model=8, **sizes, **heads)).save_pretrained(folder)


def paligemma(folder):
    sizes = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    vision = SigLIPConfig(**sizes, image_size=4, patch_size=2)
    text = Gemma2Config(**sizes, vocab_size=40, num_key_value_heads=1, head_dim=4)
    model = PaliGemma(PaliGemmaConfig(vision, text, image_token_index=9))
    model.init_weights(torch.Generator().manual_seed(0))
    model.save_pretrained(folder)


def adapter(folder):
    model = tiny_t5()
    lora.inject(model, 2, 4)
    lora.save(model, folder)


def archive(folder):
    with zipfile.ZipFile(folder / "train.zip", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("train/1/image.png", os.urandom(300))
        file.writestr("train/2/image.png", b"x" * 50)
        file.writestr("train/empty/", b"")


def addresses(folder):
    write_json(folder / "table.json", {"val.zip": ["http://127.0.0.1:9/val.zip", None]})
    (folder / "set").mkdir()
    scienceqa(folder / "set")
    write_json(folder / "set/pid_splits.json", dict.fromkeys(data.SPLITS[:3], ["1"]))


def predictions(folder):
    one = {"id": "1", "response": "The answer is (B).", "rationale": "Because.", "tokens": 3}
    lines(folder / "predictions.jsonl", [one, {"id": 2, "response": "A"}, one | {"id": "3"}])


def run_folder(folder):
    """A run of mmcot on three problems beside it, as train.py leaves it."""
    splits = enumerate(("train", "train", "val", "test", "test"))
    lines(folder / "own.jsonl", [{"id": i} | RECORD | {"split": split} for i, split in splits])
    (folder / "run").mkdir()
    flags = ["--model", "mmcot", "--recipe", "answer", "--data", str(folder / "own.jsonl")]
    config = vars(parse_args([*flags, "--device", "cpu", "--out", str(folder / "run")]))
    folders.write_config(config | {"versions": folders.VERSIONS}, folder / "run")
    problems = data.load(folder / "own.jsonl", "test")
    told = [{"id": p.id, "response": "The answer is (B).", "stop": "eos"} for p in problems]
    graded = metrics.grade_all(problems, told)
    of = evaluation.about(config["data"], "test", "QCM-LE")
    scores, graded = evaluation.assess(graded, of, config)
    tables.write_graded(folder / "run", graded, scores | {"skipped": {"train": 0, "test": 1}})
    steps = [{"stage": "answer", "step": i, "loss": 0.5, "val_loss": 1.0} for i in (1, 2)]
    lines(folder / "run/log.jsonl", steps)
    write_json(folder / "run/looks.json", {})


# ---- the readers ---------------------------------------------------------------------------------


@cache
def tokenizers():
    return [tokenizing.load_tokenizer(ROOT / "demo" / name) for name in ("t5", "paligemma")]


def read_picture(folder):
    for path in sorted(folder.iterdir()):
        picture = open_image(path)
        assert picture.mode == "RGB"
        assert siglip_pixels(picture, 14).isfinite().all()


def use(problems, told=()):
    """What is done with problems and traces before a model sees them."""
    t5, gemma = tokenizers()
    unusable(problems, open_image)
    some = [p for p in problems if not unusable([replace(p, image=None)])][:3]
    data.examples(some, "QCM-LE", t5, max_input=64, max_output=64, captions=True)
    rows = [data.TrainRow(p, "reason") for p in some]
    rows += [data.TrainRow(p, "answer", has_suffix=False) for p in some]
    rows += [data.TrainRow(p, "reason", trace) for p, trace in zip(some, told, strict=False)]
    data.pali_examples(rows, gemma, max_suffix=64, shuffle_choices=True)
    for p in some:
        json.dumps([p.id, p.question, p.answer, *p.choices], ensure_ascii=False).encode()


def read_set(folder, where=".", split="test"):
    skipped = []
    problems = data.load(folder / where, split, skipped)
    files.write_skipped(skipped, folder / "skipped.jsonl")
    assert len(list(files.json_lines(folder / "skipped.jsonl"))) == len(skipped)
    if skipped:
        with pytest.raises(ValueError) as caught:
            data.load(folder / where, split)
        raise caught.value
    use(problems)


def read_own(folder):
    read_set(folder, "own.jsonl", "train")


def read_mathvista(folder):
    read_set(folder, split="trainval")


def read_traces(folder, name):
    told = load_traces(folder / name)
    asked = data.Problem("1", "q", ("rope", "belt"), "belt", "", None, "", "", {"answer_index": 1})
    use([asked] * 2 + [replace(asked, choices=(), meta={})], told[:3])
    json.dumps(told, ensure_ascii=False).encode()


def read_tokenizer(folder):
    tokenizer = tokenizing.load_tokenizer(folder)
    ids = tokenizing.encode(tokenizer, ["the longer rope </s> ½ \0 ", ""], 64)
    tokenizer.decode(ids[0])
    tokenizing.plain_ids(tokenizer, "a <loc0001> b")


def read_published(folder, name):
    features = published_features(folder / name, folder / "name_map.json")
    rows = [{"id": id, "input_ids": [1], "image_features": features.stored(id)} for id in "12"]
    data.collate(rows)


def read_cache(folder):
    features = cached_features(image_problems(folder), extract, "weights", 8, folder)
    rows = [{"id": id, "input_ids": [1], "image_features": features.stored(id)} for id in "123"]
    data.collate(rows)


def finite(model):
    assert all(p.isfinite().all() for p in model.parameters()), "weights that are not finite"


def read_t5(folder):
    model = T5.from_pretrained(folder)
    finite(model)
    model.generate(torch.ones(1, 3, dtype=torch.long), torch.ones(1, 3), max_new_tokens=2)


def read_multimodal(folder):
    model = MultimodalT5.from_pretrained(folder)
    finite(model)
    some = torch.ones(1, 3, dtype=torch.long)
    width = model.fusion.image_dense.in_features if model.fusion else 1
    model.generate(some, some, torch.ones(1, 2, width), max_new_tokens=2)


def read_detr(folder):
    model = DETR.from_pretrained(folder)
    finite(model)
    model.features(torch.zeros(1, 3, 40, 33))


def read_paligemma(folder):
    model = PaliGemma.from_pretrained(folder)
    finite(model)
    side, ids = model.config.vision.image_size, [model.config.image_token_index]
    ids = torch.tensor([ids * model.config.image_tokens + [1, 2, 3]])
    model.generate(ids, torch.zeros(1, 3, side, side), max_new_tokens=2)


def read_adapter(folder):
    model = tiny_t5()
    lora.load(model, folder)
    finite(model)


def read_zip(folder):
    (folder / "set").mkdir()
    sources.unpack(folder / "train.zip", folder / "set", "train")


def read_addresses(folder):
    fetch, sources.download_scienceqa = sources.download_scienceqa, lambda *_: None
    try:
        data.main(["scienceqa", "--addresses", f"{folder}/table.json", "--to", f"{folder}/set"])
    except SystemExit as stop:
        raise ValueError(stop.code) from None
    finally:
        sources.download_scienceqa = fetch


def read_predictions(folder):
    told = tables.read_predictions(folder / "predictions.jsonl")
    meta = {"answer_index": 1}
    problem = data.Problem("1", "q", ("rope", "belt"), "belt", "", None, "", "", meta)
    for prediction in told[:3]:
        evaluation.grade(problem, prediction["response"])
    json.dumps(told, ensure_ascii=False).encode()


def read_ledger(folder):
    ledger = Ledger(folder / "traces.jsonl")
    ledger.close()


def read_run(folder):
    """What `python eval.py RUN` does; and what --resume asks of the folder."""
    run = folder / "run"
    args = evaluation.parse_args([str(run), "--device", "cpu"])
    with contextlib.redirect_stderr(io.StringIO()):
        column = evaluation.score_run(run, args)
        tables.table({"run": column.scores}, all_rows=True)
        tables.runs_table({"run": column.scores})
        report.write_report(folder, {"run": column})
        flags = ["--model", "mmcot", "--resume", "--out", str(run)]
        folders.is_complete(parse_args(flags))


READERS = {  # name: (what makes the valid files, what reads them, which files are mutated)
    "pictures": (pictures, read_picture, "*"),
    "scienceqa": (scienceqa, read_set, "*.json"),
    "mathvista": (mathvista, read_mathvista, "*.json"),
    "own jsonl": (own, read_own, "*.jsonl"),
    "traces jsonl": (trace_lines, partial(read_traces, name="traces.jsonl"), "*"),
    "traces csv": (seed_csv, partial(read_traces, name="training.csv"), "*"),
    "traces json": (seed_dict, partial(read_traces, name="training_dict.json"), "*"),
    "t5 tokenizer": (t5_tokenizer, read_tokenizer, "*"),
    "pali tokenizer": (pali_tokenizer, read_tokenizer, "*"),
    "spiece": (spiece, read_tokenizer, "*"),
    "charsmap": (charsmap, read_tokenizer, "*"),
    "features npy": (published_npy, partial(read_published, name="resnet.npy"), "*"),
    "features pth": (published_pth, partial(read_published, name="vit.pth"), "*"),
    "feature cache": (feature_cache, read_cache, "[fm]*"),
    "t5": (t5, read_t5, "*"),
    "t5 shards": (t5_shards, read_t5, "*"),
    "t5 bin": (t5_bin, read_t5, "*.bin"),
    "t5 old bin": (t5_old_bin, read_t5, "*.bin"),
    "multimodal": (multimodal, read_multimodal, "*"),
    "detr": (detr, read_detr, "*"),
    "paligemma": (paligemma, read_paligemma, "*"),
    "adapter": (adapter, read_adapter, "*"),
    "zip": (archive, read_zip, "*"),
    "addresses": (addresses, read_addresses, "*.json"),
    "predictions": (predictions, read_predictions, "*"),
    "ledger": (ledger, read_ledger, "*"),
    "run folder": (run_folder, read_run, "run/*.json*"),
}

# ---- mutations of bytes --------------------------------------------------------------------------

EDGES = [
    0,
    1,
    *(2**bits + more for bits in (7, 8, 15, 16, 31, 32, 63) for more in (-1, 0)),
    2**64 - 1,
]


def place(rng, content):
    """A position: in half of the cases near the start, where headers are."""
    return rng.randrange(min(len(content), rng.choice((64, len(content)))) or 1)


def flip(rng, content):
    changed = bytearray(content or b"\0")
    for _ in range(rng.choice((1, 1, 2, 8, 40))):
        changed[place(rng, changed)] ^= rng.choice((1 << rng.randrange(8), rng.randrange(1, 256)))
    return bytes(changed)


def cut(rng, content):
    at = rng.choice((0, 1, len(content) - 1, place(rng, content)))
    return content[: max(at, 0)]


def gone(rng, content):
    at = place(rng, content)
    return content[:at] + content[at + rng.choice((1, 2, 8, 100)) :]


def insert(rng, content):
    at = place(rng, content)
    some = (b"\0", b"\xff", b"[" * 9, b'"', b"\n", b"\xef\xbb\xbf", b"9" * 5000, rng.randbytes(9))
    some = rng.choice(some)
    return content[:at] + some * rng.choice((1, 1, 3, 300)) + content[at:]


def duplicate(rng, content):
    start, end = sorted((place(rng, content), rng.randrange(len(content) + 1)))
    return content[:end] + content[start:end] * rng.choice((1, 2, 20)) + content[end:]


def splice(rng, content):
    other = (content[::-1], bytes(len(content)), rng.randbytes(200), b"<html>404</html>", EVIL)
    other = rng.choice(other)
    return content[: place(rng, content)] + other[rng.randrange(len(other) or 1) :]


def numbers(rng, content):
    """A number of a header becomes an extreme one."""
    value, size, at = rng.choice(EDGES), rng.choice((1, 2, 4, 8)), place(rng, content)
    number = (value & (1 << 8 * size) - 1).to_bytes(size, rng.choice(("little", "big")))
    return content[:at] + number + content[at + size :]


def encoding(rng, content):
    text = content.decode("utf-8", "replace").replace("rope", "röpe")
    kind = rng.choice(("utf-16", "utf-16-le", "utf-32", "latin-1", "utf-8-sig", "utf-7"))
    return text.encode(kind, "replace")


def digits(rng, content):
    """A number in a text becomes another."""
    found = [i for i, byte in enumerate(content[:5000]) if 48 <= byte < 58]
    if not found:
        return flip(rng, content)
    at, value = rng.choice(found), rng.choice((-1, 10**9, 10**18, 10**400, 0.5, "1e999", "NaN"))
    return content[:at] + str(value).encode() + content[at + 1 :]


BYTE_WAYS = (flip, flip, flip, cut, gone, insert, duplicate, splice, numbers, numbers, digits)
BYTE_WAYS = (*BYTE_WAYS, encoding)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


EVIL = pickle.dumps(Evil())

# ---- mutations of structure ----------------------------------------------------------------------


def nested(depth):
    return ("nested", depth)  # written as text by `dumped`, which has no recursion to run out of


NASTY = [
    None, True, False, 0, 1, -1, 3.5, 4096, 65536, 10**12, 10**30, 2**63, 1e308, 1e-320,
    float("nan"), float("inf"), "", "x", "-1", "1e5", "9" * 5000, "Ⅷ٣", "\0", "\ud800",
    "a\udfff\ud800b", "e\u0301\u202e\ufeff", "a\nb\r\nc\u2028d", "</s>", "<pad><extra_id_0>",
    "<image><eos>", "<b>&amp;", "../../../etc/passwd", "/etc/passwd", "..", ".", "~", "C:\\x",
    "(a+)+$", "(((", "*", "float64", "a" * 100_000, "answer is " * 9000, " " * 50_000,
    "\\boxed{" * 500, "\\text{" * 9000, "answer: " + "\n" * 3000, [], {}, [[]], [None], ["a", 1],
    [-1], [10**10, 10**10], [0] * 2000, {"a": {}}, nested(400), nested(900), nested(960),
    nested(3000), nested(200_000),
]  # fmt: skip


def spots(value, at=()):
    """The path of every value inside."""
    yield at
    inside = value if isinstance(value, dict) else {}
    if isinstance(value, list):
        inside = dict(enumerate(value))
    for key, inner in itertools.islice(inside.items(), 60):
        yield from spots(inner, (*at, key))


def mutate(rng, value):
    """The value with one to three of its parts replaced, gone, renamed or exchanged."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        *path, last = rng.choice([at for at in spots(value) if at] or [(None,)])
        if last is None:
            return copy.deepcopy(rng.choice(NASTY))
        inner = value
        for key in path:
            inner = inner[key]
        way, nasty = rng.randrange(8), copy.deepcopy(rng.choice(NASTY))
        if way == 0:
            del inner[last]
        elif way == 1 and isinstance(inner, dict):
            name = rng.choice(("", "x", "\ud800", "../x", "\0", f"{last} ", "9" * 5000))
            inner[name] = inner.pop(last)
        elif way == 2 and isinstance(inner, dict):
            inner[("twice", last)] = nasty
        elif way == 3 and isinstance(inner, list):
            inner.append(nasty)
        else:
            inner[last] = nasty
        if rng.random() < 0.02:
            return nasty
    return value


def dumped(value):
    """JSON of a value, with doubled keys and nesting no library would write."""
    if isinstance(value, tuple):
        return "[" * value[1] + "]" * value[1]
    if isinstance(value, list):
        return f"[{', '.join(map(dumped, value))}]"
    if isinstance(value, dict):
        names = [key[1] if isinstance(key, tuple) else key for key in value]
        pairs = zip(map(json.dumps, names), map(dumped, value.values()), strict=True)
        return "{{{}}}".format(", ".join(": ".join(pair) for pair in pairs))
    return json.dumps(value)


def structure_json(rng, content):
    return dumped(mutate(rng, json.loads(content))).encode()


def structure_jsonl(rng, content):
    rows = content.decode().splitlines()
    at = rng.randrange(len(rows))
    rows[at] = dumped(mutate(rng, json.loads(rows[at])))
    return "\n".join([*rows, *rng.choice(([], [rows[0]], [""]))]).encode()


def structure_csv(rng, content):
    rows = list(csv.reader(io.StringIO(content.decode(), newline="")))
    row = rng.choice(rows)
    nasty = [x for x in NASTY if isinstance(x, str) and x.isascii()] + ["\r", '"', "=1+1"]
    row[rng.randrange(len(row))] = rng.choice(nasty)
    if rng.random() < 0.3:
        del row[rng.randrange(len(row))]
    file = io.StringIO()
    csv.writer(file).writerows(rows)
    return file.getvalue().encode()


def structure_safetensors(rng, content):
    size = struct.unpack("<Q", content[:8])[0]
    header, body = json.loads(content[8 : 8 + size]), bytearray(content[8 + size :])
    if rng.random() < 0.3:  # the numbers instead
        at = rng.randrange(len(body) // 4) * 4
        some = rng.choice((np.nan, np.inf, -np.inf, 3e38, 1e-40))
        body[at : at + 4] = struct.pack("<f", some)
    elif rng.random() < 0.3:
        entry = header[rng.choice([name for name in header if name != "__metadata__"])]
        kinds = "BOOL U8 I8 I16 U16 F16 BF16 I32 U32 F64 I64 F8_E4M3 F8_E8M0 C64 F4 X".split()
        entry["dtype"] = rng.choice(kinds)
        if rng.random() < 0.7:  # with a shape that fits the bytes
            width = {"8": 1, "6": 2, "2": 4, "4": 8}.get(entry["dtype"][-1], 1)
            entry["shape"] = [(entry["data_offsets"][1] - entry["data_offsets"][0]) // width]
    else:
        header = mutate(rng, header)
    text = dumped(header).encode()
    return struct.pack("<Q", len(text)) + text + bytes(body)


SHAPES = """(2, 2048)|(-1, 2048)|(10**9, 2048)|(99999999999, 2048)|(2048,)|()|(2, 2048, 0)|
    (True, 2048)|(2, 2.0)|((2,), 1)|(4611686018427387904, 2048)""".split("|")
TYPES = "<f2 <f2 <f2 <f4 <i2 |O <U2 <M8[s] |V2 <c8 |b1 >f2 x".split()


def structure_npy(rng, content):
    at, shape, descr = content.index(b"\n") + 1, rng.choice(SHAPES).strip(), rng.choice(TYPES)
    order = rng.choice(("True", "False", "False", "0"))
    header = f"{{'descr': '{descr}', 'fortran_order': {order}, 'shape': {shape}, }}".encode()
    if rng.random() < 0.1:
        code = b"__import__('os').mkdir('evil')"
        header = rng.choice((b"(" * 3000, b"{'descr': " + b"[" * 900, code))
    header = header.ljust(-(-(len(header) + 11) // 64) * 64 - 11) + b"\n"
    body = bytearray(content[at:])
    if rng.random() < 0.3 and len(body) > 2:
        body[0:2] = rng.choice((b"\x00\x7e", b"\x00\x7c", b"\x00\xfc"))  # NaN, Inf, -Inf
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header)) + header + bytes(body)


def structure_png(rng, content):
    """Chunks changed, with checksums that are right; bombs in text and in pixels."""
    chunks, at = [], 8
    while at < len(content):
        size = struct.unpack(">I", content[at : at + 4])[0]
        chunks.append([content[at + 4 : at + 8], content[at + 8 : at + 8 + size]])
        at += 12 + size
    way, chosen = rng.randrange(6), rng.choice(chunks)
    if way == 0:
        size = struct.pack(">II", *rng.choices((0, 1, 7, 12, 10_000, 60_000, 2**31 - 1), k=2))
        chunks[0][1] = size + chunks[0][1][8:]
    elif way == 1:
        chunks[0][1] = chunks[0][1][:8] + bytes(rng.choices((0, 1, 2, 3, 4, 6, 8, 16), k=5))
    elif way == 2:
        bomb = zlib.compress(bytes(rng.choice((10_000, 3_000_000, 80_000_000))))
        kind = rng.choice(b"zTXt iTXt iCCP eXIf tRNS PLTE acTL fdAT IDAT".split())
        head = {b"iTXt": b"a\0\1\0\0\0", b"eXIf": b""}.get(kind, b"a\0\0")
        chunks.insert(rng.randrange(1, len(chunks)), [kind, head + bomb])
    elif way == 3:
        chunks.remove(chosen)
    elif way == 4:
        chunks.insert(rng.randrange(len(chunks)), chosen)
    else:
        chosen[1] = rng.choice(BYTE_WAYS[:8])(rng, chosen[1])
    made = (
        (struct.pack(">I", len(d)), k + d, struct.pack(">I", zlib.crc32(k + d))) for k, d in chunks
    )
    return content[:8] + b"".join(map(b"".join, made))


ENTRIES = [
    *"../evil train/../../evil /tmp/nanocot-evil C:\\evil train\\..\\..\\evil / . ..".split(),
    *"train train/1 train/1/image.png train/1/image.png/x train/\0x train/é other/x".split(),
    *("", "a" * 300, "train/" + "b/" * 600),
]
MODES = (0, 0o120777, 0o020666, 0o010666, 0o104777, 0o40755)  # a link, a device, a pipe ...


def structure_zip(rng, content):
    """An archive packed anew: a checkpoint's with another pickle, any with evil entries."""
    file, packed = io.BytesIO(), zipfile.ZipFile(io.BytesIO(content))
    with zipfile.ZipFile(file, "w", rng.choice((0, 8, 12, 14))) as made, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for entry in packed.infolist():
            body = packed.read(entry)
            if entry.filename.endswith(".pkl"):
                body = rng.choice((body, EVIL, *[rng.choice(BYTE_WAYS[:10])(rng, body)] * 6))
            elif rng.random() < 0.2:
                body = rng.choice(BYTE_WAYS)(rng, body)
            if rng.random() > 0.05:
                made.writestr(entry.filename, body)
        for _ in range(rng.choice((0, 1, 2))):
            entry = zipfile.ZipInfo(rng.choice(ENTRIES))
            entry.external_attr = rng.choice(MODES) << 16
            entry.compress_type = rng.choice((0, 8, 12, 14))
            body = rng.choice((b"x", b"/etc/passwd", bytes(99), bytes(70_000_000)))
            made.writestr(entry, body)
    return rng.choice((file.getvalue, lambda: flip(rng, file.getvalue())))()


def structure_protobuf(rng, content):
    """Fields of sentencepiece's file in another order, of other kinds and with other content."""
    made = [
        field(rng.choice((n, n, n, rng.randrange(20))), v) for n, v in tokenizing._protobuf(content)
    ]
    at = rng.randrange(len(made))
    pieces = [field(1, b"a") + field(2, float("nan")), field(1, b"") + field(2, 1.0), b""]
    others = [b"", made[at] * 3, b"\xff" * 100_000, field(1, 7), field(3, rng.randbytes(99))]
    others += [field(1, piece) for piece in [*pieces, field(1, b"\xff")]]
    made[at] = rng.choice([*others, field(3, field(2, rng.randbytes(99)))])
    rng.random() < 0.2 and rng.shuffle(made)
    return b"".join(made)


STRUCTURE = {
    ".json": structure_json,
    ".jsonl": structure_jsonl,
    ".csv": structure_csv,
    ".safetensors": structure_safetensors,
    ".npy": structure_npy,
    ".png": structure_png,
    ".zip": structure_zip,
    ".pth": structure_zip,
    ".bin": structure_zip,
    ".model": structure_protobuf,
}


def misplace(rng, path):
    """Another thing where the file was."""
    path.unlink()
    way = rng.randrange(5)
    if way == 0:
        path.mkdir()
    elif way == 1:
        os.mkfifo(path)
    elif way > 1:
        path.symlink_to(("/dev/zero", path, "/etc/passwd")[way - 2])


def spoil(rng, folder, pattern):
    """Change one file of the case in place."""
    path = rng.choice(sorted(p for p in folder.glob(pattern) if p.is_file()))
    if rng.random() < 0.015:
        return misplace(rng, path)
    if rng.random() < 0.005:
        return path.unlink()
    content = path.read_bytes()
    structured = path.suffix in STRUCTURE and (path.suffix != ".bin" or content[:2] == b"PK")
    way = STRUCTURE[path.suffix] if structured and rng.random() < 0.6 else rng.choice(BYTE_WAYS)
    path.write_bytes(way(rng, content))


# ---- one case ------------------------------------------------------------------------------------


class Hang(BaseException):
    """Raised by the alarm; no `except Exception` takes it."""


def alarm(*_):
    raise Hang


@dataclass
class Outcome:
    kind: str  # "accepted", "refused", or what is wrong
    seconds: float
    error: BaseException | None = None


def told_well(error, folder):
    """Whether an error is a sentence that names a file of the case."""
    text = str(error)
    named = str(folder) in text or "these problems" in text
    return type(error) in SAID and text.endswith(".") and named


def judged(read, folder):
    """The outcome of one reader on one folder. The garbage collector waits: what it calls (pytest,
    hypothesis) at the bottom of a file nested too deep has no room left, and that is no outcome."""
    start, error = time.monotonic(), None
    gc.disable()
    signal.signal(signal.SIGALRM, alarm)
    signal.setitimer(signal.ITIMER_REAL, SECONDS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read(folder)
        kind = "accepted"
    except Hang as caught:
        kind, error = "hang", caught
    except BaseException as caught:
        if isinstance(caught, KeyboardInterrupt):
            raise
        kind, error = f"{type(caught).__name__}: {caught}"[:200], caught
        kind = "refused" if told_well(caught, folder) else kind
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        gc.enable()
    return Outcome(kind, time.monotonic() - start, error)


def listing(base):
    """What lies beside the case: its name must be the only one."""
    return sorted(str(p.relative_to(base)) for p in base.rglob("*") if "case" not in p.parts)


def run_case(name, number, base, seed=0):
    """Make the case below base/case, read it, and look for files that were written beside it."""
    make, read, pattern = READERS[name]
    valid, case = base / "valid" / name, base / "case"
    if not valid.is_dir():
        valid.mkdir(parents=True)
        make(valid)
        outside.cache_clear()
    rng = random.Random(f"{seed} {name} {number}")
    shutil.rmtree(case, ignore_errors=True)
    if name == "pictures":
        case.mkdir()
        shutil.copy(rng.choice(sorted(valid.iterdir())), case)
    else:
        shutil.copytree(valid, case)
    spoil(rng, case, pattern)
    before, here = outside(base), Path.cwd()
    os.chdir(base / "here")
    try:
        outcome = judged(read, case)
    finally:
        os.chdir(here)
    written = set(listing(base)) - set(before)
    if written or Path("/tmp/nanocot-evil").exists():
        outcome.kind = f"wrote {sorted(written)}"
    if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 > most_memory():
        outcome.kind = "over a gigabyte"
    return outcome


@cache
def outside(base):
    return listing(base)


@cache
def most_memory():
    """What the process has now, with all imported and a model made, and a gigabyte."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 + BYTES


@contextlib.contextmanager
def workplace(folder):
    base = Path(folder)
    (base / "here").mkdir()
    yield base


# ---- under pytest --------------------------------------------------------------------------------


def fuzz(name, numbers, folder):
    with workplace(folder) as base:
        outcomes = {number: run_case(name, number, base).kind for number in numbers}
    wrong = {n: kind for n, kind in outcomes.items() if kind not in ("accepted", "refused")}
    assert not wrong, f"python tests/test_fuzz.py --reader {name!r} --case N, for N in {wrong}"


@pytest.mark.parametrize("name", READERS)
@pytest.mark.slow
def test_no_case_gets_past_the_sentences(name, tmp_path):
    fuzz(name, range(12), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("name", READERS)
def test_many_cases(name, tmp_path):
    fuzz(name, range(1000, 1060), tmp_path)


@pytest.mark.parametrize("name", READERS)
def test_valid_files_are_read(name, tmp_path):
    make, read, _ = READERS[name]
    make(tmp_path)
    read(tmp_path)


# ---- the command: every reader in processes of its own -------------------------------------------


def child(name, numbers, base, pipe, seed):
    """Run cases and write a line for each; what cannot be caught kills this process alone."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    os.dup2(null, 2)
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + 3 * BYTES, now + 3 * BYTES))
    most_memory()
    for number in numbers:
        outcome = run_case(name, number, base, seed)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
        line = json.dumps([number, outcome.kind, outcome.seconds, peak]) + "\n"
        os.write(pipe, line.encode("utf-8", "replace"))
        if outcome.kind == "over a gigabyte":  # the peak never falls: go on in a fresh process
            break
    shutil.rmtree(base / "case", ignore_errors=True)


def run_reader(name, count, seed):
    """[(number, kind, seconds, peak MB)] of all cases, in as many processes as it takes."""
    rows, start = [], 0
    with tempfile.TemporaryDirectory() as folder, workplace(folder) as base:
        while start < count:
            out, into = os.pipe()
            pid = os.fork()
            if not pid:
                code = 1
                try:
                    child(name, range(start, count), base, into, seed)
                    code = 0
                finally:
                    os._exit(code)
            os.close(into)
            rows += told(out, pid, start)
            os.close(out)
            _, status = os.waitpid(pid, 0)
            start = rows[-1][0] + 1 if rows else start
            if status and start < count:
                why = "the fuzzer itself failed"
                if os.WIFSIGNALED(status):
                    why = "hang in native code"
                if os.WIFSIGNALED(status) and os.WTERMSIG(status) != signal.SIGKILL:
                    why = f"died of signal {os.WTERMSIG(status)}"
                rows.append([start, why, 2.0 * SECONDS, 0])
                start += 1
    return rows


def told(pipe, pid, start):
    """The lines of a child; one that is silent for twice the time is killed."""
    text = b""
    while True:
        ready, _, _ = select.select([pipe], [], [], 2 * SECONDS + (20 if not text else 0))
        if not ready:
            os.kill(pid, signal.SIGKILL)
        block = os.read(pipe, 1 << 16)
        if not block:
            return [json.loads(line) for line in text.splitlines()]
        text += block


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=2000, help="in all, shared among the readers")
    parser.add_argument("--reader", choices=READERS, help="only this one")
    parser.add_argument("--case", type=int, help="with --reader: this one, and its traceback")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.case is not None:
        with workplace(tempfile.mkdtemp()) as base:
            outcome = run_case(args.reader, args.case, base, args.seed)
            if outcome.error:
                traceback.print_exception(outcome.error)
            print(f"{outcome.kind} after {outcome.seconds:.2f} s; the files are in {base / 'case'}")
        return
    names = [args.reader] if args.reader else list(READERS)
    head = ("cases", "accepted", "refused", "violations", "slowest s", "peak MB", "outside")
    print(f"{'reader':<16}" + "".join(f"{name:>12}" for name in head), flush=True)
    found = {}
    for i, name in enumerate(names):
        count = args.cases // len(names) + (i < args.cases % len(names))
        rows = run_reader(name, count, args.seed)
        kinds = [row[1] for row in rows]
        bad = [row for row in rows if row[1] not in ("accepted", "refused")]
        wrote = sum(kind.startswith("wrote") for kind in kinds)
        slowest, peak = (max(row[i] for row in rows) for i in (2, 3))
        counts = (len(rows), kinds.count("accepted"), kinds.count("refused"), len(bad))
        cells = (*counts, f"{slowest:.2f}", peak, wrote)
        print(f"{name:<16}" + "".join(f"{cell:>12}" for cell in cells), flush=True)
        for number, kind, *_ in bad:
            short = " ".join(kind.split())[:60]
            found.setdefault((name, short), []).append(number)
    for (name, kind), cases in found.items():
        print(f"  {name}: {kind}  x{len(cases)}, e.g. --case {cases[0]}")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
