"""The report: what is written, and what a real browser makes of it."""

import base64
import json
import random
import re
import shutil
import time
from contextlib import ExitStack
from dataclasses import replace

import pytest
from conftest import ROOT
from graded import SCIENCEQA
from PIL import Image

import data
import eval as evaluation
from support.dataset import images
from support.evaluation import metrics, report, tables

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
ARGS = """--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run
    --disable-background-networking --disable-component-update --disable-sync""".split()
HOSTILE = (
    '</script><img src=x onerror="window.hacked=1"><!--<script>window.hacked=1</script>\u2028&amp;'
)
PERSIAN, CHINESE = "چند سیب در تصویر است؟", "图中有几个苹果？"


# --- what is written
def problem(i, question="How many?", image=None, family="count", **other):
    fields = {"choices": ("one", "two"), "answer": "one", "hint": "", "lecture": "", "solution": ""}
    meta = {"answer_index": 0, "caption": "", "family": family, "subject": "natural science"}
    fields |= {"id": str(i), "question": question, "image": image, "meta": meta} | other
    return data.Problem(**fields)


def image_file(path, colour="red", size=(40, 30)):
    Image.new("RGB", size, colour).save(path)
    return str(path)


def problems_in(folder):
    """A little of everything that a data set may have."""
    red = image_file(folder / "red.png")
    same = image_file(folder / "red again.png")
    blue = image_file(folder / "blue.png", "blue", (900, 600))
    (folder / "broken.png").write_bytes(b"no image")
    free = {"choices": (), "answer": "12", "meta": {"answer_index": None, "caption": ""}}
    hostile = {"hint": HOSTILE, "choices": (HOSTILE, "two"), "answer": HOSTILE}
    return [
        problem("plain", "How many magnets?", red, lecture="Poles <b>push</b>."),
        problem('a/b c?<x>&"', HOSTILE, blue, **hostile),
        problem("fa", PERSIAN, same),
        problem("zh", CHINESE, str(folder / "missing.png"), family="cup"),
        problem("long", "word " * 4000, str(folder / "broken.png"), family="cup"),
        problem("free", "How many in all?", **free),
    ]


def column(folder, problems, letters, **more):
    """A run's folder with its answers graded by eval.py, "-" for one that cannot be read."""
    folder.mkdir(exist_ok=True)
    predictions = []
    for p, letter in zip(problems, letters, strict=True):
        response = f"The answer is ({letter})."
        if letter == "-":
            response = f"{HOSTILE} I cannot tell." if p.choices else f"{HOSTILE} hm"
        x = {"id": p.id, "stop": "eos", "tokens": 7, "votes": {"A": 4, "B": 1}} | more
        x |= {"response": response, "rationale": f"I see {p.question[:40]} and count."}
        predictions.append(x)
    graded = metrics.grade_all(problems, predictions)
    scores, graded = evaluation.assess(graded, evaluation.about(str(folder), "test", None))
    config = {"model": "mmcot", "recipe": "two-stage", "seed": 42, "commit": "0123456789"}
    (folder / "config.json").write_text(json.dumps(config | {"epochs": [1]}))
    log = [{"stage": stage, "step": i, "loss": 2 / i}
           for stage in ("rationale", "answer") for i in range(1, 500)]  # fmt: skip
    log[-1] |= {"val_loss": 0.25, "val_accuracy": 60.0}
    (folder / "log.jsonl").write_text("\n".join(map(json.dumps, log)))
    return tables.Column(scores, graded, folder)


def fusion_map(stage):
    return {
        "stage": stage,
        "tokens": ["How", "▁many", HOSTILE],
        "gate": [0.2, 0.5, 0.9],
        "labels": ["magnet", "bar"],
        "boxes": [[0.25, 0.5, 0.2, 0.2], [0.75, 0.5, 0.3, 0.4]],
        "attention": [[0.6, 0.3], [0.1, 0.8], [0.5, 0.5]],
    }


def paligemma_map():
    grey = base64.b64encode(bytes([0, 255, 128, 0])).decode()
    tokens = ["Two", " are", "\n", "Answer", ": A"]
    maps = {"grid": [2, 2], "maps": {"0": grey, "4": grey}, "share": {"0": 0.25, "4": 0.4}}
    return maps | {"tokens": tokens, "p": [0.9, 0.5, 1.0, 1.0, 0.8]}


def blocks(file):
    found = re.findall(
        r'<script type="application/json" id="([^"]+)">(.*?)</script>', file.read_text()
    )
    return {name: json.loads(text) for name, text in found}


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """{name: report.html}: one run, two of them, and one without its problems."""
    folder = tmp_path_factory.mktemp("report")
    problems = problems_in(folder)
    first = column(folder / "first", problems, "ABAB--")
    second = column(folder / "second", problems, "BBAAA-", forced_after="loop")
    maps = {"plain": [fusion_map("rationale"), fusion_map("answer")], "fa": paligemma_map()}
    (folder / "first" / "looks.json").write_text(json.dumps(maps))
    shown = {"first": first, "second": second}
    report.write_report(folder / "first", {"runs/first": first})
    report.write_report(folder / "second", {f"runs/{name}": x for name, x in shown.items()})
    (folder / "bare").mkdir()
    report.write_report(folder / "bare", {"elsewhere": tables.Column(first.scores)})
    return {name: folder / name / "report.html" for name in ("first", "second", "bare")}


def test_texts_cannot_end_their_script_and_are_whole(reports):
    text = reports["first"].read_text()
    assert HOSTILE not in text and "onerror" in text and "\u2028" not in text
    found = blocks(reports["first"])["payload"]["problems"]
    assert [found[1][key] for key in ("question", "hint", "answer")] == [HOSTILE] * 3
    assert found[1]["choices"][0] == HOSTILE and found[1]["gold"] == 0
    assert text.count("</script>") == text.count("<script")  # none is opened or ended by a text


def test_half_a_surrogate_pair_does_not_stop_the_report(tmp_path):
    p = problem("half", "a \ud83d lone half")
    report.write_report(tmp_path, {"run": column(tmp_path / "run", [p], "A")})
    assert blocks(tmp_path / "report.html")["payload"]["problems"][0]["question"] == p.question


def test_other_fields_of_a_prediction_cannot_mislead_the_page(tmp_path):
    """Predictions of others may have numbers that JSON has not, and fields the page has, too."""
    strange = {"score": float("nan"), "attention_maps": "payload", "gold": "B"}
    shown = {"run": column(tmp_path / "run", [problem("p")], "A", **strange)}
    report.write_report(tmp_path, shown)
    text = (tmp_path / "report.html").read_text()
    block = re.search(r'id="payload">(.*?)</script>', text)[1]
    run = json.loads(block, parse_constant=pytest.fail)["problems"][0]["runs"][0]
    assert run["score"] == "NaN" and run["attention_maps"] is None


def test_an_image_is_there_once_and_small_and_a_bad_one_is_a_sentence(reports):
    found = blocks(reports["second"])
    assert {name for name in found if name.startswith("image")} == {"image-0", "image-1"}
    problems = {x["id"]: x for x in found["payload"]["problems"]}
    assert problems["plain"]["image"] == problems["fa"]["image"] == 0  # equal files
    kind, _, content = found["image-1"].partition(",")
    assert kind == "data:image/webp;base64"
    (path := reports["second"].parent / "x.webp").write_bytes(base64.b64decode(content))
    assert Image.open(path).size == (384, 256)
    assert "missing.png" in problems["zh"]["missing"]
    assert "broken.png" in problems["long"]["missing"]
    assert problems["free"]["image"] is problems["free"]["missing"] is None


def test_a_run_is_described_by_its_files_and_compared_on_common_problems(reports):
    payload = blocks(reports["second"])["payload"]
    first, second = payload["runs"]
    assert first["about"].startswith("mmcot · two-stage · first, test · 6 problems · seed 42")
    assert [c["stage"] for c in first["curves"]] == ["rationale", "answer"]
    assert len(first["curves"][0]["loss"]) <= 1.5 * report.CURVE_POINTS
    assert first["curves"][1]["val_accuracy"] == [[499, 60.0]]
    compared = payload["compared"]["runs/second"]
    assert (compared["better"], compared["worse"]) == (2, 1)
    answers = {x["id"]: [run["correct"] for run in x["runs"]] for x in payload["problems"]}
    assert answers["plain"] == [True, False] and answers["zh"] == [False, True]
    assert payload["problems"][0]["runs"][1]["forced_after"] == "loop"
    assert blocks(reports["bare"])["payload"]["problems"] == []


def test_the_means_of_a_curve_are_over_its_steps(tmp_path):
    log = [{"stage": s, "step": i, "loss": float(i)} for s in "aab" for i in range(1, 1001)]
    (tmp_path / "log.jsonl").write_text("\n".join(map(json.dumps, log)))
    stages = report.loss_curves(tmp_path / "log.jsonl")
    assert [s["stage"] for s in stages] == ["a", "a", "b"]  # started again: a curve of its own
    assert stages[0]["loss"][0] == [5, 4.5] and len(stages[0]["loss"]) == 125


def test_the_report_is_the_same_every_time(reports, tmp_path):
    problems = problems_in(tmp_path)
    shown = {"run": column(tmp_path / "run", problems, "ABAB--")}
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        report.write_report(tmp_path / name, shown)
    assert (tmp_path / "a/report.html").read_bytes() == (tmp_path / "b/report.html").read_bytes()
    assert not list(tmp_path.glob("*/*.part"))


# --- in a browser
@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if not CHROMIUM:
        pytest.skip("no chromium, chromium-browser or google-chrome on the PATH")
    with playwright.sync_playwright() as started:
        launched = started.chromium.launch(executable_path=CHROMIUM, args=ARGS)
        yield launched
        launched.close()


@pytest.fixture
def opened(browser):
    """opened(file, **options) -> a page of it, which may cause no error and no request."""
    faults = []
    with ExitStack() as stack:

        def open_page(file, after="", **options):
            context = browser.new_context(viewport={"width": 1280, "height": 800}, **options)
            stack.callback(context.close)
            page = context.new_page()
            page.set_default_timeout(20_000)
            page.on("pageerror", lambda error: faults.append(str(error)))
            local = ("file:", "data:")
            page.on("request", lambda r: r.url.startswith(local) or faults.append(r.url))
            page.goto(f"file://{file}{after}")
            return page

        yield open_page
    assert faults == []


def rows(page):
    return page.locator(".row").count()


def id_shown(page):
    return page.evaluate("view.at.id")


@pytest.mark.slow
def test_template_without_results_says_so(opened):
    page = opened(ROOT / "support/evaluation/report.html")
    assert page.locator("#plain").is_visible()
    assert not page.locator("main").is_visible()


def test_table_curves_and_filters(opened, reports):
    page = opened(reports["first"])
    assert "33.33" in page.inner_text("tr.all")
    assert "chance" in page.inner_text("thead") and "parse failures" in page.inner_text("#tables")
    assert page.locator("#curves svg").count() == 3  # two losses, an accuracy
    assert rows(page) == 6 and page.inner_text("#count") == "6 of 6"
    page.select_option("#verdict", "\tright")
    assert rows(page) == 2 and "cup (0)" in page.inner_text("#category")
    page.select_option("#verdict", "\twrong")
    assert rows(page) == 4 and "not readable (1)" in page.inner_text("#verdict")
    page.select_option("#category", "family\tcup")
    assert rows(page) == 2 and "right (0)" in page.inner_text("#verdict")
    page.click("#clear")
    page.select_option("#kind", "\tno parse")
    assert page.inner_text("#count") == "1 of 6" and "long" in page.inner_text(".row")
    page.click("#clear")
    page.click("#tables button:text-is('cup')")  # a row of the table is a filter
    assert page.input_value("#category") == "family\tcup" and rows(page) == 2


def test_search_and_keys(opened, reports):
    page = opened(reports["first"])
    page.keyboard.press("j")
    assert id_shown(page) == 'a/b c?<x>&"'
    page.keyboard.press("ArrowDown")
    page.keyboard.press("k")
    assert id_shown(page) == 'a/b c?<x>&"'
    page.keyboard.press("/")
    page.keyboard.type(
        "magnets MANY"
    )  # both words, anywhere, in any case; j and k are letters here
    assert rows(page) == 1 and page.inner_text("#count") == "1 of 6"
    page.keyboard.press("Escape")
    assert rows(page) == 6 and page.input_value("#search") == ""
    page.keyboard.press("Escape")  # and out
    page.keyboard.press("?")
    assert page.locator("#keys").is_visible()
    page.keyboard.press("Escape")
    assert not page.locator("#keys").is_visible()
    page.fill("#search", "苹果")
    assert rows(page) == 1
    page.fill("#search", "nothing has this")
    assert rows(page) == 0 and page.locator("#rows > p").is_visible()


@pytest.mark.slow
def test_a_problem_has_an_address(opened, reports):
    page = opened(reports["first"], "#zh")
    assert id_shown(page) == "zh" and CHINESE in page.inner_text("#detail")
    assert "missing.png" in page.inner_text(".image")
    page.click("#next")
    assert page.evaluate("decodeURIComponent(location.hash)") == "#long"
    page.evaluate("location.hash = 'plain'")
    page.wait_for_function("view.at.id === 'plain'")
    page = opened(reports["first"], "#%")  # no address at all
    assert id_shown(page) == "plain"


@pytest.mark.slow
def test_one_problem_says_everything(opened, reports):
    text = opened(reports["first"], "#plain").inner_text("#detail")
    for words in ("How many magnets?", "✓ gold", "✓ chosen", "✓ right", "I see How many magnets?",
                  "The answer is (A).", "because: ", "letter", "eos", "A 4, B 1"):  # fmt: skip
        assert words in text
    text = opened(reports["first"], "#free").inner_text("#detail")
    assert "Gold answer\n12" in text and "✗ wrong" in text and "Choices" not in text
    text = opened(reports["first"], "#long").inner_text("#detail")
    assert "✗ wrong · no parse" in text and "nothing" in text and "broken.png" in text


def test_hostile_texts_are_texts(opened, reports):
    page = opened(reports["second"])
    page.keyboard.press("j")
    assert page.locator(".question").inner_text().startswith("</script><img src=x onerror=")
    page.fill("#search", "<img")
    page.evaluate("fillPaper()")
    assert page.evaluate("window.hacked") is None
    assert page.locator("img").evaluate_all("all => all.every((x) => x.src.startsWith('data:'))")
    assert page.locator("#detail b:text-is('push')").count() == 0
    blocked = page.evaluate("""async () => {
        const found = [];
        addEventListener("securitypolicyviolation", (e) => found.push(e.effectiveDirective));
        await fetch("http://127.0.0.1:9/").catch(() => 0);
        document.body.append(Object.assign(document.createElement("script"), {text: "hacked = 2"}));
        await new Promise((done) => setTimeout(done, 50));
        return found; }""")
    assert "connect-src" in blocked and any("script-src" in x for x in blocked)
    assert page.evaluate("window.hacked") is None


@pytest.mark.slow
def test_right_to_left_and_long_texts(opened, reports):
    page = opened(reports["first"], "#fa")
    direction = "getComputedStyle(document.querySelector('.question')).direction"
    assert page.evaluate(direction) == "rtl"
    page = opened(reports["first"], "#long")
    assert page.evaluate(direction) == "ltr"
    wide = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert page.evaluate(wide) == 0
    page.set_viewport_size({"width": 400, "height": 800})
    assert page.evaluate(wide) == 0


@pytest.mark.slow
def test_attention_of_the_fusion(opened, reports):
    page = opened(reports["first"], "#plain")
    assert page.locator(".tokens").count() == 2  # a stage each
    tokens = page.locator(".tokens").first.locator(".token")
    shades = tokens.evaluate_all("all => all.map((x) => x.style.getPropertyValue('--shade'))")
    assert shades == ["0.000", "0.429", "1.000"]
    tokens.nth(0).hover()
    assert page.locator(".box").count() == 2
    assert page.locator(".box").last.inner_text() == "magnet 60 %"  # the strongest on top
    where = page.locator(".box").last.evaluate("x => [x.style.left, x.style.top, x.style.width]")
    assert where == ["15%", "40%", "20%"]
    page.mouse.move(0, 0)
    assert page.locator(".box").count() == 0
    tokens.nth(1).click()
    page.mouse.move(0, 0)  # a pressed one stays
    caption = page.inner_text(".caption")
    assert all(x in caption for x in ("“many”: gate 0.500", "bar 80.0 %", "10.0 %"))
    page.keyboard.press("ArrowLeft")
    assert "“How”" in page.inner_text(".caption")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("Escape")
    page.evaluate("document.activeElement.blur()")
    assert page.locator(".box").count() == 0
    page.keyboard.press("j")
    assert id_shown(page) != "plain"


@pytest.mark.slow
def test_attention_of_paligemma_by_touch(opened, reports):
    page = opened(reports["first"], "#fa", has_touch=True)
    tokens = page.locator(".token")
    mapped = "all => all.map((x) => x.classList.contains('map'))"
    assert tokens.evaluate_all(mapped) == [True, False, False, False, True]
    assert tokens.nth(1).get_attribute("title") == "probability 0.500"
    assert tokens.nth(1).evaluate("x => x.style.getPropertyValue('--shade')") == "0.500"
    tokens.nth(4).tap()
    grid = """() => { const paint = document.querySelector("canvas").getContext("2d");
        return [...paint.getImageData(0, 0, 2, 2).data].filter((_, i) => i % 4 === 3); }"""
    assert page.evaluate(grid) == [0, 153, 77, 0]  # alpha of the four patches
    assert page.inner_text(".caption").startswith("“: A”: probability 0.800; 40 %")
    assert "40 %" in page.inner_text(".caption")
    tokens.nth(1).tap()
    assert page.locator("canvas").count() == 0 and "“are”" in page.inner_text(".caption")


@pytest.mark.slow
def test_two_runs_compared(opened, reports):
    page = opened(reports["second"])
    head = page.inner_text("#pair")
    assert "+16.67 points on the 6 problems of both; 2 from wrong to right, 1 from right" in head
    assert "McNemar" in head
    page.select_option("#verdict", "\twrong → right")
    assert rows(page) == 2
    page.select_option("#verdict", "\tright → wrong")
    assert rows(page) == 1
    page.locator(".row").click()
    cards = page.locator(".answers > section")
    assert [x.split("\n")[0] for x in cards.all_inner_texts()] == [
        "A: runs/first",
        "B: runs/second",
    ]
    left, right = (cards.nth(i).bounding_box() for i in (0, 1))
    assert left["y"] == right["y"] and left["x"] + left["width"] <= right["x"]
    assert "✓ chosen by A" in page.inner_text(".choices")
    page.select_option("#second", "")  # alone again
    assert cards.count() == 1 and "right and wrong (6)" in page.inner_text("#verdict")


@pytest.mark.slow
def test_a_run_without_its_problems_has_its_table(opened, reports):
    page = opened(reports["bare"])
    assert "33.33" in page.inner_text("#tables") and page.locator("#rows > p").is_visible()
    assert not page.locator("#training").is_visible()
    page.keyboard.press("j")  # nothing to go to


@pytest.mark.slow
def test_dark_and_light(opened, reports):
    paper = "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)"
    assert max(opened(reports["first"], color_scheme="dark").evaluate(paper)) < 60
    assert min(opened(reports["first"], color_scheme="light").evaluate(paper)) > 220


@pytest.mark.slow
def test_on_paper_the_selected_problems_are_in_full(opened, reports):
    page = opened(reports["first"])
    page.select_option("#verdict", "\tright")
    assert page.pdf()[:4] == b"%PDF"
    assert page.locator("#paper article").count() == 2
    page.emulate_media(media="print")
    assert page.locator("#paper article").first.is_visible()
    assert not page.locator("#list").is_visible() and page.locator("#tables").is_visible()


@pytest.mark.slow
def test_on_a_phone_the_list_makes_room_for_the_problem(opened, reports):
    page = opened(reports["first"])
    page.set_viewport_size({"width": 400, "height": 800})
    assert not page.locator("#detail").is_visible()
    page.locator(".row").nth(2).click()
    assert page.locator("#detail").is_visible() and not page.locator("#list").is_visible()
    page.click("#back")
    assert page.locator("#list").is_visible()


def as_many_as_scienceqa_tests_on(folder):
    """4,241 problems, 2,017 with an image each: ScienceQA's again and again, or dull ones."""
    every = [problem("x", image=image_file(folder / "x.png")), problem("y", lecture="pull " * 99)]
    if (SCIENCEQA / "problems.json").is_file():
        every = [p for split in ("train", "test") for p in data.load(SCIENCEQA, split)]
    with_image = [p for p in every if p.image]
    without = [p for p in every if not p.image]
    small = {}
    problems = []
    for i in range(4241):
        p = with_image[i % len(with_image)] if i < 2017 else without[i % len(without)]
        if p.image:
            if p.image not in small:
                small[p.image] = images.open_image(p.image)
                small[p.image].thumbnail((384, 384))
            small[p.image].putpixel((0, 0), tuple(i.to_bytes(3, "big")))  # a file of its own
            small[p.image].save(folder / f"{i}.jpg", quality=85)
        image = str(folder / f"{i}.jpg") if p.image else None
        problems.append(replace(p, id=str(i), question=f"{p.question} ({i})", image=image))
    return problems


@pytest.mark.slow
def test_as_many_problems_as_scienceqa_tests_on(opened, tmp_path):
    """There in seconds, and never all of them in the page; `-s` shows the figures."""
    problems = as_many_as_scienceqa_tests_on(tmp_path)
    shown = {"run": column(tmp_path / "run", problems, random.Random(0).choices("AB", k=4241))}
    start = time.monotonic()
    report.write_report(tmp_path, shown)
    written, start = time.monotonic() - start, time.monotonic()
    page = opened(tmp_path / "report.html")
    page.locator(".row").first.wait_for()
    loaded = time.monotonic() - start
    assert loaded < 10
    assert rows(page) < 40 and page.inner_text("#count") == "4241 of 4241"
    page.evaluate("$('list').scrollTop = 2000 * ROW")
    page.get_by_text("(2001)").click()
    assert id_shown(page) == "2001" and rows(page) < 40
    page.wait_for_function("document.querySelector('#detail img').naturalWidth > 0")
    found = sum("(77" in f"({i})" for i in range(4241))
    search = """() => { $("search").value = ""; filter(); const start = performance.now();
        $("search").value = "(77"; filter(); return performance.now() - start; }"""
    spent = min(page.evaluate(search) for _ in range(3))  # other processes can only slow it down
    assert spent < 1000 and page.inner_text("#count") == f"{found} of 4241"
    size = (tmp_path / "report.html").stat().st_size / 1e6
    print(f"\n4,241 problems, 2,017 images: {size:.1f} MB, written in {written:.1f} s, "
          f"opened in {loaded:.1f} s, searched in {spent:.0f} ms")  # fmt: skip
