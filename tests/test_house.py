"""The house: what is read first and what after, sizes, imports that go one way, no dead names.

python tests/test_house.py        lines, functions and comments of each file
"""

import ast
import io
import re
import statistics
import subprocess
import sys
import tokenize
from collections import Counter
from functools import cache
from itertools import chain
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PRODUCT = [
    p.relative_to(ROOT)
    for pattern in ("*.py", "support/**/*.py", "demo/*.py")
    for p in sorted(ROOT.glob(pattern))
    if p.name != "__init__.py"
]
PACKAGES = "torch safetensors tokenizers PIL numpy huggingface_hub anthropic google".split()
PACKAGES.append("httpx2")  # google-genai's own, as both SDKs bring it
MOST = 450  # lines of a file
LONGER = {  # and why
    "model.py": 1270,  # five architectures, decoding
    "train.py": 560,  # two systems' runs
}


@cache
def tree(path):
    return ast.parse((ROOT / path).read_text())


def functions(path):
    kinds = ast.FunctionDef | ast.AsyncFunctionDef
    return [node for node in ast.walk(tree(path)) if isinstance(node, kinds)]


def length(node):
    return node.end_lineno - node.lineno + 1


def docstrings(path):
    kinds = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    owners = [node for node in ast.walk(tree(path)) if isinstance(node, kinds)]
    return [node.body[0] for node in owners if ast.get_docstring(node) is not None]


def counts(path):
    """(lines, functions, their median length, the longest, % of lines with a comment, % of
    lines in docstrings) of a file."""
    source = (ROOT / path).read_text()
    lines = source.count("\n") or 1
    lengths = [length(node) for node in functions(path)] or [0]
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    comments = {token.start[0] for token in tokens if token.type == tokenize.COMMENT}
    said = sum(map(length, docstrings(path)))
    share = 100 * len(comments) / lines, 100 * said / lines
    return lines, len(functions(path)), statistics.median(lengths), max(lengths), *share


def imported(path):
    """The modules a file imports, ours as 'data' or 'support.files', at any depth of its code."""
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        elif isinstance(node, ast.ImportFrom):
            inside = [f"{node.module}.{name.name}" for name in node.names]
            ours = {module(p) for p in PRODUCT}
            yield from (name if name in ours else node.module for name in inside)


def module(path):
    return ".".join(path.with_suffix("").parts)


@pytest.mark.parametrize("path", PRODUCT, ids=str)
def test_a_file_can_be_read_in_one_sitting(path):
    lines, _, _, longest, *_ = counts(path)
    assert lines <= LONGER.get(str(path), MOST)
    assert longest <= 60


@pytest.mark.parametrize("path", PRODUCT, ids=str)
def test_a_file_opens_with_what_it_is_and_what_it_leaves_out(path):
    said = ast.get_docstring(tree(path))
    assert said and re.search("Left out", said)


@pytest.mark.parametrize("path", PRODUCT, ids=str)
def test_only_the_packages_of_requirements_txt(path):
    ours = {module(p).split(".")[0] for p in PRODUCT}
    roots = {name.split(".")[0] for name in imported(path)}
    assert roots <= {*PACKAGES, *ours, *sys.stdlib_module_names}


def test_imports_go_one_way():
    """No file imports, however indirectly, one that imports it; the models import, and that when
    asked for files, only support.checkpoints."""
    ours = {module(p): p for p in PRODUCT}
    uses = {name: {x for x in imported(p) if x in ours} for name, p in ours.items()}
    files = {f"support.checkpoints.{room}" for room in ("hub", "keys", "peft", "summary")}
    assert uses["model"] | uses["lora"] <= files
    assert uses["fusion"] <= {"model", "support.distributed", *files}
    assert not any(uses[name] & {"train", "eval", "teacher"} for name in uses if "support" in name)
    left = dict(uses)
    while free := [name for name, wants in left.items() if not wants & left.keys()]:
        for name in free:
            del left[name]
    assert not left, f"in a circle: {sorted(left)}"


def test_every_name_has_a_use():
    """A function, class or constant of the product that occurs once is defined and never used."""
    read = (*PRODUCT, "README.md", "report.html")
    seen = Counter(chain(*(re.findall(r"\w+", (ROOT / p).read_text()) for p in read)))
    once = [
        f"{path}:{node.lineno} {name}"
        for path in PRODUCT
        for node, name in defined(path)
        if seen[name] < 2 and not name.startswith("__")
    ]
    assert not once


def defined(path):
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node, node.name
    for node in tree(path).body:
        if isinstance(node, ast.Assign):
            yield from ((node, x.id) for x in node.targets if isinstance(x, ast.Name))


def test_every_flag_is_used():
    texts = {p: (ROOT / p).read_text() for p in PRODUCT}
    every = re.sub(r'dest="\w+"', "", "\n".join(texts.values()))
    used = set(chain(*re.findall(r'[."](\w+)|\b(\w+)=', every)))
    for path, text in texts.items():
        for flag, dest in re.findall(r'"--([a-z][a-z-]+)"(?:.*?\bdest="(\w+)")?', text):
            name = dest or flag.replace("-", "_")
            name = name.removeprefix("lora_")  # train.py has a list of what stands behind it
            assert name in used, f"{path}: --{flag} is parsed and never used"


def test_nothing_of_where_it_was_written():
    files = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout.split("\0")
    for name in filter(None, files):
        if Path(name).suffix in {".py", ".md", ".txt", ".toml", ".html", ".json", ".jsonl"}:
            assert "/wor" + "k/" not in (ROOT / name).read_text(), name


def main():
    head = ("file", "lines", "functions", "median", "longest", "comments %", "docstrings %")
    print("{:26}{:>7}{:>11}{:>8}{:>9}{:>12}{:>14}".format(*head))
    for path in PRODUCT:
        row = counts(path)
        print("{!s:26}{:7}{:11}{:8g}{:9}{:12.0f}{:14.0f}".format(path, *row))


if __name__ == "__main__":
    main()
