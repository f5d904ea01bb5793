"""Training: `python train.py --model mmcot` or `--model paligemma`; each ends in a table.

mmcot (Zhang et al., arXiv 2302.00923): stage 1 learns QCM-LE, question to rationale; stage 2 learns
QCMG-A, question and rationale to answer, and reads stage 1's own rationales at test time. Unlike
the published code, pads are never in the loss, and the loss of accumulated batches is the mean over
all their tokens, not over the batches' means.

paligemma (pali_reason; Beyer et al., arXiv 2407.07726 and 2412.03555): a teacher's traces, judged
right, become suffixes "thought, newline, Answer: B"; LoRA teaches PaliGemma 2 to write them.
Trained weights are fp32, without autocast. support/training/ has what a first reading may skip.
A row is one example; a window is the list of batches (lists of rows) of one optimizer step.
Axes: B batch, T length, U target length, D width, V vocabulary, `tokens` those in the loss.
"""

import math
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

import data
import eval as evaluation
import fusion
import lora
from model import PaliGemma
from support import distributed, files, kernels
from support.checkpoints.hub import resolve
from support.dataset.images import LazyImages
from support.dataset.tokenizers import load_tokenizer
from support.distributed import rank, world
from support.evaluation import metrics, models, tables
from support.evaluation.decode_cache import DecodeCache
from support.evaluation.decoding import Decoder
from support.training import ablations, checks, examples, optim, runs
from support.training.dry_run import blank_features, dry_run
from support.training.examples import Inputs
from support.training.optim import LossOf, Plan, Rows
from support.training.runs import Checkpoints, StopRequest
from support.training.settings import (
    MultimodalSettings,
    PaliGemmaSettings,
    Settings,
    of_stage,
    parse_args,
)

# ---- the loss ------------------------------------------------------------------------------------


def cross_entropy(
    head: Callable,
    weight: torch.Tensor,
    states: torch.Tensor,
    labels: torch.Tensor,
    weighting: str = "token",
    label_smoothing: float = 0.0,
) -> tuple[torch.Tensor, int]:
    """Summed cross-entropy of the supervised tokens, and what to divide it by.
    states (B, T, D), labels (B, T), -100 where nothing is learned. The output layer `head`, whose
    matrix is `weight` (V, D), sees only the supervised positions, some at a time: with PaliGemma's
    vocabulary of 257,216 the logits of a whole batch would not fit, nor would their gradients.
    weighting "token" counts tokens; "example" gives each row the same weight, however long."""
    supervised = labels != -100  # (B, T)
    rows = supervised.nonzero()[:, 0]  # (tokens,)
    lengths = supervised.sum(1)  # (B,)
    by_token = weighting == "token"
    reduction = "sum" if by_token else "none"

    def chunk_loss(states: torch.Tensor, labels: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
        logits = head(states).float()  # (tokens, V)
        # Eq. cross-entropy (training): -log p(Y_i | X, Y_<i), summed
        loss = F.cross_entropy(logits, labels, reduction=reduction, label_smoothing=label_smoothing)
        return loss if by_token else (loss / lengths[rows]).sum()

    states = states[supervised]  # (tokens, D)
    labels = labels[supervised]  # (tokens,)
    loss = optim.in_chunks(chunk_loss, weight, states, labels, rows)
    return loss, len(rows) if by_token else int((lengths > 0).sum())


def t5_loss(
    model: fusion.MultimodalT5, batch: dict, weighting: str = "token", label_smoothing: float = 0.0
) -> tuple[torch.Tensor, int]:
    """As `cross_entropy`: the loss of p(Y | X), the decoder having read the gold Y_<i."""
    states = model.states(
        batch["input_ids"],
        batch["attention_mask"],
        batch.get("image_features"),
        batch["decoder_input_ids"],
    )  # (B, U, D)
    t5 = model.t5
    weight = t5.head_weight()
    return cross_entropy(t5.head, weight, states, batch["labels"], weighting, label_smoothing)


def paligemma_loss(
    model: PaliGemma, batch: dict, weighting: str = "token", label_smoothing: float = 0.0
) -> tuple[torch.Tensor, int]:
    """As `cross_entropy`; token t is predicted by the state at t - 1."""
    states = model.states(**models.paligemma_inputs(model, batch))[:, :-1]  # (B, T-1, D)
    labels = batch["labels"][:, 1:]  # (B, T-1)
    weight = model.language_model.embed_tokens.weight
    return cross_entropy(model.head, weight, states, labels, weighting, label_smoothing)


LOSS = {"mmcot": t5_loss, "paligemma": paligemma_loss}
COLLATE = {"mmcot": data.collate, "paligemma": data.pali_collate}

# ---- the loop ------------------------------------------------------------------------------------


def make_plan(
    settings: Settings, stage: str, model: nn.Module, rows: Rows, validate: Callable
) -> Plan:
    """The plan of training a model on these rows; `stage` names it in log and errors, `settings`
    are of that stage (`settings.of_stage`)."""
    s = settings
    batch_size = s.batch_size[0]
    windows = optim.windows(rows, batch_size, s.accumulate, s.epochs[0], s.seed)[: s.max_steps]
    steps = len(windows)
    per_epoch = optim.steps_per_epoch(len(rows), batch_size, s.accumulate)
    if s.model == "mmcot":
        rates = optim.linear_decay(s.lr[0], steps)
    else:
        rates = optim.warmup_cosine(s.lr[0], steps, s.warmup)
    loss_of = LossOf(model, LOSS[s.model], COLLATE[s.model], s)
    epoch_ends = {n for n in range(1, steps + 1) if n % per_epoch == 0 or n == steps}
    return Plan(stage, loss_of, rows, windows, rates, epoch_ends, validate)


def fit(plan: Plan, checkpoints: Checkpoints) -> nn.Module:
    """Train and return the model, in eval mode; if FSDP has sharded it, a new full copy. With
    --resume an interrupted run continues after its last saved step. Silent failures (a leak,
    weights that do not move ...) raise the errors of support/training/checks.py."""
    loss_of = plan.loss_of
    settings = loss_of.settings
    model = loss_of.model.to(settings.device)
    # Faster kernels go in before DDP and FSDP wrap the layers; each verdict says if one was used.
    verdicts = [] if settings.plain else kernels.enable(model)
    if plan.windows:
        checks.stop_if_it_leaks(loss_of, plan.windows[0][0], plan.stage)
    shard = settings.model == "paligemma" and settings.full
    forward = distributed.on_devices(loss_of, shard)
    # After FSDP, which replaces the parameters by shards of them.
    optimizer = optim.make_optimizer(model, settings.weight_decay)
    progress = checkpoints.begin(plan.stage, model, optimizer, plan.rows)
    for verdict in verdicts if progress.step == 0 else ():
        checkpoints.write({"stage": plan.stage, "step": 0} | verdict)
    distributed.own_dropout(settings.seed, progress.step)
    start = time.monotonic() - progress.seconds
    steps = len(plan.windows)
    for step in range(progress.step + 1, steps + 1):
        entry = take_step(plan, forward, optimizer, step)
        validates = step in plan.epoch_ends
        if validates:
            full = distributed.full_model(model)
            with checkpoints.stop.at_once():  # a signal need not wait: it is repeated on --resume
                entry |= plan.validate(loss_of.with_model(full))
            for name in optim.KEPT_BY & entry.keys():
                progress.keep_if_best(step, entry[name], model)
        progress.step = step
        progress.seconds = time.monotonic() - start
        checkpoints.write(entry | {"seconds": round(progress.seconds, 2)})
        optim.show_step(plan.stage, step, steps, entry, progress.seconds)
        # Saves a state if one is due; after the log, which --resume cuts to the state's lines.
        checkpoints.step(progress, steps, validates)
    checkpoints.end()
    if best := progress.best:
        model.load_state_dict(best.weights, strict=False)  # has the trained weights only
        print(f"  kept: the weights after step {best.step}, best in validation: {best.score:.2f}")
    return distributed.full_model(model).eval()


def take_step(plan: Plan, forward: nn.Module, optimizer: optim.AdamW, step: int) -> dict:
    """One optimizer step on window number `step` (from 1); returns its log entry. `forward` is the
    plan's `LossOf`, wrapped by DDP or FSDP if there are several devices."""
    loss_of = plan.loss_of
    model = loss_of.model
    window = plan.windows[step - 1]
    lr = plan.rates[step - 1]
    where = f"{plan.stage}, step {step}"
    weighting = loss_of.settings.weighting
    model.train()  # validation and the checks leave it in eval mode, without dropout
    checks.stop_unless_supervised(window, where)
    # Of the whole window, on all devices: the mean must not depend on how it is cut into batches.
    count = optim.units(window, weighting)
    batches = [loss_of.batch(rows) for rows in distributed.shard_batches(window)]
    loss = backward(forward, batches, count).item()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    norm = distributed.full_tensor(norm).item()
    if not (math.isfinite(loss) and math.isfinite(norm)):
        full = loss_of.with_model(distributed.full_model(model))
        checks.stop_at_what_is_not_finite(full, loss, norm, window, where)
    if step == 1:
        checks.stop_unless_learning(model)
    # Two steps, because lora_A has no gradient in the first, where B is 0; none at a rate of 0.
    before = checks.steepest(model) if step <= 2 and lr else {}
    optimizer.step(lr)
    checks.stop_unless_moved(model, before, lr, window, where)
    optimizer.zero_grad()
    return {
        "stage": plan.stage,
        "step": step,
        "loss": round(loss, 6),
        "lr": lr,
        "grad_norm": round(norm, 4),
        f"{weighting}s": count,
    }


def backward(forward: nn.Module, batches: list[dict], count: int) -> torch.Tensor:
    """Backpropagate the window's summed loss divided by `count`; returns that loss."""
    total = 0.0
    for batch in batches:
        # DDP exchanges gradients once, after the last batch.
        forward.require_backward_grad_sync = batch is batches[-1]
        loss, _ = forward(batch)
        (loss * world() / count).backward()  # times world(): the average over devices is their sum
        total += loss.detach() / count
    return distributed.summed(total)


# ---- mmcot ---------------------------------------------------------------------------------------


def run_mmcot(settings: MultimodalSettings, stop: StopRequest) -> dict | None:
    """Train, decode and score one recipe; returns its metrics, None after --stage rationale."""
    out = Path(settings.out)
    print(f"{out}: recipe {settings.recipe}, vision {settings.vision}", flush=True)
    splits, skipped = examples.load_splits(settings)
    inputs = examples.begin(settings, splits, skipped)
    names = fusion.stage_names(settings.recipe)
    stages = []
    with runs.opened_checkpoints(settings, stop) as checkpoints:
        for stage, name in enumerate(names):
            if settings.stage in ("both", name):
                generated = None
                if stage == 1 and settings.stage2_rationales == "generated":
                    generated = own_rationales(settings, inputs, checkpoints)
                plan = plan_stage(settings, stage, inputs, generated, *stages)
                model = fit(plan, checkpoints)
                if not rank():
                    model.save_pretrained(out / name)
                    inputs.tokenizer.save(str(out / name / "tokenizer.json"))
            else:  # --stage names the other one: this one was trained before
                model = fusion.MultimodalT5.from_pretrained(out / name).to(settings.device)
                if not settings.plain:
                    kernels.enable(model)
            stages.append(model)
            if settings.stage == name != names[-1]:
                return runs.complete(out)  # nothing to score yet
    return score(settings, stages, inputs)


def plan_stage(
    settings: MultimodalSettings,
    stage: int,
    inputs: Inputs,
    generated: dict | None = None,
    writer: nn.Module | None = None,
) -> Plan:
    """The plan of stage 0 or 1 of the recipe, with a new model from --weights. `generated`,
    {id: rationale}, replaces the gold rationales in training; `writer`, stage 0's model, writes
    those that stage 1 is validated on with --keep-epoch best."""
    fmt = fusion.RECIPES[settings.recipe][stage]
    s = of_stage(settings, stage)
    texts = {"fmt": fmt, "tokenizer": inputs.tokenizer, "features": inputs.features}
    rows_of = partial(models.stage_examples, s, **texts)
    train = rows_of(inputs.splits["train"], generated=generated)
    val = rows_of(inputs.splits["val"])
    examples.show_example(train[0], inputs.tokenizer, fmt)
    model = optim.start_model(s.weights[0], inputs.features, s.no_image, s.seed)
    shown = inputs.splits["val"][: s.eval_problems] if s.keep_epoch[0] == "best" else []
    rationales = rationales_of(s, writer, shown, inputs) if writer and shown else None

    def validate(loss_of: LossOf) -> dict[str, float]:
        entry = {"val_loss": round(optim.mean_loss(loss_of, val, s.batch_size[0]), 6)}
        if not shown:
            return entry
        decoder = Decoder(loss_of.model.eval(), inputs.tokenizer, s.eval_batch_size)
        texts = decoder.stage_texts(s, stage, shown, inputs.features, rationales)
        return entry | metrics.validation_score(shown, texts, fmt)

    return make_plan(s, fusion.stage_names(s.recipe)[stage], model, train, validate)


def rationales_of(
    settings: MultimodalSettings, writer: nn.Module, problems: list[data.Problem], inputs: Inputs
) -> dict[str, str]:
    """{id: rationale} that stage 1's model writes for these problems."""
    cache = DecodeCache(settings.out, [writer])
    decoder = Decoder(writer, inputs.tokenizer, settings.eval_batch_size, cache)
    texts = decoder.stage_texts(settings, 0, problems, inputs.features)
    return {id: text["text"] for id, text in texts.items()}


def own_rationales(
    settings: MultimodalSettings, inputs: Inputs, checkpoints: Checkpoints
) -> dict[str, str]:
    """{id: rationale} of the training problems, each written by a stage-1 model that did not train
    on it. Training stage 2 on these closes the gap to what it reads at test time."""
    generated = {}
    for learned, unseen in examples.halves(inputs.splits["train"], settings.seed):
        fold_inputs = replace(inputs, splits=inputs.splits | {"train": learned})
        model = fit(plan_stage(settings, 0, fold_inputs), checkpoints)
        generated |= rationales_of(settings, model, unseen, inputs)
    return generated


# ---- paligemma -----------------------------------------------------------------------------------


def run_paligemma(settings: PaliGemmaSettings, stop: StopRequest) -> dict:
    """Train (unless --epochs 0), decode and score one recipe; returns its metrics."""
    out = Path(settings.out)
    epochs = settings.epochs[0]
    print(f"{out}: recipe {settings.recipe}, epochs {epochs:g}", flush=True)
    splits, skipped = examples.load_splits(settings)
    model = models.load_paligemma(settings)
    rows = []
    if epochs:
        make_trainable(settings, model)
        rows = examples.training_rows(settings, splits["train"], skipped)
    # Only the problems of these rows, each once: `begin` computes the features of their images.
    splits["train"] = list({row.problem.id: row.problem for row in rows}.values())
    splits["val"] = splits["val"][: settings.eval_problems]
    inputs = examples.begin(settings, splits, skipped, model)
    usable = {p.id for p in inputs.splits["train"]}  # --on-error skip left out unreadable images
    rows = [row for row in rows if row.problem.id in usable]
    if not isinstance(inputs.features, LazyImages):
        model.vision_tower = None  # no longer needed: frees 0.8 GiB of the 3B's 5.7 in bf16
    if rows and settings.data != "demo":  # its splits are disjoint by construction
        examples.warn_of_overlap([row.problem for row in rows], inputs.splits[settings.test_split])
    if epochs:
        with runs.opened_checkpoints(settings, stop) as checkpoints:
            model = fit(plan_tuning(settings, model, rows, inputs), checkpoints)
        if not rank():
            inputs.tokenizer.save(str(out / "tokenizer.json"))
            if settings.full:
                model.save_pretrained(out)
                runs.write_config(settings, out, files.read_json(out / "config.json"))
            else:
                lora.save(model, out, settings.weights[0])
    return score(settings, [model], inputs)


def make_trainable(settings: PaliGemmaSettings, model: PaliGemma) -> None:
    """Make new adapters, those of --adapter or, with --full, all weights trainable. Goes before the
    image features are computed, which are not cached if the image tower is trained too."""
    torch.manual_seed(settings.seed)
    if settings.full:
        model.requires_grad_(True)
    elif settings.adapter is None:
        lora.inject(
            model,
            r=settings.lora_r,
            alpha=settings.lora_alpha,
            targets=settings.lora_targets,
            dropout=settings.lora_dropout,
            rslora=settings.lora_rslora,
            dora=settings.lora_dora,
        )
    if not settings.full:
        print(lora.describe(model))
    model.language_model.checkpointing = settings.checkpointing


def plan_tuning(
    settings: PaliGemmaSettings, model: PaliGemma, rows: list[data.TrainRow], inputs: Inputs
) -> Plan:
    """The plan of training on these rows, validated by decoding answers to --eval-problems."""
    train, held_out = examples.tuning_rows(settings, rows, inputs)
    val = inputs.splits["val"][: settings.eval_problems]

    def validate(loss_of: LossOf) -> dict[str, float]:
        model = loss_of.model.eval()
        predictions = evaluation.predict([model], val, settings, inputs.tokenizer, inputs.features)
        right = sum(grade.correct for *_, grade in metrics.grade_all(val, predictions))
        accuracy = {"val_accuracy": round(100 * right / len(val), 2)} if val else {}
        loss = optim.mean_loss(loss_of, held_out, settings.batch_size[0])
        return {"val_loss": round(loss, 6)} | accuracy

    return make_plan(settings, settings.recipe, model, train, validate)


# ---- the command ---------------------------------------------------------------------------------


def run_one(settings: Settings, stop: StopRequest) -> dict | None:
    """Train, decode and score a run unless it is complete; returns its metrics."""
    if runs.is_complete(settings):
        print(f"{settings.out}: complete already", flush=True)
        return tables.read_metrics(settings.out)
    return {"mmcot": run_mmcot, "paligemma": run_paligemma}[settings.model](settings, stop)


def score(settings: Settings, stages: list[nn.Module], inputs: Inputs) -> dict:
    """Decode and score the test split, then mark the run complete; returns its metrics."""
    scores = evaluation.evaluate(
        settings.out,
        stages,
        inputs.splits[settings.test_split],
        settings,
        inputs.tokenizer,
        inputs.features,
        teacher_forced=settings.model == "mmcot" and settings.teacher_forced,
        skipped=inputs.skipped,
    )
    runs.complete(Path(settings.out))
    return scores


def dry_plans(settings: Settings) -> Iterator[Plan]:
    """The plans of a run's trainings. No image is read: zeros stand for their features."""
    splits, skipped = examples.load_splits(settings)
    if bad := [entry for entries in (skipped or {}).values() for entry in entries]:
        print(f"  {len(set(bad))} bad records would be skipped, the first is {bad[0][0]}")
    tokenizer = load_tokenizer(resolve(settings.weights[0]))
    if settings.model == "mmcot":
        features = blank_features(settings, splits["train"] + splits["val"])
        for stage, name in enumerate(fusion.stage_names(settings.recipe)):
            if settings.stage in ("both", name):
                # Generated rationales would have to be decoded first: gold ones stand for them.
                yield plan_stage(settings, stage, Inputs(splits, tokenizer, features))
    elif settings.epochs[0]:
        model = models.load_paligemma(settings)
        make_trainable(settings, model)
        rows = examples.training_rows(settings, splits["train"])
        features = blank_features(settings, [row.problem for row in rows], model)
        yield plan_tuning(settings, model, rows, Inputs(splits, tokenizer, features))


def main(argv: list[str] | None = None) -> None:
    settings = parse_args(argv)
    distributed.check_device(settings.device)
    torch.set_num_threads(settings.threads)
    start = time.monotonic()
    table = ablations.table_of(settings)
    lines = ablations.lines_of(settings, table) if table else {settings.out: settings}
    if settings.dry_run:
        if distributed.under_torchrun():
            raise ValueError("--dry-run measures a single process: give it without torchrun.")
        for line in lines.values():
            dry_run(line, dry_plans(line))
        return
    with distributed.together(settings.device), runs.in_use(Path(settings.out)) as stop:
        runs.check_resume([*lines.values()])
        if table:
            rows = {}
            for name, line in lines.items():
                rows[name] = run_one(line, stop)
                print(tables.runs_table(rows), flush=True)
            if not settings.ablation:
                print(f"\n{tables.table(rows)}")
            ablations.show(settings, lines, rows)
        elif scores := run_one(settings, stop):
            print(f"\n{tables.table({settings.out: scores})}")
        print(f"\n{settings.out}: done in {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    try:
        main()
    except runs.Stopped:
        if not rank():
            print("\ntrain.py: stopped; the same command with --resume resumes it")
    except (ValueError, OSError, FloatingPointError, RuntimeError) as error:
        process = f" (process {rank()} of {world()})" if world() > 1 else ""
        sys.exit(f"train.py{process}: {error}")
