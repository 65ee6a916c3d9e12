"""The command ``stablegen lab``: what it prints, the pages it writes, and what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from stablegen.errors import DeviceMemoryError
from stablegen.lab import associativity, flips, layers, matmul
from stablegen.lab.reports.associativity import AssociativityReport
from stablegen.lab.reports.lab import report_of
from stablegen.lab.reports.matmul import MatmulReport

Run = Callable[..., int]


def test_the_command_prints_json_and_writes_a_page(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "sums.html"
    assert run("lab", "associativity", "--count", "256", "--device", "cpu", "--json", "--html", str(page)) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["associativity"]["sums"][0]["count"] == 256
    assert "Addition is not associative" in page.read_text()


def test_the_command_for_products_and_layers(run: Run, small_model: str, capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ("--shape", "8x8x8", "--batch", "1,2", "--rows", "1", "--precision", "float32", "--no-search")
    assert run("lab", "matmul", *sizes, "--device", "cpu") == 0
    assert "8 x 8 times 8 x 8" in capsys.readouterr().out
    chosen = ("--model", small_model, "--dtype", "float32", "--batch", "2", "--length", "3")
    assert run("lab", "layers", *chosen, "--device", "cpu") == 0
    assert "worst layer" in capsys.readouterr().out


def test_the_command_for_flips_takes_a_file_of_prompts(
    run: Run, small_model: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "prompts.txt").write_text("One day\nHello\n")
    page = tmp_path / "flips.html"
    chosen = ("--model", small_model, "--dtype", "float32", "--batch", "1,2", "--padding", "4")
    asked = ("--policy", "single", "--tokens", "3", "--prompts", str(tmp_path / "prompts.txt"), "--device", "cpu")
    assert run("lab", "flips", *chosen, *asked, "--html", str(page)) == 0
    assert "float32: 2 prompts under native, against a batch of 2" in capsys.readouterr().out
    assert "teacher-forced along the same tokens" in page.read_text()


def instead(monkeypatch: pytest.MonkeyPatch, **found: Any) -> dict[str, dict[str, Any]]:
    """Let experiments return these reports or raise these errors; return what each was asked."""
    calls: dict[str, dict[str, Any]] = {}

    def quick(name: str, result: Any) -> Callable[..., Any]:
        def measure(**asked: Any) -> Any:
            calls[name] = asked
            if isinstance(result, Exception):
                raise result
            return result

        return measure

    for module in (associativity, matmul, layers, flips):
        name = module.__name__.rpartition(".")[2]
        monkeypatch.setattr(module, "measure", quick(name, found.get(name)))
    return calls


def test_the_command_for_all(
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    sums: AssociativityReport,
    products: MatmulReport,
) -> None:
    calls = instead(monkeypatch, associativity=sums, matmul=products)
    page = tmp_path / "all.html"
    assert run("lab", "all", "--tokens", "3", "--dtype", "float32", "--seed", "5", "--html", str(page)) == 0
    assert "associativity" in capsys.readouterr().out
    assert calls["flips"]["tokens"] == 3
    assert calls["layers"]["dtypes"] == ["float32"]
    assert calls["matmul"]["seed"] == 5
    assert page.exists()


def test_an_experiment_that_fails_costs_the_others_nothing(
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    sums: AssociativityReport,
    products: MatmulReport,
) -> None:
    full = DeviceMemoryError("a batch of 64 rows did not fit")
    instead(monkeypatch, associativity=sums, matmul=products, layers=full, flips=full)
    page = tmp_path / "all.html"
    assert run("lab", "all", "--html", str(page)) == 1
    printed = capsys.readouterr().out
    assert "layers failed: a batch of 64 rows did not fit." in printed
    assert "(a + b) + c" in printed
    assert "a batch of 64 rows did not fit" in page.read_text()
    instead(monkeypatch, associativity=full, matmul=full, layers=full, flips=full)
    assert run("lab", "all", "--html", str(page)) == 1
    assert "a batch of 64 rows did not fit" in capsys.readouterr().err


def test_the_command_joins_reports(
    run: Run, tmp_path: Path, sums: AssociativityReport, products: MatmulReport, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.json").write_text(report_of(associativity=sums).model_dump_json())
    (tmp_path / "b.json").write_text(report_of(matmul=products).model_dump_json())
    assert run("lab", "join", str(tmp_path / "a.json"), str(tmp_path / "b.json"), "--json") == 0
    content = json.loads(capsys.readouterr().out)
    assert content["associativity"] and content["matmul"] and content["flips"] is None


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("lab", "associativity", "--html", "x.pdf"), 2, "ends in .html"),
        (("lab", "associativity", "--count", "3"), 2, "a power of two"),
        (("lab", "matmul", "--shape", "8x8"), 2, "3 whole numbers"),
        (("lab", "matmul", "--shape", "axbxc"), 2, "not a whole number"),
        (("lab", "matmul", "--batch", "one"), 2, "not a whole number"),
        (("lab", "layers", "--dtype", "float8"), 2, "float8"),
        (("lab", "flips", "--policy", "twice"), 2, "unknown policy"),
        (("lab", "flips", "--prompts", "nothing.txt"), 2, "cannot be read"),
        (("lab", "join", "nothing.json"), 1, "cannot be read"),
    ],
)
def test_wrong_usage_says_what_is_wrong(
    run: Run, arguments: tuple[str, ...], code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments) == code
    assert said in capsys.readouterr().err
