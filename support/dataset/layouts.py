"""Where problems come from: ScienceQA's files, MathVista's, and your own JSONL.

ScienceQA in its original layout (Lu et al., arXiv 2209.09513), MathVista's testmini (Lu et al.,
arXiv 2310.02255). Each reader has (path, split, skipped) and gives dicts of the fields of
`data.Problem`, in file order. Files come from strangers: what is wrong with one is a sentence that
names the file and the problem, an error or, with a list `skipped`, an entry (id, reason) of it.

Left out on purpose: which layout a path has (`data.load`), opening pictures (pictures.py), fetching
(downloads.py), repairing what is wrong.
"""

import os
import sys

from support.files import (
    field,
    inside,
    is_index,
    json_lines,
    noted,
    read_json,
    unix_newlines,
)

SPLITS = ("train", "val", "test", "trainval", "minitrain", "minival", "minitest", "testmini")
FIELDS = ("id", "question", "choices", "answer", "hint", "image", "lecture", "solution", "meta")
MOST_TEXT = 100_000  # characters of one text of a problem; the longest seen has 3,076


def fields_of(id, record, where, image, caption=""):
    """{name: value} of a Problem's FIELDS, checked; the record's other keys go to meta. ValueError
    with `where` and what is wrong."""
    choices = tuple(field(record, "choices", list, where, []))
    if not all(isinstance(choice, str) for choice in choices):
        raise ValueError(f'{where}: "choices" is not a list of texts.')
    answer, index = field(record, "answer", str | int | float, where), None
    if choices:
        index = choices.index(answer) if answer in choices else answer
        if not isinstance(index, int) or not 0 <= index < len(choices):
            raise ValueError(
                f'{where}: "answer" is {answer!r}, but there are {len(choices)} choices: '
                "it must be one of their texts or an index that counts from 0."
            )
        answer = choices[index]
    meta = {key: value for key, value in record.items() if key not in FIELDS}
    meta |= {"answer_index": index, "has_image": record.get("image") is not None}
    texts = [field(record, key, str, where, "") for key in ("hint", "lecture", "solution")]
    question = field(record, "question", str, where)
    for key in ("split", "caption"):
        field(meta, key, str, where, "")
    longest = max(map(len, [question, str(answer), *choices, *texts]))
    if longest > MOST_TEXT:
        raise ValueError(f"{where}: a text has {longest} characters; {MOST_TEXT} are the most.")
    return {
        "id": id,
        "question": question,
        "choices": choices,
        "answer": str(answer),
        "hint": texts[0],
        "image": None if image is None else str(image),
        "lecture": texts[1],
        "solution": texts[2],
        "meta": {"split": "train", "caption": caption} | meta,
    }


def scienceqa(folder, split, skipped=None):
    """problems.json, pid_splits.json and, if there, captions.json. The image is that of the
    question, images/{split}/{pid}/image.png, else that of the first choice, where one is."""
    file, splits = folder / "problems.json", folder / "pid_splits.json"
    records, captions = field({"problems": read_json(file)}, "problems", dict, file), {}
    pids = field(read_json(splits), split, list, splits)
    if not all(isinstance(pid, str) for pid in pids) or len(set(pids)) < len(pids):
        raise ValueError(f"{splits}: {split} is not a list of different problem ids.")
    if (folder / "captions.json").is_file():
        captions = read_json(folder / "captions.json")
        captions = field(captions, "captions", dict, folder / "captions.json")
    problems, found = [], [pid for pid in pids if pid in records]
    for pid in found:
        with noted(skipped, pid):
            record, where = records[pid], f"{file}, problem {pid:.60}"
            for key in ("choices", "hint", "image", "lecture", "solution", "subject", "grade"):
                field(record, key, object, where)  # null: see fields_of
            pictures = f"images/{field(record, 'split', str, where)}/{pid}"
            image = inside(folder, pictures, where) / "image.png"
            if record["image"] is None:  # the choices may still have pictures
                image = image.with_name("choice_0.png")
                image = image if os.path.isfile(image) else None
            caption = field(captions, pid, str, folder / "captions.json", "")
            problems.append(fields_of(pid, record, where, image, caption))
    missing = len(pids) - len(found)
    if not problems:
        none = f"{file} has none of the {missing} problems of the split {split}."
        raise ValueError(skipped[0][1] if skipped else none)
    if missing:
        print(f"{file} lacks {missing} of the {len(pids)} problems of {split}.", file=sys.stderr)
    return problems


MATHVISTA = {  # split: positions in testmini. pali_reason trained on 0..349, tested on 351..999
    "train": range(300),
    "val": range(300, 350),
    "trainval": range(350),
    "test": range(351, 1000),
    "testmini": range(1000),
}


def mathvista(folder, split, skipped=None):
    """annot_testmini.json: the 1,000 problems of MathVista whose answers are public.

    hint is the first line of `query`: what the answer should look like. The image is the file the
    annotation names, or else images/{pid}.jpg or .png; without any, opening it is the error.
    """
    file = folder / "annot_testmini.json"
    if split not in MATHVISTA:
        raise ValueError(f"{file} has no split {split}, only {', '.join(MATHVISTA)}.")
    problems, records = [], read_json(file)
    for pid, record in field({"pids": records}, "pids", dict, file).items():
        where = f"{file}, problem {pid:.60}"
        with noted(skipped, pid):
            if not is_index(pid):
                raise ValueError(f"{where}: the id is not a number that counts from 1.")
            if int(pid) - 1 not in MATHVISTA[split]:
                continue
            image = inside(folder, field(record, "image", str, where), where)
            others = [folder / "images" / f"{pid}{ending}" for ending in (".jpg", ".png")]
            image = next((path for path in (image, *others) if os.path.isfile(path)), image)
            record = {key: unix_newlines(value) for key, value in record.items()}
            hint = field(record, "query", str, where).partition("\n")[0]
            record |= field(record, "metadata", dict, where)
            record |= {"choices": record.get("choices") or []}
            record["hint"] = hint.removeprefix("Hint: ") if hint.startswith("Hint: ") else ""
            del record["metadata"]  # its fields are in the record now
            known = {key: value for key, value in record.items() if value is not None}
            if not 0 <= field(known, "precision", int | float, where, 0) < 9:
                raise ValueError(f'{where}: "precision" is no number of decimals.')
            problems.append(fields_of(pid, record, where, image))
    if not problems:
        none = f"{file} has none of the problems of the split {split}."
        raise ValueError(skipped[0][1] if skipped else none)
    return problems


def own_jsonl(file, split, skipped=None):
    """Your own data, one JSON object a line.

        {"id": "a1", "question": "Which is longer?", "choices": ["rope", "belt"], "answer": 0,
         "image": "pictures/a1.jpg", "hint": "", "lecture": "", "solution": "", "split": "test"}

    Required: id, question, answer. `answer` is one of the choices' texts or an index; without
    choices, any text. `image` is relative to the file and below its folder. Without `split` a
    record is training data. Other keys (caption, subject, grade) go to meta.
    """
    wanted = ("train", "val") if split == "trainval" else (split,)
    problems, seen = [], set()
    for where, record in json_lines(file, skipped=skipped):
        told = record if isinstance(record, dict) else {}
        elsewhere = told.get("split", "train") in [x for x in SPLITS if x not in wanted]
        bad = [] if elsewhere and skipped is not None else skipped  # it is skipped there
        with noted(bad, str(told.get("id") or where.rpartition(", ")[2])):
            id = str(field(record, "id", str | int, where))
            if id in seen:
                raise ValueError(f"{where}: the id {id[:60]!r} was used before.")
            seen.add(id)
            image = record.get("image")
            if image is not None:
                image = inside(file.parent, field(record, "image", str, where), where)
            problems.append(fields_of(id, record, f"{where} (id {id:.60})", image))
    problems = [problem for problem in problems if problem["meta"]["split"] in wanted]
    if not problems:
        none = f'{file} has no record with "split": "{split}" (the default is "train").'
        raise ValueError(skipped[0][1] if skipped else none)
    return problems
