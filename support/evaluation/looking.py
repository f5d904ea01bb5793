"""What a model looked at: gates, attention and token probabilities, of a second pass.

The pass reads what was written anyway: nothing here is part of decoding. Of mmcot it takes the
fusion's own numbers (Multimodal-CoT, arXiv 2302.00923, Eq. 4 and 5) and DETR's words for its
positions; of PaliGemma the attention of the last third of its layers to the picture.

Left out: why an answer was given. Attention says where numbers came from, not why (Jain and Wallace
2019, arXiv 1902.10186).

Axes: T tokens, U of them written, n of them with a map; P I image positions, D width, K x G heads,
L classes.
"""

import base64
import re
import time
from bisect import bisect_right
from itertools import accumulate

import torch

import data
import fusion
from model import DETR, resolve
from support import files
from support.evaluation.decode_cache import in_batches, paligemma_inputs, prolonged, spelled
from support.evaluation.grading import CUE

LOOKS = 24  # problems whose looks are kept


def looks(config, models, problems, predictions, tokenizer, features):
    """What the models looked at: {id: look}, JSON. See `fusion_looks` and `paligemma_look`.

    `predictions` as `predict` gave them for these problems: of PaliGemma with their "ids". Empty
    for models that see no pictures."""
    if config["model"] == "paligemma":
        return paligemma_looks(models[0], problems, predictions, config, tokenizer, features)
    return fusion_looks(models, problems, predictions, config, tokenizer, features)


@torch.inference_mode()
def fusion_looks(models, problems, predictions, config, tokenizer, features):
    """{id: [look of each stage]}: what mmcot's fusion did with each token of its source text.

    "stage"      "rationale" or "answer", whose source has the rationale that was written
    "tokens"     text of each source token
    "gate"       of each token, Eq. 5's lambda, the mean over D: the share of the picture in it
    "attention"  of each token, Eq. 4's weights of the 8 positions that get most of it
    "boxes"      [cx, cy, w, h] of those, in 0..1 of the picture; none with published features
    "labels"     what DETR calls them, else their numbers

    A problem without a picture has a gate, and nothing that is attended to."""
    if features is None:
        return {}
    generated = {x["id"]: x.get("rationale") for x in predictions}
    objects, found = detected(config, problems, features), {p.id: [] for p in problems}
    stages, formats = fusion.stage_names(config["recipe"]), fusion.RECIPES[config["recipe"]]
    for stage, fmt, model in zip(stages, formats, models, strict=True):
        told = generated if "G" in fmt else None
        examples = data.examples(
            problems,
            fmt,
            tokenizer,
            features,
            told,
            max_input=config["max_input"],
            max_output=config["max_output"][-1 if "G" in fmt else 0],
            captions=config["vision"] == "caption",
            faithful=config["faithful_text"],
        )
        label = f"{stage} looked at"
        for batch in in_batches(examples, config["eval_batch_size"], label, dealt=False):
            names = ("input_ids", "attention_mask", "image_features")
            ids, mask, pictures = (batch[name].to(config["device"]) for name in names)
            _, gate, attention = model.fusion.explain(model.t5.encode(ids, mask), pictures)
            for row, i in enumerate(batch["ids"]):
                real = mask[row].bool()  # (T,), no pads
                tokens = spelled(tokenizer, ids[row, real].tolist(), skip=False)
                lam = decimals(gate[row, real].mean(-1))  # T numbers
                look = {"stage": stage, "tokens": tokens, "gate": lam}
                found[i].append(look | strongest(attention[row, real], objects[i]))
    return found


def strongest(attention, objects, most=8):
    """Attention (T, P) to the `most` positions that get most of it, and what these are."""
    count = len(next(iter(objects.values())))
    best = attention.sum(0).topk(min(most, count)).indices.tolist()
    kept = {name: [values[i] for i in best] for name, values in objects.items()}
    return kept | {"attention": decimals(attention[:, best])}


def detected(config, problems, features):
    """{id: {"boxes", "labels"}} of the P positions, by DETR's two heads on the features that the
    model saw; of published ones, whose DETR is not here, and of other encoders, {"labels": their
    numbers}."""
    P = {p.id: features.shape[0] if p.id in features else 0 for p in problems}
    if config["features"] or config["vision"] != "detr":
        return {i: {"labels": [f"position {j}" for j in range(n)]} for i, n in P.items()}
    detr, found = DETR.from_pretrained(resolve(config["vision_weights"])), {}
    names = (detr.config.id2label or {}).get
    for i, n in P.items():
        logits, boxes = detr.detect(torch.from_numpy(features[i][:n]))  # (..., L + 1), (..., 4)
        best, nothing = logits.argmax(-1).tolist(), detr.config.num_labels
        labels = ["no object" if j == nothing else names(str(j), str(j)) for j in best]
        found[i] = {"boxes": decimals(boxes), "labels": labels}
    return found


def decimals(tensor):
    """Nested lists, of three decimals."""
    return (tensor.double() * 1000).round().div(1000).tolist()


@torch.inference_mode()
def paligemma_looks(model, problems, predictions, config, tokenizer, features):
    """{id: `paligemma_look`} over the ids the model wrote: decode's own, as the text tokenised
    again may have others. Of a loop that was cut they have one round, as the model had when it
    answered. An <image> token that it said is left out: no picture is behind it."""
    written = {x["id"]: [i for i in x["ids"] if i != model.config.image_token_index]
               for x in predictions}  # fmt: skip
    rows = [data.TrainRow(p, config["recipe"], has_suffix=False) for p in problems if written[p.id]]
    examples = data.pali_examples(
        rows,
        tokenizer,
        features,
        max_suffix=config["max_suffix"],
        layout=config.get("layout", "paligemma"),
    )
    start, found = time.monotonic(), {}
    for done, example in enumerate(examples, 1):
        found[example["id"]] = paligemma_look(model, example, written[example["id"]], tokenizer)
        files.progress("looked at", done, len(examples), start)
    return found


@torch.inference_mode()  # also because only then the softmax is called
def paligemma_look(model, example, ids, tokenizer):
    """What the model had in mind when it wrote `ids` behind a prompt.

    "tokens"  text of each
    "p"       probability of each, given all before it, at temperature 1; low where a cue was forced
    "grid"    [rows, columns] of picture patches
    "maps"    {index of a token: base64 of rows * columns bytes}: from where it was predicted (one
              before its own place), attention to the patches, the mean over the heads of the last
              third of the layers; 255 is the strongest. For the tokens of `worth_a_map`
    "share"   {index: how much of that attention the picture has; the rest is on text}
    """
    device, start = model.language_model.embed_tokens.weight.device, len(example["input_ids"])
    batch = data.pali_collate([prolonged(example, ids)])
    given = paligemma_inputs(model, {k: v.to(device) for k, v in batch.items() if k != "ids"})
    patches = (given["input_ids"][0] == model.config.image_token_index).nonzero()[:, 0]  # (I,)
    tokens, seen = spelled(tokenizer, ids), []
    chosen = worth_a_map(tokens) if len(patches) else []
    rows = torch.tensor([start - 1 + i for i in chosen], dtype=torch.long, device=device)  # (n,)

    def watch(module, args, weights):  # (1, K, G, T, T)
        seen.append(weights[0, :, :, rows][..., patches].mean((0, 1)).float().cpu())  # (n, I)

    layers = model.language_model.layers
    last = [layer.self_attn.softmax for layer in layers[len(layers) * 2 // 3 :]]
    hooks = [softmax.register_forward_hook(watch) for softmax in last if chosen]
    try:
        states = model.states(**given)[0, start - 1 : -1]  # (U, D)
    finally:
        for hook in hooks:
            hook.remove()
    p = model.head(states).float().softmax(-1)[torch.arange(len(ids)), ids]  # (U,)
    maps = torch.stack(seen).mean(0) if chosen else torch.zeros(0, 1)  # n x I; 0 x 1 of none
    grey = (maps / maps.amax(1, keepdim=True).clamp(min=1e-9) * 255).round().byte()
    drawn = [base64.b64encode(row.numpy().tobytes()).decode() for row in grey]
    side = model.config.vision.image_size // model.config.vision.patch_size
    return {
        "tokens": tokens,
        "p": decimals(p),
        "grid": [side, side],
        "maps": dict(zip(map(str, chosen), drawn, strict=True)),
        "share": dict(zip(map(str, chosen), decimals(maps.sum(1)), strict=True)),
    }


def worth_a_map(tokens, most=24):
    """Indices of tokens that begin a word: first those of the answer line, then numbers, then words
    of four letters and more."""
    text, ends = "".join(tokens), list(accumulate(map(len, tokens)))
    answer = text.rfind(CUE) if CUE in text else text.rstrip().rfind("\n") + 1
    ranked = {}
    for word in re.finditer(r"\d[\d.,]*\d|\w+", text):
        kinds = (word.start() >= answer, word[0][0].isdigit(), len(word[0]) >= 4)
        if any(kinds):
            ranked.setdefault(bisect_right(ends, word.start()), kinds.index(True))
    return sorted(sorted(ranked, key=ranked.get)[:most])
