"""Shapes that cannot lie: the product's code runs with every shape comment turned into a check.

A comment that begins with a shape, `x = f(y)  # (B, T, D)`, is a claim about what the line made.
`instrumented` rewrites a file's syntax tree so that each such line is followed by a check of the
real tensor, and `Frame` holds the letters of one call: a letter means one size in one call, and
the sizes that a configuration fixes (widths, heads, vocabulary) are pairwise distinct, primes
where no product is asked for, so that a wrong letter cannot be right by chance. A line counts only
if once at least all of its letters had sizes of their own. `python tests/helpers/shapes.py` prints
what was checked.

Where a comment belongs: to the statement that ends on its line; on a `def` line to the arguments,
on a `for` line to the loop's variables; inside a longer statement to the largest expression that
ends on that line. `(B, 1) -> (B, V)` means first argument and result. A single shape goes for all
tensors of a tuple. None, and whatever has no shape, is passed over and does not count.
"""

import ast
import io
import re
import sys
import tokenize
from collections import Counter
from importlib.machinery import ModuleSpec
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PATHS = sorted(ROOT.glob("*.py")) + sorted(ROOT.glob("support/**/[!_]*.py"))
PATHS.remove(ROOT / "support/proofs.py")  # its small copies have sizes of their own
FILES = {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in PATHS}  # by module's name
SHAPES = re.compile(r"#\s*(\([^()]*\)(?:\s*(?:,|->)\s*\([^()]*\))*)")
CHANGING = ("live", "length")  # sizes that may be other ones later in the same call
DIMENSION = re.compile(r"(?:\d+|[A-Za-z]+)(?:\s*[*/+-]\s*(?:\d+|[A-Za-z]+))*")


def shapes_of(comment):
    """(shapes of the arguments, shapes of the result) of a comment; None if it claims no shape."""
    found = SHAPES.match(comment)
    if not found:
        return None
    sides = []
    for side in found[1].split("->"):
        inside = [s.strip() for s in re.findall(r"\(([^()]*)\)", side)]
        shapes = [tuple(d.strip() for d in s.split(",") if d.strip()) for s in inside if "," in s]
        fits = all(d == "..." or DIMENSION.fullmatch(d) for shape in shapes for d in shape)
        if not fits or len(shapes) < len(inside):
            return None
        sides.append(shapes)
    return (sides[0], sides[1]) if len(sides) == 2 else ([], sides[0])


def comments(source):
    """{line: (argument shapes, result shapes)} of a source text."""
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    told = {t.start[0]: shapes_of(t.string) for t in tokens if t.type == tokenize.COMMENT}
    return {line: shapes for line, shapes in told.items() if shapes}


# ---- the checks, at run time ---------------------------------------------------------------------


class Record:
    """What all frames found: {file: {line: times}}, and the lies."""

    def __init__(self):
        self.checked, self.lies, self.sizes = {}, {}, {}
        self.apart = set()  # (file, line) whose letters had sizes of their own


RECORD = Record()


class Frame:
    """The letters of one call of one function."""

    def __init__(self, file, function):
        self.file, self.function, self.letters = file, function, {}

    def check(self, value, shapes, line, arguments=False):
        """`value` as it is; its tensors are held against the shapes, of arguments the first."""
        tensors = leaves(value)[: len(shapes) if arguments else None]
        wanted = shapes * len(tensors) if len(shapes) == 1 else shapes
        if len(shapes) > 1 and len(tensors) < len(shapes):
            self.lie(line, f"{len(shapes)} shapes for {len(tensors)} tensors")
        alone = bool(tensors)
        for tensor, shape in zip(tensors, wanted, strict=False):
            real = tuple(tensor.shape)
            RECORD.checked.setdefault(self.file, {}).setdefault(line, 0)
            RECORD.checked[self.file][line] += 1
            said = shape
            if "..." in shape:
                real, said = real[len(real) - len(shape) + 1 :], shape[1:]
            if len(real) != len(said):
                self.lie(line, f"said {shape}, is {real}")
            elif wrong := [
                f"{d} is {n}" for d, n in zip(said, real, strict=True) if not self.fits(d, n)
            ]:
                self.lie(line, f"said {shape}, is {real}: {', '.join(wrong)}, {self.letters}")
            meant = {x for x in zip(said, real, strict=False) if not x[0].isdecimal()}
            alone &= len({n for _, n in meant}) == len(meant)
        if alone:
            RECORD.apart.add((self.file, line))
        return value

    def fits(self, dimension, size):
        names = [n for n in re.findall(r"[A-Za-z]+", dimension) if n not in self.letters]
        if dimension in CHANGING:
            return True
        if dimension in names:
            self.letters[dimension] = size
            fixed = self.fixed(dimension)
            return fixed is None or size in fixed
        if len(set(names)) > 1:  # cannot be told
            return True
        if names:  # N*H with one of them known
            found = [
                n for n in range(1, 2 * size + 2) if self.value(dimension, {names[0]: n}) == size
            ]
            if found:
                self.letters[names[0]] = found[0]
                fixed = self.fixed(names[0])
                return fixed is None or found[0] in fixed
            return False
        return self.value(dimension, {}) == size

    def fixed(self, letter):
        """The sizes that a letter may have in this file; None: any."""
        return RECORD.sizes.get(self.file, RECORD.sizes.get("...", {})).get(letter)

    def value(self, dimension, more):
        return eval(dimension, {}, self.letters | more)  # names and arithmetic only: DIMENSION

    def lie(self, line, what):
        RECORD.lies.setdefault((self.file, line), what)


def leaves(value):
    """The tensors and arrays in a value, in order; what a tuple, list or dict holds counts."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, (tuple, list)) and not hasattr(value, "shape"):
        return [tensor for item in value for tensor in leaves(item)]
    shape = getattr(value, "shape", None)
    return [value] if isinstance(shape, tuple) and hasattr(value, "dtype") else []


# ---- rewriting a file ----------------------------------------------------------------------------


def call(method, *arguments):
    name = ast.Attribute(ast.Name("__frame__", ast.Load()), method, ast.Load())
    return ast.Call(name, list(arguments), [])


def constant(shapes):
    return ast.parse(repr(shapes), mode="eval").body


def loaded(target):
    """An expression that reads what an assignment's target has now; None for x[...] = y."""
    if isinstance(target, (ast.Tuple, ast.List)):
        parts = [loaded(t) for t in target.elts]
        return ast.Tuple([p for p in parts if p], ast.Load())
    if isinstance(target, (ast.Name, ast.Attribute)):
        return ast.parse(ast.unparse(target), mode="eval").body
    return None


class Instrument(ast.NodeTransformer):
    def __init__(self, file, told):
        self.file, self.told, self.placed, self.depth = file, told, set(), []

    def visit_FunctionDef(self, node):
        first = node.body[0].lineno
        self.depth.append(node)
        node.body = self.block(node.body)
        self.depth.pop()
        lines = [n for n in range(node.lineno, first) if n in self.told]
        arguments = [a.arg for a in node.args.posonlyargs + node.args.args + node.args.kwonlyargs]
        start = [ast.parse(f"__frame__ = __Frame__({self.file!r}, {node.name!r})").body[0]]
        for line in lines:
            given, made = self.told[line]
            self.placed.add(line)
            names = [ast.Name(n, ast.Load()) for n in arguments if n != "self"]
            told = constant(given or made), ast.Constant(line), ast.Constant(True)
            check = call("check", ast.List(names, ast.Load()), *told)
            start.append(ast.Expr(check))
            if given:
                self.returns(node, made, line)
        for statement in start:
            ast.copy_location(statement, node.body[0])
        at = 1 if ast.get_docstring(node) else 0
        node.body[at:at] = start
        return node

    def returns(self, function, shapes, line):
        for node in ast.walk(function):
            if isinstance(node, ast.Return) and node.value is not None:
                node.value = call("check", node.value, constant(shapes), ast.Constant(line))

    def block(self, statements):
        made = []
        for statement in statements:
            made += self.statement(statement)
        return made

    def statement(self, node):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            return [self.visit(node)]
        inside = [f for f in ("body", "orelse", "finalbody", "handlers") if getattr(node, f, None)]
        if inside:
            return [self.compound(node, inside)]
        if not self.depth:
            return [node]
        line = node.end_lineno
        told = self.told.get(line)
        self.expressions(node)
        if told is None:
            return [node]
        self.placed.add(line)
        given, made = told
        if isinstance(node, ast.Return):
            node.value = call("check", node.value, constant(made), ast.Constant(line))
            return [self.argument(given, line, node), node] if given else [node]
        if isinstance(node, (ast.Assign, ast.AugAssign)):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            value = loaded(targets[-1])
            if value is None:
                node.value = call("check", node.value, constant(made), ast.Constant(line))
                return [node]
            check = ast.Expr(call("check", value, constant(made), ast.Constant(line)))
            return [node, ast.copy_location(check, node)]
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and node.value.args:
            last = node.value.args[-1]  # seen.append(f(x))  # (n, I)
            node.value.args[-1] = call("check", last, constant(made), ast.Constant(line))
            return [node]
        self.placed.discard(line)
        return [node]

    def argument(self, shapes, line, node):
        arguments = [a.arg for a in self.depth[-1].args.args if a.arg != "self"]
        first = ast.Name(arguments[0], ast.Load())
        check = ast.Expr(call("check", first, constant(shapes), ast.Constant(line)))
        return ast.copy_location(check, node)

    def compound(self, node, inside):
        header = node.body[0].lineno if getattr(node, "body", None) else node.lineno
        lines = [n for n in range(node.lineno, header) if n in self.told] if self.depth else []
        for field in inside:
            children = getattr(node, field)
            if field == "handlers":
                for handler in children:
                    handler.body = self.block(handler.body)
            else:
                setattr(node, field, self.block(children))
        for line in lines:
            if isinstance(node, ast.For):
                value, shapes = loaded(node.target), self.told[line][1]
                check = ast.Expr(call("check", value, constant(shapes), ast.Constant(line)))
                node.body.insert(0, ast.copy_location(check, node.body[0]))
                self.placed.add(line)
        return node

    def expressions(self, node):
        """Comments on inner lines of a statement."""
        lines = [n for n in range(node.lineno, node.end_lineno) if n in self.told]
        for line in lines:
            best, where = None, None
            for parent in ast.walk(node):
                for field, value in ast.iter_fields(parent):
                    for i, child in enumerate(value if isinstance(value, list) else [value]):
                        ends = isinstance(child, ast.expr) and child.end_lineno == line
                        ends = ends and not isinstance(child, ast.Constant)  # a dict's key
                        ends = ends and not isinstance(getattr(child, "ctx", None), ast.Store)
                        size = ends and (child.lineno, child.col_offset)
                        if ends and (best is None or size < best):
                            best, where = size, (parent, field, i, isinstance(value, list), child)
            if where:
                parent, field, i, listed, child = where
                check = call("check", child, constant(self.told[line][1]), ast.Constant(line))
                ast.copy_location(check, child)
                if listed:
                    getattr(parent, field)[i] = check
                else:
                    setattr(parent, field, check)
                self.placed.add(line)

    def visit_ClassDef(self, node):
        depth, self.depth = self.depth, []
        node.body = self.block(node.body)
        self.depth = depth
        return node


def instrumented(name):
    """(code, {line of every shape comment}, {those that no check could be made of})."""
    path = FILES[name]
    source = path.read_text(encoding="utf-8")
    tree, told = ast.parse(source), comments(source)
    instrument = Instrument(name, told)
    tree.body = instrument.block(tree.body)
    ast.fix_missing_locations(tree)
    return compile(tree, str(path), "exec"), set(told), set(told) - instrument.placed


class Finder:
    """Imports the product's files instrumented."""

    def __init__(self):
        self.told, self.unplaced = {}, {}

    def find_spec(self, name, path=None, target=None):
        return ModuleSpec(name, self, origin=str(FILES[name])) if name in FILES else None

    def create_module(self, spec):
        return None

    def exec_module(self, module):
        code, told, unplaced = instrumented(module.__name__)
        self.told[module.__name__], self.unplaced[module.__name__] = told, unplaced
        module.__file__ = str(FILES[module.__name__])
        module.__dict__["__Frame__"] = Frame
        exec(code, module.__dict__)


def install():
    finder = Finder()
    sys.meta_path.insert(0, finder)
    sys.path.insert(0, str(ROOT))
    return finder


# ---- what is run ---------------------------------------------------------------------------------

V = 331  # more than the demo's tokenizers need
T5_SIZES = {"vocab_size": V, "d_model": 37, "d_kv": 5, "d_ff": 53, "num_heads": 13, "num_layers": 2}
DETR_SIZES = {
    "backbone_kwargs": {"layers": [1, 1, 1, 1], "channels": [2, 3, 5, 7]},
    "d_model": 44,
    "encoder_layers": 1,
    "decoder_layers": 2,
    "encoder_attention_heads": 11,
    "decoder_attention_heads": 11,
    "encoder_ffn_dim": 61,
    "decoder_ffn_dim": 61,
    "num_queries": 23,
    "num_labels": 29,
}
SIGLIP_SIZES = {
    "hidden_size": 85,
    "intermediate_size": 97,
    "num_hidden_layers": 2,
    "num_attention_heads": 17,
    "image_size": 70,
    "patch_size": 10,
}
VIT_SIZES = {
    "hidden_size": 124,
    "intermediate_size": 79,
    "num_hidden_layers": 2,
    "num_attention_heads": 31,
    "image_size": 70,
    "patch_size": 14,
}
GEMMA_SIZES = {
    "vocab_size": V,
    "hidden_size": 41,
    "intermediate_size": 59,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
    "head_dim": 10,
    "sliding_window": 30,
}
FIXED = {  # letter: the sizes it may have in a file; no two letters of a file share one
    "model": {
        "V": {V},
        "D": {37, 44, 85, 124, 41},
        "N": {13, 11, 17, 31, 6},
        "H": {5, 4, 10},
        "F": {53, 61, 97, 79, 59},
        "Q": {23},
        "L": {29},
        "K": {3},
        "G": {2},
        "I": {49, 25, 26},  # 26 in a ViT's layers, with the class token
    },
    "fusion": {"V": {V}, "D": {37}, "P": {23, 1}, "F": {44}},
    "lora": {"r": {9}},
    "support.cpu_kernels": {"V": {V}, "D": {37}, "N": {13}, "H": {5}},
    "support.kernels": {"D": {37, 41}, "F": {59}, "K": {3}, "G": {2}, "r": {9}},
    "...": {  # all others, which see several models
        "V": {V},
        "D": {37, 41},
        "P": {23, 49, 1},  # 1: a question without an image
        "F": {44, 41},
        "I": {49, 0},
        "S": {70},
        "K": {3},
        "G": {2},
        "L": {29},
    },
}


def checkpoints(folder):
    """Random models of these sizes in Hub layout, with the demo's tokenizers."""
    import shutil

    import torch

    from model import (
        DETR,
        T5,
        DETRConfig,
        Gemma2Config,
        PaliGemma,
        PaliGemmaConfig,
        SigLIPConfig,
        T5Config,
        ViT,
        ViTConfig,
    )

    torch.manual_seed(0)
    config = PaliGemmaConfig(SigLIPConfig(**SIGLIP_SIZES), Gemma2Config(**GEMMA_SIZES), 308)
    models = {
        "t5": T5(T5Config(**T5_SIZES)),
        "t5-v1.1": T5(
            T5Config(**T5_SIZES, feed_forward_proj="gated-gelu", tie_word_embeddings=False)
        ),
        "detr": DETR(DETRConfig(**DETR_SIZES)),
        "paligemma": PaliGemma(config),
        "vit": ViT(ViTConfig(**VIT_SIZES)),
    }
    for name, model in models.items():
        model.save_pretrained(folder / name)
    for name in ("t5", "paligemma"):
        shutil.copy(ROOT / f"demo/{name}/tokenizer.json", folder / name)
    return {name: model.eval() for name, model in models.items()}


def forward_passes(models):
    """Each architecture alone: unequal rows, masks, caches, both T5s, adapters of both kinds."""
    import torch

    import lora
    from fusion import GatedFusion, MultimodalT5

    ids, mask = torch.randint(5, 300, (7, 19)), torch.ones(7, 19, dtype=torch.long)
    mask[1, 12:] = 0
    targets = torch.randint(5, 300, (7, 31))
    for name in ("t5", "t5-v1.1"):
        models[name](ids, mask, targets)
        models[name].generate(ids, mask, 6)
        models[name].generate(ids, mask, 6, temperature=1.0)
        models[name].generate(ids, mask, 30, stop_loops=True)
    for no_image in ("zero", "mask"):
        fused = MultimodalT5(models["t5"], GatedFusion(37, 44, no_image))
        fused(ids, mask, torch.randn(7, 23, 44), targets)
        fused.generate(ids, mask, torch.randn(7, 23, 44), max_new_tokens=4)
    pixels, there = torch.randn(7, 3, 64, 96), torch.ones(7, 64, 96)
    there[2, 40:] = 0
    models["detr"](pixels)
    models["detr"](pixels, there)
    models["vit"](torch.randn(7, 3, 70, 70))
    pali = models["paligemma"]
    ids = torch.cat((torch.full((7, 49), 308), ids), 1)
    mask, kinds = torch.ones_like(ids), torch.zeros_like(ids)
    kinds[:, 60:] = 1
    pictures = torch.randn(7, 3, 70, 70)
    pali(ids, pictures, mask, kinds).sum().backward()
    pali.generate(ids, pictures, max_new_tokens=5)
    pali.language_model.cache(7, 5).keep(torch.arange(7) > 2)  # as when three rows have ended
    for dora in (False, True):
        model = MultimodalT5(type(models["t5"])(models["t5"].config))
        lora.inject(model, r=9, alpha=18, dora=dora, dropout=0.1)
        model.train()(ids[:, -19:].clamp(max=300), mask[:, -19:], None, targets)
        lora.merge(model)


def kernel_passes(models):
    """Each kernel, training and decoding, oneDNN's for layers of any size. They are put in without
    the proofs, whose layers have sizes of their own."""
    import copy

    import torch

    import lora
    from support import cpu_kernels, kernels

    cpu_kernels.LARGE = 1
    kernels.enable = lambda model: []  # train.py's call of the proofs
    swaps = kernels.KERNELS | kernels.CPU_KERNELS
    models = {name: copy.deepcopy(model).requires_grad_() for name, model in models.items()}
    for name in ("lora", "dora"):
        models[name] = copy.deepcopy(models["paligemma"])
        lora.inject(models[name], r=9, alpha=18, dora=name == "dora")
    for layer in [layer for model in models.values() for layer in model.modules()]:
        if type(layer) in swaps:
            layer.__class__ = swaps[type(layer)]
    ids, pictures = torch.randint(5, 300, (7, 68)), torch.randn(7, 3, 70, 70)
    mask, targets = torch.ones(7, 19, dtype=torch.long), torch.randint(5, 300, (7, 31))
    ids[:, :49] = 308
    kinds = (torch.arange(68) >= 60).long().expand(7, -1)
    for name in ("t5", "t5-v1.1"):
        models[name].train()(ids[:, 49:], mask, targets).sum().backward()
        models[name].eval().generate(ids[:, 49:], mask, 6)
    for name in ("paligemma", "lora", "dora"):
        models[name].train()(ids, pictures, torch.ones_like(ids), kinds).sum().backward()
        models[name].eval().generate(ids, pictures, max_new_tokens=5)
    with torch.inference_mode():
        models["detr"].eval()(torch.randn(7, 3, 64, 96))
    q, k, bias = torch.randn(7, 3, 38, 10), torch.randn(7, 3, 68, 10), torch.zeros(7, 1, 19, 68)
    kernels.CappedAttention.apply(q.requires_grad_(), k, k, bias, 5.0).sum().backward()


def files(folder):
    """The readers of pictures and published features that a run of the demo does not pass."""
    import numpy as np
    from PIL import Image

    from support.dataset import images as pictures

    Image.fromarray(np.arange(35 * 41, dtype=np.uint16).reshape(35, 41)).save(folder / "deep.png")
    image = pictures.open_image(folder / "deep.png")
    pictures.detr_pixels(image)
    pictures.vit_pixels(image, 70)


def runs(folder):
    """Both commands, end to end, on a few problems of the demo; then a comparison, a question with
    a picture, and a training of all weights."""
    import eval as evaluation
    import train

    size = "--limit 11 --max-steps 2 --batch-size 7 --max-output 40 5".split()
    mmcot = ["--model", "mmcot", "--weights", folder / "t5", "--vision-weights", folder / "detr"]
    pali = ["--model", "paligemma", "--weights", folder / "paligemma", "--limit-traces", "40"]
    pali += ["--eval-problems", "3"]
    commands = {
        "mmcot": [*mmcot, "--teacher-forced"],
        "mmcot-reason": [*mmcot, "--recipe", "reason"],
        "pali": [*pali, "--lora-r", "9", "--alone", "--temperature", "1"],
        "pali-full": [*pali, "--full", "--alone"],
    }
    for name, flags in commands.items():
        cache = folder / f"cache-{flags[1]}"
        more = ["--data", "demo", "--features-cache", cache, "--out", folder / name]
        train.main([*map(str, [*flags, *more]), *size])
    both = [str(folder / name) for name in ("mmcot", "mmcot-reason")]
    evaluation.main([*both, "--no-report"])
    asked = ["--image", folder / "deep.png", "--question", "Which?", "--choices", "a", "b"]
    for name in ("pali", "mmcot"):
        evaluation.main([*map(str, [folder / name, *asked])])
    evaluation.main([*map(str, [folder / "mmcot", *asked[2:]])])


def legend(name):
    """The letters and words that a file's opening explains behind "Axes:"."""
    told = ast.get_docstring(ast.parse(FILES[name].read_text(encoding="utf-8")))
    return set(re.findall(r"[A-Za-z]+", told.partition("Axes:")[2]))


def used(name):
    """{letter or word of a shape comment: its first line}."""
    found = {}
    for line, sides in comments(FILES[name].read_text(encoding="utf-8")).items():
        for dimension in (d for side in sides for shape in side for d in shape):
            for letter in re.findall(r"[A-Za-z]+", dimension):
                found.setdefault(letter, line)
    return found


def summed(name, told, checked, times):
    return f"{name}: {told} lines say a shape, {checked} of them were checked, {times:,} times"


def main():
    import tempfile

    install()
    with tempfile.TemporaryDirectory() as folder:
        RECORD.sizes = FIXED
        folder = Path(folder)
        models = checkpoints(folder)
        forward_passes(models)
        kernel_passes(models)
        files(folder)
        runs(folder)
    wrong = [f"{f}:{n}: {what}" for (f, n), what in sorted(RECORD.lies.items())]
    total = Counter()
    for name, path in FILES.items():
        told = set(comments(path.read_text(encoding="utf-8")))
        checked = RECORD.checked.get(name, {})
        apart = {n for n in told if (name, n) in RECORD.apart}
        if told:
            print(summed(name, len(told), len(apart & set(checked)), sum(checked.values())))
        total.update(lines=len(told), checked=len(checked), times=sum(checked.values()))
        wrong += [f"{name}:{n}: was not reached" for n in sorted(told - set(checked))]
        wrong += [f"{name}:{n}: has letters of one size" for n in sorted(set(checked) - apart)]
        unknown = {n: at for n, at in used(name).items() if n not in legend(name)}
        wrong += [f"{name}:{at}: {n} is not in the legend" for n, at in unknown.items()]
    print(summed("all", total["lines"], total["checked"], total["times"]))
    print("\n".join(wrong))
    sys.exit(len(wrong) > 0)


if __name__ == "__main__":
    main()
