"""Pages as files: whole or not at all, loading nothing, and text from outside as text."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from chromium import made_up
from markupsafe import Markup
from support import audit_report, client, numerics, proof, record, request, untraced, with_token

from stablegen.core.record import Record
from stablegen.errors import ParameterError
from stablegen.pages import charts
from stablegen.pages.answer import level, write_answer
from stablegen.pages.cache import write_cache
from stablegen.pages.render import (
    arrows,
    check_page,
    embedded,
    many_lines,
    number,
    one_line,
    percent,
    plain,
    render_page,
)
from stablegen.reports.answer import inspect
from stablegen.reports.cache import survey

NASTY = "<script>window.pwned=1</script><img src=x onerror=window.pwned=1></script>{{7*7}} \"'& \u202eback\u2028\x00\n"


class Seen(HTMLParser):
    """Gathers a page's elements, and what it would load."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loads: list[str] = []
        self.ids: list[str] = []
        self.scripts: list[str] = []
        self.data: list[str] = []
        self.policy = ""
        self._into: list[str] | None = None
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.tags.append(tag)
        self.ids += [found["id"] or ""] if "id" in found else []
        self.loads += [value for name in ("src", "href") if (value := found.get(name)) and value[0] != "#"]
        if found.get("http-equiv") == "Content-Security-Policy":
            self.policy = found["content"] or ""
        if tag == "script":
            self._into = self.data if found.get("type") == "application/json" else self.scripts
            self._into.append("")
        assert not [name for name in found if name.startswith("on")]

    def handle_data(self, data: str) -> None:
        if self._into is not None:
            self._into[-1] += data

    def handle_endtag(self, tag: str) -> None:
        if tag == "script":
            self._into = None


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return pages of answers and of a cache that hold the worst of texts."""
    tmp_path = tmp_path_factory.mktemp("pages")
    asked = request((7, 8), prompt=NASTY)
    nasty = record(asked, text=NASTY, app=NASTY, margins=(0.0, 3.0), numerics=numerics(dtype="bfloat16"))
    with client(tmp_path / "cache") as asking:
        old = with_token(nasty, 1, 40)._replace(text=NASTY)
        for name, one in (("traced", nasty.superseding(old)), ("untraced", untraced(asked=asked, text=NASTY))):
            write_answer(inspect(asking, one), tmp_path / f"{name}.html")
        asking.cache.put([nasty, *made_up(30, steps=4)])
        asking.cache.put_audit(asking.identity, audit_report(model=NASTY))
        write_cache(survey(asking), tmp_path / "cache.html")
    return {file.stem: file.read_text(encoding="utf-8") for file in tmp_path.glob("*.html")}


def test_text_is_text_and_nothing_is_loaded(pages: dict[str, str]) -> None:
    assert sorted(pages) == ["cache", "traced", "untraced"]
    for page in pages.values():
        seen = Seen(page)
        assert seen.tags.count("img") == 0
        assert "{{7*7}}" in page
        assert [load for load in seen.loads if not load.startswith("data:")] == []
        assert len(seen.ids) == len(set(seen.ids))
        assert "\u202e" not in page
        assert "\x00" not in page
        allowed = re.findall(r"'sha256-([^']+)'", seen.policy)
        hashes = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in seen.scripts]
        assert hashes == allowed
        assert seen.policy.startswith("default-src 'none'")
        assert seen.data
        for data in seen.data:
            json.loads(data)
            assert not set("<>&\u2028\u2029") & set(data)


def test_every_svg_is_well_formed_and_named(pages: dict[str, str]) -> None:
    drawn = re.findall(r"<svg class=\"chart\".*?</svg>", pages["cache"], re.DOTALL)
    assert len(drawn) >= 6
    for svg in drawn:
        root = ET.fromstring(svg)
        assert (root.get("role"), bool(root.get("aria-label"))) == ("img", True)
        assert root.findtext("title")
        assert root.findtext("desc")


def test_an_empty_cache_has_a_page_that_says_so(tmp_path: Path) -> None:
    with client(tmp_path / "cache") as asking:
        write_cache(survey(asking), tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert "The cache holds no answer" in page
    assert "<table" not in page


def test_an_answer_of_no_tokens_has_a_page(tmp_path: Path) -> None:
    with client(tmp_path / "cache") as asking:
        write_answer(inspect(asking, untraced(())), tmp_path / "page.html")
    assert "It is empty." in (tmp_path / "page.html").read_text(encoding="utf-8")


GPU = "A GPU with a very long name, 80 GB"
OTHER_GPU = "Another GPU, 141 GB"


def test_a_long_device_name_is_not_repeated_in_every_row(tmp_path: Path) -> None:
    dtypes = ("float32", "float16", "bfloat16")
    answers = [
        record(request((1, place)), numerics=numerics(dtype=dtypes[place % 3], device_model=GPU)) for place in range(30)
    ]
    page = tmp_path / "cache.html"
    with client(tmp_path / "one") as asking:
        asking.cache.put(answers)
        write_cache(survey(asking), page)
    (chart,) = re.findall(
        r'<svg class="chart"[^>]*aria-label="Answers by numerics and verdict".*?</svg>', page.read_text(), re.DOTALL
    )
    assert GPU not in chart
    assert [name for name in dtypes if f"single {name}" in texts(Markup(chart))] == list(dtypes)
    assert f"How the answers were computed, on {GPU}." in page.read_text()

    superseded = record(numerics=numerics(device_model=OTHER_GPU), created=1.0)
    one = with_token(record(numerics=numerics(device_model=GPU)), 1, 40).superseding(superseded)
    with client(tmp_path / "two") as asking:
        flags = [proof(one, numerics(device_model=OTHER_GPU, dtype=dtype), "at_risk") for dtype in dtypes]
        asking.cache.flag(flags)
        write_answer(inspect(asking, one), page)
    shown = page.read_text().split("<main", 1)[1].split("<script", 1)[0]
    rows = re.findall(r"<tr>.*?</tr>", shown.split('id="flagged-heading"', 1)[1].split("</section>", 1)[0], re.DOTALL)
    assert len(rows) == 1 + len(flags)
    assert [row for row in rows if GPU in row or OTHER_GPU in row] == []
    assert "single bfloat16 on B" in shown or "single bfloat16 on A" in shown
    assert f"A: {OTHER_GPU}, B: {GPU}" in shown or f"A: {GPU}, B: {OTHER_GPU}" in shown


@pytest.mark.parametrize(("file", "said"), [("page.txt", "ends in .html"), ("none/page.html", "no such folder")])
def test_files_that_cannot_be_are_named_before_the_work(tmp_path: Path, file: str, said: str) -> None:
    with pytest.raises(ParameterError, match=said):
        check_page(tmp_path / file)


def test_a_folder_is_no_page_and_a_failure_leaves_nothing(tmp_path: Path) -> None:
    (tmp_path / "page.html").mkdir()
    with pytest.raises(ParameterError, match="is a folder"):
        check_page(tmp_path / "page.html")
    with client(tmp_path / "cache") as asking, pytest.raises(ParameterError, match="cannot be written"):
        write_cache(survey(asking), tmp_path / "page.html")
    assert sorted(file.name for file in tmp_path.iterdir()) == ["cache", "page.html"]


def test_a_page_misses_nothing_in_silence() -> None:
    with pytest.raises(Exception, match="undefined"):
        render_page("answer.html.j2")


def test_embedded_values_survive_and_cannot_end_their_element() -> None:
    value: dict[str, Any] = {"text": NASTY, "numbers": [1, 0.5, float("inf"), None], "pair": ("a", True)}
    found = embedded("x", value)
    inside = found.split(">", 1)[1].removesuffix("</script>")
    assert json.loads(inside) == {"text": NASTY, "numbers": [1, 0.5, None, None], "pair": ["a", True]}
    assert embedded('"><b>', 1).startswith('<script type="application/json" id="&#34;&gt;&lt;b&gt;">')


def test_what_cannot_be_seen_is_shown() -> None:
    assert one_line("a\nb\tc\r\x00\u202e\x7f") == "a⏎b⇥c␍\\x00\\u202e\\x7f"
    assert many_lines("a\n\tb\u2066") == "a\n\tb\\u2066"
    assert plain(("a=1\n", "b")) == "a=1⏎, b"
    assert (plain(()), plain(None), plain(3)) == ("none", "\N{EN DASH}", "3")
    assert arrows("a -> b") == "a → b"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (12345.0, "12,345"),
        (0.25, "0.25"),
        (-0.5, "\N{MINUS SIGN}0.5"),
        (1.5e-7, "1.5\N{MULTIPLICATION SIGN}10⁻⁷"),
        (float("inf"), "inf"),
        (None, "\N{EN DASH}"),
    ],
)
def test_numbers_are_written_as_a_person_does(value: float | None, text: str) -> None:
    assert number(value) == text


def test_shares_and_classes() -> None:
    assert (percent(0.5), percent(None)) == ("50.0\u202f%", "\N{EN DASH}")
    assert [level(p) for p in (None, 0.0, 1e-6, 1e-4, 0.05, 0.5)] == [0, 0, 1, 2, 3, 4]


# -- charts ----------------------------------------------------------------------------------------------------


def texts(chart: Markup) -> list[str]:
    svg = ET.fromstring(str(chart).split("</svg>", 1)[0] + "</svg>")
    return [node.text or "" for node in svg.iter("text")]


def test_bars_write_their_values_and_escape_their_names() -> None:
    chart = charts.bars("t", ["<b>", "b"], {"n": [3, 1500]})
    assert texts(chart) == ["<b>", "3", "b", "1,500"]
    assert "<b>" not in chart
    assert "legend" not in chart
    stacked = charts.bars("t", ["a"], {"x": [1], "y": [2]}, stacked=True)
    assert texts(stacked) == ["a", "3"]
    assert stacked.count("<li>") == 2
    grouped = charts.bars("t", ["a"], {"x": [1], "y": [0]})
    assert texts(grouped) == ["a", "1", "0"]
    assert charts.bars("t", [], {"x": []})


def test_a_histogram_has_a_bin_for_what_is_below() -> None:
    chart = charts.histogram("t", (0.01, 0.1, 1.0), [4, 1, 2], x_label="x", y_label="y", below="0")
    assert "0: 4" in chart
    assert "0.01 to 0.1: 1" in chart
    assert "x" in texts(chart)
    with pytest.raises(AssertionError):
        charts.histogram("t", (0.01, 0.1, 1.0), [4, 1, 2], x_label="x", y_label="y")


def test_lines_leave_out_what_a_logarithm_cannot_show() -> None:
    series = [charts.Series("a", [(1, 0.0), (2, 1.0), (4, 10.0)], [(0, 0), (0.5, 2), (8, 12)])]
    chart = charts.lines("t", series, x_label="x", y_label="y", x_log=True, y_log=True, x_ticks=[1, 2, 4])
    assert chart.count('class="mark"') == 2
    assert "a, 4: 10 (8 to 12)" in chart
    many = charts.Series("m", [(x, x) for x in range(100)])
    assert 'class="mark"' not in charts.lines("t", [many], x_label="x", y_label="y")
    assert charts.lines("t", [charts.Series("one", [(1, 1)])], x_label="x", y_label="y").count('class="mark"') == 1


def test_reliability_shows_its_bounds_and_the_diagonal() -> None:
    chart = charts.reliability("t", [charts.Point(0.3, 0.25, 0.1, 0.5, "4 of 16")])
    assert "predicted 30.0%, observed 25.0% (10.0% to 50.0%); 4 of 16" in chart
    assert 'class="guide"' in chart


def test_records_can_be_made_up() -> None:
    found: list[Record] = list(made_up(10, steps=3))
    assert len({one.key for one in found}) == 10
