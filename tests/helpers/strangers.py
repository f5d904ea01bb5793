"""What test_fuzz.py attacks: each reader of files from strangers, and a small valid set for it.

The functions with one argument, a folder, write the valid files; `read_...` are the readers, each
with the use that follows it. READERS, at the end, pairs them.
"""

import csv
import functools
import json
import shutil
import struct
import zipfile

import numpy as np
import torch
from conftest import ROOT
from PIL import Image
from safetensors.torch import load_file, save_file
from samples import annotation, field, record
from samples import mathvista as write_mathvista
from samples import scienceqa as write_scienceqa

import data
import eval as evaluation
import lora
from fusion import GatedFusion, MultimodalT5
from model import DETR, T5, PaliGemma, T5Config, ViT, ViTConfig
from support.dataset import sources
from support.dataset.features import cached_features, published_features
from support.dataset.images import open_image, siglip_pixels
from support.dataset.tokenizers import encode, load_tokenizer, plain_ids
from support.dataset.traces import load_traces
from support.evaluation import metrics, report, tables
from support.teachers.cache import Ledger
from support.training import runs
from support.training.settings import parse_args


def write_lines(path, records):
    path.write_text("".join(json.dumps(entry) + "\n" for entry in records))


# --- Data sets ------------------------------------------------------------------------------------


def images(folder):
    modes = "RGB.png RGBA.png P.png I;16.png 1.png RGB.jpg CMYK.jpg L.jpg RGB.gif RGB.webp RGB.bmp"
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: turned, as a phone writes it
    for name in modes.split():
        Image.new(name.partition(".")[0], (12, 9)).save(folder / name, exif=exif)
    for compression in ("raw", "tiff_lzw", "jpeg"):
        Image.new("RGB", (12, 9)).save(folder / f"{compression}.tiff", compression=compression)


def scienceqa(folder):
    splits = dict.fromkeys(("test", "trainval"), ["1", "2", "3"])
    write_scienceqa(folder, {id: record() for id in "123"}, splits, captions={"1": "a rope"})


def captions(folder):
    write_scienceqa(folder, {id: record() for id in "123"})
    (folder / "instruct_captions.json").write_text('{"captions": {"1": "a rope", "3": ""}}')


def mathvista(folder):
    choice = annotation(2, choices=["2", "4"], answer="4", answer_type="integer")
    write_mathvista(folder, annotation(1), choice, annotation(3))


def own_jsonl(folder):
    free = {"id": 2, "question": "q", "answer": "rope", "caption": "a belt", "meta": {"a": [1]}}
    rows = [record(split="train", image="a.png", id=id) for id in "ac"]
    write_lines(folder / "own.jsonl", [rows[0], free, rows[1]])


# --- Traces ---------------------------------------------------------------------------------------


def ledger(folder):
    verdict = {"correct": True, "consistent": True, "by": "rule", "why": ""}
    trace = {"id": "1", "question": "q", "thought": "The belt.\nIs it.", "answer": "Answer: B"}
    trace |= {"gold": "belt", "verdict": verdict, "teacher": "demo", "usage": {"cost": 0.1}}
    trace |= {"key": "k1", "kept": True, "stop": "eos", "reply": {"thought": "t", "answer": "a"}}
    bare = {"id": 2, "question": "q", "thought": "t", "answer": "\\boxed{\\text{B}}", "key": "k2"}
    write_lines(folder / "traces.jsonl", [trace, bare])


def traces_csv(folder):
    names = ["questions", "thoughts", "generated_answers", "true_answers", "indexes", "validity"]
    rows = [names, ["q", "t\nt", "a, b", "B", "0", "yes"], [*"qtaB", "7", "no"]]
    with open(folder / "training.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)


def traces_json(folder):
    suffix = "Thoughts:\nIt is.\nAnswer:\nB"
    columns = {"prefixes": ["q", "p"], "suffixes": [suffix] * 2, "images": ["3.png", "a/4.jpg"]}
    (folder / "training_dict.json").write_text(json.dumps(columns))


# --- Tokenizers -----------------------------------------------------------------------------------


def demo_file(name):
    return lambda folder: shutil.copy(ROOT / "demo" / name, folder)


def spiece(folder):
    names = ["<pad>", "</s>", "<unk>", *"▁abcdefghijklmnopqrstuvwxyz", "▁the", "rope"]
    pieces = [field(1, field(1, n.encode()) + field(2, -1.0 * i)) for i, n in enumerate(names)]
    charsmap = struct.pack("<I", 1024) + bytes(1024) + b"\0"  # a table with nothing in it
    normalizer = field(3, field(1, b"none") + field(2, charsmap))
    (folder / "spiece.model").write_bytes(b"".join(pieces) + field(2, field(3, 1)) + normalizer)


def charsmap(folder):
    spiece(folder)
    load_tokenizer(folder).save(f"{folder}/tokenizer.json")
    (folder / "spiece.model").unlink()


# --- Features -------------------------------------------------------------------------------------


def features_npy(folder):
    (folder / "name_map.json").write_text('{"1": "0", "2": 1}')
    np.save(folder / "resnet.npy", np.ones((2, 2048), np.float16))


def features_pth(folder):
    (folder / "name_map.json").write_text('{"1": "0", "2": 0}')
    torch.save(torch.ones(1, 145, 1024, dtype=torch.float16), folder / "vit.pth")


def extract_features(folder):
    """Two problems with images and the cache of their features, made where it is missing."""
    problems = []
    for id, name in (("1", "a.png"), ("2", "b.png")):
        Image.new("RGB", (8, 8), (ord(name[0]), 0, 0)).save(folder / name)
        problems.append(data.Problem(id, "q", (), "a", "", str(folder / name), "", "", {}))

    def extract(pixels):
        return [image.mean((1, 2), keepdim=True)[..., 0].repeat(1, 4) for image in pixels]

    return cached_features(problems, extract, "weights", 8, folder / "cache")


# --- Checkpoints ----------------------------------------------------------------------------------


def tiny_t5():
    torch.manual_seed(0)
    sizes = dict(vocab_size=40, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    return T5(T5Config(**sizes))


def t5(folder):
    tiny_t5().save_pretrained(folder)


def stored_t5(folder):
    """T5 with its tensors taken out of their file, for another layout."""
    t5(folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    return tensors


def t5_shards(folder):
    weight_map = {}
    for i, (name, tensor) in enumerate(stored_t5(folder).items()):
        save_file({name: tensor}, folder / f"part{i}.safetensors", {"format": "pt"})
        weight_map[name] = f"part{i}.safetensors"
    index = json.dumps({"metadata": {}, "weight_map": weight_map})
    (folder / "model.safetensors.index.json").write_text(index)


def t5_bin(folder):
    torch.save(stored_t5(folder), folder / "pytorch_model.bin")


def t5_old_bin(folder):
    path = folder / "pytorch_model.bin"
    torch.save(stored_t5(folder), path, _use_new_zipfile_serialization=False)


def multimodal(folder):
    MultimodalT5(tiny_t5(), GatedFusion(8, 5, "mask")).save_pretrained(folder)


def demo_model(name):
    ignored = shutil.ignore_patterns("tokenizer.json")
    return lambda f: shutil.copytree(ROOT / "demo" / name, f, ignore=ignored, dirs_exist_ok=True)


def vit(folder):
    ViT(ViTConfig(8, 12, 1, 2, image_size=8, patch_size=4)).save_pretrained(folder)


def adapter(folder):
    model = tiny_t5()
    lora.inject(model, 2, 4)
    lora.save(model, folder)


# --- Downloads and runs ---------------------------------------------------------------------------


def archive(folder):
    with zipfile.ZipFile(folder / "train.zip", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("train/1/image.png", bytes(range(256)))
        file.writestr("train/empty/", b"")


def addresses(folder):
    (folder / "table.json").write_text('{"val.zip": ["http://127.0.0.1:9/val.zip", null]}')


def predictions(folder):
    one = {"id": "1", "response": "The answer is (B).", "rationale": "Because.", "tokens": 3}
    write_lines(folder / "predictions.jsonl", [one, {"id": 2, "response": "A"}, one | {"id": "3"}])


def run_folder(folder):
    """A run of mmcot on two test problems, as train.py leaves it."""
    file = folder / "own.jsonl"
    splits = enumerate(("train", "train", "val", "test", "test"))
    write_lines(file, [record(id=i, split=split) for i, split in splits])
    flags = ["--model", "mmcot", "--recipe", "answer", "--data", str(file), "--device", "cpu"]
    settings = parse_args([*flags, "--out", str(folder)])
    runs.write_config(settings, folder)
    problems = data.load(file, "test")
    results = [{"id": p.id, "response": "The answer is (B).", "stop": "eos"} for p in problems]
    graded = metrics.grade_all(problems, results)
    about = evaluation.about(settings.data, "test", "QCM-LE")
    scores, graded = evaluation.assess(graded, about, vars(settings))
    tables.write_graded(folder, graded, scores | {"skipped": {"train": 0, "test": 1}})
    steps = [{"stage": "answer", "step": i, "loss": 0.5, "val_loss": 1.0} for i in (1, 2)]
    write_lines(folder / "log.jsonl", steps)
    (folder / "looks.json").write_text("{}")


# --- The readers ----------------------------------------------------------------------------------


@functools.cache
def demo_tokenizers():
    return [load_tokenizer(ROOT / "demo" / name) for name in ("t5", "paligemma")]


def read_images(folder):
    for path in sorted(folder.iterdir()):
        assert siglip_pixels(open_image(path), 14).isfinite().all()


def make_rows(problems, traces=()):
    """The rows of both systems, without images."""
    t5, gemma = demo_tokenizers()
    data.examples(problems, "QCM-LE", t5, max_input=64, max_output=64)
    rows = [data.TrainRow(p, "reason") for p in problems]
    rows += [data.TrainRow(p, "answer", has_suffix=False) for p in problems]
    pairs = zip(problems, traces, strict=False)
    rows += [data.TrainRow(p, "reason", trace) for p, trace in pairs]
    data.pali_examples(rows, gemma, max_suffix=64, shuffle_choices=True)


def read_problems(path, split):
    make_rows([p for p in data.load(path, split) if not p.image])


def read_traces(path):
    traces = load_traces(path)
    meta = {"answer_index": 1}
    problem = data.Problem("1", "q", ("rope", "belt"), "belt", "", None, "", "", meta)
    make_rows([problem] * 3, traces[:3])


def read_tokenizer(folder):
    tokenizer = load_tokenizer(folder)
    tokenizer.decode(encode(tokenizer, ["the longer rope </s> ½ \0 ", ""], 64)[0])
    plain_ids(tokenizer, "a <loc0001> b")


def read_features(features):
    data.collate(
        [{"input_ids": [1], "image_features": features.stored(id)} | {"id": id} for id in "12"]
    )


def read_published(folder, name):
    read_features(published_features(folder / name, folder / "name_map.json"))


def finite(model):
    assert all(p.isfinite().all() for p in model.parameters())
    return model


def read_t5(folder):
    ids = torch.ones(1, 3, dtype=torch.long)
    finite(T5.from_pretrained(folder)).generate(ids, ids, max_new_tokens=2)


def read_multimodal(folder):
    model = finite(MultimodalT5.from_pretrained(folder))
    ids = torch.ones(1, 3, dtype=torch.long)
    width = model.fusion.image_dense.in_features if model.fusion else 1
    model.generate(ids, ids, torch.ones(1, 2, width), max_new_tokens=2)


def read_detr(folder):
    finite(DETR.from_pretrained(folder)).features(torch.zeros(1, 3, 40, 33))


def read_vit(folder):
    vit = finite(ViT.from_pretrained(folder))
    vit.features(torch.zeros(1, 3, vit.config.image_size, vit.config.image_size))


def read_paligemma(folder):
    model = finite(PaliGemma.from_pretrained(folder))
    image = [model.config.image_token_index] * model.config.image_tokens
    side = model.config.vision.image_size
    model.generate(torch.tensor([[*image, 1, 2]]), torch.zeros(1, 3, side, side), max_new_tokens=2)


def read_adapter(folder):
    model = tiny_t5()
    lora.load(model, folder)
    finite(model)


def read_archive(folder):
    (folder / "set").mkdir()
    sources.unpack(folder / "train.zip", folder / "set", "train")


def read_predictions(folder):
    problem = data.Problem("1", "q", ("a", "b"), "b", "", None, "", "", {"answer_index": 1})
    for prediction in tables.read_predictions(folder / "predictions.jsonl"):
        evaluation.grade(problem, prediction["response"])


def read_run(run):
    """What `python eval.py RUN` does, and what --resume asks of the folder."""
    column = evaluation.score_run(run, evaluation.parse_args([str(run), "--device", "cpu"]))
    tables.table({"run": column.scores}, all_rows=True)
    tables.runs_table({"run": column.scores})
    report.write_report(run, {"run": column})
    runs.is_complete(parse_args(["--model", "mmcot", "--resume", "--out", str(run)]))


READERS = {  # name: (what writes the valid files, what reads them, the files that are damaged)
    "images": (images, read_images, "*"),
    "scienceqa": (scienceqa, lambda f: read_problems(f, "test"), "*"),
    "captions": (captions, lambda f: data.load(f, "test", captions="instruct"), "i*"),
    "mathvista": (mathvista, lambda f: read_problems(f, "trainval"), "*"),
    "own jsonl": (own_jsonl, lambda f: read_problems(f / "own.jsonl", "train"), "*"),
    "traces jsonl": (ledger, lambda f: read_traces(f / "traces.jsonl"), "*"),
    "traces csv": (traces_csv, lambda f: read_traces(f / "training.csv"), "*"),
    "traces json": (traces_json, lambda f: read_traces(f / "training_dict.json"), "*"),
    "t5 tokenizer": (demo_file("t5/tokenizer.json"), read_tokenizer, "*"),
    "paligemma tokenizer": (demo_file("paligemma/tokenizer.json"), read_tokenizer, "*"),
    "spiece": (spiece, read_tokenizer, "*"),
    "charsmap": (charsmap, read_tokenizer, "*"),
    "features npy": (features_npy, lambda f: read_published(f, "resnet.npy"), "*"),
    "features pth": (features_pth, lambda f: read_published(f, "vit.pth"), "*"),
    "feature cache": (
        extract_features,
        lambda f: read_features(extract_features(f)),
        "cache/[fm]*",
    ),
    "t5": (t5, read_t5, "*"),
    "t5 shards": (t5_shards, read_t5, "*"),
    "t5 bin": (t5_bin, read_t5, "*.bin"),
    "t5 old bin": (t5_old_bin, read_t5, "*.bin"),
    "multimodal": (multimodal, read_multimodal, "*"),
    "detr": (demo_model("detr"), read_detr, "*"),
    "vit": (vit, read_vit, "*"),
    "paligemma": (demo_model("paligemma"), read_paligemma, "*"),
    "adapter": (adapter, read_adapter, "*"),
    "zip": (archive, read_archive, "*"),
    "addresses": (addresses, lambda f: sources.read_addresses(f / "table.json"), "*"),
    "predictions": (predictions, read_predictions, "*"),
    "ledger": (ledger, lambda f: Ledger(f / "traces.jsonl").close(), "*"),
    "run folder": (run_folder, read_run, "[!o]*.json*"),
}
