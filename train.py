"""Training: `python train.py --model mmcot` runs Multimodal-CoT's two stages and ends in a table.

Multimodal-CoT (Zhang et al., arXiv 2302.00923): stage 1 learns QCM-LE, question to rationale; stage
2 learns QCMG-A, question and rationale to answer. Both start from the same T5, both read the same
image features, and at test time stage 2 reads what stage 1 really wrote.

As published by default: AdamW (0.9, 0.999, 1e-8), weight decay 0.01 except on norms and on every
parameter with "bias" in its name, linear decay without warm-up, gradients clipped at 1, stage 2
trained on gold rationales. Not as published: pads are never in the loss (there they were most of
it), and a window of accumulated batches is averaged over its tokens, not over its batches.

Left out on purpose: trainer classes, callbacks, mixed precision (T5-base fits in fp32), loggers
other than log.jsonl.

Axes: B batch, U target length, D width, V vocabulary.
"""

import argparse
import json
import math
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import data
import eval as evaluation
import fusion
from model import resolve

HERE = Path(__file__).parent
DEMO = {  # two minutes on two cores
    "weights": [str(HERE / "demo/t5")],
    "vision_weights": str(HERE / "demo/detr"),
    "image_size": 96,
    "epochs": [8.0, 2.0],
    "lr": 3e-3,
    "batch_size": 32,
    "max_input": 256,
    "max_output": [64, 16],
    "threads": 1,  # the result depends on it; two are 1.5 times as fast on an idle machine
}
PUBLISHED = {  # arXiv 2302.00923, base model
    "weights": ["allenai/unifiedqa-t5-base"],
    "vision_weights": "facebook/detr-resnet-101-dc5",
    "image_size": 224,
    "epochs": [20.0],
    "lr": 5e-5,
    "batch_size": 8,
    "max_input": 512,
    "max_output": [512, 64],
    "threads": torch.get_num_threads(),
}


# ---- one stage ---------------------------------------------------------------------------------


def loss_sum(model, batch):
    """Summed cross-entropy of the supervised tokens of a batch, and their number.

    The vocabulary layer sees only the supervised positions: pads cost nothing and weigh nothing.
    """
    states = model.states(
        batch["input_ids"],
        batch["attention_mask"],
        batch.get("image_features"),
        batch["decoder_input_ids"],
    )  # (B, U, D)
    supervised = batch["labels"] != -100  # (B, U)
    logits = model.t5.head(states[supervised])  # (supervised tokens, V)
    labels = batch["labels"][supervised]
    return F.cross_entropy(logits.float(), labels, reduction="sum"), len(labels)


def to_device(batch, device):
    return {k: v.to(device) if torch.is_tensor(v) else v for k, v in batch.items()}


def make_optimizer(model, lr, weight_decay):
    """AdamW with the published decay groups; prints what is in them."""
    no_decay = [n for n, p in model.named_parameters() if p.dim() == 1 or "bias" in n]
    groups = {True: [], False: []}
    for name, p in model.named_parameters():
        groups[name not in no_decay].append(p)
    count = {decayed: sum(p.numel() for p in g) for decayed, g in groups.items()}
    print(
        f"  trainable {sum(count.values()):,} parameters, weight decay on {count[True]:,} of them"
    )
    return torch.optim.AdamW(
        [
            {"params": groups[True], "weight_decay": weight_decay},
            {"params": groups[False], "weight_decay": 0.0},
        ],
        lr=lr,
    )


@torch.inference_mode()
def mean_loss(model, examples, batch_size, device):
    """Cross-entropy per supervised token, in nats."""
    model.eval()
    total = tokens = 0
    for rows in data.batches([len(e["input_ids"]) for e in examples], batch_size):
        loss, count = loss_sum(model, to_device(data.collate([examples[i] for i in rows]), device))
        total, tokens = total + loss.item(), tokens + count
    return total / tokens


def steps_per_epoch(examples, args):
    return math.ceil(math.ceil(len(examples) / args.batch_size) / args.accumulate)


def windows(examples, args, epochs, generator):
    """Lists of `args.accumulate` batches, `epochs` times through the examples, freshly shuffled."""
    lengths = [len(e["input_ids"]) + len(e["labels"]) for e in examples]
    left = math.ceil(steps_per_epoch(examples, args) * epochs)
    while left > 0:
        order = data.batches(lengths, args.batch_size, generator)
        for start in range(0, len(order), args.accumulate):
            if left > 0:
                yield [
                    [examples[i] for i in rows] for rows in order[start : start + args.accumulate]
                ]
            left -= 1


def fit(model, examples, val, args, stage, epochs, log):
    """Train one stage in place. FloatingPointError names the records of a non-finite loss."""
    device = args.device
    model.to(device)
    optimizer = make_optimizer(model, args.lr, args.weight_decay)
    generator = torch.Generator().manual_seed(args.seed)
    plan = list(windows(examples, args, epochs, generator))[: args.max_steps]
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: 1 - s / max(1, len(plan)))
    per_epoch = steps_per_epoch(examples, args)
    start = time.monotonic()
    for step, window in enumerate(plan, 1):
        model.train()
        batches = [to_device(data.collate(rows), device) for rows in window]
        tokens = sum(int((b["labels"] != -100).sum()) for b in batches)
        total = 0.0
        for batch in batches:
            loss, _ = loss_sum(model, batch)
            (loss / tokens).backward()
            total += loss.detach() / tokens
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        stop_unless_finite(total, norm, window, stage, step)
        lr = schedule.get_last_lr()[0]
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        entry = {"stage": stage, "step": step, "loss": round(total.item(), 6), "lr": lr}
        entry |= {"grad_norm": round(norm.item(), 4), "tokens": tokens}
        if step % per_epoch == 0 or step == len(plan):
            entry["val_loss"] = round(mean_loss(model, val, args.batch_size, device), 6)
        seconds = time.monotonic() - start
        print(json.dumps(entry | {"seconds": round(seconds, 2)}), file=log, flush=True)
        report(stage, step, len(plan), entry, seconds)
    return model.eval()


def stop_unless_finite(loss, norm, window, stage, step):
    if not (math.isfinite(loss) and math.isfinite(norm)):
        ids = ", ".join(e["id"] for rows in window for e in rows)
        raise FloatingPointError(
            f"{stage}, step {step}: loss {float(loss)}, gradient norm {float(norm)}, in {ids}. "
            "This step was not taken. Look at these records, or lower --lr."
        )


def report(stage, step, steps, entry, seconds):
    """A line per validation; on a terminal also a running one with rate and time left."""
    text = f"  {stage} {step}/{steps}  loss {entry['loss']:.4f}"
    if "val_loss" in entry:
        clear = "\r" if sys.stderr.isatty() else ""
        print(f"{clear}{text}  val loss {entry['val_loss']:.4f}  {seconds:.0f} s", flush=True)
    elif sys.stderr.isatty():
        rate = step / seconds
        left = f"{rate:.1f} steps/s, {(steps - step) / rate:.0f} s left"
        print(f"\r{text}  {left}   ", end="", file=sys.stderr, flush=True)


# ---- one run -----------------------------------------------------------------------------------


def start_model(args, features, stage):
    """T5, or a whole released mm-cot checkpoint, with a fusion iff the run looks at pictures."""
    torch.manual_seed(args.seed)
    model = fusion.MultimodalT5.from_pretrained(args.weights[min(stage, len(args.weights) - 1)])
    if features is None:
        model.fusion = None
    elif model.fusion is None:
        width = model.t5.config.d_model
        model.fusion = fusion.GatedFusion(width, features.shape[1], args.no_image)
    return model


def run_mmcot(args):
    """Train, decode and score one recipe; returns its metrics. Writes the run folder `args.out`."""
    out, config = Path(args.out), vars(args)
    print(f"{out}: recipe {args.recipe}, vision {args.vision}", flush=True)
    splits = {s: data.load(args.data, s)[: args.limit] for s in ("train", "val", "test")}
    tokenizer = data.load_tokenizer(resolve(args.weights[0]))
    features = evaluation.image_features(config, [p for ps in splits.values() for p in ps])
    out.mkdir(parents=True, exist_ok=True)  # only now: a run that cannot start leaves nothing
    write_config(config, out)
    names, models = fusion.stage_names(args.recipe), []
    with open(out / "log.jsonl", "w", encoding="utf-8") as log:
        for stage, name in enumerate(names):
            if args.stage in ("both", name):
                models.append(run_stage(args, stage, splits, tokenizer, features, log))
                models[-1].save_pretrained(out / name)
                tokenizer.save(str(out / name / "tokenizer.json"))
            else:
                models.append(fusion.MultimodalT5.from_pretrained(out / name).to(args.device))
            if args.stage == name != names[-1]:
                return None  # the rationale stage alone has nothing to score yet
    how = argparse.Namespace(faithful_parse=False, teacher_forced=args.teacher_forced)
    return evaluation.evaluate(out, models, splits["test"], config, tokenizer, features, how)


def run_stage(args, stage, splits, tokenizer, features, log):
    """Train stage 0 or 1 of the recipe; returns the model."""
    fmt, name = fusion.RECIPES[args.recipe][stage], fusion.stage_names(args.recipe)[stage]
    generated = None
    if stage == 1 and args.stage2_rationales == "generated":
        generated = own_rationales(args, splits["train"], splits["val"], tokenizer, features, log)
    train = data.examples(splits["train"], fmt, tokenizer, features, generated, vars(args))
    val = data.examples(splits["val"], fmt, tokenizer, features, None, vars(args))
    show_example(train[0], tokenizer, fmt)
    model = start_model(args, features, stage)
    return fit(model, train, val, args, name, args.epochs[min(stage, len(args.epochs) - 1)], log)


def own_rationales(args, problems, val, tokenizer, features, log, folds=2):
    """{id: rationale} of the training problems, each written by a stage-1 model that did not train
    on it. Training stage 2 on these closes the gap to what it reads at test time."""
    generated = {}
    # Shuffled: every second problem of a file may be of the same kind (in the demo it is).
    order = torch.randperm(len(problems), generator=torch.Generator().manual_seed(args.seed))
    for fold in range(folds):
        held = set(order[fold::folds].tolist())
        seen = [p for i, p in enumerate(problems) if i not in held]
        unseen = [p for i, p in enumerate(problems) if i in held]
        splits = {"train": seen, "val": val}
        model = run_stage(args, 0, splits, tokenizer, features, log)
        examples = data.examples(unseen, "QCM-LE", tokenizer, features, None, vars(args))
        batches = evaluation.in_batches(examples, args.eval_batch_size, "own rationales")
        texts = fusion.write(model, batches, tokenizer, args.max_output[0])
        generated |= {problem_id: told["text"] for problem_id, told in texts.items()}
    return generated


def show_example(example, tokenizer, fmt):
    """The first example as the model gets it: text and ids, the supervised part marked."""
    print(f"  first {fmt} example, {example['id']}:")
    for part, ids in (("source", example["input_ids"]), ("supervised", example["labels"])):
        print(
            f"    {part:10} {tokenizer.decode(ids, skip_special_tokens=False)}\n    {'':10} {ids}"
        )


def write_config(config, out):
    """config.json: every flag, the versions it ran with and the commit."""
    git = ["git", "-C", str(HERE), "rev-parse", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip() or None
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    config = config | {"versions": versions, "commit": commit}
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


# ---- many runs ---------------------------------------------------------------------------------

ABLATION = {  # name: changed flags; the paper's Tables 2, 3 and 6
    "QCM->A": {"recipe": "answer", "vision": "none"},
    "QCM->RA": {"recipe": "reason", "vision": "none"},
    "QCM->AR": {"recipe": "explain", "vision": "none"},
    "two-stage, text only": {"vision": "none"},
    "two-stage, captions": {"vision": "caption"},
    "two-stage, vision": {},
    "two-stage, vision, no picture masked": {"no_image": "mask"},
    "two-stage, vision, own rationales": {"stage2_rationales": "generated"},
    "one-stage QCM->RA, vision": {"recipe": "reason"},
    "QCM->A, vision": {"recipe": "answer"},
}


def run_ablation(args):
    """Every line of ABLATION, into a folder of its own; {name: metrics}."""
    rows = {}
    for name, changed in ABLATION.items():
        folder = "".join(c if c.isalnum() else "-" for c in name.replace("->", "-"))
        changed = changed | {"out": str(Path(args.out) / folder), "teacher_forced": True}
        rows[name] = run_mmcot(argparse.Namespace(**vars(args) | changed))
        print(evaluation.summary(rows), flush=True)
    return rows


def parse_args(argv=None):
    """The flags; those not given take the demo's or the paper's value, by --data."""
    parser = argparse.ArgumentParser(prog="train.py", description=__doc__.splitlines()[0])
    add_what(parser)
    add_how(parser)
    args = parser.parse_args(argv)
    if bool(args.features) != bool(args.name_map):
        parser.error("--features FILE and --name-map name_map.json go together")
    for name, value in (DEMO if args.data == "demo" else PUBLISHED).items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.out = args.out or f"runs/{Path(args.data).stem}-{args.recipe}-{args.vision}"
    return args


def add_what(parser):
    what = parser.add_argument_group("what to train")
    what.add_argument("--model", choices=("mmcot",), required=True, help="the system to train")
    what.add_argument(
        "--recipe", choices=fusion.RECIPES, default="two-stage", help="prompt formats"
    )
    what.add_argument(
        "--vision",
        choices=("detr", "caption", "none"),
        default="detr",
        help="what stands for the picture",
    )
    what.add_argument(
        "--no-image",
        choices=fusion.NO_IMAGE,
        default="zero",
        help="problems without picture, in a new fusion: see fusion.py",
    )
    what.add_argument(
        "--stage", choices=("both", "rationale", "answer"), default="both", help="train one stage"
    )
    what.add_argument(
        "--stage2-rationales",
        choices=("gold", "generated"),
        default="gold",
        help="what stage 2 trains on",
    )
    what.add_argument(
        "--ablation", action="store_true", help="the paper's Tables 2, 3 and 6 in one run"
    )
    files = parser.add_argument_group("files")
    files.add_argument(
        "--data", default="demo", help="demo, scienceqa, a ScienceQA folder or a .jsonl"
    )
    files.add_argument(
        "--weights", nargs="+", help="T5 folder or Hub id, for both stages or one each"
    )
    files.add_argument("--vision-weights", help="DETR folder or Hub id")
    files.add_argument("--features", help="published detr.npy, clip.npy, resnet.npy or vit.pth")
    files.add_argument("--name-map", help="name_map.json that goes with --features")
    files.add_argument("--features-cache", help="folder for our own features")
    files.add_argument("--out", help="run folder (runs/DATA-RECIPE-VISION)")


def add_how(parser):
    how = parser.add_argument_group("how")
    how.add_argument(
        "--epochs", type=float, nargs="+", help="for both stages or one each; 0 only decodes"
    )
    how.add_argument("--max-steps", type=int, help="stop each stage after so many steps")
    how.add_argument("--batch-size", type=int, help="problems in a step")
    how.add_argument("--accumulate", type=int, default=1, help="batches in an optimizer step")
    how.add_argument("--lr", type=float, help="peak learning rate")
    how.add_argument("--weight-decay", type=float, default=0.01, help="(%(default)s)")
    how.add_argument("--max-input", type=int, help="source tokens; longer ones lose their middle")
    how.add_argument("--max-output", type=int, nargs="+", help="new tokens of each stage")
    how.add_argument("--eval-batch-size", type=int, default=64, help="(%(default)s)")
    how.add_argument("--image-size", type=int, help="shorter side for DETR, in pixels")
    how.add_argument("--limit", type=int, help="only the first N problems of each split")
    how.add_argument("--seed", type=int, default=42, help="(%(default)s, the original's)")
    how.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(%(default)s)"
    )
    how.add_argument("--threads", type=int, help="CPU threads (demo: 1, else all)")
    odd = parser.add_argument_group("as the original had it")
    odd.add_argument("--faithful-text", action="store_true", help='a newline becomes a stray "n"')
    odd.add_argument(
        "--teacher-forced", action="store_true", help="show the inflated ROUGE-L as well"
    )


def main(argv=None):
    args = parse_args(argv)
    torch.set_num_threads(args.threads)
    start = time.monotonic()
    if args.ablation:
        print(f"\n{evaluation.summary(run_ablation(args))}")
    else:
        scores = run_mmcot(args)
        if scores:
            print(f"\n{evaluation.table({args.out: scores})}")
    print(f"\n{args.out}: done in {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"train.py: {error}")
