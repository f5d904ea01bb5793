"""Shared by all tests: import paths, where real data lies, no network, modest threads."""

import functools
import os
import ssl
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests/helpers"), str(ROOT / "tools")]
os.environ.setdefault("NANOCOT_DATA", str(ROOT.parent / "shared" / "data"))
os.environ["HF_HUB_OFFLINE"] = "1"  # read when huggingface_hub is imported, so before it
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch  # noqa: E402

torch.set_num_threads(1)  # tiny models; a second thread only waits for a busy core


def pytest_addoption(parser):
    text = "with support/kernels.py enabled in every model that is loaded or gets adapters"
    parser.addoption("--kernels", action="store_true", help=text)


def pytest_collection_modifyitems(config, items):
    if config.getoption("--kernels"):
        config.hook.pytest_deselected(
            items=[x for x in items if x.get_closest_marker("plain_only")]
        )
        items[:] = [x for x in items if not x.get_closest_marker("plain_only")]


@pytest.fixture(scope="session", autouse=True)
def with_kernels(request):
    if not request.config.getoption("--kernels"):
        yield
        return
    import lora
    from model import Pretrained
    from support import cpu_kernels, kernels

    load, inject, load_adapter = Pretrained.from_pretrained.__func__, lora.inject, lora.load

    def loaded(cls, *args, **options):
        model = load(cls, *args, **options)
        kernels.enable(model)
        return model

    def adapted(put_in):
        def change(model, *args, **options):
            names = put_in(model, *args, **options)
            kernels.enable(model)
            return names

        return change

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cpu_kernels, "LARGE", 1)  # oneDNN's products for layers of any size
        patch.setattr(Pretrained, "from_pretrained", classmethod(loaded))
        patch.setattr(lora, "inject", adapted(inject))
        patch.setattr(lora, "load", adapted(load_adapter))
        yield


@functools.cache
def gemma():
    """The real PaliGemma's tokenizer: a second to read, so once for all modules."""
    from support.dataset.tokenizers import load_tokenizer

    return load_tokenizer(Path(os.environ["NANOCOT_DATA"]) / "tokenizers/paligemma")


def scored(problems, predictions, faithful=False, rationale_format="QCM-LE", partial=False):
    """The metrics of predictions about these problems, as eval.py makes them."""
    from support.evaluation import errors, metrics

    graded = errors.classify_all(metrics.grade_all(problems, predictions, faithful, partial))
    return metrics.metrics_of(graded, faithful, rationale_format)


@pytest.fixture(scope="module")
def read_once():
    """Most runs look at a few of the demo's 8,600 problems: these, their traces and their facts
    are read once for all tests of a module. Files that a test writes are read each time."""
    import data
    from demo import scenes
    from support.evaluation import errors
    from support.training import examples as records

    @functools.cache
    def once(read):
        kept = functools.cache(read)

        def reading(where, *rest):
            is_demo = where == "demo" or scenes.demo_folder() in Path(where).parents
            fills = any(isinstance(x, list) for x in rest)  # what --on-error skip found
            return (kept if is_demo and not fills else read)(where, *rest)

        return reading

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "load", once(data.load))
        patch.setattr(errors, "scene_facts", once(errors.scene_facts))
        for module in (errors, records):
            patch.setattr(module, "load_traces", once(module.load_traces))
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


@pytest.fixture(scope="module")
def running():
    """A server that speaks both providers' wire formats, and its url."""
    import loopback

    server = loopback.Loopback()
    return server, server.start()


@pytest.fixture
def server(running, monkeypatch):
    """The server as new, the SDKs pointed at it, dummy keys, and no back-off beyond 50 ms."""
    from asking import environment

    from support.teachers import providers

    server, url = running
    server.reset()
    for name, value in environment(url).items():
        monkeypatch.setenv(name, value)
    for name in ("GEMINI_API_KEY", "ANTHROPIC_AUTH_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(providers, "LONGEST_WAIT", 0.05)
    # Both SDKs read a bundle of certificates for every client, half the time of these tests.
    monkeypatch.setattr(ssl.SSLContext, "load_verify_locations", lambda *_, **__: None)
    return server


@pytest.fixture
def ask(tmp_path, capsys):
    """teacher.py's command line."""
    from asking import Asker

    return Asker(tmp_path, capsys)
