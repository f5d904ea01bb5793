"""House rules: what imports what, one formula, typed and plain functions, sizes, no dead names."""

import ast
import re
import subprocess
import sys
from collections import Counter
from functools import cache
from itertools import chain

import pytest
from conftest import ROOT

FOLDERS = ("*.py", "support/**/*.py", "demo/*.py")
PRODUCT = [path.relative_to(ROOT) for folder in FOLDERS for path in sorted(ROOT.glob(folder))]
PRODUCT = [path for path in PRODUCT if path.name != "__init__.py"]
MODULES = {".".join(path.with_suffix("").parts): path for path in PRODUCT}
PACKAGES = {"torch", "safetensors", "tokenizers", "PIL", "numpy", "huggingface_hub"}
PACKAGES |= {"anthropic", "google", "httpx2"}  # httpx2: what both SDKs bring
COMMANDS = ("train", "eval", "teacher")
WINGS = {f"support.{x}" for x in ("checkpoints", "dataset", "training", "evaluation", "teachers")}
NEVER = {  # what a module or the modules of a wing never import
    "support.distributed": (*COMMANDS, "data"),
    "support.checkpoints": (*COMMANDS, "data", *WINGS - {"support.checkpoints"}),
    "support.dataset": (*COMMANDS, "data", *WINGS - {"support.dataset"}),
    "support.training": ("train", "eval"),
    "support.evaluation": ("train", "eval", "support.training"),
    "support.teachers": ("teacher",),
}
SETTINGS = "support.training.settings"  # config.json is read with it: evaluation may
LINES = 450  # at most in a file
LONGER = {"model.py": 1250, "train.py": 500}  # six architectures; two systems


@cache
def tree(path):
    return ast.parse((ROOT / path).read_text())


def nodes(path, *kinds):
    return [node for node in ast.walk(tree(path)) if isinstance(node, kinds)]


def functions(path):
    return nodes(path, ast.FunctionDef, ast.AsyncFunctionDef)


def parameters(function):
    arguments = function.args
    named = arguments.posonlyargs + arguments.args + arguments.kwonlyargs
    return named + [x for x in (arguments.vararg, arguments.kwarg) if x]


def imports(path, top=False):
    """The modules that a file imports, ours as "data" or "support.files".

    top  not those inside functions and under `if __name__ == "__main__"`.
    """
    scripts = [x for x in tree(path).body if "__name__" in ast.dump(x) and isinstance(x, ast.If)]
    late = set()
    for node in [*functions(path), *scripts] if top else []:
        late.update(ast.walk(node))
    for node in nodes(path, ast.Import, ast.ImportFrom):
        if node in late:
            continue
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names)
        else:
            inside = [f"{node.module}.{name.name}" for name in node.names]
            yield from (name if name in MODULES else node.module for name in inside)


def ours(name, top=False):
    """What a module of ours imports of ours."""
    return {module for module in imports(MODULES[name], top) if module in MODULES}


def check(wrong):
    assert not wrong, "\n".join(sorted(wrong))


# --- Imports --------------------------------------------------------------------------------------


def test_only_the_packages_of_requirements_txt():
    own = {name.partition(".")[0] for name in MODULES}
    known = PACKAGES | own | set(sys.stdlib_module_names)
    roots = {(path, name.partition(".")[0]) for path in PRODUCT for name in imports(path)}
    assert not [(str(path), root) for path, root in roots if root not in known]


def test_no_circle_of_imports():
    left = {name: ours(name, top=True) for name in MODULES}
    while free := [name for name, wants in left.items() if not wants & left.keys()]:
        for name in free:
            del left[name]
    assert not left


def within(module, parents):
    return any(module == parent or module.startswith(f"{parent}.") for parent in parents)


def test_arrows_go_one_way():
    wrong = []
    for name in MODULES:
        never = {x for parent, kinds in NEVER.items() if within(name, [parent]) for x in kinds}
        bad = {x for x in ours(name) if within(x, never)}
        if name.startswith("support.evaluation."):
            bad -= {SETTINGS}
        wrong += [f"{name} imports {x}" for x in bad]
    wrong += [f"model imports {x} at its top" for x in ours("model", top=True)]
    for name in ("fusion", "lora"):
        wrong += [f"{name} imports {x} at its top" for x in ours(name, top=True) - {"model"}]
    check(wrong)


def test_files_needs_only_the_standard_library():
    roots = {name.partition(".")[0] for name in imports(MODULES["support.files"])}
    assert roots <= set(sys.stdlib_module_names)


# --- Code -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["fusion", "lora", "model"])
def test_a_formula_asks_neither_for_gradients_nor_for_private_operators(name):
    text = (ROOT / f"{name}.py").read_text()
    check(re.findall(r"is_grad_enabled|torch\.ops\.", text))


@pytest.mark.parametrize("path", PRODUCT, ids=str)
def test_parameters_are_named_for_what_they_are(path):
    vague = {"how", "what", "told", "given"}
    wrong = [
        f"{path}:{function.lineno} {function.name}({parameter.arg})"
        for function in functions(path)
        for parameter in parameters(function)
        if parameter.arg in vague
    ]
    check(wrong)


@pytest.mark.parametrize("path", PRODUCT, ids=str)
def test_functions_are_typed(path):
    """Nested ones too; self, cls and autograd's ctx need no type."""
    wrong = []
    for function in functions(path):
        untyped = [x.arg for x in parameters(function) if not x.annotation]
        untyped = [name for name in untyped if name not in ("self", "cls", "ctx")]
        private = function.name.startswith("_") and function.name != "__init__"
        if not private and (untyped or not function.returns):
            wrong.append(f"{path}:{function.lineno} {function.name}: {', '.join(untyped)}")
    check(wrong)


def test_few_tuple_assignments():
    """`a, b = x, y`, but for swaps: at most five per 1,000 lines."""
    found = []
    for path in PRODUCT:
        for node in nodes(path, ast.Assign):
            target, value = node.targets[0], node.value
            if isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple):
                sides = [sorted(map(ast.unparse, side.elts)) for side in (target, value)]
                found += [f"{path}:{node.lineno}"] if sides[0] != sides[1] else []
    lines = sum((ROOT / path).read_text().count("\n") for path in PRODUCT)
    check(found if len(found) > 5 * lines / 1000 else [])


@pytest.mark.parametrize("path", PRODUCT, ids=str)
def test_a_file_can_be_read_in_one_sitting(path):
    lines = (ROOT / path).read_text().splitlines()
    wrong = [f"{path} has {len(lines)} lines"] * (len(lines) > LONGER.get(str(path), LINES))
    wrong += [f"{path}:{i} is too long" for i, line in enumerate(lines, 1) if len(line) > 100]
    for function in functions(path):
        if function.end_lineno - function.lineno >= 60:
            wrong.append(f"{path}:{function.lineno} {function.name} is not seen at once")
    check(wrong)


@pytest.mark.parametrize("path", PRODUCT, ids=str)
def test_a_file_opens_with_what_it_is(path):
    opening = ast.get_docstring(tree(path))
    assert opening
    lines = opening.count("\n") + 1
    check([f"{path} opens with {lines} lines"] if lines > 20 else [])


# --- Names and flags ------------------------------------------------------------------------------


def defined(path):
    for node in nodes(path, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef):
        yield node, node.name
    for node in tree(path).body:
        if isinstance(node, ast.Assign):
            yield from ((node, x.id) for x in node.targets if isinstance(x, ast.Name))


def test_every_name_has_a_use():
    """A function, class or constant of the product that occurs once is defined and never used."""
    read = [*PRODUCT, "README.md", *(x.relative_to(ROOT) for x in ROOT.glob("**/report.html"))]
    seen = Counter(chain(*(re.findall(r"\w+", (ROOT / path).read_text()) for path in read)))
    wrong = [
        f"{path}:{node.lineno} {name}"
        for path in PRODUCT
        for node, name in defined(path)
        if seen[name] < 2 and not name.startswith("__")
    ]
    check(wrong)


def test_no_name_is_private():
    names = [(path, name) for path in PRODUCT for _, name in defined(path)]
    wrong = [f"{path} {name}" for path, name in names if re.match("_[^_]", name)]
    check(wrong)


def flags():
    """(path, name, keywords) of each --flag that a parser or a group of one adds."""
    for path in PRODUCT:
        for node in nodes(path, ast.Call):
            method = getattr(node.func, "attr", None)
            name = getattr(node.args[0], "value", None) if node.args else None
            if method == "add_argument" and str(name).startswith("--"):
                yield path, name, node.keywords


def test_every_flag_has_a_help_and_a_use():
    text = "\n".join((ROOT / path).read_text() for path in PRODUCT)
    used = set(chain(*re.findall(r'[."](\w+)|\b(\w+)=', re.sub(r'dest="\w+"', "", text))))
    wrong = []
    for path, name, keywords in flags():
        options = {keyword.arg: keyword.value for keyword in keywords}
        dest = options["dest"].value if "dest" in options else name[2:].replace("-", "_")
        if "help" not in options and None not in options:
            wrong.append(f"{path}: {name} has no help")
        if dest not in used and dest.removeprefix("lora_") not in used:
            wrong.append(f"{path}: {name} is never used")
    assert not wrong


def test_nothing_of_where_it_was_written():
    listing = ["git", "ls-files", "-z", "*.py", "*.md", "*.txt", "*.toml", "*.html", "*.json*"]
    files = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, files.split("\0")):
        assert "/wor" + "k/" not in (ROOT / name).read_text(), name
