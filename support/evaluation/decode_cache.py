"""What stands around decoding: batches, what was decoded before, a loop's end, ids as text.

`in_batches` deals examples out, to each process its own; a `Part` keeps what is decoded, so that an
interrupted run goes on to the same bits; `before_loop` cuts a text that goes in circles; `speller`
gives the text of ids one by one, and a `printer` prints it.

Left out: the step from logits to a token (`model.decode`), and who asks for what (eval.py).

Axes: n pictures, I image positions, D their width.
"""

import hashlib
import json
import os
import time
from pathlib import Path

import torch

import data
from support import files
from support.distributed import rank, world


def in_batches(examples, batch_size, label, collate=data.collate, dealt=True):
    """Collated batches of like lengths, with progress on a terminal as they are used up. Under
    torchrun those of this process (see `gather_dicts`), unless they are not to be dealt."""
    start, done = time.monotonic(), 0
    order = data.batches([len(e["input_ids"]) for e in examples], batch_size)
    order = order[rank() :: world()] if dealt else order
    total = sum(map(len, order))
    for rows in order:
        yield collate([examples[i] for i in rows])
        done += len(rows)
        if total > 1:
            files.progress(label, done, total, start)


def gist(tensor, block=16384):
    """Bytes that tell trained weights apart: the sum, as 64-bit integers, of each 16 KiB, and what
    is left over. It is made where the tensor is, at the memory's speed; SHA-256 of all bytes of a
    3B model takes ten seconds, at every evaluation, and nobody here is out to deceive."""
    flat = tensor.detach().reshape(-1)
    if flat.storage_offset() * flat.element_size() % 8:  # as some tensors of a mapped file begin
        flat = flat.clone()
    step = block // flat.element_size()
    whole = len(flat) // step * step
    sums = flat[:whole].view(torch.int64).view(-1, block // 8).sum(1)
    return b"".join(bytes(t.cpu().view(torch.uint8).numpy()) for t in (sums, flat[whole:]))


class Part:
    """predictions.part.jsonl: the batches that are decoded already, a line each, so that who was
    interrupted goes on where he was. A batch is known by the weights, by how it is decoded and by
    its ids: what another model left behind is never taken for this one's, and the result is, to
    the bit, that of decoding at once. A torn last line is dropped. Under torchrun each process
    writes a file of its own, and reads all."""

    def __init__(self, folder, models):
        name = f"predictions.part{rank() or ''}.jsonl"
        self.path, self.done = Path(folder) / name, {}
        digest = hashlib.sha256()
        for model in models:
            for tensor in model.state_dict().values():
                digest.update(gist(tensor))
        self.models = digest.hexdigest()
        for path in Path(folder).glob("predictions.part*.jsonl"):
            whole, lines = 0, path.read_bytes().splitlines(keepends=True)
            for line in lines:
                try:
                    key, told = json.loads(line)
                except (ValueError, TypeError):
                    break
                self.done[key], whole = told, whole + len(line) * line.endswith(b"\n")
            if lines and path == self.path:
                os.truncate(path, whole)

    def batch(self, what, decode, *given):
        """What `decode(*given)` returns, a dict fit for JSON; from the file if that has it. `what`
        says which batch it is, and how it is decoded."""
        key = files.digest([self.models, what])
        if key not in self.done:
            self.done[key] = decode(*given)
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps([key, self.done[key]]) + "\n")
        return self.done[key]

    def remove(self):
        for path in self.path.parent.glob("predictions.part*.jsonl"):
            path.unlink()


def paligemma_inputs(model, batch):
    """What `PaliGemma.states` takes of a batch of `data.pali_collate`; of pictures that are not
    cached (--full) the features are computed here, with gradient."""
    names = ("input_ids", "attention_mask", "token_type_ids", "image_features")
    given = {name: batch[name] for name in names if name in batch}
    if "pixel_values" in batch:
        given["image_features"] = model.image_features(batch["pixel_values"])  # (n, I, D)
    return given


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


def speller(tokenizer, skip=True):
    """A function that takes ids one by one and gives the text each adds: whole characters, "" while
    one is incomplete. (tokenizers.decoders.DecodeStream raises on bytes that are no UTF-8.)"""
    ids, shown = [], 0

    def spell(id):
        nonlocal shown
        ids.append(id)
        text = tokenizer.decode(ids, skip_special_tokens=skip)
        if text.endswith("\ufffd"):  # the first bytes of a character
            return ""
        piece, shown = text[shown:], len(text)
        return piece

    return spell


def spelled(tokenizer, ids, skip=True):
    """The text that each id adds, a list as long as `ids`; "" inside of a character."""
    return list(map(speller(tokenizer, skip), ids))


def printer(tokenizer, between):
    """An `on_token` for one row: prints each text as it is written, and `between` before the next.
    White space at the end of a text is not printed."""
    spell, held = None, ""

    def on_token(t, ids):
        nonlocal spell, held
        if t == 0:
            print(between if spell else "", end="")
            spell, held = speller(tokenizer), ""
        text = held + spell(ids.item())
        held = text[len(text.rstrip()) :]
        print(text.rstrip(), end="", flush=True)

    return on_token
