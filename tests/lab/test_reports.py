"""The lab's reports: read, joined and printed, and the words that their tables and pages share."""

from __future__ import annotations

from pathlib import Path

import pytest
from rich.console import Console

from stablegen.console.lab import render
from stablegen.errors import InputFileError, ParameterError
from stablegen.lab.reports.associativity import AssociativityReport
from stablegen.lab.reports.flips import FlipsReport
from stablegen.lab.reports.lab import LabReport, join, read_report, report_of
from stablegen.lab.reports.layers import LayersReport
from stablegen.lab.reports.matmul import MatmulReport
from stablegen.lab.reports.wording import DeviceNames, counts_text, grouped


def test_a_report_survives_its_json(
    sums: AssociativityReport, products: MatmulReport, streams: LayersReport, flipped: FlipsReport, tmp_path: Path
) -> None:
    report = report_of(associativity=sums, matmul=products, layers=streams, flips=flipped)
    assert report.parts == [sums, products, streams, flipped]
    (tmp_path / "all.json").write_text(report.model_dump_json())
    again = read_report(tmp_path / "all.json")
    assert again.model_dump_json() == report.model_dump_json()
    console = Console(width=160, record=True)
    with console.capture() as printed:
        render(again, console)
    text = printed.get()
    words = ("(a + b) + c", "slice 0 of bmm", "worst layer", "0, same bits", "missing mask", "padded:4", "measured in")
    assert [word for word in words if word not in text] == []


def test_reports_of_runs_apart_are_joined(sums: AssociativityReport, flipped: FlipsReport) -> None:
    other = flipped.model_copy(update={"dtypes": (flipped.dtypes[0].model_copy(update={"dtype": "float16"}),)})
    found = join([report_of(associativity=sums), report_of(flips=flipped), report_of(flips=other)])
    assert found.associativity == sums
    assert found.flips is not None
    assert [one.dtype for one in found.flips.dtypes] == ["float32", "float16"]
    with pytest.raises(ParameterError, match="twice"):
        join([report_of(flips=flipped), report_of(flips=flipped)])
    with pytest.raises(ParameterError, match="associativity was run 2 times"):
        join([report_of(associativity=sums), report_of(associativity=sums)])
    with pytest.raises(ParameterError, match="several models"):
        join([report_of(flips=flipped), report_of(flips=other.model_copy(update={"tokens": 99}))])
    with pytest.raises(ParameterError, match="no experiment"):
        join([LabReport(created=0.0)])


@pytest.mark.parametrize("content", ["", "{}", "[1]", '{"created": "x"}'])
def test_a_file_that_is_not_a_report(tmp_path: Path, content: str) -> None:
    (tmp_path / "x.json").write_text(content)
    with pytest.raises(InputFileError, match="is not a report of the lab"):
        read_report(tmp_path / "x.json")
    with pytest.raises(InputFileError, match="cannot be read"):
        read_report(tmp_path / "none.json")


def test_neighbours_that_look_the_same_become_one_row() -> None:
    rows = [("a", 1, "x"), ("a", 2, "x"), ("a", 3, "y"), ("b", 4, "y"), ("a", 5, "y")]
    assert grouped(rows) == [("a", "1, 2", "x"), ("a", "3", "y"), ("b", "4", "y"), ("a", "5", "y")]
    assert counts_text([1, 2, 3, 4]) == "1 ... 4"
    assert counts_text([2, 3, 4, 5, 9, 10], among=[1, 2, 3, 4, 5, 9, 10, 100]) == "2 ... 10"
    assert counts_text([2, 3, 5, 9], among=[1, 2, 3, 4, 5, 9]) == "2, 3, 5, 9"


def test_a_device_is_named_once() -> None:
    one = DeviceNames.of(["single float32 on a GPU on a bus", "padded:8 bfloat16 on a GPU on a bus"])
    assert (one.legend, one.several) == ("a GPU on a bus", False)
    assert list(one.short.values()) == ["single float32", "padded:8 bfloat16"]
    two = DeviceNames.of(["single float32 on a GPU", "single float32 on a CPU", "single float16 on a GPU"])
    assert (two.legend, two.several) == ("A: a GPU, B: a CPU", True)
    assert list(two.short.values()) == ["single float32 on A", "single float32 on B", "single float16 on A"]
    many = DeviceNames.of(f"single float32 on GPU {place}" for place in range(28))
    assert list(many.devices.values())[24:] == ["Y", "Z", "AA", "AB"]
    assert DeviceNames.of([]).legend == ""
