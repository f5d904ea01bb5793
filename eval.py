"""Scoring: from what a model said to a table somebody else can check.

Implements decoding for both systems: `predict` turns problems into predictions with a run's models,
`evaluate` those into a table and the files of a run folder; of PaliGemma with a budget for the
rationale, a stop for loops, a forced "Answer:" and the vote of several samples (self-consistency,
Wang et al. 2022, arXiv 2203.11171). `ask` puts one question to a run.

One walks from here into support/: an answer is read and graded in grading.py; why it fails or
succeeds is in kinds.py, the text scores of its rationale in rouge.py; many answers become numbers
in metrics.py and rows in tables.py; looking.py has what the models looked at, report.py the page,
loading.py a run's models and pictures, decoding.py what stands around decoding.

Two rules. A response that cannot be read is a failure, counted and shown, never a guess (the
original's guess is there to be compared with: `--faithful-parse`). A score is about a named set of
problems: missing, unknown and repeated predictions are errors.

Left out: beams, as both systems decode greedily or sample; an answer by the likelihood of choices.
"""

import argparse
import json
import sys
from collections import Counter
from functools import partial
from pathlib import Path

import torch

import data
import fusion
from model import of_all_ranks, rank, resolve
from support import files
from support.dataset import images as pictures
from support.dataset.choices import LETTERS
from support.dataset.tokenizers import load_tokenizer, plain_ids
from support.distributed import check_device
from support.evaluation import errors as kinds
from support.evaluation.decode_cache import (
    Part,
    before_loop,
    in_batches,
    paligemma_inputs,
    printer,
    prolonged,
)
from support.evaluation.grading import CUE, grade
from support.evaluation.grading import (
    Grade as Grade,  # what `grade` gives, for who imports this file
)
from support.evaluation.looking import LOOKS, looks
from support.evaluation.metrics import grade_all, metrics_of, rationale_scores
from support.evaluation.models import asked_features, image_features, load_paligemma
from support.evaluation.report import write_report
from support.evaluation.tables import (
    Column,
    differences,
    graded_folder,
    metrics_then,
    read_predictions,
    table,
    write_graded,
)
from support.teachers import judging
from support.training.examples import bad_records
from support.training.folders import run_config


# --- decoding a run
def predict(models, problems, config, tokenizer, features, on_token=None, part=None):
    """Decode problems with a run's models: one, or rationale and answer. Predictions in order; of
    PaliGemma with their "ids". `on_token` is as in `model.decode`, and hears no votes. Batches that
    a `Part` has are not decoded again."""
    how = {"on_token": on_token, "part": part}
    if config["model"] == "paligemma":
        return paligemma_predict(models[0], problems, config, tokenizer, features, **how)
    formats, lengths = fusion.RECIPES[config["recipe"]], config["max_output"]

    def make_batches(generated=None):
        fmt = formats[0] if generated is None else formats[-1]
        examples = data.examples(
            problems,
            fmt,
            tokenizer,
            features,
            generated,
            max_input=config["max_input"],
            max_output=lengths[0] if generated is None else lengths[-1],
            captions=config["vision"] == "caption",
            faithful=config["faithful_text"],
        )
        return in_batches(examples, config["eval_batch_size"], f"{fmt} decoded")

    if len(formats) == 2:
        limits = (lengths[0], lengths[-1])
        told = fusion.two_stage(*models, make_batches, tokenizer, limits, **how)
    else:
        texts = fusion.write(models[0], make_batches(), tokenizer, lengths[0], **how)
        told = {i: {"response": t.pop("text")} | t for i, t in texts.items()}
    return [{"id": p.id} | told[p.id] for p in problems]


# --- decoding PaliGemma: rationale and answer in one text
def paligemma_predict(model, problems, config, tokenizer, features, **how):
    """Predictions in order. With config["samples"] > 1 each is the first of several sampled texts
    that gives the answer most of them give (self-consistency, arXiv 2203.11171); "votes" has all.
    A text without a readable answer has no vote. `how` as in `continued`."""
    if config["samples"] == 1:
        told = paligemma_write(model, problems, config, tokenizer, features, **how)
        return [{"id": p.id} | told[p.id] for p in problems]
    runs, how = [], how | {"on_token": None}  # nobody hears the votes
    for sample in range(config["samples"]):
        drawn = config | {"seed": config["seed"] + sample}
        runs.append(paligemma_write(model, problems, drawn, tokenizer, features, **how))
    predictions = []
    for p in problems:
        parsed = [grade(p, run[p.id]["response"]).parsed for run in runs]
        votes = Counter(x for x in parsed if x is not None)
        best = votes.most_common(1)[0][0] if votes else None
        chosen = runs[parsed.index(best)][p.id]
        tokens = sum(run[p.id]["tokens"] for run in runs)
        predictions.append({"id": p.id} | chosen | {"tokens": tokens, "votes": dict(votes)})
    return predictions


def paligemma_write(model, problems, config, tokenizer, features, **how):
    """{id: {"response", "ids", "rationale"?, "stop", "tokens"}}; `how` as in `continued`.

    A reasoning run has a budget for the rationale, and a detector for one that repeats itself; see
    `forced` for a text that does not get to its answer. The rationale is what stands before the
    last "Answer:". "ids" are what the model wrote, without <eos>.
    """
    reasons, budgets = config["recipe"] == "reason", config["max_output"]
    rows = [data.TrainRow(p, config["recipe"], has_suffix=False) for p in problems]
    made = data.pali_examples(
        rows,
        tokenizer,
        features,
        max_suffix=config["max_suffix"],
        layout=config.get("layout", "paligemma"),
    )
    examples = {e["id"]: e for e in made}
    loops = reasons and config["loop_stop"]
    first = budgets[0] if reasons else budgets[-1]
    told = continued(model, examples.values(), tokenizer, config, first, loops=loops, **how)
    if reasons and config["force_answer"]:
        told |= forced(model, told, examples, tokenizer, config, **how)
    for t in told.values() if reasons else ():
        before, cue, rest = t["response"].rpartition(CUE)
        t["rationale"] = (before if cue else rest).strip()
    return told


def forced(model, told, examples, tokenizer, config, **how):
    """Those of `told` anew that did not get to their "Answer:" by themselves: each is given that
    word and goes on from there, at most the answer's budget. Its stop is "forced", "forced_after"
    says what came before, and "ids" are those the answer was written behind (of a loop, one round)
    and the answer's."""
    cue = plain_ids(tokenizer, f"\n{CUE}")
    image = model.config.image_token_index  # has it said one, no picture belongs to it
    cut = {i: before_loop(t["ids"]) for i, t in told.items() if CUE not in t["response"]}
    cut = {i: [x for x in ids if x != image] for i, ids in cut.items()}
    more = [prolonged(examples[i], ids + cue) for i, ids in cut.items()]
    anew, answers = {}, continued(model, more, tokenizer, config, config["max_output"][-1], **how)
    for i, answer in answers.items():
        before = told[i]
        response = f"{before['response'].rstrip()}\n{CUE}{answer['response']}"
        tokens = before["tokens"] + answer["tokens"]
        stops = {"stop": "forced", "forced_after": before["stop"]}
        ids = cut[i] + cue + answer["ids"]
        anew[i] = before | {"response": response, "ids": ids, "tokens": tokens} | stops
    return anew


def continued(model, examples, tokenizer, config, budget, loops=False, on_token=None, part=None):
    """{id: {"response", "ids", "stop", "tokens"}}: what the model writes behind each example, at
    most `budget` tokens; `loops`: stopped if it repeats itself. `on_token`, `part` as in `predict`.
    """
    device, told = model.language_model.embed_tokens.weight.device, []
    heat, examples = config["temperature"], list(examples)
    for batch in in_batches(examples, config["eval_batch_size"], "decoded", data.pali_collate):
        what = [budget, loops, heat, config["seed"], batch["ids"], batch["input_ids"].tolist()]
        # Seeded by what the batch is: a sample is the same whatever was decoded before it.
        seed = int(files.digest(what)[:12], 16)
        draw = {"temperature": heat, "generator": torch.Generator(device).manual_seed(seed)}
        given = (model, batch, tokenizer, budget, loops, draw | {"on_token": on_token})
        told.append(part.batch(what, continue_batch, *given) if part else continue_batch(*given))
    return of_all_ranks(told)


def continue_batch(model, batch, tokenizer, budget, loops, how):
    """What `continued` gives, of one batch; `how` as in `model.decode`."""
    device, told = model.language_model.embed_tokens.weight.device, {}
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


# --- scoring
def about(where, split, rationale_format, faithful=False):
    """What metrics are of: they say so in metrics.json and at the head of the table."""
    of = {"data": str(where), "split": split, "rationale_format": rationale_format}
    return of | ({"faithful_parse": True} if faithful else {})


def assess(graded, of, config=None, judge=None):
    """(metrics, graded with kinds) of what `grade_all` gives: the one way, whether it was decoded
    just now, before, or elsewhere. `of`: see `about`; `config`: of the run, if it is one's;
    `judge`: see `kinds.refine`."""
    facts = kinds.scene_facts(of["data"])
    graded = kinds.explained(graded, facts, kinds.known_types(config) if config else None)
    if judge:
        graded = kinds.refine(graded, judge)
    scores = metrics_of(graded, "faithful_parse" in of, of["rationale_format"], facts)
    return scores | of, graded


def judge_of(spec, folder):
    """What asks the --judge SPEC about (problem, thought, answer) items; None without one. Its
    verdicts are kept in the folder's judge.jsonl."""
    if not spec:
        return None
    return partial(judging.judge_many, spec=spec, cache=Path(folder) / "judge.jsonl")


def target_format(config):
    """A teacher's thought, which PaliGemma learns, has another form than the gold solution."""
    return "QCM-LE" if config["model"] == "mmcot" else None


def evaluate(folder, models, problems, config, tokenizer, features, flags):
    """Decode, grade, write predictions.jsonl and metrics.json into the run folder; the metrics.

    `flags` has faithful_parse, teacher_forced, looks and report, and what was skipped,
    {split: count} or None. Interrupted decoding is gone on with (see `Part`). Under torchrun all
    processes decode, and the first one writes."""
    part = Part(folder, models)
    written = predict(models, problems, config, tokenizer, features, part=part)
    predictions = [{k: v for k, v in x.items() if k != "ids"} for x in written]
    graded = grade_all(problems, predictions, flags.faithful_parse)
    fmt = target_format(config)
    of = about(config["data"], config["test_split"], fmt, flags.faithful_parse)
    scores, graded = assess(graded, of, config)
    if flags.teacher_forced and len(models) == 2:
        rouge = teacher_forced_rouge(models[0], problems, config, tokenizer, features)
        scores["rougeL_teacher_forced"] = rouge
    if flags.skipped is not None:
        scores["skipped"] = flags.skipped
    if rank():
        return scores
    write_graded(folder, graded, scores)
    some = (problems[: flags.looks], written[: flags.looks])
    seen = looks(config, models, *some, tokenizer, features) if flags.looks else {}
    (Path(folder) / "looks.json").write_text(json.dumps(seen) + "\n", encoding="utf-8")
    if flags.report:
        write_report(folder, {str(folder): Column(scores, graded, Path(folder))})
    part.remove()
    return scores


def teacher_forced_rouge(model, problems, config, tokenizer, features):
    """ROUGE-L of arg-max logits that read the gold rationale: what the first published commands
    scored, and stage 2 then read. Shown to be compared with; nothing here uses these texts."""
    examples = data.examples(
        problems,
        "QCM-LE",
        tokenizer,
        features,
        max_input=config["max_input"],
        max_output=config["max_output"][0],
        captions=config["vision"] == "caption",
        faithful=config["faithful_text"],
    )
    batches = in_batches(examples, config["eval_batch_size"], "teacher-forced")
    texts = fusion.teacher_forced(model, batches, tokenizer)
    graded = [(p, {"rationale": texts[p.id]}, None) for p in problems]
    return rationale_scores(graded, "QCM-LE")["rougeL"]


# --- run folders
def load_run(folder, device=None):
    """(config, models, tokenizer) of a run folder."""
    folder = Path(folder)
    config = run_config(folder)
    if not config:
        raise FileNotFoundError(f"{folder} is no run folder: it has no config.json.")
    if lacks := sorted({"recipe", "data", "device", "weights"} - config.keys()):
        raise ValueError(f"{folder}/config.json has no {', '.join(lacks)}: it cannot decode.")
    config["device"] = device or config["device"]
    check_device(config["device"])
    if config["model"] == "paligemma":
        where = resolve(config["weights"][0])
        return config, [load_paligemma(config, folder)], load_tokenizer(where)
    stages = [folder / name for name in fusion.stage_names(config["recipe"])]
    models = [fusion.MultimodalT5.from_pretrained(s).to(config["device"]) for s in stages]
    return config, models, load_tokenizer(stages[0])


def decode_run(folder, out, split, args):
    """Decode a split with the models of a run folder; `evaluate` writes what it gives to `out`."""
    config, models, tokenizer = load_run(folder, args.device)
    bad = bad_records(config)
    problems = data.load(config["data"], split, bad)[: args.limit]
    model = models[0] if config["model"] == "paligemma" else None
    features = image_features(config, problems, model, bad)
    lost = bad and {id for id, _ in bad}
    problems = [p for p in problems if not bad or p.id not in lost]
    skipped = None if bad is None else {split: len(bad)}
    more = {"report": False, "skipped": skipped}  # `main` writes one report, of all columns
    flags = argparse.Namespace(**vars(args) | more)
    evaluate(out, models, problems, config | {"test_split": split}, tokenizer, features, flags)


def score_run(folder, args):
    """The `Column` of a run folder on --split (by default the run's own). Another split gets a
    folder in the run's. The run's models decode if they have not, or with --decode."""
    folder = Path(folder)
    config = run_config(folder)
    own = config.get("test_split") or metrics_then(folder, False).get("split", "test")
    split = args.split or own
    out = folder if split == own else folder / split
    there = (out / "predictions.jsonl").is_file() or metrics_then(out)
    if decodes := args.decode or args.teacher_forced or not there:
        decode_run(folder, out, split, args)
    shown_only = not decodes and (args.limit or args.faithful_parse)
    return graded_anew(out, split, config, args, shown_only)


def graded_anew(out, split, config, args, shown_only):
    """The `Column` of the predictions in a folder, graded again, so that all columns are read by
    the same rules; if `shown_only`, nothing is written. Where the problems, or the predictions, are
    not at hand the metrics are those of then."""
    then, whole = metrics_then(out, False), metrics_then(out)
    faithful = args.faithful_parse or not config and then.get("faithful_parse", False)
    where = config.get("data") or then.get("data", "(no data named)")
    fmt = target_format(config) if config else then.get("rationale_format")
    try:
        problems = data.load(where, split, bad_records(config))
        graded = graded_folder(out, problems[: args.limit], faithful, args.limit)
    except FileNotFoundError as error:
        if shown_only or not whole:
            raise
        print(f"{out}: shown as graded then, as now {error}", file=sys.stderr)
        return Column(then)
    if not args.limit and len(graded) < len(problems):
        some = f"{len(graded)} of the {len(problems)} problems of {split}"
        print(f"{out} has predictions of {some}.", file=sys.stderr)
    of = about(where, split, fmt, faithful)
    scores, graded = assess(graded, of, config, judge_of(args.judge, out))
    if whole.get("n") == scores["n"]:  # what predictions do not say
        kept = ("rougeL_teacher_forced", "skipped")
        scores |= {key: whole[key] for key in kept if key in whole}
    if not shown_only and scores != then:
        write_graded(out, graded, scores)
    return Column(scores, graded, None if shown_only else out)


# --- one question
def ask(folder, args):
    """One question about one picture (or none) in the terminal, the text as it is written. Why it
    stopped is said on stderr, unless it came to its end by itself."""
    choices = tuple(args.choices or ())
    if len(choices) > len(LETTERS):
        raise ValueError(f"{len(choices)} choices are too many: the letters are {LETTERS}.")
    picture = pictures.open_image(args.image) if args.image else None
    config, models, tokenizer = load_run(folder, args.device)
    model = models[0] if config["model"] == "paligemma" else None
    meta = {"answer_index": 0, "caption": ""}  # unknown: only the unused target has it
    problem = data.Problem("asked", args.question, choices, "", "", args.image, "", "", meta)
    features = asked_features(config, models, picture)
    if picture and features is None:
        print("(this run looks at no pictures)", file=sys.stderr)
    show = printer(tokenizer, f"\n{CUE}" if model else "\n")
    told = predict(models, [problem], config, tokenizer, features, show)[0]
    if config.get("samples", 1) > 1:  # several texts with a vote each, of which this one was chosen
        print(told["response"], end="")
    read = grade(problem, told["response"]).parsed if choices else None
    print(f"  ({choices[LETTERS.index(read)]})" if read else "", flush=True)
    if told["stop"] == "forced":
        print(f"(stopped: {told['forced_after']}; then made to answer)", file=sys.stderr)
    elif told["stop"] != "eos":
        print(f"(stopped: {told['stop']})", file=sys.stderr)


# --- command line
def score_file(args):
    """The `Column` of --predictions on --data; the graded file goes to --out."""
    split = args.split or "test"
    problems = data.load(args.data, split)
    predictions = read_predictions(args.predictions, problems)
    if args.limit:
        problems = problems[: args.limit]
        ids = {p.id for p in problems}
        predictions = [x for x in predictions if x["id"] in ids]
    graded = grade_all(problems, predictions, args.faithful_parse, args.partial)
    of = about(args.data, split, args.rationale_format, args.faithful_parse)
    judge = judge_of(args.judge, args.out or Path(args.predictions).parent)
    scores, graded = assess(graded, of, judge=judge)
    if args.out:
        write_graded(args.out, graded, scores)
    return Column(scores, graded, args.out and Path(args.out))


def positive(text):
    """An argparse type: a whole number from 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not a positive number")
    return number


def parse_args(argv=None):
    parser = argparse.ArgumentParser(prog="eval.py", description=__doc__.split("\n")[0])
    runs = parser.add_argument_group("runs")
    runs.add_argument("runs", nargs="*", metavar="RUN", help="run folders, shown side by side")
    again = "decode even if the run has its predictions already"
    runs.add_argument("--decode", action="store_true", help=again)
    forced = "also score the arg-max of teacher-forced logits, as the first published commands did"
    runs.add_argument("--teacher-forced", action="store_true", help=forced)
    runs.add_argument("--limit", type=positive, metavar="N", help="only the first N problems")
    looked = "of the first N decoded problems keep what the model looked at (%(default)s; 0: off)"
    runs.add_argument("--looks", type=int, default=LOOKS, metavar="N", help=looked)
    runs.add_argument("--device", help="cpu or cuda; the run's own by default")
    one = parser.add_argument_group("one question to a run")
    one.add_argument("--question", metavar="TEXT", help="ask this instead of scoring")
    one.add_argument("--image", metavar="FILE", help="the picture it is about")
    one.add_argument("--choices", nargs="+", metavar="TEXT", help="the answers to choose from")
    file = parser.add_argument_group("anybody's predictions")
    lines = "JSONL with id and response, MathVista's {pid: {response}} or mm-cot's own file"
    file.add_argument("--predictions", metavar="FILE", help=lines)
    file.add_argument("--data", metavar="DIR", help="the problems they answer: a folder or a name")
    file.add_argument("--split", help="split to score (a run's own, else test)")
    file.add_argument("--out", metavar="DIR", help="write graded predictions and metrics.json here")
    file.add_argument("--partial", action="store_true", help="accept problems without prediction")
    how = parser.add_argument_group("scoring")
    guess = "guess among A-E what cannot be read, as the original did"
    how.add_argument("--faithful-parse", action="store_true", help=guess)
    gold = "prompt format whose target rationales are compared with (%(default)s)"
    how.add_argument("--rationale-format", default="QCM-LE", metavar="FORMAT", help=gold)
    judge = "model that looks why answers fail and succeed (as teacher.py --judge), or demo"
    how.add_argument("--judge", metavar="SPEC", help=judge)
    how.add_argument("--markdown", action="store_true", help="print the table as markdown")
    rows = "also the table's rows by source, question type, category, language and grade"
    how.add_argument("--all-rows", action="store_true", help=rows)
    report = "write no report.html into the first run's folder, or --out"
    how.add_argument("--no-report", dest="report", action="store_false", help=report)
    args = parser.parse_args(argv)
    if bool(args.runs) == bool(args.predictions) or bool(args.data) != bool(args.predictions):
        parser.error("give run folders, or --predictions FILE together with --data DIR")
    asks = any(x is not None for x in (args.question, args.image, args.choices))
    if asks and (not args.question or len(args.runs) != 1):
        parser.error("--image and --choices go with --question TEXT, which is asked of one RUN")
    return args


def main(argv=None):
    args = parse_args(argv)
    if args.question:
        return ask(args.runs[0], args)
    columns = {run: score_run(run, args) for run in args.runs}
    if args.predictions:
        columns[args.predictions] = score_file(args)
    scores = {name: column.scores for name, column in columns.items()}
    print(table(scores, args.markdown, args.all_rows))
    if words := differences(columns)[1]:
        print(f"\n{words}")
    folder = next(iter(columns.values())).folder
    if args.report and folder:  # nothing is written of what was only shown
        write_report(folder, columns)
        print(f"\nto read on: {folder / 'report.html'}")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f"eval.py: {error}")
