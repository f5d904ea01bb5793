"""The prompts of Multimodal-CoT: the formats byte for byte.

ScienceQA's texts are CC BY-NC-SA and are not in this repository. FORMATS holds, for each input
format (a row) and output format (a column, as in data.OUTPUTS), the start of the sha256 over all
problems of NANOCOT_DATA (train, val, test), of the lines "pid <tab> source <tab> target" as
mm-cot's own utils_prompt.build_train_pair made them at commit 8dd4ac0, then " ".join(text.split())
as its utils_data has it. To make them again, run that.
"""

import hashlib
import json

import pytest
from samples import REAL, SCIENCEQA, needs_data, real, record, scienceqa

import data
from support.dataset.tokenizers import load_tokenizer

GENERATED = "Solution: Look at the  picture.\\nThe ruler\nis longer. Answer: BECAUSE:"

FORMATS = """
QM    9849334 9133b0a 4c98bdb cb3a225 f776f40 5c05bd0 de9bf2e d72e8f3 e0d2390 04d9ae3 42e8a26
QC    961a0a8 f8fb689 ea0a0a9 aa65632 e6c9731 0f9ade9 c798613 3c0f42d e57adf4 3d9e104 189b88e
QCM   d560804 9bd200f a544551 b50b65a 4e3e58d 2a6b172 cf4f8fd 6a379b8 dee7e5f 2a9fd49 a84b926
CQM   2cc9639 4932b7e 98479d9 2c0c567 05d0fcb d535c22 49fd47f ee9d3c3 9eeb265 852a3bd cc31ee2
QCMG  d9ace7d 421dd57 8d3af1a 1525553 6c19214 2c0e6de 5081bb7 131d622 68d6445 ff2178b acd1e57
CQMG  8366b6f 796661c c7ed6ab 0578daf bd2c732 3604744 d24edf2 03c6d0d 3417326 1a4ecac 5a4dd13
QCML  d931ec6 ac621ac 5d6f92c 1419aef b8d2425 9a1c9a2 a3ef77e 1736403 aa9fe0f e83e1e5 af3c3b1
QCME  6a31886 924e2dd 3ed828f 0ea729f 3703bb4 6d028b9 7261d89 9a0dfb2 deb05d4 3b10fd7 ecce5e2
QCMLE 0d3346b e43af04 36d4bec 2c6864e e37f0ff 70e7abd ee2e70b 90cc458 ddfc946 bb6fbbd db82b32
QCLM  d708603 012feaf 406182b e350056 e8aeff2 73468d9 4251c42 584e065 bc19937 f2cf4ec c022b55
QCEM  9e9e3f2 13575a2 2756d59 4465c36 2d54862 0108f51 d2d50ba d7959e0 93ba4b5 41ac614 c0b9cc2
QCLEM 999a58e c254fa6 d63b50f b6828c5 10e35f9 48501e8 94cca40 958dcbf 8d40dfe b3425d8 20a2b50
QCMA  680e1d0 24622a9 f383032 4733187 f3b861c e438775 ea05e27 9686d72 b49ffa8 f8032c3 45fe345
QCA   a0feb93 72ea087 2100f00 b161c70 c7d7add f5bb810 d397582 0753d07 2659b07 7949412 89e06c4
"""
VARIANTS = {
    "QCM-LE+caption": "d5ce206",
    "QCMG-A+caption": "8eac1ec",
    "QCMG-A+generated": "3ebc0ad",
    "CQMG-A+generated": "53c2bb3",
}
CAPTIONED = {  # version 2's formats; with captions.json, and with texts made of it as `instruct`
    "QCM-E": ("9560cba", "29f00e3"),
    "QCMG-A": ("8eac1ec", "c66c266"),
    "QCMG-A+generated": ("2b3409b", "37b539b"),
}
QUESTION = "Question: Which one is longer? Context: "
OPTIONS = " Options: (A) the rope (B) the belt (C) neither "
LECTURE = r"Length is how long.\nCompare the ends.\n"
SOLUTION = r"The belt goes further. see it.\n\nSo it is longer."

BOTH = QUESTION + "Look at both."
CAPTION = " a rope and a belt"
REASONED = f"{LECTURE} {SOLUTION}"
IS_B = "The answer is (B)."
CONTEXT_FIRST = "Context: Look at both. Question: Which one is longer?"
GOLDEN = [  # format, caption?, generated, and mm-cot's texts of record()
    ("QCM-A", False, None, BOTH + OPTIONS + "Answer:", IS_B),
    ("QCM-LE", True, None, BOTH + CAPTION + OPTIONS + "Solution:", f"Solution: {REASONED}."),
    ("QCMG-A", True, "Solution: I  see\nit.",
     BOTH + CAPTION + OPTIONS + "Solution: I see it. Answer:", IS_B),
    ("CQM-ALE", False, None, CONTEXT_FIRST + OPTIONS + "Solution:", f"{IS_B} BECAUSE: {REASONED}"),
    ("QCA-LEA", False, None, f"{BOTH} Answer: {IS_B} BECAUSE:Solution:", f"{REASONED} {IS_B}"),
]  # fmt: skip


@pytest.mark.parametrize("fmt, caption, generated, source, target", GOLDEN)
def test_prompt_literal(tmp_path, fmt, caption, generated, source, target):
    folder = scienceqa(tmp_path, captions={"1": "a rope and a belt"})
    [problem] = data.load(folder, "test")
    made = data.prompt(problem, fmt, generated, caption=caption, faithful=True)
    assert made == (source, target)


def test_prompt_empty_parts(tmp_path):
    empty = record(hint="", solution="", lecture="It is so BECAUSE:", answer=0)
    [problem] = data.load(scienceqa(tmp_path, {"1": empty}), "test")
    made = {f: data.prompt(problem, f, faithful=True) for f in ("QCM-LE", "QCM-AE", "QCM-AL")}
    assert made["QCM-LE"] == (
        QUESTION + "N/A" + OPTIONS + "Solution:",
        "Solution: It is so BECAUSE: .",
    )
    assert made["QCM-AE"][1] == "The answer is (A). It is so"  # the original deletes the word
    assert made["QCM-AL"][1] == "The answer is (A). BECAUSE:"


def digest_of(problems, fmt, **options):
    digest = hashlib.sha256()
    for problem in problems:
        pair = data.prompt(problem, fmt, faithful=True, **options)
        digest.update("\t".join((problem.id, *pair)).encode() + b"\n")
    return digest.hexdigest()[:7]


def instruct(id, caption):
    """As InstructBLIP writes: some sentences, with newlines."""
    return f"The image features {caption.lower()}\n\nThe scene  is of problem {id}."


@needs_data
def test_captions_of_both_kinds_equal_the_originals(tmp_path):
    texts = json.loads((SCIENCEQA / "captions.json").read_text())["captions"]
    made = {"captions": {id: instruct(id, text) for id, text in texts.items()}}
    (tmp_path / "instruct_captions.json").write_text(json.dumps(made))
    splits = ("train", "val", "test")
    for kind, captions in enumerate(("scienceqa", tmp_path / "instruct_captions.json")):
        loaded = [data.load(SCIENCEQA, split, captions=captions) for split in splits]
        problems = [problem for split in loaded for problem in split]
        for name, goldens in CAPTIONED.items():
            fmt, _, extra = name.partition("+")
            generated = GENERATED if extra else None
            found = digest_of(problems, fmt, generated=generated, caption=True)
            assert found == goldens[kind], (name, captions)


@pytest.mark.slow
@needs_data
def test_prompt_equals_original_on_all_problems():
    goldens = dict(VARIANTS)
    for inputs, *row in map(str.split, FORMATS.strip().splitlines()):
        goldens |= {f"{inputs}-{out}": sha for out, sha in zip(data.OUTPUTS, row, strict=True)}
    assert len(goldens) == len(data.INPUTS) * len(data.OUTPUTS) + 4
    problems = [problem for split in ("train", "val", "test") for problem in real(split)]
    wrong = []
    for name, golden in goldens.items():
        fmt, _, extra = name.partition("+")
        options = {"caption": {"caption": True}, "generated": {"generated": GENERATED}}
        if digest_of(problems, fmt, **options.get(extra, {})) != golden:
            wrong.append(name)
    assert not wrong


def test_newlines_become_a_separator(tmp_path):
    [problem] = data.load(scienceqa(tmp_path), "test")
    source, target = data.prompt(problem, "QCM-LE")
    assert target == (
        "Solution: Length is how long. // Compare the ends. "
        "The belt goes further. see it. // So it is longer.."
    )
    assert source == data.prompt(problem, "QCM-LE", faithful=True)[0]


@pytest.mark.slow
@needs_data
def test_separator_is_known_to_t5_and_nowhere_in_scienceqa():
    tokenizer = load_tokenizer(REAL / "tokenizers/t5")
    problems = [problem for problem in real("train") if "\n" in problem.lecture.strip()]
    assert len(problems) > 100
    assert not any("//" in p.lecture + p.solution for p in problems)
    for problem in problems:
        text = data.prompt(problem, "QCM-LE")[1]
        ids = tokenizer.encode(text).ids
        assert tokenizer.decode(ids).count(" // ") == text.count(" // ") > 0
        assert ids.count(2) == tokenizer.encode(text.replace(" // ", " ")).ids.count(2)
        faithful = tokenizer.encode(data.prompt(problem, "QCM-LE", faithful=True)[1]).ids
        assert faithful.count(2) > ids.count(2)  # what the original's backslash costs


def test_many_and_no_choices(tmp_path):
    many = record(choices=list("uvwxyz"), answer=5)
    [problem] = data.load(scienceqa(tmp_path, {"77": many}), "test")
    assert data.prompt(problem, "QCM-A")[1] == "The answer is (F)."
    with pytest.raises(ValueError, match="Problem 77 .*6"):
        data.prompt(problem, "QCM-A", faithful=True)
    (tmp_path / "own.jsonl").write_text('{"id": 3, "question": "How many?", "answer": 12}')
    [problem] = data.load(tmp_path / "own.jsonl", "train")
    assert data.prompt(problem, "QCM-A") == (
        "Question: How many? Context: N/A Answer:",
        "The answer is 12.",
    )
    with pytest.raises(ValueError, match="'QCM-X'"):
        data.prompt(problem, "QCM-X")
