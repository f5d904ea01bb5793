"""teachers/providers.py: keys, packages and proxies before anything is asked; back-off; images."""

import io
import sys
from types import SimpleNamespace

import pytest
from asking import both_wires, questions
from PIL import Image

from support.teachers import providers


@both_wires
@pytest.mark.parametrize("end", [None, "\n", " x", '"', "é"])
def test_an_unusable_key_is_refused_before_anything_is_asked(ask, server, monkeypatch, wire, end):
    questions(ask.folder, 1)
    name = providers.KEYS[wire][0]
    monkeypatch.setenv(name, "secret-1234" + end) if end else monkeypatch.delenv(name)
    with pytest.raises(ValueError, match=name) as caught:
        ask(wire)
    assert "secret" not in str(caught.value) and server.log == []


@both_wires
def test_a_socks_proxy_without_socksio_is_an_error(ask, server, monkeypatch, wire):
    questions(ask.folder, 1)
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:1080")
    monkeypatch.delenv("NO_PROXY")
    monkeypatch.setitem(sys.modules, "socksio", None)
    with pytest.raises(ValueError, match="socksio"):
        ask(wire)
    assert server.log == []


@pytest.mark.parametrize("version", ["0.9.1", "1.2"])
@both_wires
def test_an_old_package_is_an_error(monkeypatch, wire, version):
    monkeypatch.setattr(providers.importlib.metadata, "version", lambda _: version)
    with pytest.raises(ValueError, match=providers.PACKAGES[wire][0]):
        providers.check_package(wire)


def test_back_off_grows_has_jitter_and_a_cap():
    for tries, longest in ((1, 0.5), (2, 1), (3, 2), (20, providers.LONGEST_WAIT)):
        waits = [providers.retry_after(TimeoutError(), tries) for _ in range(20)]
        assert longest / 2 <= min(waits) < max(waits) <= longest
    assert providers.retry_after(KeyError("a bug of ours"), 1) is None
    busy = providers.Lost("busy")
    busy.response = SimpleNamespace(status_code=429, headers={"retry-after": "3"})
    assert all(3 <= providers.retry_after(busy, 1) <= 3.3 for _ in range(20))


@pytest.mark.parametrize(
    "provider, steps",
    [
        ("gemini", {"429:0.4": 0.4, "429:delay=0.3": 0.3, "429:date=9": 0.6, "503:86400": 0.6}),
        ("anthropic", {"429:ms=200": 0.2, "529:86400": 0.6}),
    ],
)
@pytest.mark.slow
def test_retry_after_is_obeyed_up_to_a_cap(ask, server, monkeypatch, provider, steps):
    monkeypatch.setattr(providers, "LONGEST_WAIT", 0.6)
    questions(ask.folder, len(steps))
    server.script = {f"Q{i}": [step] for i, step in enumerate(steps, 1)}
    ask(provider)
    for i, (step, seconds) in enumerate(steps.items(), 1):
        first, second = server.sent(f"Q{i}")
        assert seconds - 0.01 <= second["t"] - first["end"] < seconds * 1.1 + 0.25, step


@pytest.mark.parametrize(
    "form, size, orientation, sent",
    [
        ("PNG", (8, 6), 1, "same"),
        ("BMP", (8, 6), 1, (8, 6)),  # accepted by neither
        ("JPEG", (8, 6), 6, (6, 8)),  # lying on its side
        ("PNG", (9000, 9), 1, (2048, 2)),  # over Anthropic's limit
    ],
)
def test_images_are_sent_in_a_form_that_is_accepted(tmp_path, form, size, orientation, sent):
    path = tmp_path / "image"
    exif = Image.Exif()
    exif[providers.ORIENTATION] = orientation
    Image.new("RGB", size, "red").save(path, form, exif=exif)
    body, media_type = providers.image_to_send(path)
    if sent == "same":
        assert body == path.read_bytes() and media_type == "image/png"
    else:
        assert Image.open(io.BytesIO(body)).size == sent
    path.write_bytes(b"no image")
    with pytest.raises(providers.Failed):
        providers.image_to_send(path)


@pytest.mark.parametrize("spec", ["openai:x", "demo:x", ""])
def test_unknown_providers_are_refused(spec):
    with pytest.raises(ValueError, match="not one of"):
        providers.parse_spec(spec, providers.TEACHERS)
