"""Presets of the published runs: their values, values per stage, and the released weights."""

import json
import shutil
import zipfile
from typing import get_type_hints

import huggingface_hub
import pytest
import torch
from conftest import ROOT
from samples import record, scienceqa, write_image
from small_runs import SMALL, lines_of, settings, steps

import data
import eval as evaluation
import fusion
import teacher
import train
from model import T5
from support.dataset.tokenizers import load_tokenizer
from support.evaluation import metrics
from support.evaluation.decoding import Decoder
from support.training.presets import PRESETS
from support.training.settings import MultimodalSettings, fits, of_stage, parse_args

pytestmark = pytest.mark.usefixtures("read_once")


# ---- values --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_the_settings_it_names(name):
    chosen = settings("mmcot", "--preset", name)
    hints = get_type_hints(MultimodalSettings)
    for field, value in PRESETS[name].items():
        assert getattr(chosen, field) == value
        assert fits(list(value) if isinstance(value, tuple) else value, hints[field])
    version = "v2" if name.startswith("v2") else "v1"
    assert (chosen.vision, chosen.captions) == {
        "v1": ("detr", "none"),
        "v2": ("vit", "instruct"),
    }[version]
    assert ("384" in chosen.vision_weights) == (version == "v2")
    assert (chosen.epochs == (0.0,)) == name.endswith("released")


def test_flags_override_a_preset_and_each_stage_has_its_values():
    chosen = settings("mmcot", "--preset", "v2-large", "--lr", "1e-4", "2e-4", "--data", "demo")
    assert chosen.data == "demo" and chosen.max_output == (512, 64)  # not the demo's
    first, second = (of_stage(chosen, stage) for stage in (0, 1))
    assert (first.batch_size, second.batch_size) == ((8,), (16,))
    assert (first.lr, second.lr, second.epochs) == ((1e-4,), (2e-4,), (50.0,))
    assert first.weights == second.weights == ("declare-lab/flan-alpaca-large",)


@pytest.mark.parametrize("flags", ["mmcot --lr 1 2 3", "paligemma --batch-size 4 8"])
def test_more_values_than_stages_are_refused(flags, capsys):
    with pytest.raises(SystemExit):
        parse_args(["--model", *flags.split()])
    assert flags.split()[1] in capsys.readouterr().err


# ---- the best epoch ------------------------------------------------------------------------------


def test_the_best_epoch_of_each_stage_is_kept(tmp_path):
    """Recomputed from the saved models: the score in the log at the kept step is theirs."""
    flags = [x if x != "answer" else "two-stage-e" for x in SMALL["mmcot"]]
    flags[flags.index("--epochs") + 1] = "3"
    more = "--limit 12 --keep-epoch best --eval-problems 6 --vision none --max-output 12 8"
    train.main([*flags, *more.split(), "--out", str(tmp_path)])
    chosen = parse_args([*flags, *more.split(), "--out", str(tmp_path)])
    log = [x for x in steps((tmp_path / "log.jsonl").read_text()) if "val_loss" in x]
    val = data.load("demo", "val")[:6]
    tokenizer = load_tokenizer(ROOT / "demo/t5")
    rationales = None
    for stage, key in enumerate(("val_rougeL", "val_accuracy")):
        name = ("rationale", "answer")[stage]
        scores = [x[key] for x in log if x["stage"] == name]
        assert len(scores) == 3
        model = fusion.MultimodalT5.from_pretrained(tmp_path / name)
        texts = Decoder(model, tokenizer, 8).stage_texts(chosen, stage, val, None, rationales)
        fmt = fusion.RECIPES["two-stage-e"][stage]
        score = metrics.validation_score(val, texts, fmt)
        assert score == {key: max(scores)}
        rationales = {id: text["text"] for id, text in texts.items()}


# ---- released weights ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """{repository: folder} as on the Hub: tiny weights in the authors' layouts, real names."""
    root = tmp_path_factory.mktemp("hub")
    torch.manual_seed(0)
    for width, places, zips in (
        (256, ("acheong08/models/rationale", "acheong08/models/answer"), False),
        (1024, ("cooelf/mm-cot-base-rationale", "cooelf/mm-cot-base-ans"), True),
    ):
        for place in places:
            t5 = T5.from_pretrained(ROOT / "demo/t5")
            model = fusion.MultimodalT5(t5, fusion.GatedFusion(t5.config.d_model, width))
            folder = root / place
            model.save_pretrained(folder)
            shutil.copy(ROOT / "demo/t5/tokenizer.json", folder)
            if zips:
                with zipfile.ZipFile(folder.with_suffix(".zip"), "w") as file:
                    for path in folder.iterdir():
                        file.write(path, f"{folder.name}/{path.name}")
    features = root / "features"
    features.mkdir()
    torch.save(torch.randn(3, 145, 1024), features / "vit.pth")
    (features / "name_map.json").write_text(json.dumps({"0": "0", "2": "1", "3": "2"}))
    return root


def on_the_hub(root, monkeypatch, tmp_path):
    """huggingface_hub's two functions over the folders of `released`."""

    def file(repository, name):
        where = {"cooelf/mm-cot": "cooelf", "acheong08/mm-cot": "acheong08"}.get(repository)
        return str(
            root / where / name
            if where and ".zip" in name
            else root / "features" / name.split("/")[-1]
        )

    def folder(repository, allow_patterns, ignore_patterns):
        assert repository == "acheong08/mm-cot" and allow_patterns[0].startswith("models/")
        return str(root / "acheong08")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", file)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", folder)
    monkeypatch.setenv("NANOCOT_CACHE", str(tmp_path / "cache"))


def six_problems(folder):
    pids = [str(i) for i in range(6)]
    records = {pid: record(image="image.png" if pid in "023" else None) for pid in pids}
    splits = {"train": pids[:2], "val": pids[2:4], "test": pids[4:]}
    scienceqa(folder, records, splits)
    captions = {"0": "a rope", "2": "a belt", "3": "a rope and a belt"}
    (folder / "instruct_captions.json").write_text(json.dumps({"captions": captions}))
    for pid in captions:
        write_image(folder / f"images/test/{pid}/image.png")
    return str(folder)


def test_the_released_weights_are_scored_by_one_command(released, monkeypatch, tmp_path):
    on_the_hub(released, monkeypatch, tmp_path)
    folder = six_problems(tmp_path / "scienceqa")
    out = tmp_path / "run"
    flags = f"--model mmcot --preset v2-base-released --device cpu --max-output 6 4 --out {out}"
    flags = [*flags.split(), "--data", folder, "--test-split", "val"]
    train.main(flags)
    scores = json.loads((out / "metrics.json").read_text())
    assert scores["n"] == 2 and scores["rationale_format"] == "QCM-E"
    assert [x["id"] for x in lines_of(out / "predictions.jsonl")] == ["2", "3"]
    load = fusion.MultimodalT5.from_pretrained
    before = load(released / "cooelf/mm-cot-base-ans").state_dict()
    after = load(out / "answer").state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert len(list((tmp_path / "cache/unpacked").iterdir())) == 2


def test_features_of_another_version_are_refused_before_anything_is_done(
    released, monkeypatch, tmp_path
):
    on_the_hub(released, monkeypatch, tmp_path)
    folder = six_problems(tmp_path / "scienceqa")
    out = tmp_path / "run"
    flags = f"--model mmcot --preset v1-base-released --device cpu --out {out} --data {folder}"
    with pytest.raises(ValueError, match="256.*1024|1024.*256"):
        train.main([*flags.split(), "--features", "cooelf/vision_features/vit.pth"])
    assert not out.exists()


# ---- A-OKVQA -------------------------------------------------------------------------------------


def aokvqa(folder, **changes):
    """Records in the original's layout, the test split without answers."""
    for split, count in (("train", 6), ("val", 4), ("test", 2)):
        records = []
        for i in range(count):
            entry = {
                "split": split,
                "image_id": 100 + i,
                "question_id": f"{split}{i}",
                "question": "What is the man by the bags awaiting?",
                "choices": ["skateboarder", "train", "delivery", "cab"],
                "difficult_direct_answer": False,
            }
            if split != "test":
                entry["correct_choice_idx"] = i % 4
                entry["direct_answers"] = ["cab"] * 10
                entry["rationales"] = [f"He has luggage {j}." for j in range(3)]
            records.append(entry | (changes if (split, i) == ("train", 1) else {}))
            write_image(folder / f"{split}2017/{100 + i:012}.jpg", (40, 30 + i))
        (folder / f"aokvqa_v1p0_{split}.json").write_text(json.dumps(records))
    return folder


def test_aokvqa_is_read(tmp_path):
    first, *rest = data.load(aokvqa(tmp_path), "train")
    assert (first.id, first.answer, first.solution) == (
        "train0",
        "skateboarder",
        "He has luggage 0.",
    )
    assert first.image == str(tmp_path / "train2017/000000000100.jpg") and len(rest) == 5
    assert first.meta["direct_answers"] == ["cab"] * 10
    source, target = data.prompt(first, "QCM-E")
    assert source == (
        "Question: What is the man by the bags awaiting? Context: N/A Options: (A) skateboarder "
        "(B) train (C) delivery (D) cab Solution:"
    )
    assert target == "Solution: He has luggage 0."
    assert {p.answer for p in data.load(tmp_path, "test")} == {""}


@pytest.mark.parametrize(
    "changes",
    [
        {"image_id": "1"}, {"question_id": 7}, {"question_id": "train0"}, {"choices": None},
        {"correct_choice_idx": 4}, {"correct_choice_idx": True}, {"rationales": [3]},
        {"direct_answers": "cab"}, {"question": ...},
    ],
)  # fmt: skip
def test_a_bad_record_of_aokvqa_is_named_or_skipped(changes, tmp_path):
    with pytest.raises(ValueError, match="aokvqa_v1p0_train.json, record 2"):
        data.load(
            aokvqa(tmp_path, **{k: None if v is ... else v for k, v in changes.items()}), "train"
        )
    skipped = []
    assert len(data.load(tmp_path, "train", skipped)) == 5 and len(skipped) == 1


@pytest.mark.parametrize("recipe", ["answer", "two-stage-e"])
def test_aokvqa_trains_and_its_test_split_goes_to_the_leaderboard(recipe, tmp_path, capsys):
    folder = aokvqa(tmp_path / "aokvqa")
    flags = [x if x != "answer" else recipe for x in SMALL["mmcot"]]
    flags += ["--data", str(folder), "--out", str(tmp_path / "run")]
    with pytest.raises(ValueError, match="--test-split val"):
        train.main(flags)
    train.main([*flags, "--test-split", "val"])
    assert json.loads((tmp_path / "run/metrics.json").read_text())["n"] == 4
    capsys.readouterr()
    evaluation.main([str(tmp_path / "run"), "--split", "test"])
    answers = json.loads((tmp_path / "run/test/leaderboard.json").read_text())
    choices = {"skateboarder", "train", "delivery", "cab"}
    assert answers.keys() <= {"test0", "test1"}
    assert {text for x in answers.values() for text in x.values()} <= choices
    assert not (tmp_path / "run/test/metrics.json").exists()
    predictions = str(tmp_path / "run/test/predictions.jsonl")
    with pytest.raises(ValueError, match="not public"):
        evaluation.main(["--predictions", predictions, "--data", str(folder), "--split", "test"])
    asked = f"--data {folder} --split test --teacher gemini --judge anthropic"
    with pytest.raises(ValueError, match="not public"):
        teacher.prepare(teacher.parse_args([*asked.split(), "--out", str(tmp_path / "t.jsonl")]))
    assert "leaderboard.json" in capsys.readouterr().out
