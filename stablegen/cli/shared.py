"""What commands share: reading prompts, writing answers, making clients, printing tables."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from stablegen.errors import ParameterError

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from stablegen.client import Client
    from stablegen.store.cache import Cache


def read_input(prompts: list[str] | None, file: Path | None) -> list[Any]:
    """Return the lines of prompts given as arguments, in a file or through a pipe."""
    from stablegen.lab.prompts import PromptLine, read_prompts

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


def asked_for(
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
        raise ParameterError(f"{names} given without --seed", accepted=f"{names} together with --seed, which samples")
    return {"max_new_tokens": max_new_tokens, "stop_strings": stop or None, **given}


def text_of(line: Any) -> str:
    """Return the prompt of a line; raise its error where it has one."""
    if line.error is not None:
        raise line.error
    return str(line.prompt)


@contextmanager
def opened_output(out: Path | None) -> Iterator[Callable[[str], None]]:
    """Yield a function that writes a line, to standard output or to a file that appears once it is complete."""
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


def make_client(
    model: str | None,
    policy: str | None,
    dtype: str | None,
    device: str | None,
    app_name: str | None,
    cache_dir: Path | None,
    *,
    revision: str | None = None,
) -> Client:
    """Return the client that the options ask for."""
    from stablegen.client import Client

    return Client.from_pretrained(
        model, revision=revision, policy=policy, dtype=dtype, device=device, cache_dir=cache_dir, app=app_name
    )


@contextmanager
def opened_cache(app_name: str | None, cache_dir: Path | None) -> Iterator[tuple[Cache, int | None]]:
    """Yield the cache of an app or a folder, and the limit of its size in bytes."""
    from stablegen.config import load_settings
    from stablegen.store.cache import open_cache

    settings = load_settings(app_name, cache_dir=cache_dir).settings
    cache = open_cache(settings.cache_dir, settings.size_limit)
    try:
        yield cache, settings.size_limit
    finally:
        cache.close()


def listed(values: list[str] | None) -> list[str]:
    """Return the values of an option that may be repeated, or hold several with commas."""
    return [part.strip() for value in values or () for part in value.split(",") if part.strip()]


def whole(option: str, given: list[str] | None) -> list[int]:
    """Return the whole numbers of an option, given one by one or with commas."""
    found = []
    for part in listed(given):
        if not part.isdecimal():
            raise typer.BadParameter(f"{option} {part!r} is not a whole number")
        found.append(int(part))
    return found


@contextmanager
def progress_bar(what: str) -> Iterator[Callable[[int, int], None] | None]:
    """Yield a function that draws progress on the terminal; None where standard error is not one."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def new_console() -> Console:
    """Return the console of standard output."""
    from rich.console import Console

    # a pipe has no width: do not cut lines there
    return Console(width=None if sys.stdout.isatty() else 160, soft_wrap=False)


def new_table(*columns: str) -> Table:
    """Return an empty table whose numbers are aligned to the right."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, justify="right" if column in ("step", "margin", "p(flip)", "p") else "left")
    return table


def optional(value: float | None, form: str) -> str:
    """Return a number formatted by ``form``, '' for None."""
    return "" if value is None else format(value, form)


def say(text: str) -> None:
    """Print a line to standard error."""
    print(text, file=sys.stderr)
