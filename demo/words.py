"""The demo's two tokenizers, in T5's form and in Gemma's: a piece for each word of a few hundred.

Unigram models (Kudo, arXiv 1804.10959) that are written down and not trained: training is meant for
large corpora, and breaks two hundred words into fragments. Each word is a piece with the logarithm
of its share as score; every ASCII character is one as well, as a fallback. Other characters are
<unk>.
"""

import math
import re
from collections import Counter
from collections.abc import Iterable

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)


def pieces_of(words: Counter) -> list[tuple[str, float]]:
    """[(piece, score)] of a Counter of words: those of three times or more, then the characters.
    "▁" is the space before a word."""
    total = sum(words.values())
    pieces = [(word, math.log(n / total)) for word, n in words.most_common() if n > 2]
    known = {word for word, _ in pieces}
    return pieces + [(c, -20.0) for c in ("▁", *map(chr, range(33, 127))) if c not in known]


def t5_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """T5's: <pad> 0, </s> 1, <unk> 2, then the pieces; </s> after each text."""
    words = Counter()
    for text in texts:
        for word in text.split():
            core, tail = re.fullmatch(r"(.*?)([.,?:]*)", word).groups()
            words.update(["▁" + core] * bool(core) + list(tail))
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    tokenizer = Tokenizer(models.Unigram(special + pieces_of(words), unk_id=2))
    tokenizer.add_special_tokens([name for name, _ in special])
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace("▁", prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return tokenizer


def gemma_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """Gemma's: <pad> 0, <eos> 1, <bos> 2, <unk> 3, then the pieces; last <image> and newline."""
    words = Counter()
    for text in texts:
        for word in text.split():
            first, *rest = re.findall(r"[().,?:]|[^().,?:]+", word)
            words.update(["▁" + first, *rest])
    special = ["<pad>", "<eos>", "<bos>", "<unk>"]
    pieces = [(name, 0.0) for name in special] + pieces_of(words)
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=3))
    tokenizer.add_special_tokens([*special, "<image>"])
    tokenizer.add_tokens([AddedToken("\n", normalized=False)])
    tokenizer.normalizer = normalizers.Replace(Regex(" {2,}"), " ")
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace("▁", prepend_scheme="always")
    return tokenizer
