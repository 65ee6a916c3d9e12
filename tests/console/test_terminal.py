"""Reports on a terminal: what is named once, and text that stays text."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

from rich.console import Console
from support import client, numerics, record, request, with_token

from stablegen.console import answer, cache
from stablegen.console.lab import demo
from stablegen.console.tables import cell_text, sheet
from stablegen.core.policy import control_policy
from stablegen.core.verdict import Verdict
from stablegen.lab.reports.demo import DemoReport, Flip, Judged, Measured
from stablegen.lab.reports.wording import SAME_BITS, Cell
from stablegen.reports.answer import inspect
from stablegen.reports.cache import survey

GPU = "A GPU with a very long name, 80 GB"
OTHER_GPU = "Another GPU, 141 GB"


def printed(render: Any, report: Any) -> str:
    console = Console(record=True, width=200, file=io.StringIO())
    render(report, console)
    return console.export_text()


def test_the_cache_names_a_device_once(tmp_path: Path) -> None:
    dtypes = ("float32", "float16", "bfloat16")
    with client(tmp_path) as asking:
        asking.cache.put(
            record(request((1, place)), numerics=numerics(dtype=dtypes[place % 3], device_model=GPU))
            for place in range(9)
        )
        text = printed(cache.render, survey(asking))
    assert text.count(GPU) == 1
    assert [dtype for dtype in dtypes if f"\nsingle {dtype} " not in text] == []


def test_the_cache_tells_several_devices_apart(tmp_path: Path) -> None:
    with client(tmp_path) as asking:
        asking.cache.put(
            record(request((1, place)), numerics=numerics(device_model=name))
            for place, name in enumerate((GPU, GPU, OTHER_GPU))
        )
        text = printed(cache.render, survey(asking))
    assert f"computed on A: {GPU}, B: {OTHER_GPU}:" in text
    assert "\nsingle float32 on A " in text and "\nsingle float32 on B " in text


def test_an_answer_names_its_devices_once(tmp_path: Path) -> None:
    old = record(numerics=numerics(device_model=OTHER_GPU), created=1.0)
    one = with_token(record(numerics=numerics(device_model=GPU)), 1, 40).superseding(old)
    with client(tmp_path) as asking:
        text = printed(answer.render, inspect(asking, one))
        assert f"A: {GPU}, B: {OTHER_GPU}" in text
        assert (text.count(f"on {GPU}"), text.count(f"on {OTHER_GPU}")) == (1, 0)
        assert "diverges  at step 1, superseded" in text
        assert "by single float32 on B" in text
        alone = printed(answer.render, inspect(asking, one.superseding(None)))
    assert "devices" not in alone
    assert alone.count(f"on {GPU}") == 1


def test_cells_say_that_bits_are_the_same() -> None:
    assert cell_text(SAME_BITS) == "0, same bits"
    assert cell_text(Cell("0 of 3", moved=False)) == "0 of 3"
    table = sheet("name", "figure", "note", left=["note"])
    assert [column.justify for column in table.columns] == ["left", "right", "left"]


def measured(policy: str, **more: Any) -> Measured:
    fields: dict[str, Any] = {"policy": policy, "dtype": "float32", "rows": 9, "moved": 0, "largest": 0.0, "flips": []}
    return Measured(**(fields | more))


def test_the_demo_keeps_the_control_apart_and_text_as_it_is() -> None:
    flip = Flip(prompt="[red]p[/red]", situation="together", step=2, alone="a", beside="b", margin=0.25)
    verdict = Verdict(status="at_risk", reason="", step=3, token=1, runner_up=2, margin=0.5)
    report = DemoReport(
        model="a model",
        numerics={"device_model": GPU, "torch": "2.13.0"},
        prompts=1,
        situations=["together"],
        measured=[measured(control_policy().spec, moved=3, largest=0.5, flips=[flip]), measured("single")],
        judged=[
            Judged(
                prompt="[b]",
                recorded="single float32",
                current="single float32",
                cached=True,
                verdict=verdict,
                token="[/x]",
                runner_up="y",
            )
        ],
        seconds=1.0,
    )
    text = printed(demo.render, report)
    first, second = text.split("(b) the policies that promise equal bits: single")
    assert "step 2 says 'b', alone 'a' (margin 0.25)" in first
    assert "[red]p[/red]" in first
    assert "0: not one bit" in second and "not one bit" not in first
    assert "[/x] or y" in second
    assert text.count(GPU) == 1
    still = report.model_copy(update={"measured": [measured(control_policy().spec), measured("single")]})
    assert "no token flipped" in printed(demo.render, still)
