"""Generate answers, and show what is cached: generate, inspect, warnings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from stablegen.cli.options import (
    App,
    AsJson,
    CacheDir,
    Device,
    Dtype,
    MaxNewTokens,
    Model,
    OnRiskChoice,
    PageFile,
    Policy,
    Revision,
    SampleIndex,
    Seed,
    Stop,
    Temperature,
    TopK,
    TopP,
)
from stablegen.cli.shared import (
    asked_for,
    make_client,
    new_console,
    new_table,
    opened_cache,
    opened_output,
    optional,
    progress_bar,
    read_input,
    say,
)
from stablegen.errors import InvalidRequestError, ParameterError, StablegenError, UnsupportedParameterError

if TYPE_CHECKING:
    from stablegen.client import Client
    from stablegen.core.answer import Completion

app = typer.Typer()


@app.command()
def generate(
    prompts: Annotated[
        list[str] | None, typer.Argument(help="Prompts; without any, --file or standard input is read.")
    ] = None,
    file: Annotated[
        Path | None, typer.Option(help='File of prompts: JSON lines {"prompt": ...} or plain text lines.')
    ] = None,
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
    out: Annotated[Path | None, typer.Option(help="Write the answers to this file instead of standard output.")] = None,
    as_json: AsJson = False,
) -> None:
    """Complete prompts, from the cache where it holds them."""
    from stablegen.client import Client
    from stablegen.lab.prompts import PromptLine

    lines = read_input(prompts, file)
    asked = asked_for(max_new_tokens, seed, sample_index, temperature, top_k, top_p, stop)
    with (
        opened_output(out) as write,
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
        stopped: StablegenError | None = None
        try:
            with progress_bar("answers") as progress:
                completions = client.run(requests, progress=progress)
        except StablegenError as error:
            completions, stopped = list(error.completions), error
        answers = {completion.key: completion for completion in completions}
        for line in lines:
            answer = answers.get(keys.get(line, ""))
            reason = failed.get(line) or (stopped if answer is None else None)
            write(_line(client, line, answer, reason, as_json=as_json, alone=len(lines) == 1))
    for line, problem in failed.items():
        say(f"error: {'' if line.error else f'line {line.number}: ' if line.number else ''}{problem}")
    if stopped is not None:
        raise stopped
    if failed:
        raise typer.Exit(1)


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
        # a record made by generate() has no prompt text; the line has
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
    verify: Annotated[
        bool, typer.Option("--verify", help="Load the model, and verify the answer against a fresh run.")
    ] = False,
    html: PageFile = None,
    as_json: AsJson = False,
) -> None:
    """Show a stored answer step by step: token, runner-up, margin, probability of a flip.

    Where another run's answer is known to diverge from it, both are shown.
    """
    from stablegen.console.answer import render
    from stablegen.reports.answer import inspect as make_report

    if html is not None:
        from stablegen.pages.render import check_page

        check_page(html)
    with make_client(model, policy, dtype, device, app_name, cache_dir, revision=revision) as client:
        record = client.inspect(client.find_key(key))
        seen = make_report(client, record, client.verify(record) if verify else None)
    if html is not None:
        from stablegen.pages.answer import write_answer

        write_answer(seen, html)
    if as_json:
        known = seen.model_dump(mode="json", include={"verdict", "verification", "divergences"})
        print(json.dumps(record.to_dict() | known, ensure_ascii=False))
    else:
        render(seen, new_console())


@app.command(name="warnings")
def show_warnings(app_name: App = None, cache_dir: CacheDir = None, as_json: AsJson = False) -> None:
    """List the hits that were flagged."""
    with opened_cache(app_name, cache_dir) as (cache, _):
        hits = [hit for hit in cache.flagged() if app_name is None or hit.app == app_name]
    if as_json:
        for hit in hits:
            print(hit.model_dump_json())
        return
    if not hits:
        print("no hit was flagged")
        return
    table = new_table(
        "app", "key", "prompt", "verdict", "step", "token", "runner-up", "margin", "p", "recorded -> current"
    )
    for hit in hits:
        verdict = hit.verdict
        table.add_row(
            hit.app or "",
            hit.key[:12],
            f"{hit.prompt!r:.40}",
            verdict.status,
            optional(verdict.step, "d"),
            "" if hit.token is None else repr(hit.token),
            "" if hit.runner_up is None else repr(hit.runner_up),
            optional(verdict.margin, ".4g"),
            optional(verdict.probability, ".3g"),
            f"{hit.recorded} -> {hit.current}",
        )
    new_console().print(table)
