"""demo/scenes.py: the same bytes each time, disjoint splits, answers that only the image gives.

Every answer is worked out again here, from the facts and from the boxes, by code of its own.
"""

import hashlib
import json
import re
from collections import Counter, defaultdict

import pytest
from PIL import Image

from demo import scenes

pytestmark = pytest.mark.slow  # the sample alone takes seconds
N = 250  # problems a family and split
WITH_IMAGE = [f for f in scenes.FAMILIES if f != "text"]
ALL = [(s, f) for s in ("train", "val") for f in scenes.FAMILIES if f not in scenes.HELD_OUT]
ALL += [("test", f) for f in scenes.FAMILIES]


@pytest.fixture(scope="module")
def sample():
    """(split, family) -> scenes."""
    return {(s, f): [scenes.problem(f, s, 7, i) for i in range(N)] for s, f in ALL}


@pytest.fixture(scope="module")
def everything(sample):
    return [scene for group in sample.values() for scene in group]


# ---- answers -----------------------------------------------------------------------------------


def answer_from(facts):
    """The answer that the facts imply, worked out without the module under test."""
    kind = facts["kind"]
    if kind == "magnets":
        return "attract" if facts["left"][1] != facts["right"][0] else "repel"
    if kind == "count":
        wanted = set(facts["asked"].split())
        return str(sum(n for k, n in facts["shapes"].items() if wanted <= set(k.split())))
    if kind in ("more", "most"):
        counts = sorted(facts["shapes"].items(), key=lambda kv: -kv[1])
        assert counts[0][1] > counts[1][1]
        return counts[0][0] + "s"
    if kind == "cup":
        return f"{facts['level']} ml"
    if kind in ("tallest", "shortest"):
        return (max if kind == "tallest" else min)(facts["bars"], key=facts["bars"].get)
    if kind == "height":
        return str(facts["bars"][facts["asked"]])
    if kind == "total":
        return str(facts["rings"] * facts["dots"])
    if kind == "product":
        return f"{facts['rings']} x {facts['dots']}"
    if kind in ("eats", "eaten", "top"):
        chain = facts["order"] if facts["arrow"] == "right" else facts["order"][::-1]
        if kind == "top":
            return chain[-1]
        return chain[chain.index(facts["asked"]) + (-1 if kind == "eats" else 1)]
    if kind == "side":
        a, b = (facts["order"].index(facts["asked"][key]) for key in "ab")
        return "left" if a < b else "right"
    if kind == "end":
        return facts["order"][0 if facts["asked"] == "left" else -1]
    if kind == "sum":
        return str(sum(facts["blocks"].values()))
    assert kind == "word"
    (answer,) = [w for w, group in facts["words"].items() if group == facts["asked"]]
    return answer


def facts_of_boxes(objects, facts):
    """The part of the facts that the boxes alone give."""
    names = [name for name, _ in sorted(objects, key=lambda o: o[1][0] + o[1][2])]
    boxes = {name: box for name, box in objects}
    if "left" in facts:
        poles = ["NS" if n == "magnet north left" else "SN" for n in names]
        return {"left": poles[0], "right": poles[1]}
    if "shapes" in facts:
        return {"shapes": dict(Counter(names))}
    if "level" in facts:
        cup, water = boxes["cup"], boxes["water"]
        part = (water[3] - water[1]) / (cup[3] - cup[1])  # 5.7 lines are the height of a cup
        return {"level": round(part * 5.7) * 100}
    if "bars" in facts:
        base = max(box[3] for box in boxes.values())
        unit = max(base - box[1] for box in boxes.values()) / max(facts["bars"].values())
        return {"bars": {n.split()[0]: round((base - boxes[n][1]) / unit) for n in names}}
    if "rings" in facts:
        (name,) = set(names)
        return {"rings": len(names), "dots": int(name.split()[2])}
    if "arrow" in facts:
        (arrow,) = {n for n in names if n.startswith("arrow")}
        return {"order": [n for n in names if n != arrow], "arrow": arrow.split()[1]}
    return {"order": names}


def test_answers_follow_from_the_facts_and_the_boxes_show_these(everything):
    for scene in everything:
        record, facts = scene.record, scene.facts
        gold = record["choices"][record["answer"]]
        assert gold == facts["answer"] == answer_from(facts), facts
        assert record["solution"].endswith(f" {gold}."), record["solution"]
        assert 2 <= len(set(record["choices"])) == len(record["choices"]) <= 4
        if scene.image:
            for key, value in facts_of_boxes(scene.objects, facts).items():
                assert facts[key] == value, (facts, scene.objects)


def test_colours_are_drawn_where_the_boxes_are(everything):
    def nearest(image, x, y):
        pixel = image.getpixel((round(x), round(y)))
        distance = {c: sum((a - b) ** 2 for a, b in zip(pixel, rgb, strict=True))
                    for c, rgb in scenes.RGB.items()}  # fmt: skip
        return min(distance, key=distance.get)

    checked = Counter()
    for scene in everything:
        for name, (x0, y0, x1, y1) in scene.objects:
            first = name.split()[0]
            if first in scenes.COLOURS:
                checked[first] += 1
                assert nearest(scene.image, (x0 + x1) / 2, (y0 + y1) / 2) == first
            elif first == "magnet":
                checked[first] += 1
                left = nearest(scene.image, x0 + 4, (y0 + y1) / 2)
                assert left == ("red" if name == "magnet north left" else "blue")
    assert set(checked) == {*scenes.COLOURS, "magnet"}


# ---- the text alone is worth chance --------------------------------------------------------------


def test_the_gold_choice_is_uniform_over_positions(everything):
    for n in (2, 3, 4):
        records = [scene.record for scene in everything]
        where = Counter(r["answer"] for r in records if len(r["choices"]) == n)
        total = sum(where.values())
        spread = (total * (1 / n) * (1 - 1 / n)) ** 0.5
        assert all(abs(where[i] - total / n) < 4 * spread for i in range(n)), (n, where)


@pytest.mark.parametrize("family", WITH_IMAGE)
def test_question_and_choices_do_not_give_the_answer(sample, family):
    """How often a choice wins when it is offered: at chance, for each kind, wording and hint."""
    offered, won = defaultdict(list), Counter()
    for split in ("train", "val", "test"):
        for scene in sample.get((split, family), ()):
            r, kind = scene.record, scene.facts["kind"]
            context = (kind,), (kind, " ".join(r["question"].split()[:3])), (kind, r["hint"])
            order = sorted(r["choices"])
            for key in context:
                for choice in (*r["choices"], order[0] + " first", order[-1] + " last"):
                    offered[*key, choice].append(1 / len(order))
                    won[*key, choice] += (
                        choice.split(" first")[0].split(" last")[0] == (scene.facts["answer"])
                    )
    for key, chances in offered.items():
        expected, variance = sum(chances), sum(p * (1 - p) for p in chances)
        if variance > 3:
            assert abs(won[key] - expected) < 4.5 * variance**0.5, (key, won[key], expected)


def test_captions_are_weak(sample):
    group = sample["train", "count"] + sample["train", "chain"]
    wrong = 0
    for scene in group:
        shown = {name for name, _ in scene.objects}
        wrong += sum(detail not in shown for detail in re.findall("with a (.+)", scene.caption))
    assert 0.08 < wrong / len(group) < 0.22


# ---- splits ------------------------------------------------------------------------------------


def test_the_same_call_gives_the_same_bytes():
    for family in scenes.FAMILIES:
        one, two = (scenes.problem(family, "test", 3, 5) for _ in range(2))
        assert one.image is two.image or one.image.tobytes() == two.image.tobytes()
        parts = "record", "caption", "facts", "objects", "description"
        assert all(getattr(one, part) == getattr(two, part) for part in parts)
        other = scenes.problem(family, "test", 4, 5)
        assert (one.objects, one.facts) != (other.objects, other.facts)


def test_splits_are_disjoint_for_any_seed(everything):
    found = defaultdict(set)
    for i in range(3 * N):
        split = ("train", "val", "test")[i % 3]
        everything = everything + [scenes.problem("text", split, i // 30, i)]
    for scene in everything:
        content = sorted(scene.objects)
        if not content:
            skip = "family", "kind", "answer", "asked"
            content = {k: v for k, v in scene.facts.items() if k not in skip}
        text = json.dumps(content, sort_keys=True)
        found[text].add(scene.record["split"])
        bucket = int(hashlib.sha256(text.encode()).hexdigest()[:12], 16) % 20
        assert bucket in scenes.SPLITS[scene.record["split"]]
    assert max(map(len, found.values())) == 1
    ranges = [set(buckets) for buckets in scenes.SPLITS.values()]
    assert sum(map(len, ranges)) == len(set.union(*ranges)) == 20


@pytest.mark.parametrize(
    "family, split",
    [(f, split) for f in scenes.HELD_OUT for split in ("train", "val")]
    + [("magic", "train"), ("count", "dev")],
)
def test_held_out_and_unknown_families_are_refused(family, split):
    with pytest.raises(ValueError, match=f"'{split if split == 'dev' else family}'"):
        scenes.problem(family, split, 0, 0)


# ---- images and words ------------------------------------------------------------------------


def test_objects_fit_a_small_detector(everything):
    drawn = set()
    for scene in everything:
        if scene.image is None:
            assert not scene.objects and scene.record["image"] is None
            continue
        assert scene.image.size == (128, 128) and scene.image.mode == "RGB"
        cells = set()
        for name, (x0, y0, x1, y1) in scene.objects:
            drawn.add(name)
            assert min(x0, y0) >= 0 and max(x1, y1) <= 128
            assert x1 - x0 >= 12 and y1 - y0 >= 12, (name, scene.objects)
            cells.add(((x0 + x1) / 2 * 6 // 128, (y0 + y1) / 2 * 6 // 128))
        assert len(cells) == len(scene.objects) <= 12, scene.objects
    assert drawn == set(scenes.CLASSES) and len(set(scenes.CLASSES)) == len(scenes.CLASSES)


def words(text):
    return re.findall(r"[a-z]+|\d+|[^\sa-z\d]", text.lower())


def test_texts_are_short_and_the_vocabulary_small(everything):
    vocabulary, lectures, wordings = set(), defaultdict(set), defaultdict(set)
    content = set(words(" ".join((*scenes.CLASSES, *scenes.NAMES, *scenes.WORDS))))
    for scene in everything:
        r = scene.record
        assert len(r["lecture"].split()) <= 14
        assert 8 <= len(r["solution"].split()) <= 22, r["solution"]
        assert 8 <= len(scene.description.split()) <= 40, scene.description
        lectures[scene.facts["family"], r["skill"]].add(r["lecture"])
        asked = [w.rstrip("s") for w in words(r["question"]) if w.rstrip("s") not in content]
        wordings[scene.facts["kind"]].add(" ".join(asked))
        texts = r["question"], *r["choices"], r["hint"], r["lecture"], r["solution"]
        for text in (*texts, scene.caption, scene.description):
            assert "{" not in text and " | " not in text and "  " not in text
            vocabulary.update(words(text))
    assert len(vocabulary) < 400
    assert all(len(group) == 1 for group in lectures.values())
    assert all(len(group) >= 2 for group in wordings.values()), wordings


def test_records_have_the_fields_of_scienceqa(everything):
    fields = ("question choices answer hint image task grade subject topic category skill lecture "
              "solution split family")  # fmt: skip
    grades, kinds, subjects = set(), Counter(), Counter()
    for scene in everything:
        r = scene.record
        assert list(r) == fields.split() and r["task"] == "closed choice"
        grades.add(int(r["grade"].removeprefix("grade")))
        subjects[r["subject"]] += 1
        kinds[bool(r["hint"]), bool(r["image"])] += 1
    assert grades == set(range(1, 13))
    assert set(subjects) == {"natural science", "social science", "language science"}
    with_image = kinds[True, True] + kinds[False, True]
    assert min(kinds.values()) > 30 and len(kinds) == 4
    assert 0.2 < kinds[True, True] / with_image < 0.3


# ---- the folder --------------------------------------------------------------------------------

SIZES = {"train": 40, "val": 16, "test": 27}


def test_write_makes_scienceqas_layout(tmp_path):
    folder = tmp_path / "new" / "demo"
    scenes.write(folder, SIZES, seed=1)
    names = ("problems", "pid_splits", "captions", "scenes")
    tables = [json.loads((folder / f"{name}.json").read_text()) for name in names]
    problems, splits, captions, facts = tables
    assert {p.name for p in folder.iterdir()} == {f"{n}.json" for n in names} | {"images"}
    assert list(problems) == list(facts) and len(problems) == sum(SIZES.values())
    for split, size in SIZES.items():
        pids = splits[split]
        assert len(pids) == size and set(splits[f"mini{split}"]) < set(pids)
        families = Counter(facts[pid]["family"] for pid in pids)
        held_out = set(scenes.HELD_OUT) if split != "test" else set()
        assert set(families) == set(scenes.FAMILIES) - held_out
        assert 0.1 < families["text"] / size < 0.14
        for pid in pids:
            record, path = problems[pid], folder / "images" / split / pid / "image.png"
            assert record["split"] == split and path.exists() == bool(record["image"])
            assert (pid in captions["captions"]) == path.exists()
            if record["image"]:
                with Image.open(path) as image:
                    assert image.size == (128, 128) and image.mode == "RGB"


def test_write_is_repeatable_and_never_overwrites(tmp_path):
    for name in "ab":
        scenes.write(tmp_path / name, SIZES)
    contents = [
        {path.relative_to(tmp_path / name): path.read_bytes()
         for path in (tmp_path / name).rglob("*") if path.is_file()}
        for name in "ab"
    ]  # fmt: skip
    assert contents[0] == contents[1] and len(contents[0]) > 60
    with pytest.raises(FileExistsError, match=str(tmp_path / "a")):
        scenes.write(tmp_path / "a", SIZES)


def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    def fail(family, split, seed, index):
        raise RuntimeError("no space")

    monkeypatch.setattr(scenes, "problem", fail)
    with pytest.raises(RuntimeError, match="no space"):
        scenes.write(tmp_path / "demo", SIZES)
    assert list(tmp_path.iterdir()) == []
