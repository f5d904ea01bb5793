"""The prompts of Multimodal-CoT: the formats byte for byte.

ScienceQA's texts are CC BY-NC-SA and are not in this repository. FORMATS holds, for each prompt
format, the start of the sha256 over all problems of NANOCOT_DATA (train, val, test), of the lines
"pid <tab> source <tab> target" as mm-cot's own utils_prompt.build_train_pair made them at commit
8dd4ac0, then " ".join(text.split()) as its utils_data has it. To make them again, run that.
"""

import hashlib

import pytest
from samples import REAL, needs_data, real, record, scienceqa

import data
from support.dataset.tokenizers import load_tokenizer

GENERATED = "Solution: Look at the  picture.\\nThe ruler\nis longer. Answer: BECAUSE:"

FORMATS = """
QM-A:984933407d34 QM-AL:9133b0a3b15f QM-AE:4c98bdb986d3 QM-ALE:cb3a225f899d QM-AEL:f776f403cb06
QM-LA:5c05bd0f1ed2 QM-EA:de9bf2ec98c9 QM-LEA:d72e8f30cb8b QM-ELA:e0d239094c7a QM-LE:04d9ae333047
QM-E:42e8a26e284e QC-A:961a0a85da2e QC-AL:f8fb689c673e QC-AE:ea0a0a915dbb QC-ALE:aa65632628c1
QC-AEL:e6c97315c032 QC-LA:0f9ade93dade QC-EA:c79861381e29 QC-LEA:3c0f42d2851e QC-ELA:e57adf43b8b6
QC-LE:3d9e104a5a55 QC-E:189b88e1bca5 QCM-A:d560804fd352 QCM-AL:9bd200fe8cf2 QCM-AE:a5445519df2a
QCM-ALE:b50b65a44b04 QCM-AEL:4e3e58da350c QCM-LA:2a6b1722fbe7 QCM-EA:cf4f8fd298db
QCM-LEA:6a379b82b57d QCM-ELA:dee7e5f6ce8f QCM-LE:2a9fd495853b QCM-E:a84b9265855d CQM-A:2cc9639b1330
CQM-AL:4932b7eb24af CQM-AE:98479d98ff58 CQM-ALE:2c0c567fff62 CQM-AEL:05d0fcb97a5f
CQM-LA:d535c22e1e63 CQM-EA:49fd47f04687 CQM-LEA:ee9d3c3f9261 CQM-ELA:9eeb26529e14
CQM-LE:852a3bd380a6 CQM-E:cc31ee26b361 QCMG-A:d9ace7dddd03 QCMG-AL:421dd579c01c
QCMG-AE:8d3af1a70213 QCMG-ALE:1525553d8a6b QCMG-AEL:6c19214591c6 QCMG-LA:2c0e6de7d85c
QCMG-EA:5081bb778048 QCMG-LEA:131d622b685b QCMG-ELA:68d644517bd0 QCMG-LE:ff2178b6d537
QCMG-E:acd1e57ad8fd CQMG-A:8366b6f448da CQMG-AL:796661c27743 CQMG-AE:c7ed6ab92762
CQMG-ALE:0578daf7e09f CQMG-AEL:bd2c7323e2ac CQMG-LA:3604744919fd CQMG-EA:d24edf26f735
CQMG-LEA:03c6d0da802f CQMG-ELA:34173266332b CQMG-LE:1a4ecac6be0b CQMG-E:5a4dd138079e
QCML-A:d931ec6d4c28 QCML-AL:ac621acdf4ba QCML-AE:5d6f92c275e5 QCML-ALE:1419aef753ce
QCML-AEL:b8d242546a5f QCML-LA:9a1c9a218918 QCML-EA:a3ef77eaae9b QCML-LEA:173640364c9d
QCML-ELA:aa9fe0fcd6e9 QCML-LE:e83e1e580dae QCML-E:af3c3b150200 QCME-A:6a31886fcd85
QCME-AL:924e2dd0a724 QCME-AE:3ed828fffe0a QCME-ALE:0ea729fe11de QCME-AEL:3703bb48f40c
QCME-LA:6d028b93e23b QCME-EA:7261d89d8aa6 QCME-LEA:9a0dfb2a1a98 QCME-ELA:deb05d4df0ff
QCME-LE:3b10fd7ce56a QCME-E:ecce5e2e6007 QCMLE-A:0d3346b61f4e QCMLE-AL:e43af0490b82
QCMLE-AE:36d4becf1c12 QCMLE-ALE:2c6864e5a157 QCMLE-AEL:e37f0ffffa6c QCMLE-LA:70e7abdfef76
QCMLE-EA:ee2e70b55c0e QCMLE-LEA:90cc45884cee QCMLE-ELA:ddfc946c042b QCMLE-LE:bb6fbbd39db8
QCMLE-E:db82b32350e4 QCLM-A:d708603591f9 QCLM-AL:012feaf2fd45 QCLM-AE:406182b89ee0
QCLM-ALE:e35005601ffd QCLM-AEL:e8aeff295072 QCLM-LA:73468d987f47 QCLM-EA:4251c42812a3
QCLM-LEA:584e0650bec7 QCLM-ELA:bc1993707ce2 QCLM-LE:f2cf4ec5c754 QCLM-E:c022b55da2b2
QCEM-A:9e9e3f25f985 QCEM-AL:13575a2d2dbd QCEM-AE:2756d59d166d QCEM-ALE:4465c3660db7
QCEM-AEL:2d54862cbf29 QCEM-LA:0108f51eeb5b QCEM-EA:d2d50baf14a6 QCEM-LEA:d7959e0fd2fc
QCEM-ELA:93ba4b59244c QCEM-LE:41ac61488677 QCEM-E:c0b9cc2395d5 QCLEM-A:999a58e08a25
QCLEM-AL:c254fa6b09c0 QCLEM-AE:d63b50f8e825 QCLEM-ALE:b6828c5e27a5 QCLEM-AEL:10e35f91f69f
QCLEM-LA:48501e82d1bb QCLEM-EA:94cca404802d QCLEM-LEA:958dcbfc0370 QCLEM-ELA:8d40dfe2e3ee
QCLEM-LE:b3425d80b08b QCLEM-E:20a2b5013793 QCMA-A:680e1d000cf4 QCMA-AL:24622a987b2c
QCMA-AE:f383032e6a8f QCMA-ALE:4733187f1cc7 QCMA-AEL:f3b861cb90bc QCMA-LA:e43877576e14
QCMA-EA:ea05e274070e QCMA-LEA:9686d72ceade QCMA-ELA:b49ffa8a9d18 QCMA-LE:f8032c324370
QCMA-E:45fe345b3789 QCA-A:a0feb93c57e6 QCA-AL:72ea0873b54f QCA-AE:2100f0064843 QCA-ALE:b161c70c6bea
QCA-AEL:c7d7addf1790 QCA-LA:f5bb810999ae QCA-EA:d39758249447 QCA-LEA:0753d07110b2
QCA-ELA:2659b070888a QCA-LE:794941267c39 QCA-E:89e06c4e0382 QCM-LE+caption:d5ce206374f3
QCMG-A+caption:8eac1eccfaa9 QCMG-A+generated:3ebc0ad510a9 CQMG-A+generated:53c2bb327fee
"""
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


@pytest.mark.slow
@needs_data
def test_prompt_equals_original_on_all_problems():
    goldens = dict(entry.split(":") for entry in FORMATS.split())
    assert len(goldens) == len(data.INPUTS) * len(data.OUTPUTS) + 4
    problems = [problem for split in ("train", "val", "test") for problem in real(split)]
    wrong = []
    for name, golden in goldens.items():
        fmt, _, extra = name.partition("+")
        options = {"caption": {"caption": True}, "generated": {"generated": GENERATED}}
        digest = hashlib.sha256()
        for problem in problems:
            pair = data.prompt(problem, fmt, faithful=True, **options.get(extra, {}))
            digest.update("\t".join((problem.id, *pair)).encode() + b"\n")
        if digest.hexdigest()[:12] != golden:
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
