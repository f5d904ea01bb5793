"""Decoding the prompts of a run: in batches, resumed where it was interrupted, shown as it goes.

Of mmcot each stage is decoded; PaliGemma writes rationale and answer in one text, with a budget for
the rationale, a stop for loops and a forced "Answer:"; `majority` takes the vote of several samples
(self-consistency, Wang et al. 2022, arXiv 2203.11171).

Axes: B texts, U new tokens.
"""

import itertools
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

import torch
from tokenizers import Tokenizer

import data
from data import Problem
from fusion import RECIPES, MultimodalT5, generate_texts
from model import PaliGemma, looping
from support import files
from support.dataset.tokenizers import plain_ids
from support.distributed import gather_dicts, rank, world
from support.evaluation.decode_cache import DecodeCache
from support.evaluation.errors import before_loop
from support.evaluation.grading import CUE, grade
from support.evaluation.models import paligemma_inputs, stage_examples
from support.training.settings import Settings

OnToken = Callable[[int, torch.Tensor], None]  # as in `model.decode`


def in_batches(
    examples: list[dict], batch_size: int, label: str, collate: Callable = data.collate
) -> Iterator[dict]:
    """Collated batches of like lengths, under torchrun every n-th of them for each of n processes,
    with progress on a terminal as they are used up."""
    start = time.monotonic()
    done = 0
    order = data.batches([len(e["input_ids"]) for e in examples], batch_size)[rank() :: world()]
    total = sum(map(len, order))
    for rows in order:
        yield collate([examples[i] for i in rows])
        done += len(rows)
        if total > 1:
            files.progress(label, done, total, start)


@dataclass(frozen=True)
class Decoder:
    """Writes texts with one model of a run; all results include those of other processes."""

    model: MultimodalT5 | PaliGemma
    tokenizer: Tokenizer
    batch_size: int
    cache: DecodeCache | None = None  # the batches in it are not decoded again
    on_token: OnToken | None = None
    temperature: float = 0.0  # 0 is greedy
    seed: int = 0  # makes sampled texts repeatable

    def decode(
        self, examples: list[dict], collate: Callable, options: list, decode_batch: Callable
    ) -> dict[str, dict]:
        """{id: result} of `decode_batch(batch, key)` for each batch. The key is what the texts
        depend on, apart from the weights."""
        results = []
        for batch in in_batches(examples, self.batch_size, "decoded", collate):
            key = [*options, batch["ids"], batch["input_ids"].tolist()]
            compute = partial(decode_batch, batch, key)
            results.append(self.cache.get_or_compute(key, compute) if self.cache else compute())
        return gather_dicts(results)

    def stage_texts(
        self,
        settings: Settings,
        stage: int,
        problems: list[Problem],
        features: data.ImageSource | None,
        rationales: dict[str, str] | None = None,
    ) -> dict[str, dict]:
        """{id: {"text", "stop", "tokens"}}, `fusion.generate_texts` of one stage of an mmcot run;
        stage 1 reads `rationales`, {id: text}."""
        fmt = RECIPES[settings.recipe][stage]
        examples = stage_examples(settings, problems, fmt, self.tokenizer, features, rationales)
        budget = settings.max_output[-1 if "G" in fmt else 0]

        def decode_batch(batch: dict, key: list) -> dict[str, dict]:
            return generate_texts(self.model, batch, self.tokenizer, budget, self.on_token)

        return self.decode(examples, data.collate, [budget], decode_batch)

    def paligemma_texts(self, examples: list[dict], settings: Settings) -> dict[str, dict]:
        """{id: {"response", "ids", "rationale"?, "stop", "tokens"}} of the prompts.

        A reasoning run has a budget for the rationale, which is what stands before the last
        "Answer:", and a detector for one that repeats itself; see `forced_answers` for a text that
        does not get to its answer. "ids" are what the model wrote, without <eos>."""
        if settings.recipe != "reason":
            return self.continued(examples, settings.max_output[-1])
        results = self.continued(examples, settings.max_output[0], settings.loop_stop)
        if settings.force_answer:
            cut = {i: x for i, x in results.items() if CUE not in x["response"]}
            results |= self.forced_answers(cut, examples, settings.max_output[-1])
        for result in results.values():
            before, cue, rest = result["response"].rpartition(CUE)
            result["rationale"] = (before if cue else rest).strip()
        return results

    def forced_answers(
        self, cut: dict[str, dict], examples: list[dict], answer_budget: int
    ) -> dict[str, dict]:
        """The results `cut` that did not get to their "Answer:", continued: each is given that word
        and writes its answer after it. Its stop is "forced", "forced_after" says what came before,
        and "ids" are those the answer was written after (of a loop, one round) and the answer's."""
        cue = plain_ids(self.tokenizer, f"\n{CUE}")
        begun = {}
        for problem_id, result in cut.items():
            # No image belongs to an <image> token that the model wrote.
            image_id = self.model.config.image_token_index
            begun[problem_id] = [i for i in before_loop(result["ids"]) if i != image_id] + cue
        by_id = {example["id"]: example for example in examples}
        prompts = [with_suffix(by_id[i], ids) for i, ids in begun.items()]
        results = {}
        for problem_id, answer in self.continued(prompts, answer_budget).items():
            before = cut[problem_id]
            results[problem_id] = before | {
                "response": f"{before['response'].rstrip()}\n{CUE}{answer['response']}",
                "ids": begun[problem_id] + answer["ids"],
                "stop": "forced",
                "tokens": before["tokens"] + answer["tokens"],
                "forced_after": before["stop"],
            }
        return results

    def continued(
        self, examples: list[dict], max_new_tokens: int, stop_loops: bool = False
    ) -> dict[str, dict]:
        """{id: {"response", "ids", "stop", "tokens"}}: what PaliGemma writes after each example,
        with `stop_loops` until it repeats itself."""
        options = [max_new_tokens, stop_loops, self.temperature, self.seed]
        return self.decode(examples, data.pali_collate, options, self.continue_batch)

    @torch.inference_mode()
    def continue_batch(self, batch: dict, key: list) -> dict[str, dict]:
        """`continued` of one batch, with the options its key begins with."""
        max_new_tokens, stop_loops, temperature, *_ = key
        config = self.model.config
        device = self.model.language_model.embed_tokens.weight.device
        tensors = {name: x.to(device) for name, x in batch.items() if name != "ids"}
        # Seeded by what the batch is: a sample is the same whatever was decoded before it.
        seed = int(files.digest(key)[:12], 16)
        new_ids = self.model.generate(
            **paligemma_inputs(self.model, tensors),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            generator=torch.Generator(device).manual_seed(seed),
            stop_loops=stop_loops,
            on_token=self.on_token,
        )  # (B, U)
        ends = (config.eos_token_id, config.pad_token_id)
        results = {}
        for problem_id, row in zip(batch["ids"], new_ids.cpu(), strict=True):
            stop = stop_reason(row, *ends, stop_loops)
            ids = list(itertools.takewhile(lambda i: i not in ends, row.tolist()))
            text = self.tokenizer.decode(ids, skip_special_tokens=True)
            tokens = len(ids) + (stop == "eos")
            results[problem_id] = {"response": text, "ids": ids, "stop": stop, "tokens": tokens}
        return results


def stop_reason(ids: torch.Tensor, eos_id: int, pad_id: int, stop_loops: bool = False) -> str:
    """Why `decode` ended a row, of which `ids` (U,) are all it gave: "eos", "loop" or "length"."""
    if (ids == eos_id).any():
        return "eos"
    # Only EOS and a loop end a row before the others; a loop may also be complete at the limit.
    if stop_loops and len(ids) and (ids[-1] == pad_id or looping(ids[None]).item()):
        return "loop"
    return "length"


def with_suffix(example: dict, ids: list[int]) -> dict:
    """A prompt with some ids of its suffix."""
    types = example["token_type_ids"] + [1] * len(ids)
    return example | {"input_ids": example["input_ids"] + ids, "token_type_ids": types}


def majority(problems: list[Problem], runs: list[dict[str, dict]]) -> dict[str, dict]:
    """Of each problem the first of several sampled texts that gives the answer most of them give;
    "votes" has all, "tokens" counts those of all texts. A text without a readable answer has no
    vote."""
    results = {}
    for p in problems:
        texts = [run[p.id] for run in runs]
        parsed = [grade(p, text["response"]).parsed for text in texts]
        votes = Counter(x for x in parsed if x is not None)
        best = votes.most_common(1)[0][0] if votes else None
        tokens = sum(text["tokens"] for text in texts)
        results[p.id] = texts[parsed.index(best)] | {"tokens": tokens, "votes": dict(votes)}
    return results


# --- ids as text
def token_texts(
    tokenizer: Tokenizer, ids: list[int], skip_special_tokens: bool = True
) -> list[str]:
    """The text that each id adds, a list as long as `ids`; "" inside of a character. (DecodeStream
    of tokenizers raises on bytes that are no UTF-8.)"""
    texts = []
    length = 0
    for n in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:n], skip_special_tokens=skip_special_tokens)
        if text.endswith("\ufffd"):  # the first bytes of a character
            texts.append("")
            continue
        texts.append(text[length:])
        length = len(text)
    return texts


def token_printer(tokenizer: Tokenizer, between: str) -> OnToken:
    """An `on_token` for one row: prints each text as it is written, and `between` before the next.
    White space at the end of a text is not printed."""
    ids = []
    printed = 0

    def on_token(t: int, new_ids: torch.Tensor) -> None:
        nonlocal printed
        if t == 0:
            print(between if ids else "", end="")
            ids.clear()
            printed = 0
        ids.append(new_ids.item())
        text = tokenizer.decode(ids, skip_special_tokens=True)
        if not text.endswith("\ufffd"):  # the first bytes of a character
            print(text.rstrip()[printed:], end="", flush=True)
            printed = max(printed, len(text.rstrip()))

    return on_token
