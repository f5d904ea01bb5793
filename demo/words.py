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


def unigram(words: Counter, special: list[str]) -> Tokenizer:
    """The special tokens, the words of three times or more, then the characters. "▁" is the space
    before a word."""
    total = sum(words.values())
    pieces = [(word, math.log(n / total)) for word, n in words.most_common() if n > 2]
    known = {word for word, _ in pieces}
    pieces += [(c, -20.0) for c in ("▁", *map(chr, range(33, 127))) if c not in known]
    pieces = [(name, 0.0) for name in special] + pieces
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=special.index("<unk>")))
    tokenizer.add_special_tokens(special)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace("▁", prepend_scheme="always")
    return tokenizer


def t5_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """T5's: <pad> 0, </s> 1, <unk> 2, then the pieces; </s> after each text."""
    words = Counter()
    for word in " ".join(texts).split():
        core, tail = re.fullmatch(r"(.*?)([.,?:]*)", word).groups()
        words.update(["▁" + core] * bool(core) + list(tail))
    tokenizer = unigram(words, ["<pad>", "</s>", "<unk>"])
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFKC(), normalizers.Strip(), normalizers.Replace(Regex(" {2,}"), " ")]
    )
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    return tokenizer


def gemma_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """Gemma's: <pad> 0, <eos> 1, <bos> 2, <unk> 3, then the pieces; last <image> and newline."""
    words = Counter()
    for word in " ".join(texts).split():
        first, *rest = re.findall(r"[().,?:]|[^().,?:]+", word)
        words.update(["▁" + first, *rest])
    tokenizer = unigram(words, ["<pad>", "<eos>", "<bos>", "<unk>"])
    tokenizer.add_special_tokens(["<image>"])
    tokenizer.add_tokens([AddedToken("\n", normalized=False)])
    tokenizer.normalizer = normalizers.Replace(Regex(" {2,}"), " ")
    return tokenizer
