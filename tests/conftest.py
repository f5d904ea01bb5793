"""Shared by all tests: import paths, where real data lies, no network, modest threads."""

import functools
import os
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
os.environ.setdefault("NANOCOT_DATA", str(ROOT.parent / "shared" / "data"))
os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported, so before it
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch  # noqa: E402

torch.set_num_threads(1)  # tiny models; a second thread only waits for a busy core


@functools.cache
def gemma():
    """The real PaliGemma's tokenizer: a second to read, so once for all modules."""
    from support.tokenizing import load_tokenizer

    return load_tokenizer(Path(os.environ["NANOCOT_DATA"]) / "tokenizers/paligemma")


@pytest.fixture(scope="module")
def read_once():
    """Most runs look at a few of the demo's 8,600 problems: these, their traces and their facts
    are read once for all tests of a module. Files that a test writes are read each time."""
    import data
    import eval as evaluation
    import train

    @functools.cache
    def once(read):
        kept = functools.cache(read)

        def reading(where, *rest):
            is_demo = where == "demo" or data.demo_folder() in Path(where).parents
            fills = any(isinstance(x, list) for x in rest)  # what --on-error skip found
            return (kept if is_demo and not fills else read)(where, *rest)

        return reading

    with pytest.MonkeyPatch.context() as patch:
        places = [(data, "load"), (evaluation, "scene_facts")]
        places += [(module, "load_traces") for module in (train, evaluation)]
        for module, name in places:
            patch.setattr(module, name, once(getattr(module, name)))
        yield


@pytest.fixture(scope="session")
def spiece(tmp_path_factory):
    """A sentencepiece model with T5's special ids, trained here."""
    import sentencepiece
    from samples import SENTENCES, STRINGS

    folder = tmp_path_factory.mktemp("spiece")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES + STRINGS[:1]),
        model_prefix=str(folder / "spiece"),
        vocab_size=120,
        model_type="unigram",
        pad_id=0,
        eos_id=1,
        unk_id=2,
        bos_id=-1,
        minloglevel=2,
    )
    return folder
