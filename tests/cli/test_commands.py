"""The command, called as a user calls it."""

import contextlib
import io
import json
import os
import pty
import signal
import sqlite3
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from rich.console import Console
from support import client, with_token

import stablegen
from stablegen import cli
from stablegen.console.lab.demo import render
from stablegen.lab import demo
from stablegen.lab.reports.demo import DemoReport
from stablegen.reports.cache import CacheReport

PROMPT = "Tell me about yourself.\nanswer : "


class Done(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def lines(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.out.splitlines()]


Run = Callable[..., Done]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run the command in this process, in an empty folder, with a cache of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("STABLEGEN_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments: str) -> Done:
        monkeypatch.setattr(sys, "argv", ["stablegen", *arguments])
        code = 0
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            try:
                cli.main()
            except SystemExit as stopped:
                code = int(stopped.code or 0)
        return Done(code, *capsys.readouterr())

    return call


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-c", "from stablegen.cli import main; main()", *arguments]


def test_generate_prints_the_answer_and_then_serves_it(run: Run) -> None:
    first, again = (run("generate", PROMPT, "--max-new-tokens", "8") for _ in range(2))
    assert first == again
    assert (first.code, first.err) == (0, "")
    assert "glad" in first.out


def test_json_has_what_the_issue_promises(run: Run) -> None:
    (miss,) = run("generate", PROMPT, "--max-new-tokens", "8", "--json").lines
    (hit,) = run("generate", PROMPT, "--max-new-tokens", "8", "--json").lines
    assert miss.keys() >= {
        *("prompt", "text", "token_ids", "cached", "key", "verdict", "policy", "numerics_digest", "score_hash")
    }
    assert miss["verdict"].keys() >= {"status", "probability", "step", "margin", "reason"}
    assert (miss["prompt"], miss["cached"], hit["cached"]) == (PROMPT, False, True)
    assert (miss["policy"], len(miss["token_ids"]), hit["verdict"]["status"]) == ("invariant", 8, "exact")
    assert {**miss, "cached": True} == hit


def test_prompts_come_from_files_and_pipes(run: Run, tmp_path: Path) -> None:
    (tmp_path / "plain.txt").write_text("One day\n\nTwo men\n")
    (tmp_path / "lines.jsonl").write_text('{"prompt": "One day", "id": 7}\n{"prompt": "a\\nb"}\n')
    common = ("--max-new-tokens", "3", "--json")
    plain = run("generate", "--file", "plain.txt", *common)
    lines = run("generate", "--file", "lines.jsonl", *common)
    assert [(line["line"], line["prompt"]) for line in plain.lines] == [(1, "One day"), (3, "Two men")]
    assert [(line["line"], line["prompt"]) for line in lines.lines] == [(1, "One day"), (2, "a\nb")]
    assert [line["cached"] for line in lines.lines] == [True, False]
    piped = subprocess.run(command("generate", *common), input=b"Two men\n", capture_output=True, check=True)
    assert json.loads(piped.stdout)["key"] == plain.lines[1]["key"]
    assert piped.stderr == b""


def test_a_broken_line_is_named_and_the_others_run(run: Run, tmp_path: Path) -> None:
    long = "word " * 2000
    (tmp_path / "in.jsonl").write_bytes(
        b'{"prompt": "One day"}\n{"prompt": 3}\n{"promp\n\xff\n'
        + json.dumps({"prompt": long}).encode()
        + b'\n{"prompt": ""}\n{"prompt": "Two men"}\n'
    )
    done = run("generate", "--file", "in.jsonl", "--max-new-tokens", "3", "--json")
    assert done.code == 1
    assert [line["line"] for line in done.lines] == [1, 2, 3, 4, 5, 6, 7]
    assert [line["line"] for line in done.lines if "error" in line] == [2, 3, 4, 5, 6]
    for number in (2, 3, 4, 5, 6):
        assert f"line {number}" in done.err
    assert "context is 1024" in done.err


@pytest.mark.slow
def test_what_cannot_be_shown_or_read_stops_nothing(tmp_path: Path) -> None:
    lines = b'{"prompt": "One day"}\n{"prompt": "\\ud800"}\n{"prompt":' + b"[" * 200_000 + b'\n{"prompt": "Two men"}\n'
    arguments = ("generate", "--max-new-tokens", "2", "--json", "--cache-dir", str(tmp_path / "cache"))
    done = subprocess.run(command(*arguments), input=lines, capture_output=True, check=False, cwd=tmp_path)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert [("error" in line, line["line"]) for line in found] == [(False, 1), (True, 2), (True, 3), (False, 4)]
    assert done.returncode == 1
    assert b"Traceback" not in done.stderr


def test_a_first_line_that_is_broken_does_not_make_text_of_the_rest(run: Run, tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_bytes(b'\xff{"prompt": "x"}\n{"prompt": "One day"}\n')
    done = run("generate", "--file", "in.txt", "--max-new-tokens", "2", "--json")
    assert [line["prompt"] for line in done.lines] == [None, "One day"]


def test_a_cache_is_not_emptied_without_a_yes(tmp_path: Path) -> None:
    arguments = command("cache", "clear", "--cache-dir", str(tmp_path / "cache"))
    done = subprocess.run(arguments, input="n\n", capture_output=True, text=True, check=False, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (1, "nothing was done\n")


def test_out_is_written_whole_or_not_at_all(run: Run, tmp_path: Path) -> None:
    arguments = ("generate", PROMPT, "--max-new-tokens", "3", "--json", "--out", "answers.jsonl")
    assert run(*arguments) == (0, "", "")
    before = (tmp_path / "answers.jsonl").read_text()
    assert json.loads(before)["prompt"] == PROMPT
    assert run(*arguments, "--policy", "nonsense").code == 2
    assert (tmp_path / "answers.jsonl").read_text() == before
    assert run("generate", PROMPT, "--out", "no/such/folder").code == 2


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("generate", "x", "--policy", "padded:0"), 2, "'padded:N'"),
        (("generate", "x", "--dtype", "float8"), 2, "bfloat16"),
        (("generate", "x", "--device", "cuda:77"), 2, "cuda:77"),
        (("generate", "x", "--max-new-tokens", "0"), 2, "max_new_tokens=0"),
        (("generate", "x", "--app", "nobody"), 2, "nobody"),
        (("generate", "x", "--on-risk", "panic"), 2, "panic"),
        (("generate", "x", "--no-such-option"), 2, "--no-such-option"),
        (("generate", "x", "--file", "y"), 2, "not both"),
        (("generate", "--file", "absent.txt"), 2, "absent.txt"),
        (("generate", "x", "--model", "./absent"), 1, "absent"),
        (("generate", ""), 1, "empty"),
        (("inspect", "0000"), 1, "cache export"),
        (("inspect", "0000", "--html", "page.txt"), 2, "ends in .html"),
        (("report", "--html", "absent/page.html"), 2, "no such folder"),
        (("cache", "clear", "--nonsense"), 2, "--nonsense"),
    ],
)
def test_exit_codes_and_what_is_said(run: Run, arguments: tuple[str, ...], code: int, said: str) -> None:
    done = run(*arguments)
    assert done.code == code
    assert said in done.err
    assert "Traceback" not in done.err


def test_a_flagged_hit_is_warned_of_listed_and_can_stop_the_run(run: Run) -> None:
    arguments = ("generate", PROMPT, "--max-new-tokens", "40", "--json")
    run(*arguments, "--dtype", "bfloat16")
    warned = run(*arguments)
    assert warned.code == 0
    assert warned.err.startswith("margin warning: ")
    assert warned.lines[0]["verdict"]["status"] == "at_risk"
    raised = run(*arguments, "--on-risk", "raise")
    assert (raised.code, raised.lines[0].keys() >= {"prompt", "error"}) == (1, True)
    (listed,) = run("warnings", "--json").lines
    verdict = warned.lines[0]["verdict"]
    assert (listed["key"], listed["prompt"]) == (warned.lines[0]["key"], PROMPT)
    assert listed["verdict"]["step"] == verdict["step"]
    assert listed["token"] != listed["runner_up"]
    assert (listed["recorded"].split()[1], listed["current"].split()[1]) == ("bfloat16", "float32")
    table = run("warnings").out
    assert all(part in table for part in ("at_risk", "bfloat16", listed["key"][:12], str(verdict["step"])))
    recomputed = run(*arguments, "--on-risk", "verify")
    assert recomputed.lines[0]["verdict"]["basis"] == "verified"
    assert run(*arguments).lines[0]["verdict"]["status"] == "exact"


def test_inspect_marks_the_fragile_steps(run: Run) -> None:
    (line,) = run("generate", PROMPT, "--max-new-tokens", "40", "--json", "--dtype", "bfloat16").lines
    shown = run("inspect", line["key"][:8])
    assert shown.code == 0
    assert all(word in shown.out for word in ("runner-up", "margin", "p(flip)", "at_risk", line["key"]))
    assert shown.out.count("fragile") >= 1
    assert "fragile" not in run("inspect", line["key"], "--dtype", "bfloat16", "--json").out
    content = json.loads(run("inspect", line["key"], "--json").out)
    assert len(content["trace"]["margins"]) == 40
    assert content["numerics_digest"] == line["numerics_digest"]


def test_inspect_verifies_and_shows_both_continuations(run: Run, tmp_path: Path) -> None:
    with client(tmp_path / "cache", policy="invariant") as asking:
        right = asking.complete(PROMPT, max_new_tokens=8).record
        asking.cache.put([with_token(right, 3, 7)])
    done = run("inspect", right.key, "--verify", "--html", "page.html")
    assert done.code == 0
    assert "diverges  at step 3, verified" in done.out
    assert "A fresh run diverges at step 3" in (tmp_path / "page.html").read_text(encoding="utf-8")
    later = json.loads(run("inspect", right.key, "--json").out)
    (noted,) = later["divergences"]
    assert (noted["source"], noted["step"], noted["newer"]) == ("flagged", 3, [right.token_ids[3]])
    assert later["verification"] is None


def test_report_looks_the_cache_over(run: Run, tmp_path: Path) -> None:
    assert run("report").out.startswith("0 answers in")
    run("generate", PROMPT, "--max-new-tokens", "40", "--dtype", "bfloat16")
    done = run("report", "--html", "page.html")
    assert done.code == 0
    assert all(part in done.out for part in ("1 at risk", "padded:8", "most fragile", "native"))
    assert "1 cached answer" in (tmp_path / "page.html").read_text(encoding="utf-8")
    content = CacheReport.model_validate_json(run("report", "--json").out)
    assert (content.records, content.answers[0].verdict.status) == (1, "at_risk")


def test_the_cache_is_counted_explained_exported_and_emptied(run: Run, tmp_path: Path) -> None:
    assert "empty" in run("cache", "why", PROMPT).out
    run("generate", PROMPT, "One day", "--max-new-tokens", "3")
    assert run("cache", "path").out.strip() == str(tmp_path / "cache")
    assert json.loads(run("cache", "stats", "--json").out)["records"] == 2
    assert run("cache", "why", "One day", "--max-new-tokens", "3").out.startswith("a hit")
    budget = run("cache", "why", "One day", "--max-new-tokens", "4").out
    assert "max_new_tokens differs" in budget
    assert "prompt differs" not in budget
    other = run("cache", "why", "One night", "--max-new-tokens", "3").out
    assert "prompt differs" in other
    assert "'One day'" in other
    exported = run("cache", "export").lines
    assert [record["prompt"] for record in exported] == [PROMPT, "One day"]
    assert exported[0]["numerics"]["policy"] == "invariant"
    assert run("cache", "clear", "--yes").out.startswith("2 records removed")
    assert json.loads(run("cache", "stats", "--json").out)["records"] == 0


def test_config_show_says_where_each_value_comes_from(run: Run, tmp_path: Path) -> None:
    (tmp_path / "stablegen.toml").write_text('[defaults]\ndtype = "bfloat16"\n[apps.chat]\non_risk = "serve"\n')
    shown = run("config", "show", "--app", "chat").out
    assert f"bfloat16                  [defaults] in {tmp_path / 'stablegen.toml'}" in shown
    assert f"serve                     [apps.chat] in {tmp_path / 'stablegen.toml'}" in shown
    assert "environment STABLEGEN_CACHE_DIR" in shown
    content = json.loads(run("config", "show", "--json").out)
    assert content["policy"] == {"value": "by the model", "origin": "built-in"}
    (tmp_path / "stablegen.toml").write_text('[defaults]\ndtipe = "bfloat16"\n')
    broken = run("config", "show")
    assert broken.code == 2
    assert all(part in broken.err for part in ("stablegen.toml", "dtipe", "dtype"))


@pytest.mark.slow
def test_doctor_measures_and_says_what_holds(run: Run) -> None:
    done = run("doctor")
    assert done.code == 0
    assert "kept: invariant float32" in done.out
    assert "prefill against decode: equal" in done.out


@pytest.mark.slow
def test_doctor_says_why_a_promise_is_broken(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from stablegen.kernels.reference import ReferenceKernels

    honest = ReferenceKernels.linear

    def batch_dependent(self: ReferenceKernels, x: Any, layer: Any, **options: Any) -> Any:
        return honest(self, x, layer, **options) * (1.0 + 1e-6 * (len(x) % 7))

    monkeypatch.setattr(ReferenceKernels, "linear", batch_dependent)
    done = run("doctor")
    assert done.code == 1
    assert "BROKEN: invariant float32" in done.out
    assert "score rows differ" in done.out
    (answer,) = run("generate", PROMPT, "--max-new-tokens", "3", "--json").lines
    assert answer["verdict"]["status"] != "exact"


@pytest.mark.slow
def test_the_demo_reports_what_it_measured(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "PROMPTS", demo.PROMPTS[:2])
    monkeypatch.setattr(demo, "NEIGHBOURS", demo.NEIGHBOURS[1:3])
    monkeypatch.setattr(demo, "STEPS", 4)
    monkeypatch.setattr(demo, "LONG", 12)
    (report,) = run("demo", "--json").lines
    by_policy = {(m["policy"], m["dtype"]): m for m in report["measured"]}
    assert len(by_policy) == 8
    assert by_policy["native", "float32"]["moved"] + by_policy["native", "bfloat16"]["moved"] > 0
    for (policy, _), measured in by_policy.items():
        assert measured["rows"] > 0
        if policy != "native":
            assert (measured["moved"], measured["largest"], measured["flips"]) == (0, 0.0, [])
    assert [judged["cached"] for judged in report["judged"][:2]] == [False, True]
    assert {judged["verdict"]["status"] for judged in report["judged"][:2]} == {"exact"}
    assert {judged["verdict"]["status"] for judged in report["judged"][2:]} <= {"stable", "at_risk"}
    console = Console(record=True, width=160, file=io.StringIO())
    render(DemoReport.model_validate(report), console)
    shown = console.export_text()
    assert "not one bit" in shown
    assert ("no token flipped" in shown) == (not any(m["flips"] for m in report["measured"]))


def test_help_loads_neither_torch_nor_transformers() -> None:
    code = "import sys\nfrom stablegen.cli import main\ntry:\n    main()\nexcept SystemExit:\n    pass\n"
    code += "assert not {'torch', 'transformers', 'triton'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, "--help"], capture_output=True, text=True, check=True)
    assert "generate" in done.stdout


@pytest.mark.slow
def test_a_terminal_gets_a_progress_bar(tmp_path: Path) -> None:
    master, slave = pty.openpty()
    arguments = command("generate", "One day", "--max-new-tokens", "3", "--cache-dir", str(tmp_path))
    environ = {**os.environ, "TERM": "xterm"}
    with subprocess.Popen(arguments, stderr=slave, stdout=subprocess.DEVNULL, env=environ) as process:
        os.close(slave)
        shown = b""
        with contextlib.suppress(OSError):  # a terminal whose other end is closed
            while part := os.read(master, 4096):
                shown += part
        assert process.wait(timeout=60) == 0
    os.close(master)
    assert b"answers" in shown


@pytest.mark.slow
def test_an_interrupt_loses_nothing_and_a_rerun_continues(tmp_path: Path) -> None:
    (tmp_path / "in.txt").write_text("".join(f"Story number {n}:\n" for n in range(600)))
    arguments: tuple[str, ...] = (
        "generate",
        "--file",
        str(tmp_path / "in.txt"),
        "--max-new-tokens",
        "60",
        "--policy",
        "single",
    )
    arguments += ("--cache-dir", str(tmp_path / "cache"), "--json")
    process = subprocess.Popen(command(*arguments), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while _stored(tmp_path / "cache") < 3:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert b"finished answer" in said
    kept = _stored(tmp_path / "cache")
    assert 3 <= kept < 600
    with stablegen.Client.from_pretrained(policy="single", cache_dir=tmp_path / "cache") as client:
        prompts = [f"Story number {n}:" for n in range(kept + 1)]
        again = client.complete(prompts, max_new_tokens=60)
    assert [completion.cached for completion in again] == [True] * kept + [False]


def _stored(folder: Path) -> int:
    try:
        with sqlite3.connect(f"file:{folder / 'cache.db'}?mode=ro", uri=True) as database:
            return int(database.execute("SELECT COUNT(*) FROM Cache WHERE key LIKE 'record/%'").fetchone()[0])
    except sqlite3.OperationalError:
        return 0
