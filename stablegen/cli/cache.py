"""The cache: stats, path, why, clear, export."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from stablegen.cli.options import (
    App,
    AsJson,
    CacheDir,
    MaxNewTokens,
    Model,
    Revision,
    SampleIndex,
    Seed,
    Stop,
    Temperature,
    TopK,
    TopP,
)
from stablegen.cli.shared import asked_for, make_client, opened_cache, opened_output

app = typer.Typer(help="Show the cache, explain a miss, clear or export the cache.", no_args_is_help=True)


@app.command()
def stats(app_name: App = None, cache_dir: CacheDir = None, as_json: AsJson = False) -> None:
    """Print how many records the cache holds and how large it is."""
    from dataclasses import asdict

    with opened_cache(app_name, cache_dir) as (cache, size_limit):
        content = {"path": cache.where, **asdict(cache.stats()), "size_limit": size_limit}
    if as_json:
        print(json.dumps(content))
        return
    for name, value in content.items():
        print(f"{name:>13}  {'none: nothing is ever evicted' if value is None else value}")


@app.command()
def path(app_name: App = None, cache_dir: CacheDir = None) -> None:
    """Print the folder of the cache."""
    with opened_cache(app_name, cache_dir) as (cache, _):
        print(cache.where)


@app.command()
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
    from stablegen.reports.miss import explain_miss

    with make_client(model, None, None, None, app_name, cache_dir, revision=revision) as client:
        asked = asked_for(max_new_tokens, seed, sample_index, temperature, top_k, top_p, stop)
        request = client.request(prompt, **asked)
        if client.cache.get(request.key) is not None:
            print(f"a hit: the cache holds an answer under {request.key}")
            return
        found = explain_miss(request, client.cache.records())
    if found is None:
        print("a miss: the cache is empty")
        return
    print(f"a miss: no record under {request.key}\nnearest stored request: {found.nearest.key}")
    for name, (asked, stored) in found.differences.items():
        print(f"  {name} differs\n    asked   {asked!r}\n    stored  {stored!r}")


@app.command()
def clear(
    app_name: App = None,
    cache_dir: CacheDir = None,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask for confirmation.")] = False,
) -> None:
    """Remove every record, flagged hit, self-check, calibration and audit."""
    with opened_cache(app_name, cache_dir) as (cache, _):
        if not yes:
            typer.confirm(f"Remove {cache.stats().records} records from {cache.where}?", abort=True)
        print(f"{cache.clear()} records removed from {cache.where}")


@app.command()
def export(
    app_name: App = None,
    cache_dir: CacheDir = None,
    out: Annotated[Path | None, typer.Option(help="Write to this file instead of standard output.")] = None,
) -> None:
    """Print every record as JSON, one a line."""
    with opened_cache(app_name, cache_dir) as (cache, _), opened_output(out) as write:
        for record in cache.records():
            write(json.dumps(record.to_dict(), ensure_ascii=False))
