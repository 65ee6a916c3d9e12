"""The pages in a real browser: opened, searched, sorted, hovered, walked by keyboard, in light and dark, on a phone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from chromium import browser as started
from chromium import made_up, program
from fakes import FakeSource
from support import client, near_tie, record, request, trace, untraced, with_token

from stablegen.client import Client
from stablegen.lab import associativity
from stablegen.lab.reports import flips
from stablegen.lab.reports.lab import report_of
from stablegen.pages.answer import write_answer
from stablegen.pages.cache import write_cache
from stablegen.pages.lab import write as write_lab
from stablegen.reports.answer import inspect
from stablegen.reports.cache import CacheReport, survey

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.skipif(program() is None, reason="no Chromium on this machine, and none is downloaded")
EVIL = (
    "<script>window.pwned = 1</script><img src=x onerror='window.pwned = 1'>\"</script><!--<script>"
    "{{ 7 * 7 }} {% raw %} \u202edlrow\u202c &amp; \u2028 end"
)
COUNT = 500
MANY = 10_000
Open = Callable[..., "Page"]


@pytest.fixture(scope="module")
def chromium() -> Iterator[Browser]:
    with started() as browser:
        yield browser


@pytest.fixture
def open_page(chromium: Browser) -> Iterator[Open]:
    """Open a file; in the end nothing else may have been asked for, and nothing may have gone wrong in it."""
    problems: list[str] = []
    asked: list[str] = []
    contexts = []

    def opened(file: Path, *, width: int = 1280, height: int = 900, scheme: Any = "light") -> Page:
        context = chromium.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: problems.append(message.text))
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(file.as_uri())
        return page

    yield opened
    for context in contexts:
        context.close()
    assert not problems
    assert [url for url in asked if not url.startswith(("file://", "data:"))] == []
    assert len([url for url in asked if url.startswith("file://")]) == len(contexts)


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Write one page of each kind, with text in each that must stay text."""
    folder = tmp_path_factory.mktemp("pages")
    files = {name: folder / f"{name}.html" for name in ("cache", "large", "small", "empty", "untraced")}
    evil = record(
        request((1, 2), prompt=EVIL, new=4), traced=trace([9.0, 0.0, 9.0, 9.0], score=8.0), text=EVIL, app=EVIL
    )
    with client(folder / "large") as mine:
        mine.cache.put(made_up(COUNT, steps=24))
        report = survey(mine)
        write_cache(report, files["cache"])
    answers = [report.answers[place % COUNT].model_copy(update={"key": f"{place:064x}"}) for place in range(MANY)]
    write_cache(CacheReport.model_validate({**dict(report), "records": MANY, "answers": answers}), files["large"])
    with client(folder / "few") as mine:
        mine.cache.put([*made_up(5), evil])
        write_cache(survey(mine), files["small"])
        write_answer(inspect(mine, untraced(asked=request((1, 2), prompt=EVIL), text=EVIL)), files["untraced"])
    with client(folder / "none") as mine:
        write_cache(survey(mine), files["empty"])
    return files


def rows(page: Page) -> list[str]:
    return page.locator("#rows tr[data-place]").all_inner_texts()


# --- the cache --------------------------------------------------------------------------------------------------------


def test_ten_thousand_answers_are_a_few_rows_in_the_document(open_page: Open, pages: dict[str, Path]) -> None:
    page = open_page(pages["large"])
    assert page.locator("#count").inner_text() == "10,000 of 10,000 answers"
    first = rows(page)
    assert 5 < len(first) < 60
    page.evaluate("const view = document.getElementById('viewport'); view.scrollTop = view.scrollHeight")
    page.wait_for_function("() => document.querySelector('#rows tr[aria-rowindex=\"10001\"]') !== null")
    last = rows(page)
    assert len(last) < 60
    assert set(first).isdisjoint(last)


def test_answers_are_searched_and_filtered(open_page: Open, pages: dict[str, Path]) -> None:
    page = open_page(pages["cache"])
    page.get_by_role("searchbox", name="Search").fill("number 234.")
    page.wait_for_function("() => document.getElementById('count').textContent.startsWith('1 of')")
    assert "number 234." in page.locator("#rows tr[data-place] td").nth(1).inner_text()
    page.get_by_role("searchbox", name="Search").fill("nothing is like this")
    page.locator("#nothing").wait_for()
    assert rows(page) == []
    page.get_by_role("button", name="Clear").click()
    page.wait_for_function("() => document.getElementById('count').textContent.startsWith('500 of')")
    for name in ("Verdict", "App", "Model"):
        chosen = page.get_by_role("combobox", name=name)
        labels = chosen.locator("option").all_inner_texts()
        chosen.select_option(index=1)
        page.wait_for_function("() => !document.getElementById('count').textContent.startsWith('500 of')")
        word = labels[1].split(" (")[0]
        found = rows(page)
        assert found
        assert name == "App" or [row for row in found if word not in row] == []
        page.get_by_role("button", name="Clear").click()


@pytest.mark.parametrize(("column", "place", "first"), [("p", 3, "descending"), ("margin", 4, "ascending")])
def test_answers_are_sorted_by_a_click(
    open_page: Open, pages: dict[str, Path], column: str, place: int, first: str
) -> None:
    page = open_page(pages["cache"])
    head = page.locator(f"th[data-column={column}]")

    def values() -> list[float]:
        cells = page.locator(f"#rows tr[data-place] td:nth-child({place + 1})").all_inner_texts()
        return [_number(cell) for cell in cells]

    for direction in (first, "ascending" if first == "descending" else "descending"):
        head.get_by_role("button").click()
        assert head.get_attribute("aria-sort") == direction
        found = values()
        assert len(found) > 5
        assert found == sorted(found, reverse=direction == "descending")
    assert page.locator("th[aria-sort=ascending], th[aria-sort=descending]").count() == 1


def test_every_column_sorts_both_ways_by_keyboard(open_page: Open, pages: dict[str, Path]) -> None:
    page = open_page(pages["cache"])
    heads = page.locator("#grid th[data-column]")
    assert heads.first.get_attribute("aria-sort") == "ascending"
    for place in range(1, heads.count()):
        directions = []
        for _ in range(2):
            heads.nth(place).get_by_role("button").press("Enter")
            directions.append(heads.nth(place).get_attribute("aria-sort"))
            assert page.locator("#grid [aria-sort]").count() == 1
        assert sorted(map(str, directions)) == ["ascending", "descending"]


def _number(text: str) -> float:
    raised = str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")
    mantissa, _, power = text.replace(",", "").partition("\N{MULTIPLICATION SIGN}10")
    return float(mantissa) * 10.0 ** int(power.translate(raised) or 0)


def test_answers_are_walked_and_opened_by_keyboard(open_page: Open, pages: dict[str, Path]) -> None:
    page = open_page(pages["cache"])
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.locator("#grid").focus()
    for key, place in (("ArrowDown", 1), ("ArrowDown", 2), ("ArrowUp", 1), ("End", COUNT - 1), ("Home", 0)):
        page.keyboard.press(key)
        assert page.locator("#grid").get_attribute("aria-activedescendant") == f"row-{place}"
        assert page.locator(f"#row-{place}").is_visible()
    page.keyboard.press("PageDown")
    page.keyboard.press("Enter")
    details = page.get_by_role("dialog")
    details.wait_for()
    opened = page.locator("#d-prompt").inner_text()
    assert "number" in opened
    assert "stablegen inspect" in page.locator("#d-command").inner_text()
    page.get_by_role("button", name="Next answer").click()
    assert page.locator("#d-prompt").inner_text() != opened
    page.keyboard.press("Escape")
    details.wait_for(state="hidden")
    assert page.evaluate("document.activeElement.id") == "grid"


def test_an_empty_cache_says_so(open_page: Open, pages: dict[str, Path]) -> None:
    page = open_page(pages["empty"])
    assert "The cache holds no answer" in page.locator("main").inner_text()


# --- text stays text --------------------------------------------------------------------------------------------------


def test_a_prompt_with_a_script_in_it_shows_as_text(open_page: Open, pages: dict[str, Path]) -> None:
    page = open_page(pages["small"])
    page.get_by_role("searchbox", name="Search").fill("window.pwned")
    page.wait_for_function("() => document.getElementById('count').textContent.startsWith('1 of')")
    page.locator("#rows tr[data-place]").first.click()
    page.get_by_role("dialog").wait_for()
    shown = page.locator("#d-prompt").inner_text()
    assert shown.startswith("<script>window.pwned = 1</script><img src=x onerror=")
    assert "{{ 7 * 7 }}" in shown
    assert "\u202e" not in shown  # what turns the direction of what follows is made visible
    assert page.evaluate("window.pwned") is None
    assert page.locator("img").count() == 0


def test_an_answer_without_a_trace_shows_its_prompt_as_text(open_page: Open, pages: dict[str, Path]) -> None:
    page = open_page(pages["untraced"])
    assert page.locator(".prompt").inner_text().startswith("<script>window.pwned = 1</script>")
    assert "\u202e" not in page.locator("body").inner_text()
    assert page.evaluate("window.pwned") is None
    assert page.locator("img").count() == 0


def test_the_lab_shows_prompts_as_text(open_page: Open, tmp_path: Path) -> None:
    best = tuple(flips.Candidate(token=place, text=EVIL, score=1.0 - place) for place in range(3))
    flip = flips.Flip(cause="padding", setting=1, step=0, margin=0.0, baseline=best, other=best)
    trial = flips.Trial(cause="padding", setting=1, moved=1, largest=0.5, flips=(0,))
    prompt = flips.PromptFlips(prompt=EVIL, length=3, answer=EVIL, steps=1, trials=(trial,), shown=(flip,))
    sums = associativity.measure(device="cpu", count=256)
    found = flips.FlipsReport(
        model=EVIL,
        machine=sums.machine,
        control="native",
        baseline=2,
        tokens=1,
        skipped=(EVIL,),
        dtypes=(flips.DtypeFlips(dtype="float32", prompts=(prompt,), policies=()),),
        seconds=1.0,
    )
    write_lab(report_of(associativity=sums, flips=found), tmp_path / "lab.html")
    page = open_page(tmp_path / "lab.html")
    page.evaluate("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    assert page.evaluate("window.pwned") is None
    assert page.locator("img").count() == 0
    assert page.locator("script").count() == 0
    assert "<script>window.pwned = 1</script>" in page.locator("main").inner_text()
    assert "{{ 7 * 7 }}" in page.locator("main").inner_text()


# --- one answer -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def answer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the page of an answer that was replaced by one that diverges from it, with two fragile steps."""
    folder = tmp_path_factory.mktemp("answer")
    with Client(FakeSource(), cache_dir=folder / "cache", policy="single", dtype="float32", device="cpu") as mine:
        old = mine.complete("One day", max_new_tokens=12).record
        fragile = near_tie(near_tie(old, step=3), step=7)
        mine.cache.put([with_token(fragile, 5, 7).superseding(old)])
        write_answer(inspect(mine, mine.inspect(old.key)), folder / "answer.html")
    return folder / "answer.html"


def test_a_token_tells_of_itself_when_pointed_at_and_when_focused(open_page: Open, answer: Path) -> None:
    page = open_page(answer)
    tokens = page.locator("#tokens .token")
    assert tokens.count() == 12
    place = page.locator("#d-place")
    tokens.nth(6).hover()
    assert place.inner_text() == "step 6"
    page.mouse.move(0, 0)
    tokens.nth(3).focus()
    assert place.inner_text() == "step 3"
    assert page.locator("#d-fragile").is_visible()
    assert page.locator("#d-runner_up").inner_text()
    for key, step in (("ArrowRight", 4), ("n", 7), ("p", 3), ("End", 11), ("Home", 0)):
        page.keyboard.press(key)
        assert place.inner_text() == f"step {step}", key
    assert page.locator("#tokens [tabindex='0']").count() == 1


def test_fragile_tokens_stand_out_not_by_colour_alone(open_page: Open, answer: Path) -> None:
    page = open_page(answer)
    tokens = page.locator("#tokens .token")
    lines = [tokens.nth(step).evaluate("(one) => getComputedStyle(one).borderBottomStyle") for step in (3, 7, 1)]
    colours = [tokens.nth(step).evaluate("(one) => getComputedStyle(one).backgroundColor") for step in (3, 7, 1)]
    assert lines[0] == lines[1] != lines[2]
    assert colours[0] == colours[1] != colours[2]


def test_both_continuations_are_shown_where_a_divergence_is_known(open_page: Open, answer: Path) -> None:
    text = open_page(answer).locator("main").inner_text()
    assert "step 5" in text
    assert "Other runs of the same request" in text


# --- looks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cache", "small", "empty", "untraced", "answer"])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_page_fits_a_phone_and_both_schemes(
    open_page: Open, pages: dict[str, Path], answer: Path, name: str, scheme: str
) -> None:
    page = open_page(answer if name == "answer" else pages[name], width=360, height=740, scheme=scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    light = sum(map(int, page.evaluate("getComputedStyle(document.body).backgroundColor").strip("rgb()").split(",")))
    assert light > 700 if scheme == "light" else light < 120
