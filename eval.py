"""Scoring: from what a model said to a table somebody else can check.

Implements
* the answer extraction and the categories of ScienceQA (Lu et al. 2022, arXiv 2209.09513) as
  Multimodal-CoT (Zhang et al. 2023, arXiv 2302.00923) reports them;
* sentence BLEU without smoothing (Papineni et al. 2002) and summary-level ROUGE-L (Lin 2004) in the
  set-based form of the PyPI package `rouge` 1.0.1, both as those authors call them;
* the Wilson (1927) interval of every accuracy, with n and chance beside it;
* decoding: `predict` turns problems into predictions with a run's models, `evaluate` into a table;
  of PaliGemma with a budget for the rationale, a stop for loops, a forced "Answer:" and the vote of
  several samples (self-consistency, Wang et al. 2022, arXiv 2203.11171).

Two rules. A response that cannot be read is a failure, counted and shown, never a guess (the
original's guess is there to be compared with: `--faithful-parse`). A score is about a named set of
problems: missing, unknown and repeated predictions are errors.

Left out: sentence-embedding similarity, which needs one more model to say what ROUGE-L says.

Axes: B pictures or rows, H W S pixels, P I image positions, F D their width.
"""

import argparse
import hashlib
import json
import math
import random
import re
import sys
import time
from bisect import bisect_left
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

import data
import fusion
import lora
from model import DETR, PaliGemma, resolve, stored_tensors

CUE = "Answer:"  # what PaliGemma's last line begins with
ANSWER = re.compile(r"The answer is \(([A-Z])\)")
SUBJECTS = {"natural science": "NAT", "social science": "SOC", "language science": "LAN"}
CATEGORIES = ("NAT", "SOC", "LAN", "TXT", "IMG", "NO", "G1-6", "G7-12")
GUESS_SEED, GUESS_LETTERS = 42, "ABCDE"  # the original's, however many choices a problem has
OTHER_ROWS = {"parse_failures": "parse failures %", "rougeL": "ROUGE-L", "bleu1": "BLEU-1",
              "bleu4": "BLEU-4"}  # fmt: skip


# --- one answer
@dataclass(frozen=True)
class Grade:
    """`parsed`: the letter (or free text) that was read, None if none could be; `how`: in words."""

    correct: bool
    parsed: str | None
    how: str


def grade(problem, response, guess=None):
    """Grade one response: exactly one "The answer is (X)", X among the choices; else what follows
    the last "Answer:", or the whole response, if it is a letter or the text of one choice. Anything
    else is a failed parse and wrong. Problems without choices: see `grade_free_form`.

    `guess` gives the released code's verdict: a random.Random(42), drawn from in prediction order,
    once per unreadable response, for one of A-E. A letter A-E beyond the choices is read (and
    wrong) there; only one beyond E is drawn for.
    """
    if not problem.choices:
        return grade_free_form(problem, response)
    gold = problem.meta.get("answer_index")  # comes first, as two choices may have the same text
    gold = problem.choices.index(problem.answer) if gold is None else gold
    options = data.LETTERS[: len(problem.choices)] if guess is None else GUESS_LETTERS
    letters = ANSWER.findall(response)
    if len(letters) == 1 and letters[0] in options:
        return Grade(options.index(letters[0]) == gold, letters[0], "letter")
    if guess is None and not letters and (read := bare_choice(problem, response)):
        return Grade(options.index(read[0]) == gold, *read)
    whys = ("no answer found", "letter not among the options", "several answers")
    why = whys[min(len(letters), 2)]
    if guess is None:
        return Grade(False, None, why)
    index = guess.choice(range(len(options)))
    return Grade(index == gold, None, f"{why}; guessed {options[index]}")


def bare_choice(problem, response):
    """(letter, how) if PaliGemma's "Answer: B", or all of a response, is a letter or a choice."""
    said = " ".join(response.rpartition(CUE)[2].split()).strip(" .()").casefold()
    texts = [" ".join(choice.split()).strip(" .()").casefold() for choice in problem.choices]
    letters = list(data.LETTERS[: len(texts)].casefold())
    for how, names in (("letter", letters), ("choice text", texts)):
        if names.count(said) == 1:
            return data.LETTERS[names.index(said)], how
    return None


def grade_free_form(problem, response):
    """The last line, after "The answer is" or "Answer:" where it says so: the gold text, or the
    same number."""
    line = (response.strip().splitlines() or [""])[-1].split("The answer is")[-1].split(CUE)[-1]
    said, gold = (" ".join(x.split()).strip(" .()").casefold() for x in (line, problem.answer))
    if not said:
        return Grade(False, None, "no answer found")
    try:
        numbers = (float(x.replace(",", "")) for x in (said, gold))
        return Grade(math.isclose(*numbers, rel_tol=1e-6), said, "number")
    except ValueError:
        return Grade(said == gold, said, "text")


# --- one rationale
def bleu(candidate, reference, n):
    """Sentence BLEU-n in 0..1 with uniform weights; tokens end at white space and full stops. An
    order without a match counts as the smallest positive float (as in nltk): BLEU-4 of three words
    is next to 0 even if they are the right ones. Without a common word it is 0."""
    said, gold = ([t for t in re.split(r"[\s.]", x) if t] for x in (candidate, reference))
    logs = []
    for order in range(1, n + 1):
        grams = (zip(*(x[i:] for i in range(order)), strict=False) for x in (said, gold))
        ours, theirs = map(Counter, grams)
        hits = sum(min(count, theirs[gram]) for gram, count in ours.items() if gram in theirs)
        if not hits and order == 1:
            return 0.0
        logs.append(math.log(hits / ours.total() if hits else sys.float_info.min))
    brevity = 1.0 if len(said) > len(gold) else math.exp(1 - len(gold) / len(said))
    return brevity * math.exp(math.fsum(x / n for x in logs))


def lcs_words(x, places):
    """The words, as a set, of one longest common subsequence of the word list x and a second, y.

    `places` maps each word of y to its positions, last first. Hunt and Szymanski (1977): ends[k] is
    where the shortest prefix of y ends that has k+1 words in common with x so far; only matching
    pairs cost. Going up from the last row, a word is taken if it stands where that prefix ends: the
    same choice among equals as walking back the full table and shortening y first.
    """
    ends, rows = [], []
    for word in x:
        if word in places:
            for j in places[word]:
                k = bisect_left(ends, j)
                ends[k : k + 1] = [j]
            rows.append((word, ends.copy()))
    found, k = set(), len(ends) - 1
    for word, ends_then in reversed(rows):
        if k >= 0 and ends_then[k] in places[word]:
            found.add(word)
            k -= 1
    return found


def rouge_l(candidate, reference):
    """Summary-level ROUGE-L F in 0..1, equal to `rouge` 1.0.1 in the authors' call.

    Its peculiarities are kept: sentences end at every full stop, the longest common subsequences of
    all pairs of sentences join in one *set* of words, and lengths count distinct words (a blank
    sentence has the word ""). A text without a sentence scores 0; the package raises.
    """
    texts = ([s for s in text.split(".") if s] for text in (candidate, reference))
    said, gold = ([" ".join(s.split()).split(" ") for s in sentences] for sentences in texts)
    if not said or not gold:
        return 0.0
    common = set()
    for theirs in gold:
        places = {}
        for j in reversed(range(len(theirs))):
            places.setdefault(theirs[j], []).append(j)
        for ours in said:
            if not common.issuperset(ours):  # else it cannot add a word
                common |= lcs_words(ours, places)
    precision, recall = (len(common) / len(set().union(*x)) for x in (said, gold))
    return 2.0 * precision * recall / (precision + recall + 1e-8)


# --- many
def percent(share):
    return round(100.0 * share, 2)


def wilson(hits, n, z=1.959963984540054):
    """95 % Wilson score interval of hits / n, in percent: it stays inside 0..100, and does not
    shrink to nothing when all answers, or none, are right."""
    centre = (hits + z * z / 2) / (n + z * z)
    half = z / (n + z * z) * math.sqrt(hits * (n - hits) / n + z * z / 4)
    return [percent(max(0.0, centre - half)), percent(min(1.0, centre + half))]


def categories(problem):
    """The table rows a problem counts in. TXT has a hint, IMG a picture *of the question* (pictures
    of the choices do not count, as published), NO neither. The demo's family is a row as well."""
    meta = problem.meta
    has_image = meta.get("has_image", problem.image is not None)
    names = [SUBJECTS.get(str(meta.get("subject"))), meta.get("family")]
    names += ["TXT" if problem.hint else None, "IMG" if has_image else None]
    names += [None if problem.hint or has_image else "NO"]
    year = re.fullmatch(r"grade(\d+)", str(meta.get("grade")))
    names += [("G1-6" if int(year[1]) <= 6 else "G7-12") if year else None]
    return [str(name) for name in names if name]


def grade_all(problems, predictions, faithful=False, partial=False):
    """[(problem, prediction, Grade)] in prediction order. Raises ValueError on repeated, unknown
    and (unless `partial`) missing ids. `faithful`: with the original's guesses."""
    by_id = {p.id: p for p in problems}
    times = Counter(x["id"] for x in predictions)
    missing = [] if partial and times else by_id.keys() - times
    for fault, ids in (
        ("prediction ids are there more than once", [i for i in times if times[i] > 1]),
        ("prediction ids are of no problem here, check --data and --split", times.keys() - by_id),
        ("problems have no prediction (--partial scores the others)", missing),
    ):
        if ids:
            some = ", ".join(sorted(ids)[:5]) + (", ..." if len(ids) > 5 else "")
            raise ValueError(f"{len(ids)} {fault}: {some} (there are {len(by_id)} problems).")
    guess = random.Random(GUESS_SEED) if faithful else None
    pairs = [(by_id[x["id"]], x) for x in predictions]
    return [(p, x, grade(p, x["response"], guess)) for p, x in pairs]


def tally(graded):
    """n, accuracy, its interval and chance; rates in percent, None where there is nothing."""
    n, hits = len(graded), sum(g.correct for *_, g in graded)
    luck = sum(1 / len(p.choices) for p, *_ in graded if p.choices)
    rates = (percent(hits / n), wilson(hits, n), percent(luck / n)) if n else (None, None, None)
    return dict(zip(("n", "accuracy", "ci95", "chance"), (n, *rates), strict=True))


def rationale_scores(graded, rationale_format, faithful=False):
    """Mean ROUGE-L and BLEU in percent of the rationales against the gold target of their stage; {}
    without rationales. Empty targets do not count. An empty rationale scores 0, but the original
    (`faithful`) leaves it out of ROUGE-L."""
    told = [(x["rationale"], p) for p, x, _ in graded if x.get("rationale") is not None]
    if rationale_format is None:  # a teacher's thought has another form than the gold solution
        return {}
    pairs = [(said, data.prompt(p, rationale_format)[1].strip()) for said, p in told]
    pairs = [(said, gold) for said, gold in pairs if gold]
    if not pairs or not any(p.lecture or p.solution for _, p in told):
        return {}
    rouge = [rouge_l(*pair) for pair in pairs if pair[0] or not faithful]
    means = {f"bleu{n}": sum(bleu(*pair, n) for pair in pairs) / len(pairs) for n in (1, 4)}
    means = {"rougeL": sum(rouge) / max(1, len(rouge))} | means
    return {"n_rationales": len(pairs)} | {name: percent(mean) for name, mean in means.items()}


def metrics(problems, predictions, faithful=False, rationale_format="QCM-LE", partial=False):
    """Score predictions (dicts {"id", "response", "rationale"?, "stop"?}) of exactly these problems
    (`partial`: of some of them); rates are percentages with two decimals.

    Returns {"n", "accuracy": {"avg", "NAT", ...}, "ci95": [low, high], "chance", "parse_failures",
    "n_rationales"?, "rougeL"?, "bleu1"?, "bleu4"?, "families"?, "stop"?, "n_by", "ci95_by",
    "chance_by"}; a category without problems is None. ValueError: see `grade_all`.
    """
    graded = grade_all(problems, predictions, faithful, partial)
    groups = {"avg": graded} | {name: [] for name in CATEGORIES}
    for item in graded:
        for name in categories(item[0]):
            groups.setdefault(name, []).append(item)
    by = {name: tally(items) for name, items in groups.items()}
    families = {name: by[name]["accuracy"] for name in sorted(set(by) - {"avg", *CATEGORIES})}
    stops = Counter(x["stop"] for _, x, _ in graded if x.get("stop"))
    return {
        "n": len(graded),
        "accuracy": {name: by[name]["accuracy"] for name in ("avg", *CATEGORIES)},
        "ci95": by["avg"]["ci95"],
        "chance": by["avg"]["chance"],
        "parse_failures": percent(sum(g.parsed is None for *_, g in graded) / len(graded)),
        **rationale_scores(graded, rationale_format, faithful),
        **({"families": families} if families else {}),
        **({"stop": dict(sorted(stops.items()))} if stops else {}),
        **{f"{k}_by": {name: t[k] for name, t in by.items()} for k in ("n", "ci95", "chance")},
    }


# --- files and tables
def read_predictions(path, problems=()):
    """Predictions of a JSONL file, or of the released code's predictions_ans_*.json. Raises
    ValueError naming the line, or the position in that list."""
    text = Path(path).read_text(encoding="utf-8")
    try:
        whole = json.loads(text)
    except ValueError:  # several lines, as it should be
        whole = None
    if isinstance(whole, dict) and "preds" in whole:
        return in_split_order(path, whole["preds"], whole.get("labels", []), problems)
    predictions = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            x = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: not complete JSON ({error}).") from None
        for key, kinds in {"id": str, "response": str, "rationale": str | None}.items():
            if not isinstance(x, dict) or not isinstance(x.get(key), kinds):
                found = f"found {line.strip()[:60]}"
                raise ValueError(f'{path}, line {number}: "{key}" must be a string; {found}')
        predictions.append(x)
    return predictions


def in_split_order(path, preds, labels, problems):
    """The released code's list without ids, matched to problems by position. Where its labels are
    answers they must be the gold ones, else the split or the order is another."""
    if len(preds) != len(problems):
        found = f"{len(preds)} predictions without ids, for {len(problems)} problems"
        raise ValueError(f"{path} lists {found}; it needs the complete split in its own order.")
    for p, label in zip(problems, labels, strict=False):
        if ANSWER.search(label) and not grade(p, label).correct:
            found = f"{label!r} as the label of problem {p.id}, which has another answer"
            raise ValueError(f"{path} has {found}; it is of another split, or in another order.")
    return [{"id": p.id, "response": said} for p, said in zip(problems, preds, strict=True)]


def write_graded(folder, graded, scores):
    """Write predictions.jsonl (with "correct", "parsed", "how" and "kind") and metrics.json."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "predictions.jsonl", "w", encoding="utf-8") as file:
        for _, x, g in graded:
            kind = "correct" if g.correct else "no parse" if g.parsed is None else "wrong"
            file.write(json.dumps(x | asdict(g) | {"kind": kind}, ensure_ascii=False) + "\n")
    (folder / "metrics.json").write_text(json.dumps(scores, indent=2) + "\n", encoding="utf-8")


def table(columns, markdown=False):
    """Runs side by side, {name: metrics} -> text: accuracies with their 95 % interval, n and chance
    at the head of the row. Runs over different problems cannot share those: a table each."""
    blocks = {}
    for name, m in columns.items():
        blocks.setdefault(json.dumps([m["n_by"], m["chance_by"]]), {})[name] = m
    return "\n\n".join(align(rows_of(block), markdown) for block in blocks.values())


def rows_of(block):
    """The rows of one table, as lists of strings."""
    runs = list(block.values())
    names = [name if len(name) <= 20 else ".." + name[-18:] for name in block]
    rows = [["accuracy %", "n", "chance", *names]]
    for name, n in runs[0]["n_by"].items():
        if n:
            rates = [(m["accuracy"] | m.get("families", {}))[name] for m in runs]
            cis = [", ".join(f"{end:.2f}" for end in m["ci95_by"][name]) for m in runs]
            cells = [f"{rate:.2f} [{ci}]" for rate, ci in zip(rates, cis, strict=True)]
            rows.append([name[:18], str(n), f"{runs[0]['chance_by'][name]:.2f}", *cells])
    for key, name in OTHER_ROWS.items():
        if any(key in m for m in runs):
            rows.append([name, "", "", *(f"{m[key]:.2f}" if key in m else "-" for m in runs)])
    for stop in sorted({stop for m in runs for stop in m.get("stop", {})} - {"eos"}):
        shares = [percent(m.get("stop", {}).get(stop, 0) / m["n"]) for m in runs]
        rows.append([f"stopped by {stop} %", "", "", *(f"{x:.2f}" for x in shares)])
    return rows


def align(rows, markdown):
    """Rows as text in columns, or as a markdown table; the first column left, the others right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    pads = [str.ljust] + [str.rjust] * (len(widths) - 1)
    rows = [[pad(*cell) for pad, *cell in zip(pads, row, widths, strict=True)] for row in rows]
    if not markdown:
        return "\n".join("  ".join(row).rstrip() for row in rows)
    rows.insert(1, ["-" * widths[0], *("-" * (w - 1) + ":" for w in widths[1:])])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def summary(rows):
    """Many runs on the same problems, a line each: {name: metrics} -> text. Of two-stage runs the
    ROUGE-L of the decoded rationales, and beside it what teacher forcing would have claimed; of
    PaliGemma's how many texts did not end by themselves."""
    first = next(iter(rows.values()))
    columns = {"run": {name: name for name in rows} | {"chance": "chance"}}
    for key, title in (("rougeL", "ROUGE-L"), ("rougeL_teacher_forced", "teacher-forced")):
        columns[title] = {name: f"{m[key]:.2f}" for name, m in rows.items() if key in m}
    columns["accuracy %"] = {name: f"{m['accuracy']['avg']:.2f}" for name, m in rows.items()}
    columns["accuracy %"]["chance"] = f"{first['chance']:.2f}"
    interval = "{:.2f} - {:.2f}".format
    columns["95 % interval"] = {name: interval(*m["ci95"]) for name, m in rows.items()}
    columns["no answer %"] = {name: f"{m['parse_failures']:.2f}" for name, m in rows.items()}
    for stop in ("loop", "length", "forced"):
        shares = {
            name: percent(m.get("stop", {}).get(stop, 0) / m["n"]) for name, m in rows.items()
        }
        columns[f"{stop} %"] = {
            name: f"{x:.2f}" for name, x in shares.items() if any(shares.values())
        }
    columns = {title: cells for title, cells in columns.items() if cells}
    lines = [[column.get(name, "-") for column in columns.values()] for name in ["chance", *rows]]
    return f"n = {first['n']} problems\n\n{align([list(columns), *lines], False)}"


# --- decoding a run
def image_features(config, problems, model=None):
    """The run's `data.Features` for these problems, or None if it looks at no pictures.

    Published feature files are used as they are. Otherwise DETR is loaded only if a picture is not
    in the cache, and sees one size at a time: padding would change its output. A PaliGemma `model`
    makes its own, projected; they are not kept where its image tower is trained or adapted.
    """
    inside = [p.startswith("language_model.") for p in lora.adapters(model)] if model else []
    if model is not None and (config["full"] or not all(inside)):
        side, tokens = model.config.vision.image_size, model.config.image_tokens
        return data.Pictures(problems, side, tokens)
    if model is None and config["vision"] != "detr":
        return None
    if model is None and config["features"]:
        return data.published_features(config["features"], config["name_map"])
    folder = resolve(config["weights"][0] if model else config["vision_weights"])
    fingerprint = checkpoint_hash(folder) + (f"-{dtype_name(model)}" if model else "")
    extract, pixels, size = eyes(config, model)
    cache = config["features_cache"] or data.cache_folder() / "features" / f"{fingerprint}-{size}"
    return data.cached_features(problems, extract, fingerprint, size, cache, pixels)


def eyes(config, model=None):
    """(list of pixels -> list of features, picture -> pixels, size): PaliGemma's own, or DETR's."""
    if model is not None:
        return paligemma_extractor(model), data.siglip_pixels, model.config.vision.image_size
    extract = feature_extractor(resolve(config["vision_weights"]), config["device"])
    return extract, data.detr_pixels, config["image_size"]


def dtype_name(model):
    return str(model.language_model.embed_tokens.weight.dtype).removeprefix("torch.")


def paligemma_extractor(model):
    """list of (3, S, S) -> list of (I, D), projected: what takes the places of <image> tokens."""

    @torch.inference_mode()
    def extract(pixels):
        device = model.multi_modal_projector.linear.weight.device
        stacked = torch.stack(pixels).to(device)  # (B, 3, S, S)
        return list(model.image_features(stacked).float().cpu())

    return extract


def checkpoint_hash(folder):
    """Twelve hex digits over the weight files of a checkpoint."""
    digest = hashlib.sha256()
    for path in sorted({path for path, _ in stored_tensors(folder).values()}):
        with open(path, "rb") as file:
            digest.update(hashlib.file_digest(file, "sha256").digest())
    return digest.hexdigest()[:12]


def feature_extractor(folder, device):
    """list of (3, H, W) -> list of (P, F), the model loaded at the first call."""
    loaded = []

    @torch.inference_mode()
    def extract(pixels):
        if not loaded:
            model = DETR.from_pretrained(folder).to(device, memory_format=torch.channels_last)
            loaded.append(model)
        made = [None] * len(pixels)
        sizes = Counter(tuple(p.shape) for p in pixels)
        for size in sizes:
            rows = [i for i, p in enumerate(pixels) if tuple(p.shape) == size]
            stacked = torch.stack([pixels[i] for i in rows]).to(device)  # (B, 3, H, W)
            for i, features in zip(rows, loaded[0].features(stacked).cpu(), strict=True):
                made[i] = features  # (P, F)
        return made

    return extract


def in_batches(examples, batch_size, label, collate=data.collate):
    """Collated batches of like lengths, with progress on a terminal as they are used up."""
    start, done = time.monotonic(), 0
    for rows in data.batches([len(e["input_ids"]) for e in examples], batch_size):
        yield collate([examples[i] for i in rows])
        done += len(rows)
        data.progress(label, done, len(examples), start)


def predict(models, problems, config, tokenizer, features):
    """Decode problems with a run's models: one, or rationale and answer. Predictions in order."""
    if config["model"] == "paligemma":
        return paligemma_predict(models[0], problems, config, tokenizer, features)
    formats = fusion.RECIPES[config["recipe"]]
    lengths = config["max_output"]

    def make_batches(generated=None):
        fmt = formats[0] if generated is None else formats[-1]
        examples = data.examples(problems, fmt, tokenizer, features, generated, config)
        return in_batches(examples, config["eval_batch_size"], f"{fmt} decoded")

    if len(formats) == 2:
        told = fusion.two_stage(*models, make_batches, tokenizer, (lengths[0], lengths[-1]))
    else:
        texts = fusion.write(models[0], make_batches(), tokenizer, lengths[0])
        told = {i: {"response": t.pop("text")} | t for i, t in texts.items()}
    return [{"id": p.id} | told[p.id] for p in problems]


# --- decoding PaliGemma: rationale and answer in one text
def paligemma_predict(model, problems, config, tokenizer, features):
    """Predictions in order. With config["samples"] > 1 each is the first of several sampled texts
    that gives the answer most of them give (self-consistency, arXiv 2203.11171); "votes" has all.
    A text without a readable answer has no vote."""
    if config["samples"] == 1:
        how = (config["temperature"], config["seed"])
        told = paligemma_write(model, problems, config, tokenizer, features, *how)
        return [{"id": p.id} | told[p.id] for p in problems]
    runs = []
    for sample in range(config["samples"]):
        seed = config["seed"] + sample
        heat = config["temperature"]
        runs.append(paligemma_write(model, problems, config, tokenizer, features, heat, seed))
    predictions = []
    for p in problems:
        parsed = [grade(p, run[p.id]["response"]).parsed for run in runs]
        votes = Counter(x for x in parsed if x is not None)
        best = votes.most_common(1)[0][0] if votes else None
        chosen = runs[parsed.index(best)][p.id]
        tokens = sum(run[p.id]["tokens"] for run in runs)
        predictions.append({"id": p.id} | chosen | {"tokens": tokens, "votes": dict(votes)})
    return predictions


def paligemma_write(model, problems, config, tokenizer, features, temperature=0.0, seed=0):
    """{id: {"response", "rationale"?, "stop", "tokens"}}.

    A reasoning run has a budget for the rationale, and a detector for one that repeats itself. A
    text that does not get to its "Answer:" by itself is given that word and goes on from there, at
    most the answer's budget: its stop is "forced", and "forced_after" says what came before.
    """
    task, budgets = config["recipe"], config["max_output"]
    generator = torch.Generator(model.language_model.embed_tokens.weight.device).manual_seed(seed)
    how = {"temperature": temperature, "generator": generator}
    rows = [(p, task, None, False) for p in problems]
    examples = {e["id"]: e for e in data.pali_examples(rows, tokenizer, features, config)}
    reasons = task == "reason"
    loops = reasons and config["loop_stop"]
    first = budgets[0] if reasons else budgets[-1]
    told = continued(model, examples.values(), tokenizer, config, first, loops, how)
    if reasons and config["force_answer"]:
        cue = data.plain_ids(tokenizer, f"\n{CUE}")
        image = model.config.image_token_index  # has it said one, no picture belongs to it
        cut = {i: before_loop(t["ids"]) for i, t in told.items() if CUE not in t["response"]}
        cut = {i: [x for x in ids if x != image] for i, ids in cut.items()}
        more = [prolonged(examples[i], ids + cue) for i, ids in cut.items()]
        forced = continued(model, more, tokenizer, config, budgets[-1], False, how)
        for i, answer in forced.items():
            before = told[i]
            response = f"{before['response'].rstrip()}\n{CUE}{answer['response']}"
            tokens = before["tokens"] + answer["tokens"]
            stops = {"stop": "forced", "forced_after": before["stop"]}
            told[i] = before | {"response": response, "tokens": tokens} | stops
    for t in told.values():
        del t["ids"]
        if reasons:
            before, cue, rest = t["response"].rpartition(CUE)
            t["rationale"] = (before if cue else rest).strip()
    return told


def paligemma_inputs(model, batch):
    """What `PaliGemma.states` takes of a batch of `data.pali_collate`; of pictures that are not
    cached (--full) the features are computed here, with gradient."""
    names = ("input_ids", "attention_mask", "token_type_ids", "image_features")
    given = {name: batch[name] for name in names if name in batch}
    if "pixel_values" in batch:
        given["image_features"] = model.image_features(batch["pixel_values"])  # (n, I, D)
    return given


def continued(model, examples, tokenizer, config, budget, loops, how):
    """{id: {"response", "ids", "stop", "tokens"}}: what the model writes behind each example."""
    device, told = model.language_model.embed_tokens.weight.device, {}
    examples = list(examples)
    for batch in in_batches(examples, config["eval_batch_size"], "decoded", data.pali_collate):
        ids = batch.pop("ids")
        batch = paligemma_inputs(model, {k: v.to(device) for k, v in batch.items()})
        new_ids, stops = model.write(max_new_tokens=budget, stop_loops=loops, **batch, **how)
        for problem_id, row, stop in zip(ids, new_ids.tolist(), stops, strict=True):
            ends = [i for i in (model.config.eos_token_id, model.config.pad_token_id) if i in row]
            row = row[: min(map(row.index, ends))] if ends else row
            text = tokenizer.decode(row, skip_special_tokens=True)
            tokens = len(row) + (stop == "eos")
            told[problem_id] = {"response": text, "ids": row, "stop": stop, "tokens": tokens}
    return told


def prolonged(example, ids):
    """A prompt with some of its suffix written already."""
    types = example["token_type_ids"] + [1] * len(ids)
    return example | {"input_ids": example["input_ids"] + ids, "token_type_ids": types}


def before_loop(ids, times=4, least=24):
    """The ids without the loop they end in, one round of it kept; the rule is model.looping's."""
    for period in range(1, len(ids) // times + 1):
        start = len(ids) - period
        while start and ids[start - 1] == ids[start - 1 + period]:
            start -= 1
        if len(ids) - start >= max(times * period, least):
            return ids[: start + period]
    return ids


def teacher_forced_rouge(model, problems, config, tokenizer, features):
    """ROUGE-L of arg-max logits that read the gold rationale: what the first published commands
    scored, and stage 2 then read. Shown to be compared with; nothing here uses these texts."""
    examples = data.examples(problems, "QCM-LE", tokenizer, features, None, config)
    batches = in_batches(examples, config["eval_batch_size"], "teacher-forced")
    texts = fusion.teacher_forced(model, batches, tokenizer)
    graded = [(p, {"rationale": texts[p.id]}, None) for p in problems]
    return rationale_scores(graded, "QCM-LE")["rougeL"]


def evaluate(folder, models, problems, config, tokenizer, features, how):
    """Decode, grade, write predictions.jsonl and metrics.json into the run folder; the metrics.

    `how` has the flags faithful_parse and teacher_forced."""
    predictions = predict(models, problems, config, tokenizer, features)
    of_prompt = "QCM-LE" if config["model"] == "mmcot" else None
    scores = metrics(problems, predictions, how.faithful_parse, of_prompt)
    if how.teacher_forced and len(models) == 2:
        scores["rougeL_teacher_forced"] = teacher_forced_rouge(
            models[0], problems, config, tokenizer, features
        )
    write_graded(folder, grade_all(problems, predictions, how.faithful_parse), scores)
    return scores


def check_device(device):
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(
            f"There is no device {device!r} that this torch can use: try --device cpu."
        )


def load_run(folder, device=None):
    """(config, models, tokenizer) of a run folder."""
    folder = Path(folder)
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} is no run folder: it has no config.json.")
    config = data.read_json(folder / "config.json")
    config["device"] = device or config["device"]
    check_device(config["device"])
    if config["model"] == "paligemma":
        where = resolve(config["weights"][0])
        return config, [load_paligemma(config, folder)], data.load_tokenizer(where)
    stages = [folder / name for name in fusion.stage_names(config["recipe"])]
    models = [fusion.MultimodalT5.from_pretrained(s).to(config["device"]) for s in stages]
    return config, models, data.load_tokenizer(stages[0])


def load_paligemma(config, folder=None):
    """The base model of a run and, if its folder has them, the adapter or weights trained there."""
    trained = folder is not None and (folder / "model.safetensors").is_file()
    where = folder if trained else config["weights"][0]
    model = PaliGemma.from_pretrained(where, getattr(torch, config["dtype"]))
    if folder is not None and (folder / "adapter_model.safetensors").is_file():
        lora.load(model, folder)
    elif config["adapter"]:
        lora.load(model, config["adapter"])
    if not config["final_soft_cap"]:
        text = replace(model.config.text, final_logit_softcapping=None)
        model.config = replace(model.config, text=text)
    return model.to(config["device"]).eval()


def score_run(folder, args):
    """Metrics of a run folder on --split (by default the run's own): decoded, unless that has been
    done. Another split gets a folder in the run's."""
    folder = Path(folder)
    written = folder / "config.json"  # graded predictions from elsewhere have none
    own = data.read_json(written).get("test_split", "test") if written.is_file() else "test"
    split = args.split or own
    out = folder if split == own else folder / split
    if (out / "metrics.json").is_file() and not (args.decode or args.teacher_forced):
        return data.read_json(out / "metrics.json")
    config, models, tokenizer = load_run(folder, args.device)
    problems = data.load(config["data"], split)[: args.limit]
    model = models[0] if config["model"] == "paligemma" else None
    features = image_features(config, problems, model)
    return evaluate(out, models, problems, config, tokenizer, features, args)


def ask(folder, args):
    """One question about one picture (or none), in the terminal."""
    config, models, tokenizer = load_run(folder, args.device)
    choices = tuple(args.choices or ())
    meta = {"answer_index": 0, "caption": ""}  # unknown: only the unused target has it
    problem = data.Problem("asked", args.question, choices, "", "", args.image, "", "", meta)
    model, features = models[0] if config["model"] == "paligemma" else None, None
    if model or config["vision"] == "detr":
        extract, pixels, size = eyes(config, model)
        seen = (
            pixels(data.open_image(args.image), size) if args.image else torch.zeros(3, size, size)
        )
        rows = {"asked": 0} if args.image else {}
        features = data.Features(extract([seen])[0][None].half().numpy(), rows)  # as cached
    told = predict(models, [problem], config, tokenizer, features)[0]
    if "rationale" in told and not model:  # PaliGemma's is a part of its response
        print(told["rationale"])
    read = grade(problem, told["response"]).parsed
    choice = f"  ({choices[ord(read) - 65]})" if choices and read else ""
    print(told["response"] + choice)


# --- command line
def score_file(args):
    """Metrics of --predictions on --data; the graded file goes to --out."""
    problems = data.load(args.data, args.split or "test")
    predictions = read_predictions(args.predictions, problems)
    faithful, partial = args.faithful_parse, args.partial
    scores = metrics(problems, predictions, faithful, args.rationale_format, partial)
    if args.out:
        write_graded(args.out, grade_all(problems, predictions, faithful, partial), scores)
    return scores


def parse_args(argv=None):
    parser = argparse.ArgumentParser(prog="eval.py", description=__doc__.split("\n")[0])
    runs = parser.add_argument_group("runs")
    runs.add_argument("runs", nargs="*", metavar="RUN", help="run folders, shown side by side")
    again = "decode even if the run has its predictions already"
    runs.add_argument("--decode", action="store_true", help=again)
    forced = "also score the arg-max of teacher-forced logits, as the first published commands did"
    runs.add_argument("--teacher-forced", action="store_true", help=forced)
    runs.add_argument("--limit", type=int, metavar="N", help="only the first N problems")
    runs.add_argument("--device", help="cpu or cuda; the run's own by default")
    one = parser.add_argument_group("one question to a run")
    one.add_argument("--question", metavar="TEXT", help="ask this instead of scoring")
    one.add_argument("--image", metavar="FILE", help="the picture it is about")
    one.add_argument("--choices", nargs="+", metavar="TEXT", help="the answers to choose from")
    file = parser.add_argument_group("anybody's predictions")
    file.add_argument("--predictions", metavar="FILE", help="JSONL with id and response")
    file.add_argument("--data", metavar="DIR", help="the problems they answer: a folder or a name")
    file.add_argument("--split", help="split to score (a run's own, else test)")
    file.add_argument("--out", metavar="DIR", help="write graded predictions and metrics.json here")
    file.add_argument("--partial", action="store_true", help="accept problems without prediction")
    how = parser.add_argument_group("scoring")
    guess = "guess among A-E what cannot be read, as the original did"
    how.add_argument("--faithful-parse", action="store_true", help=guess)
    gold = "prompt format whose target rationales are compared with (%(default)s)"
    how.add_argument("--rationale-format", default="QCM-LE", metavar="FORMAT", help=gold)
    how.add_argument("--markdown", action="store_true", help="print the table as markdown")
    args = parser.parse_args(argv)
    if bool(args.runs) == bool(args.predictions) or bool(args.data) != bool(args.predictions):
        parser.error("give run folders, or --predictions FILE together with --data DIR")
    return args


def main(argv=None):
    args = parse_args(argv)
    if args.question:
        return ask(args.runs[0], args)
    columns = {run: score_run(run, args) for run in args.runs}
    if args.predictions:
        columns[args.predictions] = score_file(args)
    print(table(columns, args.markdown))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"eval.py: {error}")
