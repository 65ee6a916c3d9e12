"""The command: parses, calls, prints; nothing else. Exit codes: 0 done, 1 a request failed, 2 wrong usage."""

from __future__ import annotations

import contextlib
import io
import json
import os
import signal
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from stablegen.errors import (
    ConfigError,
    DeviceError,
    DeviceMemoryError,
    InvalidRequestError,
    MarginWarning,
    ParameterError,
    PolicyError,
    StablegenError,
    UnsupportedParameterError,
)

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from stablegen.client import Client
    from stablegen.lab.bench import Report
    from stablegen.lab.report import LabReport
    from stablegen.record import Completion
    from stablegen.store.base import Store

app = typer.Typer(
    name="stablegen",
    help="A cached LLM generation client with a determinism guard.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
cache_app = typer.Typer(help="Look at the cache, explain a miss, empty it, export it.", no_args_is_help=True)
config_app = typer.Typer(help="Show the settings in force.", no_args_is_help=True)
lab_app = typer.Typer(help="See batch variance on this machine: four experiments.", no_args_is_help=True)
app.add_typer(cache_app, name="cache")
app.add_typer(config_app, name="config")
app.add_typer(lab_app, name="lab")

INTERRUPTED = 130
USAGE_ERRORS = (ConfigError, PolicyError, ParameterError, UnsupportedParameterError, DeviceError)


class OnRiskChoice(StrEnum):
    """What happens to a flagged hit."""

    serve = "serve"
    warn = "warn"
    verify = "verify"
    recompute = "recompute"
    raise_ = "raise"


MaxNewTokens = Annotated[int, typer.Option(help="Tokens to generate at most.")]
Seed = Annotated[int | None, typer.Option(help="Sample, by this seed; without one decoding is greedy.")]
SampleIndex = Annotated[int | None, typer.Option(help="Which of a seed's samples.")]
Temperature = Annotated[float | None, typer.Option(help="What scores are divided by before one samples.")]
TopK = Annotated[int | None, typer.Option(help="Sample from so many tokens.")]
TopP = Annotated[float | None, typer.Option(help="Sample from the tokens that make up this share.")]
Stop = Annotated[list[str] | None, typer.Option(help="A text that ends the answer; may be given again.")]
Model = Annotated[str | None, typer.Option(help="Hub name or local directory; the embedded tiny-gpt2 if none.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")]
Policy = Annotated[str | None, typer.Option(help="single, padded:N, invariant, or native (the control).")]
Dtype = Annotated[str | None, typer.Option(help="float32, float16 or bfloat16.")]
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N.")]
App = Annotated[str | None, typer.Option("--app", help="The app whose settings hold.")]
CacheDir = Annotated[Path | None, typer.Option(help="Folder of the cache.")]
PageFile = Annotated[Path | None, typer.Option("--html", help="Write it as a page to this .html file as well.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, one object a line.")]


def main() -> NoReturn:
    """Run the command and leave with its exit code."""
    warnings.showwarning = _show_warning
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what is finished is kept, as after Ctrl-C
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a terminal or pipe that cannot show a character
    try:
        code = app(standalone_mode=False)
    except StablegenError as error:
        code = _report(error)
    except KeyboardInterrupt:
        code = INTERRUPTED
    except typer.Abort:
        _say("nothing was done")
        code = 1
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        # click's usage errors: wrong option, missing argument
        _say(f"error: {error.format_message()}\nTry 'stablegen --help'.")
        code = 2
    if code == INTERRUPTED:
        _say("stopped; every finished answer is in the cache, and the same command continues")
    sys.exit(code if isinstance(code, int) else 0)


# -- generate ------------------------------------------------------------------------------------------------------


@app.command()
def generate(
    prompts: Annotated[list[str] | None, typer.Argument(help="Prompts; none: --file or standard input.")] = None,
    file: Annotated[Path | None, typer.Option(help='JSON lines {"prompt": ...} or plain text lines.')] = None,
    model: Model = None,
    revision: Revision = None,
    policy: Policy = None,
    dtype: Dtype = None,
    device: Device = None,
    app_name: App = None,
    max_new_tokens: MaxNewTokens = 64,
    seed: Seed = None,
    sample_index: SampleIndex = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    stop: Stop = None,
    on_risk: Annotated[OnRiskChoice | None, typer.Option(help="What happens to a flagged hit.")] = None,
    cache_dir: CacheDir = None,
    out: Annotated[Path | None, typer.Option(help="Write the answers to this file instead.")] = None,
    as_json: AsJson = False,
) -> None:
    """Complete prompts, from the cache where it holds them."""
    from stablegen.client import Client
    from stablegen.prompts import PromptLine

    lines = _input(prompts, file)
    asked = _asked(max_new_tokens, seed, sample_index, temperature, top_k, top_p, stop)
    with (
        _output(out) as write,
        Client.from_pretrained(
            model,
            revision=revision,
            policy=policy,
            dtype=dtype,
            device=device,
            cache_dir=cache_dir,
            on_risk=None if on_risk is None else on_risk.value,
            app=app_name,
        ) as client,
    ):
        failed: dict[PromptLine, StablegenError] = {line: line.error for line in lines if line.error is not None}
        keys: dict[PromptLine, str] = {}
        requests = []
        for line in lines:
            if line.prompt is None:
                continue
            try:
                request = client.request(line.prompt, **asked)
            except (ParameterError, UnsupportedParameterError):
                raise
            except InvalidRequestError as error:
                failed[line] = error
            else:
                keys[line] = request.key
                requests.append(request)
        answers: dict[str, Completion] = {}
        stopped: StablegenError | None = None
        try:
            with _progress("answers") as progress:
                completions = client.run(requests, progress=progress)
        except StablegenError as error:
            completions, stopped = list(error.completions), error
        answers = {completion.key: completion for completion in completions}
        for line in lines:
            answer = answers.get(keys.get(line, ""))
            reason = failed.get(line) or (stopped if answer is None else None)
            write(_line(client, line, answer, reason, as_json=as_json, alone=len(lines) == 1))
    for line, problem in failed.items():
        _say(f"error: {'' if line.error else f'line {line.number}: ' if line.number else ''}{problem}")
    if stopped is not None:
        raise stopped
    if failed:
        raise typer.Exit(1)


def _asked(
    max_new_tokens: int,
    seed: int | None,
    sample_index: int | None,
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    stop: list[str] | None,
) -> dict[str, Any]:
    """Return the parameters of a request; a seed means sampling."""
    sampled = {"sample_index": sample_index, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    if seed is not None:
        sampled |= {"do_sample": True, "seed": seed}
    given = {name: value for name, value in sampled.items() if value is not None}
    if given and seed is None:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in given)
        raise ParameterError(f"{names} without --seed", accepted="them beside --seed, which means sampling")
    return {"max_new_tokens": max_new_tokens, "stop_strings": stop or None, **given}


def _input(prompts: list[str] | None, file: Path | None) -> list[Any]:
    from stablegen.prompts import PromptLine, read_prompts

    if prompts and file:
        raise typer.BadParameter("give prompts or --file, not both")
    if prompts:
        return [PromptLine(0, prompt) for prompt in prompts]
    if file is not None:
        try:
            with file.open("rb") as stream:
                lines = read_prompts(stream, str(file))
        except OSError as error:
            raise typer.BadParameter(f"{file} cannot be read: {error.strerror}") from error
    elif sys.stdin.isatty():
        raise typer.BadParameter("no prompt: give prompts, --file or standard input")
    else:
        lines = read_prompts(sys.stdin.buffer, "standard input")
    if not lines:
        raise typer.BadParameter("the input holds no prompt")
    return lines


@contextmanager
def _output(out: Path | None) -> Iterator[Callable[[str], None]]:
    if out is None:
        yield lambda text: print(text, flush=True)
        return
    draft = out.with_name(f".{out.name}.{os.getpid()}")
    try:
        stream = draft.open("w", encoding="utf-8", errors="backslashreplace")
    except OSError as error:
        raise typer.BadParameter(f"{out} cannot be written: {error.strerror}") from error
    try:
        with stream:
            yield lambda text: print(text, file=stream)
        draft.replace(out)
    finally:
        draft.unlink(missing_ok=True)


def _line(
    client: Client,
    line: Any,
    answer: Completion | None,
    error: StablegenError | None,
    *,
    as_json: bool,
    alone: bool,
) -> str:
    if as_json:
        content = {"prompt": line.prompt, "error": str(error)} if answer is None else completion_json(client, answer)
        # a generate() call knows no text; the line does
        content["prompt"] = line.prompt
        return json.dumps(content | ({"line": line.number} if line.number else {}), ensure_ascii=False)
    text = f"[failed] {error}" if answer is None else answer.text
    return text if alone else f"> {line.prompt}\n{text}\n"


def completion_json(client: Client, completion: Completion) -> dict[str, Any]:
    """Return what ``--json`` prints of a completion."""
    verdict = completion.verdict
    return {
        "prompt": completion.record.request.prompt,
        "text": completion.text,
        "token_ids": completion.token_ids,
        "finish_reason": completion.record.finish_reason,
        "cached": completion.cached,
        "key": completion.key,
        "verdict": verdict.model_dump(mode="json"),
        "policy": completion.record.numerics.policy,
        "numerics_digest": completion.record.numerics.digest,
        "current_numerics_digest": client.numerics_for(completion.record.request).digest,
        "score_hash": None if completion.trace is None else completion.trace.digest(),
    }


# -- looking -------------------------------------------------------------------------------------------------------


@app.command()
def inspect(
    key: Annotated[str, typer.Argument(help="A completion's key, or its first digits.")],
    model: Model = None,
    revision: Revision = None,
    policy: Policy = None,
    dtype: Dtype = None,
    device: Device = None,
    app_name: App = None,
    cache_dir: CacheDir = None,
    verify: Annotated[bool, typer.Option("--verify", help="Load the model, and hold it against a fresh run.")] = False,
    html: PageFile = None,
    as_json: AsJson = False,
) -> None:
    """Show a stored answer step by step: token, runner-up, margin, probability of a flip.

    Where another run's answer is known to part from it, both are shown.
    """
    from stablegen.inspection import inspect as look
    from stablegen.inspection import render

    if html is not None:
        from stablegen.pages.render import check_page

        check_page(html)
    with _client(model, policy, dtype, device, app_name, cache_dir, revision=revision) as client:
        record = client.inspect(client.find_key(key))
        seen = look(client, record, client.verify(record) if verify else None)
    if html is not None:
        from stablegen.pages.answer import write_answer

        write_answer(seen, html)
    if as_json:
        known = seen.model_dump(mode="json", include={"verdict", "verification", "partings"})
        print(json.dumps(record.to_dict() | known, ensure_ascii=False))
    else:
        render(seen, _console())


@app.command(name="warnings")
def show_warnings(app_name: App = None, cache_dir: CacheDir = None, as_json: AsJson = False) -> None:
    """List the hits that were flagged."""
    with _store(app_name, cache_dir) as store:
        hits = [hit for hit in store.flagged() if app_name is None or hit.app == app_name]
    if as_json:
        for hit in hits:
            print(hit.model_dump_json())
        return
    if not hits:
        print("no hit was flagged")
        return
    table = _table(
        "app", "key", "prompt", "verdict", "step", "token", "runner-up", "margin", "p", "recorded -> current"
    )
    for hit in hits:
        verdict = hit.verdict
        table.add_row(
            hit.app or "",
            hit.key[:12],
            f"{hit.prompt!r:.40}",
            verdict.status,
            _optional(verdict.step, "d"),
            "" if hit.token is None else repr(hit.token),
            "" if hit.runner_up is None else repr(hit.runner_up),
            _optional(verdict.margin, ".4g"),
            _optional(verdict.probability, ".3g"),
            f"{hit.recorded} -> {hit.current}",
        )
    _console().print(table)


@cache_app.command()
def stats(app_name: App = None, cache_dir: CacheDir = None, as_json: AsJson = False) -> None:
    """Print how many records the cache holds and how large it is."""
    from dataclasses import asdict

    with _store(app_name, cache_dir) as store:
        content = {"path": str(store.path), **asdict(store.stats())}
    if as_json:
        print(json.dumps(content))
        return
    for name, value in content.items():
        print(f"{name:>13}  {'none: nothing is ever evicted' if value is None else value}")


@cache_app.command()
def path(app_name: App = None, cache_dir: CacheDir = None) -> None:
    """Print the folder of the cache."""
    with _store(app_name, cache_dir) as store:
        print(store.path)


@cache_app.command()
def why(
    prompt: Annotated[str, typer.Argument(help="The prompt that missed.")],
    model: Model = None,
    revision: Revision = None,
    max_new_tokens: MaxNewTokens = 64,
    seed: Seed = None,
    sample_index: SampleIndex = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    stop: Stop = None,
    app_name: App = None,
    cache_dir: CacheDir = None,
) -> None:
    """Explain a miss: the nearest stored request, and the parts of the key that differ."""
    from stablegen.why import explain_miss

    with _client(model, None, None, None, app_name, cache_dir, revision=revision) as client:
        asked = _asked(max_new_tokens, seed, sample_index, temperature, top_k, top_p, stop)
        request = client.request(prompt, **asked)
        if client.store.get(request.key) is not None:
            print(f"a hit: the cache holds an answer under {request.key}")
            return
        found = explain_miss(request, client.store.records())
    if found is None:
        print("a miss: the cache is empty")
        return
    print(f"a miss: no record under {request.key}\nnearest stored request: {found.nearest.key}")
    for name, (asked, stored) in found.differences.items():
        print(f"  {name} differs\n    asked   {asked!r}\n    stored  {stored!r}")


@cache_app.command()
def clear(
    app_name: App = None,
    cache_dir: CacheDir = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Remove every record, flagged hit, self-check, calibration and audit."""
    with _store(app_name, cache_dir) as store:
        if not yes:
            typer.confirm(f"Remove {store.stats().records} records from {store.path}?", abort=True)
        print(f"{store.clear()} records removed from {store.path}")


@cache_app.command()
def export(
    app_name: App = None,
    cache_dir: CacheDir = None,
    out: Annotated[Path | None, typer.Option(help="Write to this file instead.")] = None,
) -> None:
    """Print every record as JSON, one a line."""
    with _store(app_name, cache_dir) as store, _output(out) as write:
        for record in store.records():
            write(json.dumps(record.to_dict(), ensure_ascii=False))


@config_app.command()
def show(app_name: App = None, as_json: AsJson = False) -> None:
    """Print each setting in force and where it came from."""
    from stablegen.client import cache_path
    from stablegen.config import load_settings

    effective = load_settings(app_name)
    values = effective.settings.model_dump(mode="json")
    values["model"] = values["model"] or "tiny-gpt2"
    values["cache_dir"] = str(cache_path(effective.settings.cache_dir))
    if as_json:
        print(json.dumps({name: {"value": value, "origin": effective.origins[name]} for name, value in values.items()}))
        return
    for name, value in values.items():
        print(f"{name:>13}  {value!s:<24}  {effective.origins[name]}")


@app.command()
def calibrate(
    model: Model = None,
    revision: Revision = None,
    dtype: Dtype = None,
    source: Annotated[
        str | None,
        typer.Option(
            "--from",
            help="POLICY/DTYPE whose answers are scored again, native in the dtype of --to if none; or 'cache': "
            "the answers that it holds, of whatever numerics.",
        ),
    ] = None,
    target: Annotated[
        str | None, typer.Option("--to", help="POLICY/DTYPE that scores them; what the settings say if none.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="File of prompts, JSON lines or text lines; a built-in set if none.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens of each answer.")] = 64,
    device: Device = None,
    app_name: App = None,
    cache_dir: CacheDir = None,
    as_json: AsJson = False,
) -> None:
    """Measure how far margins move between two numerics, for the guard to judge hits by."""
    import tempfile

    from stablegen.prompts import SAMPLE

    asked = list(SAMPLE) if prompts is None else [_text(line) for line in _input(None, prompts)]
    policy, dtype = _pair("--to", target, None, dtype)
    with contextlib.ExitStack() as stack:
        scoring = _client(model, policy, dtype, device, app_name, cache_dir, revision=revision)
        stack.enter_context(scoring)
        with _progress("answers") as progress:
            if source == "cache":
                mine = [record for record in scoring.store.records() if scoring.answers_for(record)]
                found = scoring.calibrate(mine, progress=progress)
            else:
                policy, dtype = _pair("--from", source, "native", scoring.numerics.dtype)
                folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="stablegen-")))
                answering = _client(model, policy, dtype, device, app_name, folder, revision=revision)
                stack.enter_context(answering)
                found = scoring.calibrate_from(answering, asked, max_new_tokens=max_new_tokens, progress=progress)
    for one in found:
        if as_json:
            print(one.model_dump_json())
            continue
        print(f"{one.model.name}: {one.recorded.summary()} -> {one.current.summary()}")
        print(f"    {one.basis}: {one.flips} steps flipped, {one.tie_flips} of {one.ties} ties")
        for share in (0.5, 0.99):
            print(f"    {share:.0%} of margins moved by at most {one.quantile(share):.3g} at a score of 16")
        print(f"    beyond {one.tail_from * 2 ** (4 * one.power):.3g} extrapolated, tail shape {one.tail_shape:.2f}")


def _pair(option: str, given: str | None, policy: str | None, dtype: str | None) -> tuple[str | None, str | None]:
    """Return the policy and the dtype of POLICY/DTYPE; of either alone the other stays as it is."""
    if given is None:
        return policy, dtype
    parts = given.split("/")
    if len(parts) > 2 or not parts[0]:
        raise typer.BadParameter(f"{option} {given!r} is not POLICY/DTYPE, such as native/bfloat16")
    return parts[0], parts[1] if len(parts) == 2 else dtype


def _text(line: Any) -> str:
    if line.error is not None:
        raise line.error
    return str(line.prompt)


@app.command()
def audit(
    model: Model = None,
    revision: Revision = None,
    policy: Policy = None,
    dtype: Dtype = None,
    device: Device = None,
    app_name: App = None,
    sample: Annotated[int | None, typer.Option(help="Cached answers to audit, chosen at random; all if none.")] = None,
    seed: Annotated[int, typer.Option(help="Chooses the sample.")] = 0,
    cache_dir: CacheDir = None,
    out: Annotated[Path | None, typer.Option(help="Write the JSON to this file as well.")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw predicted against observed into this .png, .svg or .pdf.")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Generate cached answers anew from scratch, and hold the guard's verdicts against what comes of it.

    Ends with 1 where an answer called exact was not. No record is changed; what was found is kept for `report`.
    """
    from stablegen.audit import audit as run
    from stablegen.audit import keep, render
    from stablegen.lab.plot import check_plot, draw_reliability

    if sample is not None and sample < 1:
        raise typer.BadParameter(f"--sample {sample} is not a positive number")
    if plot is not None:
        check_plot(plot)
    with _client(model, policy, dtype, device, app_name, cache_dir, revision=revision) as client:
        with contextlib.nullcontext() if out is None else _output(out) as write, _progress("answers") as progress:
            report = run(client, sample=sample, seed=seed, progress=progress)
            if write is not None:
                write(report.model_dump_json(indent=1))
        try:
            keep(report, client)
        finally:  # a full disk, or a pipe that closes, costs one of the two and not both
            if as_json:
                print(report.model_dump_json())
            else:
                render(report, _console())
            if plot is not None:
                draw_reliability(report, plot)
    if report.broken:
        raise typer.Exit(1)


@app.command()
def report(
    model: Model = None,
    revision: Revision = None,
    policy: Policy = None,
    dtype: Dtype = None,
    device: Device = None,
    app_name: App = None,
    cache_dir: CacheDir = None,
    html: PageFile = None,
    as_json: AsJson = False,
) -> None:
    """Look the whole cache over: verdicts, margins, the most fragile answers, and what each policy would do."""
    from stablegen.overview import render, survey

    if html is not None:
        from stablegen.pages.render import check_page

        check_page(html)
    made = _client(model, policy, dtype, device, app_name, cache_dir, revision=revision)
    with made as client, _progress("answers") as progress:
        found = survey(client, progress=progress)
    if html is not None:
        from stablegen.pages.cache import write_cache

        write_cache(found, html)
    if as_json:
        print(found.model_dump_json())
    else:
        render(found, _console())


@app.command()
def doctor(
    model: Model = None,
    revision: Revision = None,
    policy: Policy = None,
    dtype: Dtype = None,
    device: Device = None,
    app_name: App = None,
    cache_dir: CacheDir = None,
) -> None:
    """Load the model, measure whether the policy keeps its promise here, and show every check kept so far."""
    import stablegen

    with _client(model, policy, dtype, device, app_name, cache_dir, revision=revision) as client:
        print(f"stablegen {stablegen.__version__}, cache {client.store.path}")
        for name, value in client.numerics.model_dump(exclude_none=True).items():
            print(f"{name:>24}  {value}")
        now = client.self_check()
        for check in client.store.checks():
            shape = "" if check.width is None else f", width {check.width}"
            shape += "" if check.capacity is None else f", capacity {check.capacity}"
            print(f"{'kept' if check.passed else 'BROKEN'}: {check.numerics.summary()}{shape}")
            for name, result in check.checks.items():
                print(f"    {name}: {result}")
            if check.passed and check.width is not None and not check.slot_free:
                print("    so each request stands in slot 0 of a batch of its own")
        if not client.policy.promises:
            print(f"policy {client.policy} promises nothing; hits under it are judged by their margins")
        elif not now.passed:
            print(f"policy {client.policy} does not keep its promise here: no hit under it is judged exact")
            raise typer.Exit(1)


@app.command()
def demo(as_json: AsJson = False) -> None:
    """Show batch variance, the policies that end it, and the verdicts, measured here and now (under a minute)."""
    from stablegen.lab.demo import measure, render

    with _progress("measurements") as progress:
        report = measure(progress)
    if as_json:
        print(report.model_dump_json())
    else:
        render(report, _console())


@app.command()
def bench(
    model: Annotated[
        str | None,
        typer.Option(help="Hub name, local directory or tiny-gpt2; none: tiny-gpt2 on a CPU, as --random on a GPU."),
    ] = None,
    revision: Revision = None,
    random_weights: Annotated[
        bool, typer.Option("--random", help="GPT-2 small's shape with random weights; nothing is downloaded.")
    ] = False,
    dtype: Annotated[
        list[str] | None, typer.Option(help="float32, float16 or bfloat16; repeat it, or separate by commas.")
    ] = None,
    batch: Annotated[list[str] | None, typer.Option(help="Batch sizes; repeat it, or separate by commas.")] = None,
    prompt: Annotated[int | None, typer.Option(help="Tokens of each prompt.")] = None,
    tokens: Annotated[int | None, typer.Option(help="New tokens of each call.")] = None,
    repeats: Annotated[int | None, typer.Option(help="Measured runs of each arm; 5 if none.")] = None,
    arms: Annotated[
        list[str] | None,
        typer.Option(
            help="invariant, vendor, single, padded, eager, static, batch_invariant_ops; all if none, single and "
            "static at batch 1 alone unless they are named."
        ),
    ] = None,
    prefill: Annotated[str | None, typer.Option(help="PROMPTSxTOKENS of the prefill measured; 0: none.")] = None,
    golden: Annotated[int | None, typer.Option(help="Prompts of the golden set measured; 0: none.")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")] = "auto",
    plot: Annotated[Path | None, typer.Option(help="Draw the step times into this .png, .svg or .pdf.")] = None,
    out: Annotated[Path | None, typer.Option(help="Write the JSON to this file as well, after each table.")] = None,
    as_json: AsJson = False,
) -> None:
    """Measure here what each policy costs against transformers and against the memory's speed.

    What is not given suits the device: on a GPU float32 and a 16-bit dtype, batches 1, 8, 32, 64, 256, prompts of 32
    tokens and 128 new ones, a prefill of 16x512 and a golden set of 1000; on a CPU a small part of that.
    """
    from stablegen.lab.plot import check_plot, draw

    sizes = _whole("--batch", batch)
    if plot is not None:
        check_plot(plot)
    from stablegen.lab.bench import Options, measure, render

    def save(report: Report) -> None:
        with _output(out) as write:
            write(report.model_dump_json(indent=1))

    options = Options(
        model=model,
        revision=revision,
        random_weights=random_weights,
        dtypes=_listed(dtype),
        batches=sizes,
        prompt=prompt,
        tokens=tokens,
        repeats=repeats,
        arms=_listed(arms),
        prefill=prefill,
        golden=golden,
        device=device,
    )
    with _progress("runs") as progress:
        report = measure(options, progress, keep=None if out is None else save)
    if out is not None:
        save(report)
    if as_json:
        print(report.model_dump_json())
    else:
        render(report, _console())
    if plot is not None:
        draw(report, plot)
    if report.cells and all(cell.problem is not None for cell in report.cells):
        raise typer.Exit(1)


# -- lab -----------------------------------------------------------------------------------------------------------


DeviceName = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Dtypes = Annotated[
    list[str] | None, typer.Option("--dtype", help="float32, float16 or bfloat16; repeat it, or separate by commas.")
]
NumberSeed = Annotated[int, typer.Option(help="Draws the numbers.")]
PromptFile = Annotated[Path | None, typer.Option(help="File of prompts, JSON lines or text lines; its own if none.")]
PromptCount = Annotated[
    int | None, typer.Option("--count", help="Prompts from the beginning; of its own all 103 on a GPU, 24 on a CPU.")
]
FlipTokens = Annotated[int, typer.Option("--tokens", help="Tokens of an answer at most.")]


@lab_app.command()
def associativity(
    count: Annotated[int, typer.Option(help="Random numbers of the sum, a power of two.")] = 4096,
    seed: NumberSeed = 0,
    device: DeviceName = "auto",
    html: PageFile = None,
    as_json: AsJson = False,
) -> None:
    """Add up the same numbers in several orders, and see several results."""
    with _experiment("associativity", html, as_json=as_json) as (progress, show):
        from stablegen.lab.associativity import measure

        show(measure(device=device, count=count, seed=seed, progress=progress("dtypes")))


@lab_app.command()
def matmul(
    shape: Annotated[str, typer.Option(help="MxNxK of the product.")] = "512x512x512",
    batch: Annotated[list[str] | None, typer.Option(help="Matrices; 1-10, 100, 1000 if none.")] = None,
    rows: Annotated[list[str] | None, typer.Option(help="Rows beside row 0; 1 to 512 if none.")] = None,
    precision: Annotated[list[str] | None, typer.Option(help="float32, tf32, float16, bfloat16; all if none.")] = None,
    search: Annotated[bool, typer.Option(help="Look for shapes whose product moves.")] = True,
    seed: NumberSeed = 0,
    device: DeviceName = "auto",
    html: PageFile = None,
    as_json: AsJson = False,
) -> None:
    """Multiply two matrices alone and in company, by the vendor's libraries and by stablegen's kernels."""
    given: dict[str, Any] = {"batches": _whole("--batch", batch), "rows": _whole("--rows", rows)}
    given |= {"precisions": _listed(precision), "shape": _whole("--shape", shape.split("x"))}
    with _experiment("matmul", html, as_json=as_json) as (progress, show):
        from stablegen.lab.matmul import measure

        chosen = {name: value for name, value in given.items() if value}
        show(measure(**chosen, search=search, device=device, seed=seed, progress=progress("products")))


@lab_app.command()
def layers(
    model: Model = None,
    revision: Revision = None,
    random_weights: Annotated[bool, typer.Option("--random", help="GPT-2 small's shape, random weights.")] = False,
    dtype: Dtypes = None,
    batch: Annotated[list[str] | None, typer.Option(help="Batch sizes; 2 to 64 if none.")] = None,
    length: Annotated[int, typer.Option(help="Tokens of the sequence.")] = 32,
    seed: NumberSeed = 0,
    device: DeviceName = "auto",
    html: PageFile = None,
    as_json: AsJson = False,
) -> None:
    """Compare each layer of a transformer for one sequence, alone and in larger and larger batches."""
    given = {"batches": sizes} if (sizes := _whole("--batch", batch)) else {}
    with _experiment("layers", html, as_json=as_json) as (progress, show):
        from stablegen.lab.layers import measure

        show(
            measure(
                model=model,
                revision=revision,
                random_weights=random_weights,
                dtypes=_listed(dtype),
                length=length,
                device=device,
                seed=seed,
                progress=progress("batches"),
                **given,
            )
        )


@lab_app.command()
def flips(
    model: Model = None,
    revision: Revision = None,
    dtype: Dtypes = None,
    batch: Annotated[list[str] | None, typer.Option(help="Batch sizes; 1 to 32 if none.")] = None,
    baseline: Annotated[int, typer.Option(help="The batch size that others are compared with.")] = 2,
    padding: Annotated[list[str] | None, typer.Option(help="Tokens of padding; 1, 16, 64 if none.")] = None,
    policy: Annotated[list[str] | None, typer.Option(help="single, padded:8 and invariant if none.")] = None,
    tokens: FlipTokens = 8,
    prompts: PromptFile = None,
    count: PromptCount = None,
    device: DeviceName = "auto",
    html: PageFile = None,
    as_json: AsJson = False,
) -> None:
    """Answer prompts in many companies: which answers flip, by what cause, and that none does under the policies."""
    given: dict[str, Any] = {"batches": _whole("--batch", batch), "pads": _whole("--padding", padding)}
    chosen = {name: value for name, value in given.items() if value}
    if policy is not None:
        chosen["policies"] = _listed(policy)
    with _experiment("flips", html, as_json=as_json) as (progress, show):
        from stablegen.lab.flips import measure

        show(
            measure(
                model=model,
                revision=revision,
                dtypes=_listed(dtype),
                baseline=baseline,
                tokens=tokens,
                prompts=None if prompts is None else [_text(line) for line in _input(None, prompts)],
                count=count,
                device=device,
                progress=progress("prompts"),
                **chosen,
            )
        )


@lab_app.command(name="all")
def all_experiments(
    model: Model = None,
    revision: Revision = None,
    dtype: Dtypes = None,
    tokens: FlipTokens = 8,
    prompts: PromptFile = None,
    count: PromptCount = None,
    seed: NumberSeed = 0,
    device: DeviceName = "auto",
    html: PageFile = None,
    as_json: AsJson = False,
) -> None:
    """Run all four experiments, and make one report of them."""
    with _experiment(None, html, as_json=as_json) as (progress, show):
        from stablegen.lab.report import measure

        show(
            measure(
                model=model,
                revision=revision,
                dtypes=_listed(dtype),
                tokens=tokens,
                prompts=None if prompts is None else [_text(line) for line in _input(None, prompts)],
                count=count,
                device=device,
                seed=seed,
                progress=progress,
            )
        )


@lab_app.command()
def join(
    files: Annotated[list[Path], typer.Argument(help="Files of what --json printed.")],
    html: PageFile = None,
    as_json: AsJson = False,
) -> None:
    """Make one report of experiments that were run apart; of `flips`, dtypes that were."""
    from stablegen.lab.report import join as joined
    from stablegen.lab.report import read_report

    _show_lab(joined([read_report(file) for file in files]), html, as_json=as_json)


@contextmanager
def _experiment(
    name: str | None, html: Path | None, *, as_json: bool
) -> Iterator[tuple[Callable[[str], Callable[[int, int], None] | None], Callable[[Any], None]]]:
    """Yield who hears how far an experiment is, and what shows its report: of ``name``, or of all."""
    from stablegen.lab.report import report_of
    from stablegen.pages.render import check_page

    if html is not None:
        check_page(html)
    found: list[Any] = []
    with contextlib.ExitStack() as bars:

        def progress(what: str) -> Callable[[int, int], None] | None:
            bars.close()  # the one before is done
            return bars.enter_context(_progress(what))

        yield progress, found.append
    _show_lab(found[0] if name is None else report_of(**{name: found[0]}), html, as_json=as_json)


def _show_lab(report: LabReport, html: Path | None, *, as_json: bool) -> None:
    from stablegen.lab.report import render

    if as_json:
        print(report.model_dump_json())
    else:
        render(report, _console())
    if html is not None:
        from stablegen.pages.lab import write

        write(report, html)


def _whole(option: str, given: list[str] | None) -> list[int]:
    """Return the whole numbers of an option, given one by one or with commas."""
    found = []
    for part in _listed(given):
        if not part.isdecimal():
            raise typer.BadParameter(f"{option} {part!r} is not a whole number")
        found.append(int(part))
    return found


# -- helpers -------------------------------------------------------------------------------------------------------


def _client(
    model: str | None,
    policy: str | None,
    dtype: str | None,
    device: str | None,
    app_name: str | None,
    cache_dir: Path | None,
    *,
    revision: str | None = None,
) -> Client:
    from stablegen.client import Client

    return Client.from_pretrained(
        model, revision=revision, policy=policy, dtype=dtype, device=device, cache_dir=cache_dir, app=app_name
    )


@contextmanager
def _store(app_name: str | None, cache_dir: Path | None) -> Iterator[Store]:
    from stablegen.client import open_store
    from stablegen.config import load_settings

    settings = load_settings(app_name, cache_dir=cache_dir).settings
    store = open_store(settings.cache_dir, settings.size_limit)
    try:
        yield store
    finally:
        store.close()


def _listed(values: list[str] | None) -> list[str]:
    return [part.strip() for value in values or () for part in value.split(",") if part.strip()]


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None] | None]:
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _console() -> Console:
    from rich.console import Console

    # a pipe has no width: do not cut lines there
    return Console(width=None if sys.stdout.isatty() else 160, soft_wrap=False)


def _table(*columns: str) -> Table:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right" if column in ("step", "margin", "p(flip)", "p") else "left")
    return table


def _optional(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _report(error: StablegenError) -> int:
    _say(f"error: {error}")
    return 2 if isinstance(error, USAGE_ERRORS) and not isinstance(error, DeviceMemoryError) else 1


def _say(text: str) -> None:
    print(text, file=sys.stderr)


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    kind = "margin warning" if issubclass(category, MarginWarning) else "warning"
    _say(f"{kind}: {message}")
