"""Where problems come from: ScienceQA, A-OKVQA, MathVista, your own JSONL; on disk or downloaded.

ScienceQA in its original layout (Lu et al., arXiv 2209.09513), A-OKVQA (Schwenk et al., arXiv
2206.01718), MathVista's testmini (Lu et al., arXiv 2310.02255). A reader takes (path, split,
skipped) and gives dicts of the fields of `data.Problem`, in file order. A bad record is an error
that names the file and the problem or, with a list `skipped`, an entry (id, reason) of it.
(ScienceQA's parquet files on the Hub are not used: they have no problem ids, so neither captions
nor published features can be joined to them.)
"""

import argparse
import http.client
import os
import sys
import tarfile
import tempfile
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from support import files
from support.files import field, inside, is_index, json_lines, noted, read_json, unix_newlines

SPLITS = ("train", "val", "test", "trainval", "minitrain", "minival", "minitest", "testmini")
OWN_SPLITS = tuple(name for name in SPLITS if name != "trainval")  # of a line of JSONL
FIELDS = ("id", "question", "choices", "answer", "hint", "image", "lecture", "solution", "meta")
MOST_TEXT = 100_000  # characters of one text of a problem; the longest in ScienceQA has 3,076


# --- Readers --------------------------------------------------------------------------------------


def problem_fields(id: str, record: dict, where: str, image: Path | None, caption: str) -> dict:
    """{name: value} of a Problem's FIELDS, checked; the record's other keys go to meta."""
    choices = tuple(field(record, "choices", list, where, []))
    if not all(isinstance(choice, str) for choice in choices):
        raise ValueError(f'{where}: "choices" is not a list of texts.')
    answer = field(record, "answer", str | int | float, where)
    index = None
    if choices:
        index = choices.index(answer) if answer in choices else answer
        if not isinstance(index, int) or not 0 <= index < len(choices):
            needed = f"one of the {len(choices)} choices or an index that counts from 0"
            raise ValueError(f'{where}: "answer" is {answer!r}; it must be {needed}.')
        answer = choices[index]
    meta = {"split": "train", "caption": caption}
    meta |= {key: value for key, value in record.items() if key not in FIELDS}
    meta |= {"answer_index": index, "has_image": record.get("image") is not None}
    for key in ("split", "caption"):
        field(meta, key, str, where)
    texts = {key: field(record, key, str, where, "") for key in ("hint", "lecture", "solution")}
    texts |= {"question": field(record, "question", str, where), "answer": str(answer)}
    longest = max(map(len, [*texts.values(), *choices]))
    if longest > MOST_TEXT:
        raise ValueError(f"{where}: a text has {longest} characters; at most {MOST_TEXT} are read.")
    path = None if image is None else str(image)
    return {"id": id, "choices": choices, "image": path, "meta": meta} | texts


def scienceqa(folder: Path, split: str, skipped: list | None = None) -> list[dict]:
    """problems.json, pid_splits.json and, if it exists, captions.json. The image is the question's,
    images/{split}/{pid}/image.png, else the first choice's, if it has one."""
    file = folder / "problems.json"
    splits = folder / "pid_splits.json"
    caption_file = folder / "captions.json"
    records = field({"problems": read_json(file)}, "problems", dict, file)
    pids = field(read_json(splits), split, list, splits)
    if not all(isinstance(pid, str) for pid in pids) or len(set(pids)) < len(pids):
        raise ValueError(f"{splits}: {split} is not a list of different problem ids.")
    captions = read_captions(caption_file) if caption_file.is_file() else {}
    problems = []
    for pid in [pid for pid in pids if pid in records]:
        with noted(skipped, pid):
            record = records[pid]
            where = f"{file}, problem {pid:.60}"
            for key in ("choices", "hint", "image", "lecture", "solution", "subject", "grade"):
                field(record, key, object, where)  # null is for problem_fields to judge
            image_folder = f"images/{field(record, 'split', str, where)}/{pid}"
            image = inside(folder, image_folder, where) / "image.png"
            if record["image"] is None:  # the choices may still have images
                image = image.with_name("choice_0.png")
                image = image if os.path.isfile(image) else None
            caption = field(captions, pid, str, caption_file, "")
            problems.append(problem_fields(pid, record, where, image, caption))
    missing = len(set(pids) - records.keys())
    if missing:
        print(f"{file} lacks {missing} of the {len(pids)} problems of {split}.", file=sys.stderr)
    return problems


def read_captions(file: Path) -> dict[str, str]:
    """{problem id: caption} of a file in the layout of ScienceQA's captions.json, in which mm-cot's
    instruct_captions.json is too. FileNotFoundError, or ValueError for another layout."""
    return field(read_json(file), "captions", dict, file)


AOKVQA = "aokvqa_v1p0_{}.json"


def aokvqa(folder: Path, split: str, skipped: list | None = None) -> list[dict]:
    """aokvqa_v1p0_train.json, _val.json and _test.json; images as COCO 2017 has them,
    val2017/000000000139.jpg. The solution is the first of the three rationales. The answers of
    "test" are not public: there `answer` is "", and what is predicted cannot be scored here.
    """
    if split not in SPLITS[:3]:
        raise ValueError(f"{folder} has no split {split}, only {', '.join(SPLITS[:3])}.")
    file = folder / AOKVQA.format(split)
    problems = []
    ids = set()
    for number, record in enumerate(field({"list": read_json(file)}, "list", list, file), 1):
        where = f"{file}, record {number}"
        with noted(skipped, f"record {number}"):
            id = field(record, "question_id", str, where)
            if id in ids:
                raise ValueError(f"{where}: the question_id {id[:60]!r} occurs twice.")
            ids.add(id)
            rationales = field(record, "rationales", list, where, [])
            image = folder / f"{split}2017" / f"{field(record, 'image_id', int, where):012}.jpg"
            known = {
                "question": field(record, "question", str, where),
                "choices": field(record, "choices", list, where),
                "answer": 0 if split == "test" else field(record, "correct_choice_idx", int, where),
                "solution": rationales[0] if rationales else "",
                "direct_answers": field(record, "direct_answers", list, where, []),
                "image": image.name,
                "split": split,
            }
            fields = problem_fields(id, known, where, image, "")
            if split == "test":
                fields["answer"] = ""
                fields["meta"]["answer_index"] = None
            problems.append(fields)
    return problems


MATHVISTA = {  # split: positions in testmini. pali_reason trained on 0..349, tested on 351..999
    "train": range(300),
    "val": range(300, 350),
    "trainval": range(350),
    "test": range(351, 1000),
    "testmini": range(1000),
}


def mathvista(folder: Path, split: str, skipped: list | None = None) -> list[dict]:
    """annot_testmini.json: the 1,000 problems of MathVista whose answers are public.

    hint is the first line of `query`: the form the answer should have. The image is the file the
    annotation names, or else images/{pid}.jpg or .png; if none exists, opening it is the error.
    """
    file = folder / "annot_testmini.json"
    if split not in MATHVISTA:
        raise ValueError(f"{file} has no split {split}, only {', '.join(MATHVISTA)}.")
    records = field({"pids": read_json(file)}, "pids", dict, file)
    problems = []
    for pid, annotation in records.items():
        where = f"{file}, problem {pid:.60}"
        with noted(skipped, pid):
            if not is_index(pid):
                raise ValueError(f"{where}: the id is not a number that counts from 1.")
            if int(pid) - 1 not in MATHVISTA[split]:
                continue
            image = inside(folder, field(annotation, "image", str, where), where)
            others = [folder / "images" / f"{pid}{ending}" for ending in (".jpg", ".png")]
            image = next((path for path in (image, *others) if os.path.isfile(path)), image)
            record = {key: unix_newlines(value) for key, value in annotation.items()}
            hint = field(record, "query", str, where).partition("\n")[0]
            record |= field(record, "metadata", dict, where)
            del record["metadata"]
            record["choices"] = record.get("choices") or []
            record["hint"] = hint.removeprefix("Hint: ") if hint.startswith("Hint: ") else ""
            known = {key: value for key, value in record.items() if value is not None}
            if not 0 <= field(known, "precision", int | float, where, 0) < 9:
                raise ValueError(f'{where}: "precision" is not a number of decimals.')
            problems.append(problem_fields(pid, record, where, image, ""))
    return problems


def own_jsonl(file: Path, split: str, skipped: list | None = None) -> list[dict]:
    """Your own data, one JSON object a line.

        {"id": "a1", "question": "Which is longer?", "choices": ["rope", "belt"], "answer": 0,
         "image": "images/a1.jpg", "hint": "", "lecture": "", "solution": "", "split": "test"}

    Required: id, question, answer. `answer` is one of the choices' texts or an index; without
    choices, any text. `image` is relative to the file and below its folder. Without `split` a
    record is training data. Other keys (caption, subject, grade) go to meta.
    """
    wanted = ("train", "val") if split == "trainval" else (split,)
    problems = []
    ids = set()
    for where, record in json_lines(file, skipped=skipped):
        keys = record if isinstance(record, dict) else {}
        name = keys.get("split", "train")
        elsewhere = name in OWN_SPLITS and name not in wanted
        # A bad record of another split is noted when that split is read, not here as well.
        bad = [] if elsewhere and skipped is not None else skipped
        with noted(bad, str(keys.get("id") or where.rpartition(", ")[2])):
            id = str(field(record, "id", str | int, where))
            if id in ids:
                raise ValueError(f"{where}: the id {id[:60]!r} occurs twice.")
            ids.add(id)
            if name not in OWN_SPLITS:
                raise ValueError(
                    f'{where}: "split" is {name!r:.60}, not one of {", ".join(OWN_SPLITS)}.'
                )
            image = record.get("image")
            if image is not None:
                image = inside(file.parent, field(record, "image", str, where), where)
            fields = problem_fields(id, record, f"{where} (id {id:.60})", image, "")
            if not elsewhere:
                problems.append(fields)
    return problems


def reader_of(path: Path) -> Callable | None:
    """The reader of the layout that a file or folder has; None if it has none of them."""
    if path.suffix == ".jsonl":
        return own_jsonl
    if os.path.isfile(path / "problems.json"):
        return scienceqa
    if os.path.isfile(path / AOKVQA.format("val")):
        return aokvqa
    return mathvista if os.path.isfile(path / "annot_testmini.json") else None


# --- Downloads ------------------------------------------------------------------------------------

COMMIT = "2cbf8318e07b9ece895bb2ae605e71e38d623264"
DATA = f"https://raw.githubusercontent.com/lupantech/ScienceQA/{COMMIT}/data"
MMCOT = "https://raw.githubusercontent.com/amazon-science/mm-cot"
MMCOT_COMMIT = "8dd4ac02b94f21347973491f6e6b828502d23f9d"
BUCKET = "https://scienceqa.s3.us-west-1.amazonaws.com/images"
PROBLEMS_ID = "3920b762556abfbfa001f298c9740c36d4e041e1"
SPLITS_ID = "bde005092576ebebfed08087879ff774fcd75b62"
CAPTIONS_ID = "38726c2097b97e73b95582857c95de225f6682a8"
INSTRUCT = "instruct_captions.json"  # mm-cot's, by InstructBLIP; captions.json is by ViT-GPT2
INSTRUCT_ID = "2adcd93329b229ec3efb1cf0e273c9d53b8decb4"
SCIENCEQA = {  # file: address, checksum (a git blob id or a sha256; None: nobody recorded one yet)
    "problems.json": (f"{DATA}/scienceqa/problems.json", PROBLEMS_ID),
    "pid_splits.json": (f"{DATA}/scienceqa/pid_splits.json", SPLITS_ID),
    "captions.json": (f"{DATA}/captions.json", CAPTIONS_ID),
    INSTRUCT: (f"{MMCOT}/{MMCOT_COMMIT}/data/{INSTRUCT}", INSTRUCT_ID),
    "train.zip": (f"{BUCKET}/train.zip", None),
    "val.zip": (f"{BUCKET}/val.zip", None),
    "test.zip": (f"{BUCKET}/test.zip", None),
}
AOKVQA_URL = "https://prior-datasets.s3.us-east-2.amazonaws.com/aokvqa/aokvqa_v1p0.tar.gz"
COCO = "http://images.cocodataset.org"
MATHVISTA_COMMIT = "2b6ad69445fbb5695c9b165475e8decdbeb97747"


def download(
    url: str, path: Path, checksum: str | None = None, attempts: int = 5, report: bool = True
) -> None:
    """Fetch url into path by way of path.part, which a later call continues (HTTP Range). Without a
    checksum that of the file is printed, if `report`.

    Raises ConnectionError, or ValueError for a wrong checksum. path appears only when complete.
    """
    part = Path(f"{path}.part")
    for attempt in range(1, attempts + 1):
        try:
            fetch_rest(url, part)
            break
        except (OSError, http.client.HTTPException) as error:
            code = getattr(error, "code", 0)
            if attempt == attempts or (400 <= code < 500 and code != 416):
                advice = "Try again later, or give another address with --addresses."
                raise ConnectionError(f"{url} could not be fetched ({error}). {advice}") from None
            if code == 416:  # the part is longer than the file, or already complete: start again
                part.unlink(missing_ok=True)
            time.sleep(attempt / 2)
    found = files.checksum(part, checksum)
    if checksum is None and report:
        print(f"{path.name} has sha256 {found}; there is none on record to compare it with.")
    if checksum is not None and found != checksum:
        part.unlink()
        raise ValueError(f"{url} has checksum {found}, not {checksum}; the download was deleted.")
    os.replace(part, path)


def fetch_rest(url: str, part: Path) -> None:
    """One attempt to append to `part` whatever it lacks of the file at url."""
    have = part.stat().st_size if part.is_file() else 0
    request = urllib.request.Request(url, headers={"Range": f"bytes={have}-"} if have else {})
    start = time.monotonic()
    with urllib.request.urlopen(request, timeout=60) as reply:
        if not reply.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            have = 0  # the server ignores Range and sends the whole file
        length = reply.headers.get("Content-Length", "0")
        rest = int(length) if length.isdecimal() else 0
        fetched = 0
        with open(part, "ab" if have else "wb") as file:
            while block := reply.read(1 << 20):
                fetched += file.write(block)
                files.progress(f"{part.stem}, MB", fetched / 1e6, rest / 1e6, start)
    if fetched < rest:  # http.client does not report it
        total = have + rest
        raise ConnectionError(f"the connection was lost after {have + fetched} of {total} bytes")


def unpack(archive: Path, folder: Path, top: str) -> None:
    """Unzip the archive's folder `top` as folder/top, see `files.unzip`."""
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        files.unzip(archive, temporary)
        if not Path(temporary, top).is_dir():
            raise ValueError(f"{archive} has no folder {top}.")
        os.replace(Path(temporary, top), Path(folder, top))


def download_mathvista(folder: Path) -> None:
    """MathVista's testmini and all 6,141 images (0.9 GB) from the Hub into `folder`."""
    import huggingface_hub

    def fetch(name: str) -> str:
        options = {"repo_type": "dataset", "revision": MATHVISTA_COMMIT, "local_dir": folder}
        return huggingface_hub.hf_hub_download("AI4Math/MathVista", name, **options)

    try:
        if not (folder / "images").is_dir():
            unpack(fetch("images.zip"), folder, "images")
            (folder / "images.zip").unlink()
        fetch("annot_testmini.json")  # last: with it the folder counts as MathVista
    except ValueError:
        raise  # unpack's sentence about a broken archive
    except Exception as error:  # the client raises its HTTP library's own errors when offline
        raise ConnectionError(f"AI4Math/MathVista could not be fetched ({error}).") from None


def download_scienceqa(folder: Path, addresses: dict[str, tuple[str, str | None]]) -> None:
    """ScienceQA into `folder`, as data.load reads it; addresses is a table like SCIENCEQA."""
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for name, (url, checksum) in addresses.items():
        path = folder / name
        if (folder / "images" / path.stem).is_dir():
            continue
        if not path.is_file():
            download(url, path, checksum)
        if path.suffix == ".zip":
            unpack(path, folder / "images", path.stem)
            path.unlink()


def download_aokvqa(folder: Path, archive_url: str = AOKVQA_URL, images_url: str = COCO) -> None:
    """A-OKVQA's three files, and of COCO 2017 the 24,000 images that they use (4 GB), one by one:
    COCO's own zip files have 26 GB."""
    folder.mkdir(parents=True, exist_ok=True)
    names = {AOKVQA.format(split): split for split in SPLITS[:3]}
    if not all((folder / name).is_file() for name in names):
        archive = folder / "aokvqa_v1p0.tar.gz"
        download(archive_url, archive)
        try:
            with tarfile.open(archive) as file:
                for member in file:
                    if member.isfile() and (name := Path(member.name).name) in names:
                        (folder / name).write_bytes(file.extractfile(member).read())
        except (tarfile.TarError, OSError, EOFError) as error:
            raise ValueError(f"{archive} is not a whole archive ({error}); delete it.") from None
        archive.unlink()
    start = time.monotonic()
    with ThreadPoolExecutor(8) as pool:
        for split in names.values():
            images = folder / f"{split}2017"
            images.mkdir(exist_ok=True)
            paths = {Path(fields["image"]) for fields in aokvqa(folder, split)}
            todo = sorted(path for path in paths if not path.is_file())
            urls = [f"{images_url}/{split}2017/{path.name}" for path in todo]
            fetch = partial(download, report=False)
            for done, _ in enumerate(pool.map(fetch, urls, todo), 1):
                files.progress(f"{split} images", done, len(todo), start)


def download_command(argv: list[str] | None = None) -> Path:
    """Download the data set a command line asks for; returns its folder."""
    parser = argparse.ArgumentParser(description="Download a data set from its authors' hosts.")
    parser.add_argument("name", choices=["scienceqa", "aokvqa", "mathvista"], help="the data set")
    parser.add_argument("--to", metavar="DIR", help="folder (default: where --data NAME looks)")
    table = 'JSON {"train.zip": [address, checksum or null], ...} that replaces built-in addresses'
    parser.add_argument("--addresses", metavar="FILE", help=f"scienceqa: {table}")
    args = parser.parse_args(argv)
    folder = Path(args.to or files.cache_folder() / args.name)
    addresses = SCIENCEQA | (read_addresses(args.addresses) if args.addresses else {})
    if args.name == "mathvista":
        download_mathvista(folder)
    elif args.name == "aokvqa":
        download_aokvqa(folder)
    else:
        download_scienceqa(folder, addresses)
    return folder


def read_addresses(file: str) -> dict[str, list]:
    """A table of other addresses for some of SCIENCEQA's files, checked."""
    changed = field({"table": read_json(file)}, "table", dict, file)
    for name, entry in changed.items():
        match entry:
            case [str(), str() | None] if name in SCIENCEQA:
                continue
        entries = f"{', '.join(SCIENCEQA)} with [address, checksum or null]"
        raise ValueError(f"{file}: {name:.60} is not one of {entries}.")
    return changed
