"""Decoding the prompts of a run: in batches, resumed where it was interrupted, shown as it goes.

`t5_texts` decodes one stage of mmcot; `paligemma_texts` rationale and answer in one text, with a
budget for the rationale, a stop for loops and a forced "Answer:"; `majority` takes the vote of
several samples (self-consistency, Wang et al. 2022, arXiv 2203.11171).

Left out: the step from logits to a token (`model.decode`) and the file of decoded batches
(decode_cache.py).
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial

import torch
from tokenizers import Tokenizer

import data
import fusion
from data import Problem
from model import PaliGemma, stop_reason
from support import files
from support.dataset.tokenizers import plain_ids
from support.distributed import gather_dicts, rank, world
from support.evaluation.decode_cache import DecodeCache
from support.evaluation.errors import before_loop
from support.evaluation.grading import CUE, grade
from support.evaluation.models import paligemma_inputs

OnToken = Callable[[int, torch.Tensor], None]  # as in `model.decode`


# --- batches
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


def batch_key(batch: dict, *options: float) -> list:
    """What the texts of a batch depend on, apart from the weights."""
    return [*options, batch["ids"], batch["input_ids"].tolist()]


def t5_texts(
    model: fusion.MultimodalT5,
    examples: list[dict],
    tokenizer: Tokenizer,
    max_new_tokens: int,
    *,
    batch_size: int,
    on_token: OnToken | None = None,
    cache: DecodeCache | None = None,
) -> dict[str, dict]:
    """`fusion.generate_texts` of all examples, those of other processes included. Batches that are
    in the cache are not decoded again."""
    results = []
    for batch in in_batches(examples, batch_size, "decoded"):
        write = partial(
            fusion.generate_texts, model, batch, tokenizer, max_new_tokens, on_token=on_token
        )
        key = batch_key(batch, max_new_tokens)
        results.append(cache.get_or_compute(key, write) if cache else write())
    return gather_dicts(results)


def teacher_forced(
    model: fusion.MultimodalT5, examples: list[dict], tokenizer: Tokenizer, batch_size: int
) -> dict[str, str]:
    """`fusion.teacher_forced_texts` of all examples: what the first published commands scored, and
    stage 2 then read. Shown to be compared with; nothing here uses these texts."""
    batches = in_batches(examples, batch_size, "teacher-forced")
    return gather_dicts([fusion.teacher_forced_texts(model, b, tokenizer) for b in batches])


# --- PaliGemma
def paligemma_texts(
    model: PaliGemma,
    examples: list[dict],
    tokenizer: Tokenizer,
    *,
    rationale_budget: int | None,
    answer_budget: int,
    loop_stop: bool,
    force_answer: bool,
    temperature: float,
    seed: int,
    batch_size: int,
    on_token: OnToken | None = None,
    cache: DecodeCache | None = None,
) -> dict[str, dict]:
    """{id: {"response", "ids", "rationale"?, "stop", "tokens"}} of the prompts.

    A reasoning run has a `rationale_budget`, None in one that only answers, and a detector for a
    rationale that repeats itself; see `forced_answers` for a text that does not get to its answer.
    The rationale is what stands before the last "Answer:". "ids" are what the model wrote, without
    <eos>. The other options are those of `continued`.
    """
    write = partial(
        continued,
        model,
        tokenizer=tokenizer,
        temperature=temperature,
        seed=seed,
        batch_size=batch_size,
        on_token=on_token,
        cache=cache,
    )
    if rationale_budget is None:
        return write(examples, max_new_tokens=answer_budget)
    results = write(examples, max_new_tokens=rationale_budget, stop_loops=loop_stop)
    if force_answer:
        cut = {i: x for i, x in results.items() if CUE not in x["response"]}
        write_answers = partial(write, max_new_tokens=answer_budget)
        image_id = model.config.image_token_index
        results |= forced_answers(cut, examples, tokenizer, image_id, write_answers)
    for result in results.values():
        before, cue, rest = result["response"].rpartition(CUE)
        result["rationale"] = (before if cue else rest).strip()
    return results


def with_suffix(example: dict, ids: list[int]) -> dict:
    """A prompt with some ids of its suffix."""
    types = example["token_type_ids"] + [1] * len(ids)
    return example | {"input_ids": example["input_ids"] + ids, "token_type_ids": types}


def forced_answers(
    cut: dict[str, dict],
    examples: list[dict],
    tokenizer: Tokenizer,
    image_id: int,
    write_answers: Callable[[list[dict]], dict[str, dict]],
) -> dict[str, dict]:
    """The results `cut` that did not get to their "Answer:", continued: each is given that word and
    writes its answer after it. Its stop is "forced", "forced_after" says what came before, and
    "ids" are those the answer was written after (of a loop, one round) and the answer's."""
    cue = plain_ids(tokenizer, f"\n{CUE}")
    begun = {}
    for problem_id, result in cut.items():
        # No image belongs to an <image> token that the model wrote.
        kept = [i for i in before_loop(result["ids"]) if i != image_id]
        begun[problem_id] = kept + cue
    prompts = {example["id"]: example for example in examples}
    answers = write_answers([with_suffix(prompts[i], ids) for i, ids in begun.items()])
    results = {}
    for problem_id, answer in answers.items():
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
    model: PaliGemma,
    examples: list[dict],
    tokenizer: Tokenizer,
    max_new_tokens: int,
    *,
    temperature: float,
    seed: int,
    batch_size: int,
    stop_loops: bool = False,
    on_token: OnToken | None = None,
    cache: DecodeCache | None = None,
) -> dict[str, dict]:
    """{id: {"response", "ids", "stop", "tokens"}}: what the model writes after each example, with
    `stop_loops` until it repeats itself. Batches that are in the cache are not decoded again."""
    device = model.language_model.embed_tokens.weight.device
    results = []
    for batch in in_batches(examples, batch_size, "decoded", data.pali_collate):
        key = batch_key(batch, max_new_tokens, stop_loops, temperature, seed)
        # Seeded by what the batch is: a sample is the same whatever was decoded before it.
        generator = torch.Generator(device).manual_seed(int(files.digest(key)[:12], 16))
        write = partial(
            continue_batch,
            model,
            batch,
            tokenizer,
            max_new_tokens,
            temperature=temperature,
            generator=generator,
            stop_loops=stop_loops,
            on_token=on_token,
        )
        results.append(cache.get_or_compute(key, write) if cache else write())
    return gather_dicts(results)


@torch.inference_mode()
def continue_batch(
    model: PaliGemma,
    batch: dict,
    tokenizer: Tokenizer,
    max_new_tokens: int,
    *,
    temperature: float,
    generator: torch.Generator,
    stop_loops: bool,
    on_token: OnToken | None,
) -> dict[str, dict]:
    """`continued` of one batch; the options are those of `model.decode`."""
    device = model.language_model.embed_tokens.weight.device
    tensors = {name: x.to(device) for name, x in batch.items() if name != "ids"}
    inputs = paligemma_inputs(model, tensors)
    new_ids = model.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        generator=generator,
        stop_loops=stop_loops,
        on_token=on_token,
    )  # (B, U)
    eos_id = model.config.eos_token_id
    pad_id = model.config.pad_token_id
    results = {}
    for problem_id, row in zip(batch["ids"], new_ids.cpu(), strict=True):
        stop = stop_reason(row, eos_id, pad_id, stop_loops)
        ids = row.tolist()
        length = next((i for i, x in enumerate(ids) if x in (eos_id, pad_id)), len(ids))
        results[problem_id] = {
            "response": tokenizer.decode(ids[:length], skip_special_tokens=True),
            "ids": ids[:length],
            "stop": stop,
            "tokens": length + (stop == "eos"),
        }
    return results


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
def incremental_decoder(
    tokenizer: Tokenizer, skip_special_tokens: bool = True
) -> Callable[[int], str]:
    """A function that takes ids one by one and gives the text each adds: whole characters, "" while
    one is incomplete. (tokenizers.decoders.DecodeStream raises on bytes that are no UTF-8.)"""
    ids = []
    length = 0

    def decode(token_id):
        nonlocal length
        ids.append(token_id)
        text = tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)
        if text.endswith("\ufffd"):  # the first bytes of a character
            return ""
        added = text[length:]
        length = len(text)
        return added

    return decode


def token_texts(
    tokenizer: Tokenizer, ids: list[int], skip_special_tokens: bool = True
) -> list[str]:
    """The text that each id adds, a list as long as `ids`; "" inside of a character."""
    decode = incremental_decoder(tokenizer, skip_special_tokens)
    return [decode(token_id) for token_id in ids]


def token_printer(tokenizer: Tokenizer, between: str) -> OnToken:
    """An `on_token` for one row: prints each text as it is written, and `between` before the next.
    White space at the end of a text is not printed."""
    decode = None
    held = ""

    def on_token(t, ids):
        nonlocal decode, held
        if t == 0:
            print(between if decode else "", end="")
            decode = incremental_decoder(tokenizer)
            held = ""
        text = held + decode(ids.item())
        held = text[len(text.rstrip()) :]
        print(text.rstrip(), end="", flush=True)

    return on_token
