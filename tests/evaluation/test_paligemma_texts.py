"""PaliGemma's texts: the budget of a rationale, loops, forced answers, votes, and their answers.

What decoding makes of loops, cuts and votes is shown with a stand-in for the model (`Speaker`) that
writes what a test tells it to.
"""

import json
import random
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from small_runs import PALIGEMMA, adapted, settings

import data
import eval as evaluation
import model as backbones
from support.dataset.tokenizers import load_tokenizer, plain_ids
from support.evaluation import decoding, errors, models
from support.files import read_json

CONFIG = read_json(f"{PALIGEMMA}/config.json")
TEXT = CONFIG["text_config"]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(PALIGEMMA)


class Speaker:
    """Writes what `says(prompt, begun)` returns, token by token through the real loop; `begun` is
    the part of the suffix that is there already. A text that ends in "..." has no <eos>. A list is
    ids."""

    config = SimpleNamespace(
        eos_token_id=1, pad_token_id=0, image_token_index=CONFIG["image_token_index"]
    )
    language_model = SimpleNamespace(embed_tokens=SimpleNamespace(weight=torch.zeros(1)))

    def __init__(self, tokenizer, says):
        self.tokenizer, self.says, self.calls = tokenizer, says, []

    def script(self, ids, types):
        """The ids that are to be written after a row's ids."""
        text = self.tokenizer.decode(ids[types == 0].tolist())
        answer = self.says(text, self.tokenizer.decode(ids[types == 1].tolist()))
        if isinstance(answer, list):
            return [*answer, 1]
        more = range(100, 200) if answer.endswith("...") else [1]  # other words, or <eos>
        return plain_ids(self.tokenizer, answer.removesuffix("...")) + [*more]

    def generate(self, input_ids, attention_mask, token_type_ids, max_new_tokens, **options):
        rows = []
        for ids, mask, types in zip(input_ids, attention_mask, token_type_ids, strict=True):
            ids, types = ids[mask.bool()], types[mask.bool()]
            rows.append(self.script(ids, types))
            call = (ids.tolist(), types.tolist(), max_new_tokens, options["stop_loops"])
            self.calls.append(call)
        script = Script(rows)
        return backbones.decode(self, script.logits(), script, max_new_tokens, **options)

    def step(self, ids, script):
        script.t += 1
        return script.logits()


class Script:
    """In the place of a cache: the ids of each live row, and which of them is next."""

    def __init__(self, rows):
        self.rows, self.t = rows, 0

    def logits(self):
        ids = torch.tensor([row[self.t] for row in self.rows])
        return 1e6 * F.one_hot(ids, TEXT["vocab_size"]).float()

    def keep(self, alive):
        self.rows = [row for row, stays in zip(self.rows, alive, strict=True) if stays]


def own_problem(id="1", choices=("red", "blue", "green"), index=0, question="Which is most?"):
    meta = {"answer_index": index, "caption": ""}
    return data.Problem(id, question, choices, choices[index], "", None, "", "", meta)


LONG = "There is 1 red circle and 2 blue squares and 3 green triangles and 4 yellow circles and"
LOOP = "I look at the picture. " + "There is 1 red circle and 2 blue squares. " * 8


@pytest.fixture
def heard(tokenizer):
    """(says, flags) -> the prediction of one problem, the calls of the model."""

    def ask(says, *flags):
        speaker = Speaker(tokenizer, says if callable(says) else lambda prompt, begun: says)
        config = settings("paligemma", "--max-output", "30", "4", *flags)
        (result,) = evaluation.predict([speaker], [own_problem()], config, tokenizer, None)
        return result, speaker.calls

    return ask


def test_a_text_that_answers_by_itself_is_left_alone(heard, tokenizer):
    result, calls = heard("Red is most. Answer: A")
    assert result["stop"] == "eos" and len(calls) == 1 and "forced_after" not in result
    ids = plain_ids(tokenizer, "Red is most. Answer: A")
    assert result["tokens"] == len(ids) + 1  # and <eos>
    assert result["response"] == tokenizer.decode(ids)
    assert result["rationale"] == "Red is most." and set(result) == {
        "id", "response", "ids", "rationale", "stop", "tokens"
    }  # fmt: skip
    assert heard("Answer: A")[0]["rationale"] == ""


def test_a_rationale_over_its_budget_is_made_to_answer(heard, tokenizer):
    result, calls = heard(lambda prompt, begun: "B" if begun else LONG + "...", "--max-output", "9")
    ids = plain_ids(tokenizer, LONG)[:9]
    cut, cue = tokenizer.decode(ids), plain_ids(tokenizer, "\nAnswer:")
    assert result["stop"] == "forced" and result["forced_after"] == "length"
    assert result["response"].startswith(f"{cut.rstrip()}\nAnswer:")
    assert result["response"].splitlines()[-1].removeprefix("Answer:").strip(" :") == "B"
    assert result["rationale"] == cut.strip()
    assert result["tokens"] == 9 + 2  # B and <eos>; the cue is not the model's
    (first, _, budget, loops), (second, kinds, after, again) = calls
    assert (budget, after, loops, again) == (9, 9, True, False)
    assert second == first + ids + cue and kinds == [0] * len(first) + [1] * len(ids + cue)
    _, calls = heard(lambda prompt, begun: "B" if begun else LONG + "...")
    assert [call[2] for call in calls] == [30, 4]  # a budget for the rationale, one to answer


def test_a_loop_is_stopped_and_the_answer_is_asked_for_before_it(heard, tokenizer):
    result, calls = heard(lambda prompt, begun: "C" if begun else LOOP, "--max-output", "90", "4")
    assert result["stop"] == "forced" and result["forced_after"] == "loop"
    assert evaluation.grade(own_problem(), result["response"]).parsed == "C"
    assert result["tokens"] < 60 and result["response"].count("red circle") >= 3
    (first, *_), (second, *_) = calls
    begun = tokenizer.decode(second[len(first) :])
    assert begun.count("red circle") == 1 and begun.startswith("I look") and "Answer" in begun


def test_loops_may_go_on(heard):
    says = lambda prompt, begun: "C" if begun else LOOP  # noqa: E731
    result, calls = heard(says, "--no-loop-stop", "--max-output", "60", "4")
    assert result["forced_after"] == "length" and result["tokens"] == 60 + 2
    assert [call[3] for call in calls] == [False, False]


def test_nothing_is_forced_where_that_is_switched_off(heard):
    for says, stop in ((LOOP, "loop"), (LONG + LONG + "...", "length"), ("It is red.", "eos")):
        result, calls = heard(says, "--no-forced-answer", "--max-output", "80", "4")
        if stop == "length":
            result, calls = heard(says, "--no-forced-answer", "--max-output", "20", "4")
        assert result["stop"] == stop and "forced_after" not in result and len(calls) == 1
        assert (
            result["rationale"] == result["response"].strip()
            and "Answer:" not in result["response"]
        )


def test_an_end_without_an_answer_is_asked_for_one(heard):
    result, _ = heard(lambda prompt, begun: "A" if begun else "It is red.")
    assert result["stop"] == "forced" and result["forced_after"] == "eos"
    assert evaluation.grade(own_problem(), result["response"]).correct


def test_an_answer_run_has_no_rationale_and_a_short_budget(heard):
    result, calls = heard("B", "--recipe", "answer")
    assert set(result) == {"id", "response", "ids", "stop", "tokens"} and result["stop"] == "eos"
    result, calls = heard(LOOP, "--recipe", "answer")
    assert result["stop"] == "length" and result["tokens"] == 4
    assert [call[2:] for call in calls] == [(4, False)]


def test_an_image_token_that_was_said_is_not_shown_again(heard):
    """Sampled, it happens; there would be no features for it."""
    image = CONFIG["image_token_index"]
    result, calls = heard(lambda prompt, begun: "A" if begun else [101, image, 102, image])
    assert result["stop"] == "forced" and result["tokens"] == 5 + 2
    (first, *_), (second, *_) = calls
    assert second[len(first) :][:2] == [101, 102] and image not in second


def test_each_recipe_asks_in_its_own_words(tokenizer):
    for recipe in ("reason", "answer"):
        prompts = []
        speaker = Speaker(tokenizer, lambda p, begun, to=prompts: to.append(p) or "Answer: A")
        config = settings("paligemma", "--recipe", recipe)
        evaluation.predict([speaker], [own_problem()], config, tokenizer, None)
        expected = plain_ids(tokenizer, data.pali_prefix(own_problem(), recipe) + "\n")
        assert plain_ids(tokenizer, prompts[0])[-len(expected) :] == expected


def test_only_cut_rows_are_asked_again_and_each_keeps_its_own(tokenizer):
    """Rows of a batch that end differently, and a last answer for each of them."""
    first_by = {
        "red": "It is red. Answer: A",
        "blue": LONG + "...",
        "green": LOOP,
        "yellow": "It is yellow.",
    }
    answers = {"blue": "B", "green": "C", "yellow": "A"}

    def says(prompt, begun):
        colour = prompt.split("Which is")[1].split("?")[0].strip()
        return answers[colour] if begun else first_by[colour]

    problems = [own_problem(str(i), question=f"Which is {c}?") for i, c in enumerate(first_by)]
    for size in ("1", "3", "64"):
        speaker = Speaker(tokenizer, says)
        config = settings("paligemma", "--eval-batch-size", size, "--max-output", "50", "4")
        result = evaluation.predict([speaker], problems, config, tokenizer, None)
        assert [x["id"] for x in result] == ["0", "1", "2", "3"] and len(speaker.calls) == 7
        assert [x.get("forced_after") for x in result] == [None, "length", "loop", "eos"]
        parsed = [evaluation.grade(problems[0], x["response"]).parsed for x in result]
        assert parsed == ["A", "B", "C", "A"]


@pytest.mark.parametrize("period", [1, 2, 3, 7, 8, 9, 12])
def test_what_was_written_before_the_loop(period):
    """One round of it is kept. At the token where the detector stops it, and at any later one."""
    start, ids = list(range(100, 105)), list(range(100, 105)) + list(range(period)) * 30
    for longer in (0, 1, period + 1, 25):
        looped = ids[: len(start) + max(4 * period, 24) + longer]
        assert errors.before_loop(looped) == start + list(range(period))
    almost = ids[: len(start) + max(4 * period, 24) - 1]
    assert errors.before_loop(almost) == almost


def test_what_is_no_loop_to_the_detector_stays_whole():
    generator = torch.Generator().manual_seed(0)
    loops_seen = 0
    for _ in range(300):
        size, words = (
            int(torch.randint(a, b, (), generator=generator)) for a, b in ((0, 60), (1, 4))
        )
        rows = torch.randint(0, words, (1, size), generator=generator)
        loops, ids = bool(backbones.looping(rows)), rows[0].tolist()
        kept = errors.before_loop(ids)
        assert ids[: len(kept)] == kept and (len(kept) < size) == loops
        loops_seen += loops
    assert 20 < loops_seen < 280


@pytest.mark.slow
def test_batched_equals_single(tokenizer):
    """In fp32, with adapters that make it talk at random, cut rows and forced answers included."""
    model, args = adapted()
    generator = torch.Generator().manual_seed(3)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data.normal_(0, 0.15, generator=generator)
    problems = data.load("demo", "test")[:10]
    features = models.image_features(args, problems, model)
    result = []
    for size in (1, 4, 64):
        config = replace(args, eval_batch_size=size, max_output=(24, 4))
        result.append(evaluation.predict([model.eval()], problems, config, tokenizer, features))
    assert result[0] == result[1] == result[2]
    assert len({x["response"] for x in result[0]}) > 5


# ---- votes -------------------------------------------------------------------------------------


def voted(texts, monkeypatch):
    """The prediction from five texts, and with which temperature and seed each was asked for."""
    asked = []

    def write(decoder, **options):
        asked.append((decoder.temperature, decoder.seed))
        text = texts[len(asked) - 1]
        result = {"response": text, "rationale": text, "stop": "eos", "tokens": len(asked)}
        return {"1": result}

    monkeypatch.setattr(decoding.Decoder, "paligemma_texts", write)
    monkeypatch.setattr(evaluation, "prompt_examples", lambda *args: [])
    flags = ["--samples", str(len(texts)), "--temperature", "0.7", "--seed", "9"]
    config = settings("paligemma", *flags)
    (result,) = evaluation.predict([None], [own_problem(index=1)], config, None, None)
    return result, asked


@pytest.mark.parametrize(
    "texts, winner, votes",
    [
        (["x Answer: A", "y Answer: B", "z Answer: B"], 1, {"A": 1, "B": 2}),
        (["x Answer: C", "y Answer: A", "z Answer: B", "w Answer: B", "v Answer: A"], 1,
         {"C": 1, "A": 2, "B": 2}),  # a tie: the one that was there first
        (["nothing", "more", "y Answer: B"], 2, {"B": 1}),  # no answer has no vote
        (["nothing", "Answer: D", "more"], 0, {}),
        (["Answer: B", "blue", "Answer: (B)", "x Answer: A", "x Answer: A"], 0, {"B": 3, "A": 2}),
    ],
)  # fmt: skip
def test_the_most_frequent_answer_wins(texts, winner, votes, monkeypatch):
    result, asked = voted(texts, monkeypatch)
    assert result["response"] == texts[winner] and result["votes"] == votes
    assert result["id"] == "1" and result["stop"] == "eos"
    assert result["tokens"] == sum(range(1, len(texts) + 1))  # what all of them cost
    assert asked == [(0.7, 9 + i) for i in range(len(texts))]
    json.dumps(result)


@pytest.mark.slow
def test_sampling_follows_seed_and_temperature(tokenizer):
    model = models.load_paligemma(settings("paligemma"))
    problems = data.load("demo", "test")[:4]
    features = models.image_features(settings("paligemma"), problems, model)

    def result(*flags):
        config = settings("paligemma", "--max-output", "12", "4", *flags)
        return evaluation.predict([model], problems, config, tokenizer, features)

    def responses(*flags):
        return [x["response"] for x in result(*flags)]

    votes = ["--samples", "3", "--temperature", "3"]
    first = result(*votes, "--seed", "1")
    assert first == result(*votes, "--seed", "1")
    assert all(sum(x["votes"].values()) <= 3 for x in first)
    greedy, hot = responses(), ["--temperature", "3"]
    assert responses("--seed", "5") == greedy != responses(*hot)
    assert responses(*hot, "--seed", "5") == responses(*hot, "--seed", "5")
    assert responses(*hot, "--seed", "5") != responses(*hot, "--seed", "6")
    assert responses("--temperature", "1e-6") == greedy
    assert any(len(x["votes"]) > 1 or sum(x["votes"].values()) < 3 for x in first)


# ---- reading PaliGemma's answers ---------------------------------------------------------------


@pytest.mark.parametrize(
    "response, parsed",
    [
        ("It is so.\nAnswer: B", "B"),
        ("It is so.\n Answer: (B).", "B"),
        ("Answer: blue", "B"),
        ("Answer:  Dark   Blue. ", "C"),
        (" (b) ", "B"),
        ("Answer: A\nNo.\nAnswer: B", "B"),  # the last counts
        ("Answer: B\nAnswer:", None),  # cut
        ("Answer: D", None),
        ("Answer: A or B", None),
        ("The answer is (D).\nAnswer: B", "B"),
        ("So: The answer is (A).\nAnswer: B", "B"),
    ],
)
def test_paligemmas_forms_are_read(response, parsed):
    problem = own_problem(choices=("red", "blue", "dark  blue"), index=1)
    read = evaluation.grade(problem, response)
    assert (read.correct, read.parsed) == (parsed == "B", parsed)


def test_the_original_guess_knows_nothing_of_these_forms():
    problem = own_problem(index=1)
    for response in ("Answer: B", "B", "blue"):
        read = evaluation.grade(problem, response, random.Random(42))
        assert read.parsed is None and read.how == "no answer found; guessed A"


@pytest.mark.parametrize(
    "response, correct",
    [("Answer: 4", True), ("It is 5.\nAnswer: 4.0", True), ("Answer: 5", False)],
)
def test_answers_without_choices(response, correct):
    problem = data.Problem("1", "?", (), "4", "", None, "", "", {"answer_index": None})
    assert evaluation.grade(problem, response).correct == correct
