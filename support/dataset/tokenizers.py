r"""Tokenizers: a checkpoint's, from whichever file it has, and texts that hold no special token.

tokenizer.json is read by the tokenizers library. spiece.model, which is all that UnifiedQA
(Khashabi et al., arXiv 2005.00700) comes with, is a sentencepiece model (Kudo and Richardson, arXiv
1808.06226) in protobuf, of which T5's tokenizer is built; sentencepiece's BPE models are not read.
`encode` for T5 and `plain_ids` for Gemma: whatever looks like </s> or <image> in a text is text.
"""

import base64
import io
import re
import string
import struct
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from support.files import regular_file


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """A checkpoint's tokenizer.json; where there is only spiece.model (UnifiedQA), T5's from it.
    FileNotFoundError without either, ValueError for one that cannot be used."""
    file = Path(folder, "tokenizer.json")
    if not file.exists():
        file = Path(folder, "spiece.model")
    if not file.exists():
        raise FileNotFoundError(f"{folder} has neither tokenizer.json nor spiece.model.")
    read = Tokenizer.from_file if file.suffix == ".json" else t5_tokenizer
    try:
        content = regular_file(file).read_bytes()
        for found in re.finditer(rb'"precompiled_charsmap"\s*:\s*"([^"]*)"', content):
            check_charsmap(base64.b64decode(found[1]))
        tokenizer = read(str(file))
        tokenizer.no_truncation()
        tokenizer.no_padding()
        # A trial: some can be read but not used.
        tokenizer.decode(tokenizer.encode(f"{string.printable} ½ é 中").ids)
    except BaseException as error:  # the library's panics are not Exceptions
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"{file} is not a tokenizer that can be read ({error!r}).") from None
    return tokenizer


def t5_tokenizer(file: str | Path) -> Tokenizer:
    """T5's tokenizer of a sentencepiece Unigram model: its pieces, then <extra_id_99> ... _0.

    ModelProto: field 1, repeated, a piece {1 text, 2 score}; 3 the normalizer {2 charsmap}.
    """
    vocabulary = []
    charsmap = None
    for number, value in protobuf(Path(file).read_bytes()):
        if number == 1:
            piece = dict(protobuf(value))
            vocabulary.append((piece[1].decode(), struct.unpack("<f", piece[2])[0]))
        elif number == 3:
            charsmap = dict(protobuf(value)).get(2, b"")
    if charsmap is None:
        raise ValueError("it has no normalizer: the file is cut off")
    ids = {text: i for i, (text, _) in enumerate(vocabulary)}
    extras = [f"<extra_id_{i}>" for i in reversed(range(100))]
    vocabulary += [(extra, 0.0) for extra in extras]
    clean = [normalizers.Strip(left=False), normalizers.Replace(Regex(" {2,}"), "▁")]
    if charsmap:
        check_charsmap(charsmap)
        clean.insert(0, normalizers.Precompiled(charsmap))
    tokenizer = Tokenizer(models.Unigram(vocabulary, ids["<unk>"], byte_fallback=False))
    tokenizer.normalizer = normalizers.Sequence(clean)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="always")
    tokenizer.decoder = decoders.Metaspace("▁", prepend_scheme="always")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", ids["</s>"])]
    )
    tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>", *extras])
    return tokenizer


def check_charsmap(content: bytes) -> None:
    """The tokenizers library trusts the size at its start: asked for gigabytes, it aborts."""
    if struct.unpack_from("<I", content)[0] > len(content) - 4:
        raise ValueError("its table of characters is shorter than it states")


def protobuf(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) pairs of one protobuf message: int for a varint, otherwise bytes."""
    stream = io.BytesIO(data)

    def varint() -> int:
        value = 0
        for shift in range(0, 64, 7):
            [byte] = stream.read(1)
            value |= (byte & 127) << shift
            if byte < 128:
                return value
        raise ValueError("it has a number of more than 64 bits")

    while stream.tell() < len(data):
        number, wire = divmod(varint(), 8)
        if wire == 0:
            yield number, varint()
            continue
        size = {1: 8, 5: 4}.get(wire) or varint()
        value = stream.read(size)
        if len(value) < size:
            raise ValueError("it ends in the middle of a field")
        yield number, value


# --- Texts in which nothing is a special token ----------------------------------------------------

NO_TAGS = dict.fromkeys(map(ord, "<\N{FULLWIDTH LESS-THAN SIGN}\N{SMALL LESS-THAN SIGN}"), "⟨")


def encode(
    tokenizer: Tokenizer, texts: Sequence[str], max_length: int, tail: int = 16
) -> list[list[int]]:
    """Token ids of each text, at most max_length with the </s> the tokenizer appends.

    A text that is too long loses tokens before its last `tail`: a source keeps its cue "Answer:",
    a target its end. tail=1 is the original's truncation, which keeps </s> only. The number of
    texts that were cut goes to stderr.

    No text holds a special token: T5's tokenizers find "</s>" and "<extra_id_0>" anywhere. Where
    one did, the text is encoded again with another character for "<"; T5 has a piece for neither,
    so the "<" is <unk> either way and the rest is spelled out.
    """
    tail = min(tail, max_length)
    rows = [encoding.ids for encoding in tokenizer.encode_batch(texts)]
    added = tokenizer.get_added_tokens_decoder().items()
    special = {id for id, token in added if token.content.startswith("<")}
    special -= {tokenizer.token_to_id("<unk>")}
    for i, row in enumerate(rows):
        if not special.isdisjoint(row[:-1]):
            rows[i] = tokenizer.encode(texts[i].translate(NO_TAGS)).ids
    long = [i for i, row in enumerate(rows) if len(row) > max_length]
    for i in long:
        rows[i] = rows[i][: max_length - tail] + rows[i][-tail:]
    if long:
        print(f"{len(long)} of {len(rows)} texts were cut to {max_length} tokens.", file=sys.stderr)
    return rows


TAG = re.compile(r"<(?=[^<>\s]+>)|\[(?=@BOS@\])")


def plain_ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Token ids of a text in which nothing is a special token, whatever it looks like.

    Gemma's added tokens (<eos>, <image>, <loc0001>, <seg001>, <b>, [@BOS@] ...) are found in any
    text, whether they are marked special or not. So the text is cut after the first character of
    everything that has their form: no part holds a whole one, and together they decode to the text.
    """
    cuts = [0, *(match.end() for match in TAG.finditer(text)), len(text)]
    pieces = [text[start:end] for start, end in zip(cuts, cuts[1:], strict=False)]
    return [id for piece in pieces for id in tokenizer.encode(piece, add_special_tokens=False).ids]


def special_ids(tokenizer: Tokenizer) -> dict[str, int]:
    """{"pad", "eos", "bos", "image"}: ids, looked up by name. ValueError if one is missing."""
    ids = {name: tokenizer.token_to_id(f"<{name}>") for name in ("pad", "eos", "bos", "image")}
    missing = ", ".join(f"<{name}>" for name, id in ids.items() if id is None)
    if missing:
        raise ValueError(f"This tokenizer has no {missing}: it is not PaliGemma's.")
    return ids
