"""train.py's command line: the flags, and the defaults of each system.

The values are those of the papers and of big_vision's configs, as far as they say; the demo's are
what a few minutes on a core allow.

Left out: configuration files, and tables of many runs (support/training/ablations.py).
"""

import argparse
from pathlib import Path

import torch

import fusion
from support.files import ROOT

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
ALL_THREADS = torch.get_num_threads()
RECIPES = {"mmcot": tuple(fusion.RECIPES), "paligemma": ("reason", "answer")}
MMCOT = {  # arXiv 2302.00923, base model
    "weights": ["allenai/unifiedqa-t5-base"],
    "vision_weights": "facebook/detr-resnet-101-dc5",
    "recipe": "two-stage",
    "image_size": 224,
    "epochs": [20.0],
    "lr": 5e-5,
    "weight_decay": 0.01,
    "batch_size": 8,
    "accumulate": 1,
    "weighting": "token",
    "max_input": 512,
    "max_output": [512, 64],
    "threads": ALL_THREADS,
}
MMCOT_DEMO = MMCOT | {  # three minutes on one core
    "weights": [str(ROOT / "demo/t5")],
    "vision_weights": str(ROOT / "demo/detr"),
    "image_size": 96,
    "epochs": [8.0, 2.0],
    "lr": 3e-3,
    "batch_size": 32,
    "max_input": 256,
    "max_output": [64, 16],
    "threads": 1,  # the result depends on it; two are 1.5 times as fast on an idle machine
}
PALIGEMMA = {  # none of it was tried at full size; the sources are papers and big_vision's configs
    "weights": ["google/paligemma2-3b-mix-448"],  # mix has answered questions, pt has not
    "recipe": "reason",
    "epochs": [5.0],  # at most: the best epoch on validation answers is kept
    "lr": 1e-4,  # of adapters; for --full take 6e-6 (ScienceQA in 2412.03555, Table 14)
    "weight_decay": 0.0,  # as the published ScienceQA transfer
    "batch_size": 4,  # a guess at what a 24 GB GPU holds with checkpointing at 448 pixels
    "accumulate": 8,  # 32 rows a step: 4, as in pali_reason, is noise
    "weighting": "example",  # as big_vision: a long thought does not outweigh a short answer
    "warmup": 0.05,
    "lora_r": 32,  # long texts are a new skill: more than the usual 8 or 16
    "lora_alpha": 64.0,  # a scale of 2
    "max_suffix": 384,  # 62 of pali_reason's 251 are longer; short suits the small (2502.12143)
    "max_output": [384, 16],
    "mix": 0.25,  # answer-only rows a trace, so that short answers are not forgotten
    "final_soft_cap": False,  # "better for transfer" (big_vision); arg-max is the same without
    "checkpointing": True,
    "eval_problems": 200,  # decoded after each epoch
    "threads": ALL_THREADS,
}
PALIGEMMA_DEMO = PALIGEMMA | {  # four minutes on one core
    "weights": [str(ROOT / "demo/paligemma")],
    "epochs": [4.0],
    "lr": 4e-3,
    "batch_size": 16,
    "accumulate": 1,
    "weighting": "token",
    "lora_r": 16,
    "lora_alpha": 32.0,
    "max_suffix": 96,
    "max_output": [96, 8],
    "mix": 0.0,
    "final_soft_cap": True,
    "checkpointing": False,
    "eval_problems": 200,
    "threads": 1,
}
DEFAULTS = {  # by --model, and whether --data is the demo
    ("mmcot", True): MMCOT_DEMO,
    ("mmcot", False): MMCOT,
    ("paligemma", True): PALIGEMMA_DEMO,
    ("paligemma", False): PALIGEMMA,
}
AT_LEAST_ONE = """max_steps batch_size accumulate max_output eval_batch_size limit threads samples
    image_size max_input max_suffix lora_r save_every""".split()  # others may be 0, none negative


def parse_args(argv=None):
    """The flags; those not given take the defaults of --model, the demo's or the published ones."""
    about = (
        "Training: `python train.py --model mmcot` or `--model paligemma`; each ends in a table."
    )
    parser = argparse.ArgumentParser(prog="train.py", description=about)
    for add in (add_what, add_files, add_how, add_mmcot, add_paligemma, add_adapter, add_decoding):
        add(parser)
    args = parser.parse_args(argv)
    if bool(args.features) != bool(args.name_map):
        parser.error("--features FILE and --name-map name_map.json go together")
    for name, value in DEFAULTS[args.model, args.data == "demo"].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    refuse_senseless_numbers(parser, args)
    known = RECIPES[args.model]
    if args.recipe not in known:
        parser.error(f"--model {args.model} knows the recipes {', '.join(known)}")
    if args.full and args.adapter:
        parser.error("--full trains all weights, --adapter starts from an adapter: not both")
    if args.samples > 1 and args.temperature == 0:
        parser.error("--samples needs a --temperature above 0: greedy texts are all the same")
    if args.full and args.dtype == "bfloat16":
        parser.error("--full trains in float32: steps of 1e-5 are lost in bfloat16's 8 bits")
    half = args.model == "paligemma" and args.device.startswith("cuda") and not args.full
    args.dtype = args.dtype or ("bfloat16" if half else "float32")
    what = args.vision if args.model == "mmcot" else "paligemma"
    args.out = args.out or f"runs/{Path(args.data).stem}-{args.recipe}-{what}"
    if args.model == "paligemma" and args.data == "demo":
        args.traces = args.traces or "demo"
    args.teacher_forced |= args.ablation
    return args


def refuse_senseless_numbers(parser, args):
    for name, value in vars(args).items():
        for x in value if isinstance(value, list) else [value]:
            least = 1 if name in AT_LEAST_ONE else 0
            if isinstance(x, int | float) and not x >= least:  # nan is refused as well
                parser.error(f"--{name.replace('_', '-')} {x} makes no sense: {least} is the least")


def add_what(parser):
    what = parser.add_argument_group("what to train")
    what.add_argument(
        "--model", choices=("mmcot", "paligemma"), required=True, help="the system to train"
    )
    recipes = "mmcot: two-stage, answer, reason, explain; paligemma: reason, answer"
    what.add_argument("--recipe", metavar="NAME", help=recipes)
    tables = "mmcot: the paper's Tables 2, 3 and 6; paligemma: what each part buys"
    what.add_argument("--ablation", action="store_true", help=tables)


def add_files(parser):
    files = parser.add_argument_group("files")
    folders = "demo, scienceqa, mathvista, a folder of theirs or a .jsonl (%(default)s)"
    files.add_argument("--data", default="demo", help=folders)
    weights = "T5 or PaliGemma folder or Hub id; mmcot takes one for both stages or one each"
    files.add_argument("--weights", nargs="+", help=weights)
    files.add_argument("--features-cache", help="folder for image features")
    files.add_argument("--out", help="run folder (runs/DATA-RECIPE-...)")
    bad = "a record, picture or trace that cannot be used: stop at it, or do without (%(default)s)"
    files.add_argument("--on-error", choices=("stop", "skip"), default="stop", help=bad)
    files.add_argument("--test-split", default="test", help="what the table is about (%(default)s)")


def add_how(parser):
    how = parser.add_argument_group("how")
    epochs = "mmcot: for both stages or one each; 0 only decodes"
    how.add_argument("--epochs", type=float, nargs="+", help=epochs)
    how.add_argument("--max-steps", type=int, help="stop each training after so many steps")
    rows = "rows that go through the model together, at most, on a device"
    how.add_argument("--batch-size", type=int, help=rows)
    step = "batches in an optimizer step, on however many devices"
    how.add_argument("--accumulate", type=int, help=step)
    how.add_argument("--lr", type=float, help="peak learning rate")
    how.add_argument("--weight-decay", type=float, help="of matrices")
    weighting = "token: the mean over a step's tokens; example: the mean of each row's mean"
    how.add_argument("--weighting", choices=("token", "example"), help=weighting)
    how.add_argument("--max-output", type=int, nargs="+", help="new tokens: rationale, answer")
    how.add_argument("--eval-batch-size", type=int, default=64, help="(%(default)s)")
    how.add_argument("--limit", type=int, help="only the first N problems of each split")
    resume = "go on, to the bit, with the run in --out that was interrupted"
    how.add_argument("--resume", action="store_true", help=resume)
    dry = "print parameters, memory, one measured step and the time it would take; write nothing"
    how.add_argument("--dry-run", action="store_true", help=dry)
    every = "steps between two saved states (one a minute, at most a twentieth of the time)"
    how.add_argument("--save-every", type=int, metavar="N", help=every)
    how.add_argument("--seed", type=int, default=42, help="(%(default)s)")
    how.add_argument("--device", default=DEVICE, help="(%(default)s)")
    how.add_argument("--threads", type=int, help="CPU threads (demo: 1, else all)")


def add_mmcot(parser):
    mmcot = parser.add_argument_group("mmcot")
    pictures = ("detr", "caption", "none")
    mmcot.add_argument(
        "--vision", choices=pictures, default="detr", help="what stands for the picture"
    )
    mmcot.add_argument("--vision-weights", help="DETR folder or Hub id")
    mmcot.add_argument("--image-size", type=int, help="shorter side for DETR, in pixels")
    mmcot.add_argument("--features", help="published detr.npy, clip.npy, resnet.npy or vit.pth")
    mmcot.add_argument("--name-map", help="name_map.json that goes with --features")
    none = "problems without picture, in a new fusion: see fusion.py"
    mmcot.add_argument("--no-image", choices=fusion.NO_IMAGE, default="zero", help=none)
    stages = ("both", "rationale", "answer")
    mmcot.add_argument("--stage", choices=stages, default="both", help="train one stage")
    kinds = ("gold", "generated")
    reads = "what stage 2 trains on"
    mmcot.add_argument("--stage2-rationales", choices=kinds, default="gold", help=reads)
    longest = "source tokens; longer ones lose their middle"
    mmcot.add_argument("--max-input", type=int, help=longest)
    stray = 'as the original had it: a newline becomes a stray "n"'
    mmcot.add_argument("--faithful-text", action="store_true", help=stray)
    forced = "show the inflated ROUGE-L of teacher-forced rationales as well"
    mmcot.add_argument("--teacher-forced", action="store_true", help=forced)


def add_paligemma(parser):
    pali = parser.add_argument_group("paligemma")
    traces = "traces.jsonl, or pali_reason's csv or json; none: the data's own solutions"
    pali.add_argument("--traces", metavar="FILE", help=traces)
    kept = "traces to learn from: all, judged correct, or also judged consistent (%(default)s)"
    kinds = ("all", "correct", "consistent")
    pali.add_argument("--keep", choices=kinds, default="consistent", help=kept)
    pali.add_argument("--limit-traces", type=int, metavar="N", help="only the first N of them")
    pali.add_argument("--mix", type=float, help="answer-only rows for each trace")
    longest = "tokens of a suffix; longer ones are left out, never cut"
    pali.add_argument("--max-suffix", type=int, help=longest)
    shuffle = "shuffle the choices of training rows where no text names their letters"
    pali.add_argument("--shuffle-choices", action="store_true", help=shuffle)
    pali.add_argument("--warmup", type=float, help="share of the steps; then a cosine to 0")
    pali.add_argument(
        "--label-smoothing", type=float, default=0.0, help="spread this much over all words"
    )
    pali.add_argument("--eval-problems", type=int, help="validation problems decoded each epoch")
    alone = "only this run, without the baselines it must be compared with"
    pali.add_argument("--alone", action="store_true", help=alone)
    seed_layout = "seed: BOS after the question, as pali_reason had it"
    layouts = ("paligemma", "seed")
    pali.add_argument("--layout", choices=layouts, default="paligemma", help=seed_layout)
    no_eos = "leave EOS out of the loss: shows what that does"
    pali.add_argument("--no-eos-loss", dest="eos_in_loss", action="store_false", help=no_eos)


def add_adapter(parser):
    lora_ = parser.add_argument_group("paligemma: weights")
    lora_.add_argument("--full", action="store_true", help="train all weights, not adapters")
    lora_.add_argument("--adapter", metavar="DIR", help="start from this adapter, or only decode")
    lora_.add_argument("--lora-r", type=int, help="rank")
    lora_.add_argument("--lora-alpha", type=float, help="the update is scaled by alpha / r")
    lora_.add_argument("--lora-dropout", type=float, default=0.0, help="(%(default)s)")
    targets = "module names or paths; no patterns (all projections of the language model)"
    lora_.add_argument("--lora-targets", nargs="+", help=targets)
    lora_.add_argument("--lora-rslora", action="store_true", help="scale by alpha / sqrt(r)")
    lora_.add_argument("--lora-dora", action="store_true", help="magnitude and direction apart")
    dtype = "of frozen weights and compute (bfloat16 on a GPU, else float32)"
    lora_.add_argument("--dtype", choices=("float32", "bfloat16"), help=dtype)
    again = "keep only each layer's input, compute it again on the way back"
    flag = argparse.BooleanOptionalAction
    lora_.add_argument("--checkpointing", action=flag, help=again)
    cap = "cap the final logits as in pretraining"
    lora_.add_argument("--final-soft-cap", action=flag, help=cap)


def add_decoding(parser):
    how = parser.add_argument_group("paligemma: decoding")
    many = "texts per problem; their answers vote (%(default)s)"
    how.add_argument("--samples", type=int, default=1, metavar="N", help=many)
    how.add_argument("--temperature", type=float, default=0.0, help="(%(default)s: greedy)")
    loops = "let a rationale repeat itself until its budget is spent"
    how.add_argument("--no-loop-stop", dest="loop_stop", action="store_false", help=loops)
    cut = 'do not give a cut rationale its "Answer:"'
    how.add_argument("--no-forced-answer", dest="force_answer", action="store_false", help=cut)
