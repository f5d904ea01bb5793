"""Training: `python train.py --model mmcot` or `--model paligemma`; each ends in a table.

mmcot (Zhang et al., arXiv 2302.00923). Stage 1 learns QCM-LE, question to rationale; stage 2 learns
QCMG-A, question and rationale to answer. Both start from the same T5, both read the same image
features, and at test time stage 2 reads what stage 1 really wrote.

As published by default: AdamW (0.9, 0.999, 1e-8), weight decay 0.01 except on norms and on every
parameter with "bias" in its name, linear decay without warm-up, gradients clipped at 1, stage 2
trained on gold rationales. Not as published: pads are never in the loss (there they were most of
it), and a window of accumulated batches is averaged over its tokens, not over its batches.

paligemma (pali_reason; Beyer et al., arXiv 2407.07726 and 2412.03555). A teacher's traces, judged
right, become suffixes "thought, newline, Answer: B"; LoRA teaches PaliGemma 2 to write them. The
table has what that must be compared with: chance, the model as it was, and the same model trained
as long on the same answers without the thoughts.

Here are the loss, the loop and a run of each system. What a first reading may skip is in support/:
flags.py (flags and defaults), ablations.py (tables of many runs), records.py (which problems and
traces), optimizing.py (the loss in chunks, AdamW), guards.py (what stops a training that goes wrong
without a word), journal.py and folders.py (a run that was killed goes on with --resume, on a CPU to
the same bits), devices.py (`torchrun --nproc-per-node N train.py ...` takes N devices), dry_run.py
(what a training would take).

Left out on purpose: trainer classes, callbacks, autocast (weights that are trained are fp32, frozen
ones bf16 where the device is good at it), loggers other than log.jsonl.

Axes: B batch, T length, U target length, D width, V vocabulary, `tokens` those in the loss.
In the loop a row is one example, a batch is a list of rows until `LossOf.batch` collates it, and a
window is the list of batches of one optimizer step.
"""

import argparse
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import data
import eval as evaluation
import fusion
import lora
from support import distributed as devices
from support import files
from support.checkpoints.hub import resolve
from support.checkpoints.weights import in_file_names
from support.dataset import images as pictures
from support.dataset.tokenizers import load_tokenizer
from support.distributed import rank, world
from support.evaluation import metrics, tables
from support.evaluation.decode_cache import DecodeCache
from support.evaluation.decoding import Decoder
from support.evaluation.models import load_paligemma, paligemma_inputs
from support.training import ablations, folders
from support.training import checks as guards
from support.training import examples as records
from support.training import settings as flags
from support.training.dry_run import blank_features, dry_step
from support.training.journal import Stopped, in_use
from support.training.optim import in_chunks, make_optimizer, trained

# ---- the loss ------------------------------------------------------------------------------------


def cross_entropy(head, weight, states, labels, args):
    """Summed cross-entropy of the supervised tokens, and what to divide it by.

    states (B, T, D), labels (B, T), -100 where nothing is learned. The vocabulary layer `head`,
    which multiplies by `weight` (V, D), sees only the supervised positions, some at a time: the
    logits of PaliGemma's 257,216 words are never all there, in neither direction.
    args.weighting "token" counts tokens; "example" gives each row the same weight, however long.
    """
    supervised = labels != -100  # (B, T)
    rows, lengths = supervised.nonzero()[:, 0], supervised.sum(1)  # (tokens,), (B,)
    states, labels = states[supervised], labels[supervised]  # (tokens, D), (tokens,)
    by_row = args.weighting == "example"
    smoothing = args.label_smoothing

    def chunk_loss(states, labels, rows):
        logits = head(states).float()  # (tokens, V)
        # Eq. cross-entropy (training): -log p(Y_i | X, Y_<i), summed
        if not by_row:
            return F.cross_entropy(logits, labels, reduction="sum", label_smoothing=smoothing)
        each = F.cross_entropy(logits, labels, reduction="none", label_smoothing=smoothing)
        return (each / lengths[rows]).sum()

    loss = in_chunks(chunk_loss, weight, states, labels, rows)
    return loss, int((lengths > 0).sum()) if by_row else len(labels)


def t5_loss(model, batch, args):
    """As `cross_entropy`: the loss of p(Y | X), the decoder having read the gold Y_<i."""
    states = model.states(
        batch["input_ids"],
        batch["attention_mask"],
        batch.get("image_features"),
        batch["decoder_input_ids"],
    )  # (B, U, D)
    t5 = model.t5
    weight = (t5.lm_head or t5.shared).weight
    return cross_entropy(t5.head, weight, states, batch["labels"], args)


def paligemma_loss(model, batch, args):
    """As `cross_entropy`; token t is predicted by the state at t - 1."""
    inputs = paligemma_inputs(model, batch)
    states = model.states(**inputs)[:, :-1]  # (B, T-1, D)
    weight = model.language_model.embed_tokens.weight
    return cross_entropy(model.head, weight, states, batch["labels"][:, 1:], args)


LOSS = {"mmcot": t5_loss, "paligemma": paligemma_loss}
COLLATE = {"mmcot": data.collate, "paligemma": data.pali_collate}


def to_device(batch, device):
    return {k: v.to(device) if torch.is_tensor(v) else v for k, v in batch.items()}


class LossOf(torch.nn.Module):
    """A model and its loss as one module, which is what DDP and FSDP take; the guards and --dry-run
    get it too."""

    def __init__(self, model, args):
        super().__init__()
        self.model, self.args = model, args

    def batch(self, rows):
        """The rows as a batch on the device."""
        return to_device(COLLATE[self.args.model](rows), self.args.device)

    def forward(self, batch):
        """Summed loss of a batch, and what to divide it by."""
        return LOSS[self.args.model](self.model, batch, self.args)


def units(window, args):
    """What a window's summed loss is divided by: its supervised tokens, or its rows."""
    counts = [len(e["labels"]) - e["labels"].count(-100) for rows in window for e in rows]
    return sum(map(bool, counts)) if args.weighting == "example" else sum(counts)


@torch.inference_mode()
def mean_loss(model, examples, args):
    """Cross-entropy in nats per supervised token (or of the mean example, see --weighting)."""
    loss_of, total, count = LossOf(model.eval(), args), 0, 0
    order = data.batches([len(e["input_ids"]) for e in examples], args.batch_size)
    for chosen in order[rank() :: world()]:
        loss, n = loss_of(loss_of.batch([examples[i] for i in chosen]))
        total, count = total + loss.item(), count + n
    total, count = devices.summed(torch.tensor([total, count], dtype=torch.float64)).tolist()
    return total / count


# ---- the loop ------------------------------------------------------------------------------------


def windows(examples, args, epochs, generator):
    """Windows of `args.accumulate` batches, `epochs` times through the examples, each time freshly
    shuffled; an epoch's last window may have fewer."""
    lengths = [len(e["input_ids"]) + len(e["labels"]) for e in examples]
    left = math.ceil(steps_per_epoch(examples, args) * epochs)
    while left > 0:
        order = data.batches(lengths, args.batch_size, generator)
        made = [[examples[i] for i in chosen] for chosen in order]
        for start in range(0, len(made), args.accumulate):
            if left > 0:
                yield made[start : start + args.accumulate]
            left -= 1


def steps_per_epoch(examples, args):
    return math.ceil(math.ceil(len(examples) / args.batch_size) / args.accumulate)


def schedule(step, steps, args):
    """The share of the peak learning rate at a step, counted from 0: linear decay to 0 (mmcot, as
    published), or linear warm-up and a cosine to 0 (paligemma)."""
    if args.model == "mmcot":
        return 1 - step / max(1, steps)
    warm = max(1, round(args.warmup * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def fit(model, examples, validate, args, stage, epochs, journal):
    """Train in place (of FSDP's parts it makes a new model) and return the model, in eval mode.

    validate  validate(model) gives what is logged after each epoch. If that has "val_accuracy",
              the weights of the best epoch are what is left in the end.
    stage     what this training is called in the log and in errors.
    journal   a `Journal`, which goes on from the last saved step; None in a dry run.
    What can go wrong without a word stops it with one: see support/training/checks.py.
    """
    model.to(args.device)
    generator = torch.Generator().manual_seed(args.seed)
    plan = list(windows(examples, args, epochs, generator))[: args.max_steps]
    loss_of = LossOf(model, args)
    if plan and not args.dry_run:
        guards.stop_if_it_leaks(loss_of, plan[0][0], stage)
    forward = devices.on_devices(loss_of)
    optimizer = make_optimizer(model, args.lr, args.weight_decay)
    if args.dry_run:
        dry_step(loss_of, optimizer, plan)
        return model
    per_epoch = steps_per_epoch(examples, args)
    done, best, seconds = journal.begin(stage, model, optimizer, examples)
    devices.own_dropout(args, done)
    start = time.monotonic() - seconds
    for step, window in enumerate(plan[done:], done + 1):
        lr = args.lr * schedule(step - 1, len(plan), args)
        entry = take_step(loss_of, forward, optimizer, window, lr, stage, step)
        validates = step % per_epoch == 0 or step == len(plan)
        if validates:
            entry |= journal.validation(validate, devices.whole_model(model))
            best = better(best, entry, model)
        seconds = time.monotonic() - start
        journal.write(entry | {"seconds": round(seconds, 2)})
        show_step(stage, step, len(plan), entry, seconds)
        journal.step(step, len(plan), best, seconds, validates)
    journal.end()
    if best:
        model.load_state_dict(best[2], strict=False)
        print(f"  kept: the weights after step {best[1]}, validation accuracy {best[0]:.2f}")
    return devices.whole_model(model).eval()


def take_step(loss_of, forward, optimizer, window, lr, stage, step):
    """One step of the optimizer on a window of batches; what is logged of it. `forward` is
    `loss_of` on this device."""
    model, args = loss_of.model, loss_of.args
    model.train()
    guards.stop_unless_supervised(window, stage, step)
    batches = [loss_of.batch(rows) for rows in devices.dealt(window)]
    count = units(window, args)
    total = backward(forward, batches, count)
    norm = devices.whole(torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0))
    if not (math.isfinite(total) and math.isfinite(norm)):
        plain = LossOf(devices.whole_model(model), args)
        guards.stop_at_what_is_not_finite(plain, total, norm, window, stage, step)
    if step == 1:
        guards.stop_unless_learning(model)
    for group in optimizer.param_groups:
        group["lr"] = lr
    before = guards.steepest(model) if step <= 2 and lr else {}  # --lr 0 moves none
    optimizer.step()
    guards.stop_unless_moved(model, before, lr, window, stage, step)
    optimizer.zero_grad()
    entry = {"stage": stage, "step": step, "loss": round(total.item(), 6), "lr": lr}
    return entry | {"grad_norm": round(norm.item(), 4), args.weighting + "s": count}


def backward(forward, batches, count):
    """Put the gradients of a window's summed loss over `count` into the weights; that loss."""
    total = 0.0
    for batch in batches:
        forward.require_backward_grad_sync = batch is batches[-1]  # DDP: once a step
        loss, _ = forward(batch)
        (loss * world() / count).backward()  # as the devices' gradients are averaged
        total += loss.detach() / count
    return devices.summed(total)


def better(best, entry, model):
    """(accuracy, step, trained weights) of the best epoch so far; of equal ones the later."""
    accuracy = entry.get("val_accuracy")
    if accuracy is None or (best and accuracy < best[0]):
        return best
    return accuracy, entry["step"], {n: p.detach().clone() for n, p in trained(model).items()}


def show_step(stage, step, steps, entry, seconds):
    """A line per validation; on a terminal also a running one with rate and time left."""
    text = f"  {stage} {step}/{steps}  loss {entry['loss']:.4f}"
    if "val_loss" in entry:
        clear = "\r" if sys.stderr.isatty() else ""
        right = f"  val accuracy {entry['val_accuracy']:.2f}" if "val_accuracy" in entry else ""
        text = f"{clear}{text}  val loss {entry['val_loss']:.4f}{right}"
        print(f"{text}  {seconds:.0f} s", flush=True)
    elif sys.stderr.isatty():
        rate = step / seconds
        left = f"{rate:.1f} steps/s, {(steps - step) / rate:.0f} s left"
        print(f"\r{text}  {left}   ", end="", file=sys.stderr, flush=True)


# ---- mmcot ---------------------------------------------------------------------------------------


def run_mmcot(args):
    """Train, decode and score one recipe; returns its metrics. Writes the run folder `args.out`."""
    out = Path(args.out)
    print(f"{out}: recipe {args.recipe}, vision {args.vision}", flush=True)
    splits, skipped = records.load_splits(args)
    tokenizer = load_tokenizer(resolve(args.weights[0]))
    with devices.in_turn():
        features, splits = records.with_pictures(args, splits, skipped)
    folders.begin(args)  # only now: a run that cannot start leaves nothing
    counts = records.told_skipped(args, skipped)
    names, models = fusion.stage_names(args.recipe), []
    with folders.opened_journal(args) as journal:
        for stage, name in enumerate(names):
            if args.stage in ("both", name):
                models.append(run_stage(args, stage, splits, tokenizer, features, journal))
                if not rank():
                    models[-1].save_pretrained(out / name)
                    tokenizer.save(str(out / name / "tokenizer.json"))
            else:
                models.append(fusion.MultimodalT5.from_pretrained(out / name).to(args.device))
            if args.stage == name != names[-1]:
                return folders.complete(out)  # the rationale stage alone has nothing to score yet
    return scored(args, models, splits[args.test_split], tokenizer, features, counts)


def run_stage(args, stage, splits, tokenizer, features, journal):
    """Train stage 0 or 1 of the recipe; returns the model. `journal` as in `fit`."""
    fmt, name = fusion.RECIPES[args.recipe][stage], fusion.stage_names(args.recipe)[stage]
    generated = None
    if stage == 1 and args.stage2_rationales == "generated":
        generated = own_rationales(args, splits, tokenizer, features, journal)
    limits = {"max_input": args.max_input, "max_output": args.max_output[-1 if "G" in fmt else 0]}
    limits |= {"captions": args.vision == "caption", "faithful": args.faithful_text}
    train = data.examples(splits["train"], fmt, tokenizer, features, generated, **limits)
    val = data.examples(splits["val"], fmt, tokenizer, features, None, **limits)
    records.show_example(train[0], tokenizer, fmt)
    model = start_model(args, features, stage)
    epochs = args.epochs[min(stage, len(args.epochs) - 1)]

    def validate(model):
        return {"val_loss": round(mean_loss(model, val, args), 6)}

    return fit(model, train, validate, args, name, epochs, journal)


def start_model(args, features, stage):
    """T5, or a whole released mm-cot checkpoint, with a fusion iff the run looks at pictures."""
    torch.manual_seed(args.seed)
    model = fusion.MultimodalT5.from_pretrained(args.weights[min(stage, len(args.weights) - 1)])
    if features is None:
        model.fusion = None
    elif model.fusion is None:
        width = model.t5.config.d_model
        model.fusion = fusion.GatedFusion(width, features.shape[1], args.no_image)
    in_file_names(model)  # what could not be saved is not trained
    return model


def own_rationales(args, splits, tokenizer, features, journal):
    """{id: rationale} of the training problems, each written by a stage-1 model that did not train
    on it. Training stage 2 on these closes the gap to what it reads at test time."""
    problems, folds, generated = splits["train"], 2, {}
    # Shuffled: every second problem of a file may be of the same kind (in the demo it is).
    order = torch.randperm(len(problems), generator=torch.Generator().manual_seed(args.seed))
    for fold in range(folds):
        held = set(order[fold::folds].tolist())
        seen = [p for i, p in enumerate(problems) if i not in held]
        unseen = [p for i, p in enumerate(problems) if i in held]
        model = run_stage(args, 0, splits | {"train": seen}, tokenizer, features, journal)
        examples = data.examples(
            unseen,
            "QCM-LE",
            tokenizer,
            features,
            max_input=args.max_input,
            max_output=args.max_output[0],
            captions=args.vision == "caption",
            faithful=args.faithful_text,
        )
        cache = DecodeCache(args.out, [model])
        decoder = Decoder(model, tokenizer, args.eval_batch_size, cache)
        texts = decoder.t5_texts(examples, args.max_output[0])
        generated |= {problem_id: result["text"] for problem_id, result in texts.items()}
    return generated


# ---- paligemma -----------------------------------------------------------------------------------


def run_paligemma(args):
    """Train (unless --epochs 0), decode and score one recipe; returns its metrics."""
    print(f"{Path(args.out)}: recipe {args.recipe}, epochs {args.epochs[0]:g}", flush=True)
    splits, skipped = records.load_splits(args)
    tokenizer = load_tokenizer(resolve(args.weights[0]))
    model = load_paligemma(args)
    if args.epochs[0]:
        make_trainable(args, model)
    rows = records.training_rows(args, splits["train"], skipped) if args.epochs[0] else []
    learned = {row.problem.id: row.problem for row in rows}
    splits |= {"train": [*learned.values()], "val": splits["val"][: args.eval_problems]}
    with devices.in_turn():
        features, splits = records.with_pictures(args, splits, skipped, model)
    left, test = {p.id for p in splits["train"]}, splits[args.test_split]
    rows = [row for row in rows if row.problem.id in left]
    if not isinstance(features, pictures.LazyImages):
        model.vision_tower = None  # all pictures were looked at: 0.8 GiB of the 3B's 5.7 in bf16
    folders.begin(args)  # only now: a run that cannot start leaves nothing
    counts = records.told_skipped(args, skipped)
    if rows and args.data != "demo":  # its splits are disjoint by construction
        records.warn_of_overlap([row.problem for row in rows], test)
    if args.epochs[0]:
        with folders.opened_journal(args) as journal:
            model = tune(args, model, rows, splits["val"], tokenizer, features, journal)
        if not rank():
            save_paligemma(args, model, tokenizer)
    return scored(args, [model], test, tokenizer, features, counts)


def make_trainable(args, model):
    """What shall be trained gets gradients: new adapters, those of --adapter or, with --full, all
    weights. Comes before the picture features, which are not cached if the image tower is adapted
    too."""
    torch.manual_seed(args.seed)
    if args.full:
        model.requires_grad_(True)
    elif args.adapter is None:
        how = ("r", "alpha", "targets", "dropout", "rslora", "dora")
        lora.inject(model, **{flag: vars(args)[f"lora_{flag}"] for flag in how})
    if not args.full:
        print(lora.describe(model))
    model.language_model.checkpointing = args.checkpointing


def tune(args, model, rows, val, tokenizer, features, journal):
    """Fit what `make_trainable` chose to these rows, as `records.training_rows` gives them,
    validated on real answers to the problems `val`; returns the model. ValueError if --max-suffix
    leaves no row to train on. `journal` as in `fit`."""
    val = val[: args.eval_problems]
    examples = data.pali_examples(
        rows,
        tokenizer,
        features,
        max_suffix=args.max_suffix,
        layout=args.layout,
        eos_in_loss=args.eos_in_loss,
        shuffle_choices=args.shuffle_choices,
        seed=args.seed,
    )
    ids = list(dict.fromkeys(example["id"] for example in examples))
    held_ids = set(ids[:: max(20, len(ids) // 100)])  # for the validation loss: 5 % or 100 problems
    held_back = [e for e in examples if e["id"] in held_ids]
    train = [e for e in examples if e["id"] not in held_ids]
    if not train:
        raise ValueError(
            f"{len(examples)} rows are left, {len(held_back)} of them held back for validation: "
            "none to train on. Look at --max-suffix, --limit-traces and --on-error."
        )
    records.show_example(examples[0], tokenizer, args.recipe)

    def validate(model):
        predictions = evaluation.predict([model.eval()], val, args, tokenizer, features)
        right = sum(g.correct for *_, g in metrics.grade_all(val, predictions))
        accuracy = {"val_accuracy": round(100 * right / len(val), 2)} if val else {}
        return {"val_loss": round(mean_loss(model, held_back, args), 6)} | accuracy

    return fit(model, train, validate, args, args.recipe, args.epochs[0], journal)


def save_paligemma(args, model, tokenizer):
    out = Path(args.out)
    if args.full:
        model.save_pretrained(out)
        config = files.read_json(out / "config.json") | vars(args)  # one file for both
        folders.write_config(config, out)
    else:
        lora.save(model, out, args.weights[0])
    tokenizer.save(str(out / "tokenizer.json"))


# ---- one run, a dry one, and many ----------------------------------------------------------------


def run_one(args):
    """The metrics of a run, which is trained and decoded unless it is complete."""
    if folders.is_complete(args):
        print(f"{args.out}: complete already", flush=True)
        return tables.read_metrics(args.out)
    return {"mmcot": run_mmcot, "paligemma": run_paligemma}[args.model](args)


def scored(args, models, problems, tokenizer, features, counts):
    """The metrics of a run, whose models decode these problems now; it is complete then. `counts`
    of skipped records by split, or None, go into the table."""
    forced = args.model == "mmcot" and args.teacher_forced
    how = {"teacher_forced": forced, "skipped": counts}
    scores = evaluation.evaluate(args.out, models, problems, args, tokenizer, features, **how)
    folders.complete(Path(args.out))
    return scores


def run_many(lines):
    """{name: metrics} of these lines, {name: flags}; the table is shown as it grows."""
    rows = {}
    for name, args in lines.items():
        rows[name] = run_one(args)
        print(tables.runs_table(rows), flush=True)
    return rows


def dry_run(args):
    """Parameters, memory, one step and the time of each training of a run. Nothing is written; the
    pictures are not looked at: features of zeros stand for them."""
    print(f"{args.out}: recipe {args.recipe}", flush=True)
    splits, skipped = records.load_splits(args)
    if skipped and (bad := [entry for found in skipped.values() for entry in found]):
        print(f"  {len(set(bad))} bad records would be skipped, the first is {bad[0][0]}")
    tokenizer = load_tokenizer(resolve(args.weights[0]))
    if args.model == "paligemma":
        return dry_paligemma(args, splits, tokenizer)
    features = blank_features(args, splits["train"] + splits["val"])
    # Own rationales would have to be decoded first: the gold ones stand for them.
    args = argparse.Namespace(**vars(args) | {"stage2_rationales": "gold"})
    models = []  # they stay in memory, as in a run
    for stage, name in enumerate(fusion.stage_names(args.recipe)):
        if args.stage in ("both", name):
            models.append(run_stage(args, stage, splits, tokenizer, features, None))


def dry_paligemma(args, splits, tokenizer):
    """`dry_run` of a paligemma run, whose splits and tokenizer are loaded."""
    if not args.epochs[0]:
        return print("  nothing is trained: it only decodes")
    model = load_paligemma(args)
    make_trainable(args, model)
    rows = records.training_rows(args, splits["train"])
    features = blank_features(args, [row.problem for row in rows], model)
    tune(args, model, rows, splits["val"], tokenizer, features, None)


# ---- the command ---------------------------------------------------------------------------------


def main(argv=None):
    args = flags.parse_args(argv)
    devices.check_device(args.device)
    torch.set_num_threads(args.threads)
    start = time.monotonic()
    table = ablations.table_of(args)
    lines = ablations.lines_of(args, table) if table else {args.out: args}
    if args.dry_run and devices.under_torchrun():
        raise ValueError("--dry-run measures a single process: give it without torchrun.")
    if args.dry_run:
        for line in lines.values():
            dry_run(line)
        return
    with devices.together(args), in_use(Path(args.out)):
        folders.check_resume([*lines.values()])
        if table:
            rows = run_many(lines)
            if not args.ablation:
                print(f"\n{tables.table(rows)}")
            ablations.show(args, lines, rows)
        elif scores := run_one(args):
            print(f"\n{tables.table({args.out: scores})}")
        print(f"\n{args.out}: done in {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    try:
        main()
    except Stopped:
        if not rank():
            print("\ntrain.py: stopped; the same command with --resume goes on from here")
    except (ValueError, OSError, FloatingPointError, RuntimeError) as error:
        who = f" (process {rank()} of {world()})" if world() > 1 else ""
        sys.exit(f"train.py{who}: {error}")
