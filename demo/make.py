"""Makes the demo's pretrained checkpoints: `python demo/make.py` writes demo/{t5,detr,paligemma}.

They take the place of UnifiedQA-T5, DETR and PaliGemma 2 on a machine without a network, in the
same files (Hub layout, safetensors, tokenizer.json) and through the same code:

  t5         T5 v1.0, trained on text questions: scenes of demo/scenes.py described in words. It
             knows no image.
  detr       trained to find the objects of such images. It knows no question.
  paligemma  PaliGemma 2: it has described images, answered questions about them with a bare letter
             (which taught it little), and reasoned in steps about scenes described in words, but
             never about an image.

None was trained on a val or test scene, nor on the held-out family.

Axes: n scenes, B batch, S pixels down and across, Q queries, L classes, N heads, H width of one.
"""

import argparse
import itertools
import os
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import Tokenizer
from torch import Tensor, nn

import data
from demo import scenes, teacher
from demo.words import gemma_tokenizer, t5_tokenizer
from model import (
    DETR,
    T5,
    DETRConfig,
    FrozenBatchNorm,
    Gemma2,
    Gemma2Config,
    PaliGemma,
    PaliGemmaConfig,
    SigLIPConfig,
    T5Config,
    rotary_angles,
    rotate,
)
from support.dataset.choices import LETTERS
from support.dataset.images import detr_pixels
from support.dataset.sources import problem_fields
from support.dataset.tokenizers import encode

HERE = Path(__file__).parent
SIDE = 96  # pixels; scenes are drawn at 128
SEED = 1_000_003  # not the benchmark's seed; train split only
FAMILIES = [f for f in scenes.FAMILIES if f not in scenes.HELD_OUT]
# Prompt formats of the text questions. Without LEA and ALE: their source is LE's, word for word.
FORMATS = ["QCM-LE"] * 4 + ["QCMG-A"] * 5 + ["QCM-A"]


# ---- data --------------------------------------------------------------------------------------


def problem_of(record: dict, hint: str) -> data.Problem:
    """A scene's record as a text question: without its image, with this hint."""
    return data.Problem(**problem_fields("", record | {"hint": hint}, "A scene", None, ""))


def drawn_scene(index: int) -> tuple[Tensor, list] | None:
    """Pretraining scene `index`: pixels and objects, or None for a scene without an image."""
    scene = scenes.problem(FAMILIES[index % len(FAMILIES)], "train", SEED, index)
    return (detr_pixels(scene.image, SIDE).half(), scene.objects) if scene.image else None


def text_question(index: int) -> tuple[str, str]:
    """Pretraining scene `index` as a text question: source and target."""
    scene = scenes.problem(FAMILIES[index % len(FAMILIES)], "train", SEED, index)
    record = scene.record
    fmt = FORMATS[index // len(FAMILIES) % len(FORMATS)]
    hint = record["hint"] if "G" in fmt else f"{record['hint']} {scene.description}".strip()
    # Finding the letter of an answer is the hardest part to learn: mostly from one sentence.
    last = record["solution"].rstrip(".").split(". ")[-1]
    return data.prompt(problem_of(record, hint), fmt, f"Solution: {last}." if index % 5 else None)


def many(make: Callable[[int], Any], count: int) -> list:
    """make(0) .. make(count - 1), on all cores, without those that are None."""
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        results = pool.map(make, range(count), chunksize=64)
        return [result for result in results if result is not None]


# ---- training ----------------------------------------------------------------------------------


def optimise(
    name: str, model: nn.Module, losses: Callable, steps: int, lr: float, device: str
) -> None:
    """AdamW, 5 % warm-up, linear decay, clipping at 1; `losses(step)` gives the step's loss."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.01)

    def rate_at(step: int) -> float:
        return min((step + 1) / (0.05 * steps), 1 - step / steps)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate_at)
    model.to(device).train()
    for step in range(steps):
        loss = losses(step)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if (step + 1) % 100 == 0:
            print(f"{name} {step + 1}/{steps}  loss {loss.item():.4f}", flush=True)
    model.cpu().eval()


def endless_batches(rows: list[dict], generator: torch.Generator) -> Iterator[list[dict]]:
    """48 rows of like length at a time, one epoch after another."""
    lengths = [len(row["input_ids"]) + len(row["labels"]) for row in rows]
    while True:
        for batch in reversed(data.batches(lengths, 48, generator)):
            yield [rows[i] for i in batch]


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> int:
    """Write tokenizer.json; returns the vocabulary's size, rounded up to a multiple of 32."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return -(-tokenizer.get_vocab_size() // 32) * 32


# ---- detr --------------------------------------------------------------------------------------


def swap_norms(module: nn.Module, old: type, new: type) -> None:
    """Replace batch norms of class `old` by `new`, keeping their four tensors: DETR freezes them,
    but somebody has to train them first."""
    for name, child in module.named_children():
        if isinstance(child, old):
            norm = new(len(child.weight))
            norm.load_state_dict(child.state_dict(), strict=False)  # but for num_batches_tracked
            setattr(module, name, norm)
        else:
            swap_norms(child, old, new)


def detr_targets(objects: list) -> tuple[Tensor, Tensor]:
    """Class (Q,) and box (Q, 4) per query. In place of Hungarian matching an object belongs to the
    query of the grid cell of its centre."""
    classes = torch.full((scenes.GRID**2,), len(scenes.CLASSES))
    boxes = torch.zeros(scenes.GRID**2, 4)
    for name, (x0, y0, x1, y1) in objects:
        x = (x0 + x1) / 2
        y = (y0 + y1) / 2
        query = int(y // scenes.CELL) * scenes.GRID + int(x // scenes.CELL)
        classes[query] = scenes.CLASSES.index(name)
        boxes[query] = torch.tensor([x, y, x1 - x0, y1 - y0]) / scenes.SIDE
    return classes, boxes


@torch.inference_mode()
def report_detr(model: DETR, pixels: Tensor, classes: Tensor, boxes: Tensor) -> None:
    """Print the detector's accuracy on images it was not trained on."""
    logits, predicted = model(pixels)
    full = classes < model.config.num_labels  # (B, Q)
    right = logits.argmax(-1) == classes  # (B, Q)
    named = right[full].float().mean()
    empty = right[~full].float().mean()
    error = (predicted - boxes)[full].abs().mean() * scenes.SIDE
    print(
        f"detr, {len(pixels)} new images: {named:.2%} of the objects named, {empty:.2%} of the "
        f"empty cells left empty, boxes off by {error:.2f} of {scenes.SIDE} pixels"
    )


def make_detr(args: argparse.Namespace) -> None:
    """Write OUT/detr: trained on drawn scenes to name each object and to box it."""
    torch.manual_seed(0)
    drawn = many(drawn_scene, args.pictures)
    pixels = torch.stack([p for p, _ in drawn]).to(args.device)  # (n, 3, S, S)
    pixels = pixels.to(memory_format=torch.channels_last)
    targets = [detr_targets(objects) for _, objects in drawn]
    classes, boxes = (torch.stack(t).to(args.device) for t in zip(*targets, strict=True))
    config = DETRConfig(
        backbone="resnet50", dilation=True, d_model=64,
        backbone_kwargs={"layers": [1, 1, 1, 1], "channels": [16, 24, 32, 48]},
        encoder_layers=2, encoder_attention_heads=4, encoder_ffn_dim=128,
        decoder_layers=2, decoder_attention_heads=4, decoder_ffn_dim=128,
        num_queries=scenes.GRID**2, num_labels=len(scenes.CLASSES),
        id2label={str(i): name for i, name in enumerate(scenes.CLASSES)},
    )  # fmt: skip
    model = DETR(config).to(memory_format=torch.channels_last)  # twice as fast on a CPU
    swap_norms(model, FrozenBatchNorm, nn.BatchNorm2d)
    weight = torch.ones(config.num_labels + 1, device=args.device)
    weight[-1] = 0.2  # most cells are empty

    def losses(step: int) -> torch.Tensor:
        batch = torch.randint(len(pixels) - 512, (64,), device=pixels.device)  # 512 are held back
        x = pixels[batch].float()
        x = x + 0.05 * torch.randn_like(x) + 0.1 * torch.randn_like(x[:, :, :1, :1])
        logits, predicted = model(x)  # (B, Q, L + 1), (B, Q, 4)
        full = classes[batch] < config.num_labels  # (B, Q)
        box_loss = (predicted - boxes[batch])[full].abs().mean()
        class_loss = F.cross_entropy(logits.flatten(0, 1), classes[batch].flatten(), weight)
        return class_loss + 5 * box_loss

    optimise("detr", model, losses, args.detr_steps, 1e-3, args.device)
    swap_norms(model, nn.BatchNorm2d, FrozenBatchNorm)
    report_detr(model, pixels[-512:].float().cpu(), classes[-512:].cpu(), boxes[-512:].cpu())
    model.save_pretrained(args.out / "detr")


# ---- t5 ----------------------------------------------------------------------------------------


@torch.no_grad()
def attend_to_neighbours(model: T5) -> None:
    """Start some heads on the previous and the next token.

    T5 knows positions only through its bias table, which starts near zero and which Adam moves by
    at most lr a step: without this it does not learn to find the letter of an answer in 4,000
    steps, with it in 1,000.
    """
    before = 1  # the bucket of -1
    after = 17  # and of +1
    table = model.encoder.relative_attention_bias.weight  # (buckets, N)
    table[before, 0] += 4
    table[after, 1] += 4
    table[before + 1, 2] += 2
    model.decoder.relative_attention_bias.weight[before, 0] += 4


def make_t5(args: argparse.Namespace) -> None:
    """Write OUT/t5, with its tokenizer: trained on scenes described in words."""
    torch.manual_seed(0)
    pairs = many(text_question, args.texts)
    tokenizer = t5_tokenizer([text for pair in pairs for text in pair])
    vocab_size = save_tokenizer(tokenizer, args.out / "t5")
    sizes = {"d_model": 64, "d_kv": 16, "d_ff": 192, "num_layers": 2, "num_heads": 4}
    model = T5(T5Config(vocab_size=vocab_size, dropout_rate=0.0, **sizes))
    sources, targets = (encode(tokenizer, texts, 512) for texts in zip(*pairs, strict=True))
    rows = [
        {"id": "", "input_ids": source, "labels": target}
        for source, target in zip(sources, targets, strict=True)
    ]
    batches = endless_batches(rows, torch.Generator().manual_seed(0))
    model.init_weights()
    attend_to_neighbours(model)

    def losses(step: int) -> torch.Tensor:
        batch = data.collate(next(batches))
        batch = {k: v.to(args.device) for k, v in batch.items() if k != "ids"}
        logits = model(batch["input_ids"], batch["attention_mask"], batch["decoder_input_ids"])
        return F.cross_entropy(logits.flatten(0, 1), batch["labels"].flatten())

    optimise("t5", model, losses, args.t5_steps, 2e-3, args.device)
    model.save_pretrained(args.out / "t5")


# ---- paligemma ---------------------------------------------------------------------------------

THETA = 30.0  # rotary base: with the usual 10,000 and 8 angles a head hardly tells neighbours apart


class Lesson(NamedTuple):
    """One pretraining sequence, and the image shown with it: its bytes, (S, S, 3)."""

    prefix: str
    suffix: str
    pixels: bytes | None = None


def scene_lessons(index: int) -> list[Lesson]:
    """The lessons of pretraining scene `index`."""
    scene = scenes.problem(FAMILIES[index % len(FAMILIES)], "train", SEED + 1, index)
    tasks = ["solve", "lookup"]
    if scene.image:
        extra = ("answer", "caption")[index // len(FAMILIES) % 2]
        tasks = ["describe", "solve", "lookup", extra]
    for attempt in itertools.count():
        reply = teacher.think(scene.record, scene.facts, f"pretraining {attempt}")
        if reply["kind"] == "sound":
            return [lesson(task, scene, reply["thought"]) for task in tasks]


def lesson(task: str, scene: scenes.Scene, thought: str) -> Lesson:
    """The lesson of one task about one scene."""
    hint = scene.record["hint"]
    letter = LETTERS[scene.record["answer"]]
    if task == "solve":  # in words
        words = f"{hint} {scene.description}".strip() if scene.image else hint
        prefix = data.pali_prefix(problem_of(scene.record, words), "solve")
        return Lesson(prefix, f"{thought}\nAnswer: {letter}")
    if task == "lookup":  # finding the letter of an answer is the hardest part to learn
        last = thought.split(". ")[-1]
        prefix = data.pali_prefix(problem_of(scene.record, last), "solve")
        return Lesson(prefix, f"Answer: {letter}")
    pixels = scene.image.resize((SIDE, SIDE), Image.Resampling.BICUBIC).tobytes()
    if task == "describe":
        return Lesson("describe en", scene.description, pixels)
    if task == "caption":
        return Lesson("caption en", scene.caption, pixels)
    return Lesson(data.pali_prefix(problem_of(scene.record, hint), "answer"), letter, pixels)


def paligemma_config(vocab_size: int, image_id: int) -> PaliGemmaConfig:
    """A PaliGemma 2 with one image token for each cell of the scenes' grid."""
    vision = SigLIPConfig(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        image_size=SIDE, patch_size=SIDE // scenes.GRID,
    )  # fmt: skip
    text = Gemma2Config(
        vocab_size=vocab_size, hidden_size=64, intermediate_size=192, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, query_pre_attn_scalar=16,
        rope_theta=THETA,
    )  # fmt: skip
    return PaliGemmaConfig(vision, text, image_token_index=image_id)


@torch.no_grad()
def attend_near(gemma: Gemma2) -> None:
    """Start the first layer's heads on the tokens one, two and three back and one ahead, as in
    `attend_to_neighbours`. Rotary attention needs something constant to turn: the embedding's first
    dimension."""
    c = gemma.config
    H = c.head_dim
    attention = gemma.layers[0].self_attn
    gemma.embed_tokens.weight[:, 0] = 4 * gemma.embed_tokens.weight.std()
    u = torch.tensor([1, 1, 1, 0.5, 0.3, 0, 0, 0]).repeat(2)  # the angles that turn fast
    u = 6 * u / u.norm()  # (H,)
    attention.q_proj.weight *= 0.5
    attention.k_proj.weight *= 0.5
    attention.k_proj.weight[:, 0] = u.repeat(c.num_key_value_heads)
    for head, offset in enumerate((-1, -2, 1, -3)):
        cos, sin = rotary_angles(torch.tensor([[offset]]), H, c.rope_theta, u.dtype)
        turned = rotate(u[None, None, None], cos, sin).flatten()  # (H,)
        attention.q_proj.weight[head * H : (head + 1) * H, 0] = turned


def make_paligemma(args: argparse.Namespace) -> None:
    """Write OUT/paligemma, with its tokenizer: trained on the lessons of drawn scenes."""
    torch.manual_seed(0)
    lessons = list(itertools.chain(*many(scene_lessons, args.scenes)))
    tokenizer = gemma_tokenizer([text for x in lessons for text in (x.prefix, x.suffix)])
    vocab_size = save_tokenizer(tokenizer, args.out / "paligemma")
    model = PaliGemma(paligemma_config(vocab_size, tokenizer.token_to_id("<image>")))
    model.init_weights()
    attend_near(model.language_model)
    rows = []
    for x in lessons:
        image_tokens = model.config.image_tokens if x.pixels else 0
        row = data.sequence(tokenizer, x.prefix, x.suffix, image_tokens)
        rows.append({"id": "", "lesson": x} | row)
    lookups = [row for row in rows if row["lesson"].suffix.startswith("Answer:")]
    generator = torch.Generator().manual_seed(0)
    first = endless_batches(lookups, generator)
    later = endless_batches(rows, generator)

    def losses(step: int) -> torch.Tensor:
        chosen = next(first if step < args.lookup_steps else later)
        batch = data.pali_collate(chosen)
        batch = {k: v.to(args.device) for k, v in batch.items() if k != "ids"}
        images = [noisy_image(x["lesson"].pixels) for x in chosen if x["lesson"].pixels]
        features = model.image_features(torch.stack(images).to(args.device)) if images else None
        labels = batch.pop("labels")[:, 1:]
        states = model.states(**batch, image_features=features)[:, :-1]
        supervised = labels != -100
        return F.cross_entropy(model.head(states[supervised]), labels[supervised])

    optimise("paligemma", model, losses, args.paligemma_steps, 2e-3, args.device)
    model.save_pretrained(args.out / "paligemma")


def noisy_image(pixels: bytes) -> Tensor:
    """Bytes -> (3, S, S) in -1..1, a little noisy, so that no grey level is memorised."""
    x = torch.frombuffer(bytearray(pixels), dtype=torch.uint8).view(SIDE, SIDE, 3)
    x = x.permute(2, 0, 1).float() / 127.5 - 1  # (3, S, S)
    return x + 0.1 * torch.randn_like(x) + 0.1 * torch.randn_like(x[:, :1, :1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write to")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=device, help="where to train")
    parser.add_argument("--only", choices=("t5", "detr", "paligemma"), help="make one of them")
    parser.add_argument("--pictures", type=int, default=6000, help="scenes DETR learns from")
    parser.add_argument("--texts", type=int, default=48000, help="problems T5 learns from")
    parser.add_argument("--scenes", type=int, default=30000, help="scenes PaliGemma learns from")
    parser.add_argument("--detr-steps", type=int, default=1500, help="steps of training")
    parser.add_argument("--t5-steps", type=int, default=10000, help="steps of training")
    parser.add_argument("--lookup-steps", type=int, default=2000, help="only letters, at first")
    parser.add_argument("--paligemma-steps", type=int, default=11000, help="steps of training")
    parser.add_argument("--threads", type=int, default=1, help="fixed, as sums depend on it")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for name, make in {"detr": make_detr, "t5": make_t5, "paligemma": make_paligemma}.items():
        if args.only in (None, name):
            make(args)


if __name__ == "__main__":
    main()
