"""The batches that are decoded already, in a file, so that an interrupted run resumes where it was.

A batch is known by the weights, by the decoding options and by its ids: a line that another model
wrote is never taken for this one's, and the result is, to the bit, that of decoding at once.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import nn

from support import files
from support.distributed import rank


class DecodeCache:
    """predictions.part*.jsonl in a run folder, a line [key, result] for each decoded batch. Under
    torchrun each process writes a file of its own and reads all of them."""

    def __init__(self, folder: str | Path, models: Iterable[nn.Module]) -> None:
        self.path = Path(folder) / f"predictions.part{rank() or ''}.jsonl"
        self.results = {}
        tensors = (tensor for model in models for tensor in model.state_dict().values())
        self.weights = hashlib.sha256(b"".join(map(fingerprint, tensors))).hexdigest()
        for path in Path(folder).glob("predictions.part*.jsonl"):
            complete = 0  # bytes up to the torn line of a process that was killed
            for line in path.read_bytes().splitlines(keepends=True):
                try:
                    key, result = json.loads(line)
                except (ValueError, TypeError):
                    break
                self.results[key] = result
                complete += len(line) if line.endswith(b"\n") else 0
            if path == self.path:
                # The next line must not be appended to a torn one.
                os.truncate(path, complete)

    def get_or_compute(self, key: list, compute: Callable[[], dict]) -> dict:
        """The result of `compute()`, a dict fit for JSON, from the file if it is there. `key` is
        fit for JSON and says which batch it is, and how it is decoded."""
        key = files.digest([self.weights, key])
        if key not in self.results:
            self.results[key] = compute()
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with open(self.path, "a", encoding="utf-8") as file:
                file.write(json.dumps([key, self.results[key]]) + "\n")
        return self.results[key]

    def remove(self) -> None:
        """Delete the files of all processes: the predictions are complete."""
        for path in self.path.parent.glob("predictions.part*.jsonl"):
            path.unlink()


def fingerprint(tensor: torch.Tensor, block: int = 16384) -> bytes:
    """Bytes that tell trained weights apart: the sum, as 64-bit integers, of each block of 16 KiB,
    and the bytes that do not fill one.

    It is computed where the tensor is, at the memory's speed; SHA-256 of all bytes of a 3B model
    would take ten seconds at every evaluation.
    """
    flat = tensor.detach().reshape(-1)
    if flat.storage_offset() * flat.element_size() % 8:
        # Tensors of a mapped file may begin at any byte, and a view as int64 needs a multiple of 8.
        flat = flat.clone()
    per_block = block // flat.element_size()
    filled = len(flat) // per_block * per_block
    sums = flat[:filled].view(torch.int64).view(-1, block // 8).sum(1)
    return b"".join(bytes(t.cpu().view(torch.uint8).numpy()) for t in (sums, flat[filled:]))
