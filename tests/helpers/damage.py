"""hypothesis strategies that damage a valid file: `damaged(path)` draws its new content."""

import csv
import functools
import io
import json
import operator
import os
import pickle
import re
import zipfile
import zlib

from hypothesis import strategies as st


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


EDGES = [n.to_bytes(8, order) for n in (2**31 - 1, 2**63, 2**64 - 1) for order in ("big", "little")]
INSERTS = [b"", b"\0", b"\xff", b"\r", b'"', b"\n\n", b"\xef\xbb\xbf", b"[" * 3000, b"9" * 5000]
INSERTS += [b"-1", b"1e999", b"NaN", b"../", bytes(999)]
TWICE = " (twice)"  # cut off when a file is written: then the key occurs twice
ODD = [None, True, [], {}, [None], [-1], [0] * 2000, {"a": {}}, "", "\0", "\ud800", "</s>", ".."]
ODD += [0, -1, 10**12, 2**63, 10**400, 1e308, float("nan"), float("inf"), "9" * 5000, "Ⅷ", "C:\\x"]
ODD += ["a" * 100_001, "\\boxed{" * 500, "answer is " * 9000, "nested 900", "nested 200000"]
VALUES = (
    st.sampled_from(ODD)
    | st.sampled_from(ODD)
    | st.integers(-9, 10**6)
    | st.floats()
    | st.text(max_size=9)
)
KEYS = st.sampled_from(("", "x", "../x", "\0", "\ud800", "9" * 5000))


@st.composite
def spliced(draw, content):
    """Bytes with some removed, replaced or added: mostly near the start, where headers are."""
    end = len(content)
    start = draw(st.sampled_from((0, end)) | st.integers(0, min(64, end)) | st.integers(0, end))
    removed = draw(st.sampled_from((0, 1, 1, 4, 8, end)))
    added = draw(st.sampled_from(INSERTS + EDGES) | st.binary(max_size=min(removed, 8)))
    return content[:start] + added + content[start + removed :]


def paths(value, path=()):
    yield path
    keys = list(value) if isinstance(value, dict) else []
    if isinstance(value, list):
        keys = range(len(value))
    for key in keys[:60]:
        yield from paths(value[key], (*path, key))


@st.composite
def altered(draw, value):
    """A JSON value with one part replaced, removed, renamed or there twice."""
    path = draw(st.sampled_from(list(paths(value))))
    if not path:
        return draw(VALUES)
    value = json.loads(json.dumps(value))
    parent = functools.reduce(operator.getitem, path[:-1], value)
    change = draw(st.sampled_from(("replace", "replace", "remove", "rename", "twice")))
    if change == "twice" and isinstance(parent, dict):
        parent[f"{path[-1]}{TWICE}"] = draw(VALUES)
    elif change == "rename" and isinstance(parent, dict):
        parent[draw(KEYS)] = parent.pop(path[-1])
    elif change == "remove":
        del parent[path[-1]]
    else:
        parent[path[-1]] = draw(VALUES)
    return value


def dumped(value):
    """JSON, with what json.dumps cannot write: deep nesting and a key that is there twice."""
    text = json.dumps(value).replace(TWICE, "")
    return re.sub(r'"nested (\d+)"', lambda n: "[" * int(n[1]) + "]" * int(n[1]), text).encode()


@st.composite
def damaged(draw, path):
    """The content of a file with one part changed."""
    content = path.read_bytes()
    way = draw(st.sampled_from(("bytes", "structure", "structure", "another file")))
    if way == "another file":
        return draw(st.sampled_from((b"", b"<html>404", bytes(100_000), pickle.dumps(Evil()))))
    if way == "bytes":
        return draw(spliced(content))
    if path.suffix == ".json":
        return dumped(draw(altered(json.loads(content))))
    if path.suffix == ".jsonl":
        rows = [json.loads(line) for line in content.splitlines()]
        i = draw(st.integers(0, len(rows) - 1))
        rows[i] = draw(altered(rows[i]))
        return b"\n".join(map(dumped, rows))
    if path.suffix == ".png":  # its header: 13 bytes with a checksum
        header = b"IHDR" + draw(spliced(content[16:29]))[:13].ljust(13, b"\0")
        return content[:12] + header + zlib.crc32(header).to_bytes(4, "big") + content[33:]
    if path.suffix == ".csv":
        rows = list(csv.reader(io.StringIO(content.decode(), newline="")))
        row = draw(st.sampled_from(rows))
        row[draw(st.integers(0, len(row) - 1))] = draw(VALUES.filter(lambda x: x != "\ud800"))
        file = io.StringIO()
        csv.writer(file).writerows(rows)
        return file.getvalue().encode()
    if path.suffix == ".safetensors":
        end = 8 + int.from_bytes(content[:8], "little")
        header = dumped(draw(altered(json.loads(content[8:end]))))
        return len(header).to_bytes(8, "little") + header + content[end:]
    if zipfile.is_zipfile(path):  # .pth and .bin too: with checksums that are right
        file = io.BytesIO()
        with zipfile.ZipFile(path) as valid, zipfile.ZipFile(file, "w") as changed:
            chosen = draw(st.sampled_from(valid.namelist()))
            for name in valid.namelist():
                entry = valid.read(name)
                changed.writestr(name, draw(spliced(entry)) if name == chosen else entry)
        return file.getvalue()
    text = content.decode("utf-8", "replace")
    return text.encode(draw(st.sampled_from(("utf-16", "utf-32", "latin-1"))), "replace")
