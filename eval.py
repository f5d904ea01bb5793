"""Scoring: from the text that a model wrote to a table that others can check.

`predict` turns problems into predictions with a run's models, `evaluate` those into a table and the
files of a run folder, `regrade` grades what is there; `ask` puts one question to a run. A response
that cannot be read is a failure, counted and shown, never a guess (`--faithful-parse` makes the
original's guesses, for comparison).
"""

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from tokenizers import Tokenizer

import data
import fusion
from data import ImageSource, Problem
from model import DETR
from support import files, kernels
from support.checkpoints.hub import resolve
from support.dataset import images
from support.dataset.choices import LETTERS
from support.dataset.tokenizers import load_tokenizer
from support.distributed import check_device, gather_dicts, rank
from support.evaluation import decoding, errors, tables
from support.evaluation.decode_cache import DecodeCache
from support.evaluation.errors import Graded
from support.evaluation.grading import CUE, grade
from support.evaluation.grading import Grade as Grade  # what `grade` gives, for notebooks
from support.evaluation.metrics import grade_all, metrics_of, rationale_scores
from support.evaluation.models import (
    Settings,
    image_features,
    load_paligemma,
    load_problems,
    prompt_examples,
    question_features,
    stage_examples,
)
from support.evaluation.report import detected_objects, fusion_maps, paligemma_maps, write_report
from support.evaluation.tables import Column
from support.teachers import filters
from support.training.settings import read_config, read_settings

ATTENTION_MAPS = 24  # problems whose attention maps are kept


# --- decoding a run
def predict(
    models: list[torch.nn.Module],
    problems: list[Problem],
    settings: Settings,
    tokenizer: Tokenizer,
    features: ImageSource | None,
    on_token: decoding.OnToken | None = None,
    cache: DecodeCache | None = None,
) -> list[dict]:
    """Decode problems with a run's models: one, or rationale and answer. Predictions in order; of
    PaliGemma with their "ids". `on_token` is as in `model.decode`, and hears no votes."""
    decoder = decoding.Decoder(models[0], tokenizer, settings.eval_batch_size, cache, on_token)

    def write_stage(stage: int, rationales: dict | None = None) -> dict[str, dict]:
        stage_decoder = replace(decoder, model=models[stage])
        return stage_decoder.stage_texts(settings, stage, problems, features, rationales)

    if settings.model == "paligemma":
        examples = prompt_examples(settings, problems, tokenizer, features)
        decoder = replace(decoder, temperature=settings.temperature, seed=settings.seed)
        if settings.samples == 1:
            results = decoder.paligemma_texts(examples, settings)
        else:
            seeds = range(settings.seed, settings.seed + settings.samples)
            voters = [replace(decoder, seed=seed, on_token=None) for seed in seeds]
            texts = [voter.paligemma_texts(examples, settings) for voter in voters]
            results = decoding.majority(problems, texts)
    elif len(models) == 2:
        results = fusion.two_stage(partial(write_stage, 0), partial(write_stage, -1))
    else:
        results = {i: {"response": x.pop("text")} | x for i, x in write_stage(0).items()}
    return [{"id": p.id} | results[p.id] for p in problems]


# --- scoring
def about(
    where: str | Path, split: str, fmt: str | None, faithful: bool = False, strict: bool = False
) -> dict[str, str | bool | None]:
    """What metrics are about: they say so in metrics.json and at the head of the table."""
    subject = {"data": str(where), "split": split, "rationale_format": fmt}
    rules = {"faithful_parse": faithful, "strict_parse": strict}
    return subject | {key: True for key in rules if rules[key]}


def assess(
    graded: list[Graded], subject: dict, config: dict | None = None, judge: Callable | None = None
) -> tuple[dict, list[Graded]]:
    """(metrics, graded with kinds) of what `grade_all` returns. `subject`: see `about`; `config`:
    the run's whose predictions these are, if any; `judge`: see `errors.refine`."""
    facts = errors.scene_facts(subject["data"])
    known = None
    if config and (any(config.get("epochs", ())) or config.get("adapter")):  # it was trained
        skip = config.get("on_error") == "skip"
        trained_on = config.get("data", subject["data"])
        known = errors.known_types(trained_on, config.get("traces"), skip)
    graded = errors.classify_all(graded, facts, known)
    if judge:
        graded = errors.refine(graded, judge)
    faithful = "faithful_parse" in subject
    return metrics_of(graded, faithful, subject["rationale_format"], facts) | subject, graded


def judge_of(spec: str | None, folder: str | Path) -> Callable | None:
    """The judge of --judge SPEC, its verdicts kept in the folder's judge.jsonl; None without."""
    cache = Path(folder) / "judge.jsonl"
    return partial(filters.judge_many, spec=spec, cache=cache) if spec else None


def target_format(model: str, recipe: str | None) -> str | None:
    """The prompt format whose target the rationales of a run learned: mmcot's stage 1. A teacher's
    rationale, which PaliGemma learns, has another form than the gold solution."""
    if model != "mmcot":
        return None
    formats = fusion.RECIPES.get(recipe, ())
    return formats[0] if len(formats) == 2 else "QCM-LE"


def evaluate(
    folder: str | Path,
    models: list[torch.nn.Module],
    problems: list[Problem],
    settings: Settings,
    tokenizer: Tokenizer,
    features: ImageSource | None,
    *,
    faithful_parse: bool = False,
    teacher_forced: bool = False,
    attention_maps: int = ATTENTION_MAPS,
    report: bool = True,
    skipped: dict[str, int] | None = None,
) -> dict:
    """Decode, grade, write predictions.jsonl and metrics.json into the run folder; the metrics.

    `attention_maps` of so many problems go into looks.json; `skipped` {split: count} into the
    metrics. Interrupted decoding resumes (see `DecodeCache`). Under torchrun all processes decode,
    and the first one writes."""
    folder = Path(folder)
    cache = DecodeCache(folder, models)
    written = predict(models, problems, settings, tokenizer, features, cache=cache)
    predictions = [{k: v for k, v in x.items() if k != "ids"} for x in written]
    if not data.has_answers(problems):  # `regrade` writes them for the leaderboard
        if not rank():
            with files.atomic_write(folder / "predictions.jsonl") as file:
                file.writelines(json.dumps(x) + "\n" for x in predictions)
            cache.remove()
        return {}
    fmt = target_format(settings.model, settings.recipe)
    subject = about(settings.data, settings.test_split, fmt, faithful_parse)
    graded = grade_all(problems, predictions, faithful_parse)
    scores, graded = assess(graded, subject, vars(settings))
    if teacher_forced and len(models) == 2:
        # What the first published commands scored; shown to be compared with.
        examples = stage_examples(settings, problems, fmt, tokenizer, features)
        batches = decoding.in_batches(examples, settings.eval_batch_size, "teacher-forced")
        texts = [fusion.teacher_forced_texts(models[0], batch, tokenizer) for batch in batches]
        by_id = gather_dicts(texts)
        rationales = [(p, {"rationale": by_id[p.id]}, None) for p in problems]
        scores["rougeL_teacher_forced"] = rationale_scores(rationales, fmt)["rougeL"]
    if skipped is not None:
        scores["skipped"] = skipped
    if rank():
        return scores
    tables.write_graded(folder, graded, scores)
    first = (problems[:attention_maps], written[:attention_maps])
    maps = attention_maps_of(models, *first, settings, tokenizer, features) if first[0] else {}
    (folder / "looks.json").write_text(json.dumps(maps) + "\n", encoding="utf-8")
    if report:
        write_report(folder, {str(folder): Column(scores, graded, folder)})
    cache.remove()
    return scores


def attention_maps_of(
    models: list[torch.nn.Module],
    problems: list[Problem],
    predictions: list[dict],
    settings: Settings,
    tokenizer: Tokenizer,
    features: ImageSource | None,
) -> dict:
    """{id: `fusion_maps` or `paligemma_map`} of these problems and the predictions `predict`
    returned for them; {} for models that read no images. Kernels are off: they do not call what
    the hooks listen to."""
    if settings.model == "paligemma":
        examples = prompt_examples(settings, problems, tokenizer, features)
        ids = {x["id"]: x["ids"] for x in predictions}
        with kernels.plain_formulas(models[0]):
            return paligemma_maps(models[0], examples, ids, tokenizer)
    if features is None:
        return {}
    rationales = {x["id"]: x.get("rationale") for x in predictions}
    formats = fusion.RECIPES[settings.recipe]
    stages = {}
    for stage, fmt in zip(fusion.stage_names(settings.recipe), formats, strict=True):
        generated = rationales if "G" in fmt else None
        stages[stage] = stage_examples(settings, problems, fmt, tokenizer, features, generated)
    own_detr = settings.vision == "detr" and not settings.features
    detr = DETR.from_pretrained(resolve(settings.vision_weights)) if own_detr else None
    objects = detected_objects(problems, features, detr)
    return fusion_maps(models, stages, objects, tokenizer, settings.eval_batch_size)


# --- run folders
def load_run(
    folder: str | Path,
    device: str | None = None,
    split: str | None = None,
    plain: bool | None = None,
) -> tuple[Settings, list[torch.nn.Module], Tokenizer]:
    """(settings, models, tokenizer) of a run folder; what is not None replaces the run's own."""
    folder = Path(folder)
    changed = {"device": device, "test_split": split, "plain": plain}
    changed = {name: value for name, value in changed.items() if value is not None}
    settings = replace(read_settings(folder), **changed)
    check_device(settings.device)
    if settings.model == "paligemma":
        models = [load_paligemma(settings, folder)]
        tokenizer = load_tokenizer(resolve(settings.weights[0]))
    else:
        stages = [folder / name for name in fusion.stage_names(settings.recipe)]
        models = [fusion.MultimodalT5.from_pretrained(s).to(settings.device) for s in stages]
        tokenizer = load_tokenizer(stages[0])
    if not settings.plain:
        for model in models:
            kernels.enable(model)
    return settings, models, tokenizer


def score_run(folder: str | Path, args: argparse.Namespace) -> Column | None:
    """The `Column` of a run folder on --split (by default the run's own). Another split gets a
    folder in the run's. The run's models decode if they have not, or with --decode. None where the
    answers are not public."""
    folder = Path(folder)
    config = read_config(folder)
    own = config.get("test_split") or tables.stored_metrics(folder).get("split", "test")
    split = args.split or own
    out = folder if split == own else folder / split
    scored = (out / "predictions.jsonl").is_file() or tables.read_metrics(out)
    decodes = args.decode or args.teacher_forced or not scored
    if decodes:
        settings, models, tokenizer = load_run(folder, args.device, split, args.plain)
        bad = [] if settings.on_error == "skip" else None
        problems = load_problems(settings, split, bad)[: args.limit]
        model = models[0] if settings.model == "paligemma" else None
        features = image_features(settings, problems, model, bad)
        lost = {problem_id for problem_id, _ in bad or ()}
        evaluate(
            out,
            models,
            [p for p in problems if p.id not in lost],
            settings,
            tokenizer,
            features,
            faithful_parse=args.faithful_parse,
            teacher_forced=args.teacher_forced,
            attention_maps=args.looks,
            report=False,  # `main` writes one report, of all columns
            skipped=None if bad is None else {split: len(bad)},
        )
    store = decodes or not (args.limit or args.faithful_parse or args.strict_parse)
    return regrade(out, split, config, args, store)


def regrade(
    folder: Path, split: str, config: dict, args: argparse.Namespace, store: bool
) -> Column | None:
    """The `Column` of the predictions in a folder, graded again, so that all columns are read by
    the same rules; without `store` nothing is written. `config`: of the run, {} if it is none.
    Where the problems or the predictions are gone, the stored metrics are shown; where no answer
    is public, the predictions are written for the leaderboard."""
    stored = tables.stored_metrics(folder)
    complete = tables.read_metrics(folder)
    where = config.get("data") or stored.get("data", "(no data named)")
    fmt = stored.get("rationale_format")
    if config:
        fmt = target_format(config["model"], config.get("recipe"))
    faithful = args.faithful_parse or not config and stored.get("faithful_parse", False)
    strict = args.strict_parse or not config and stored.get("strict_parse", False)
    try:
        problems = data.load(where, split, [] if config.get("on_error") == "skip" else None)
        some = problems[: args.limit]
        if not data.has_answers(some):
            return tables.write_leaderboard(folder, some)
        graded = tables.graded_folder(folder, some, faithful, args.limit, strict)
    except FileNotFoundError as error:
        if not (store and complete):
            raise
        print(f"{folder}: its stored metrics are shown, as {error}", file=sys.stderr)
        return Column(complete)
    if not args.limit and len(graded) < len(problems):
        some = f"{len(graded)} of the {len(problems)} problems of {split}"
        print(f"{folder} has predictions of {some}.", file=sys.stderr)
    judge = judge_of(args.judge, folder)
    scores, graded = assess(graded, about(where, split, fmt, faithful, strict), config, judge)
    if complete.get("n") == scores["n"]:
        # Predictions do not have these two.
        kept = ("rougeL_teacher_forced", "skipped")
        scores |= {key: complete[key] for key in kept if key in complete}
    if store and scores != stored:
        tables.write_graded(folder, graded, scores)
    return Column(scores, graded, folder if store else None)


# --- one question
def ask(args: argparse.Namespace) -> None:
    """One question about one image (or none) in the terminal, the text as it is written. Why it
    stopped is printed on stderr, unless it came to its end by itself."""
    choices = args.choices or []
    if len(choices) > len(LETTERS):
        raise ValueError(f"{len(choices)} choices are too many: the letters are {LETTERS}.")
    image = images.open_image(args.image) if args.image else None
    settings, models, tokenizer = load_run(args.runs[0], args.device, plain=args.plain)
    meta = {"answer_index": 0, "caption": ""}  # unknown: only the unused target has it
    problem = Problem("asked", args.question, tuple(choices), "", "", args.image, "", "", meta)
    features = question_features(settings, models, image)
    if image and features is None:
        print("(this run reads no images)", file=sys.stderr)
    between = f"\n{CUE}" if settings.model == "paligemma" else "\n"
    show = decoding.token_printer(tokenizer, between)
    [result] = predict(models, [problem], settings, tokenizer, features, show)
    if "votes" in result:  # several texts with a vote each, of which this one was chosen
        print(result["response"], end="")
    parsed = grade(problem, result["response"]).parsed if choices else None
    print(f"  ({choices[LETTERS.index(parsed)]})" if parsed else "", flush=True)
    if result["stop"] == "forced":
        print(f"(stopped: {result['forced_after']}; then made to answer)", file=sys.stderr)
    elif result["stop"] != "eos":
        print(f"(stopped: {result['stop']})", file=sys.stderr)


# --- command line
def score_file(args: argparse.Namespace) -> Column:
    """The `Column` of --predictions on --data; the graded file goes to --out."""
    split = args.split or "test"
    problems = data.load(args.data, split)
    if not data.has_answers(problems):
        raise ValueError(f"The answers of {args.data}'s {split} are not public: nothing is scored.")
    predictions = tables.read_predictions(args.predictions, problems)
    if args.limit:
        problems = problems[: args.limit]
        ids = {p.id for p in problems}
        predictions = [x for x in predictions if x["id"] in ids]
    faithful = args.faithful_parse
    graded = grade_all(problems, predictions, faithful, args.partial, args.strict_parse)
    subject = about(args.data, split, args.rationale_format, faithful, args.strict_parse)
    judge = judge_of(args.judge, args.out or Path(args.predictions).parent)
    scores, graded = assess(graded, subject, judge=judge)
    if args.out:
        tables.write_graded(args.out, graded, scores)
    return Column(scores, graded, args.out and Path(args.out))


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = files.Parser(prog="eval.py", description=__doc__.split("\n")[0])
    add = parser.add_argument_group("runs to decode and score").add_argument
    add("runs", nargs="*", metavar="RUN", help="run folders, shown side by side")
    add("--decode", action="store_true", help="decode even if the run has its predictions already")
    add("--teacher-forced", action="store_true", help="also score the teacher-forced rationales")
    add("--limit", type=int, metavar="N", help="only the first N problems")
    maps = "attention maps of the first N decoded problems (%(default)s; 0: off)"
    add("--looks", type=int, default=ATTENTION_MAPS, metavar="N", help=maps)
    add("--device", help="cpu or cuda; the run's own by default")
    keep = "keep every layer's plain class: no kernels (support/kernels.py)"
    add("--plain", action="store_true", default=None, help=keep)
    add = parser.add_argument_group("one question to one run").add_argument
    add("--question", metavar="TEXT", help="ask this instead of scoring")
    add("--image", metavar="FILE", help="the image it is about")
    add("--choices", nargs="+", metavar="TEXT", help="the answers to choose from")
    add = parser.add_argument_group("predictions of any model, instead of runs").add_argument
    lines = "JSON, JSONL, csv or tsv in one of the layouts of docs/grading.md"
    add("--predictions", metavar="FILE", help=lines)
    add("--data", metavar="DIR", help="the problems they answer: a folder or a name")
    add("--split", help="split to score (a run's own, else test)")
    add("--out", metavar="DIR", help="write graded predictions and metrics.json here")
    add("--partial", action="store_true", help="accept problems without prediction")
    add = parser.add_argument_group("how answers are graded and shown").add_argument
    guess = "guess A-E if unreadable, as the original does"
    add("--faithful-parse", action="store_true", help=guess)
    add("--strict-parse", action="store_true", help="read ScienceQA by its published rule")
    gold = "prompt format whose target is the gold rationale (%(default)s)"
    add("--rationale-format", default="QCM-LE", metavar="FORMAT", help=gold)
    add("--judge", metavar="SPEC", help="model that judges rationales, as teacher.py --judge")
    add("--markdown", action="store_true", help="print the table as markdown")
    add("--all-rows", action="store_true", help="also rows by source, question type and the like")
    add("--no-report", dest="report", action="store_false", help="write no report.html")
    args = parser.parse_args(argv)
    if bool(args.runs) == bool(args.predictions) or bool(args.data) != bool(args.predictions):
        parser.error("give run folders, or --predictions FILE together with --data DIR")
    if args.limit is not None and args.limit < 1:
        parser.error(f"--limit is {args.limit}; it must be at least 1")
    asks = any(x is not None for x in (args.question, args.image, args.choices))
    if asks and (not args.question or len(args.runs) != 1):
        parser.error("--image and --choices go with --question TEXT, which is asked of one RUN")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse_args(argv)
    if args.question:
        return ask(args)
    columns = {run: column for run in args.runs if (column := score_run(run, args))}
    if args.predictions:
        columns[args.predictions] = score_file(args)
    if not columns:
        return
    scores = {name: column.scores for name, column in columns.items()}
    print(tables.table(scores, args.markdown, args.all_rows))
    if words := tables.differences(columns)[1]:
        print(f"\n{words}")
    folder = next(iter(columns.values())).folder
    if args.report and folder:  # nothing is written of what was only shown
        write_report(folder, columns)
        print(f"\nreport: {folder / 'report.html'}")


if __name__ == "__main__":
    files.run_command("eval.py", main)
