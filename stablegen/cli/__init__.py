"""The command line: parse, call, print; nothing else. Exit codes: 0 done, 1 a request failed, 2 wrong usage."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
import warnings
from typing import Any, NoReturn

import typer

from stablegen.cli import answers, cache, guard, lab
from stablegen.cli.options import App, AsJson
from stablegen.cli.shared import say
from stablegen.errors import (
    ConfigError,
    DeviceError,
    DeviceMemoryError,
    MarginWarning,
    ParameterError,
    PolicyError,
    StablegenError,
    UnsupportedParameterError,
)

app = typer.Typer(
    name="stablegen",
    help="A cached LLM generation client with a determinism guard.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)
config_app = typer.Typer(help="Show the settings in force.", no_args_is_help=True)
app.add_typer(answers.app)
app.add_typer(guard.app)
app.add_typer(lab.app)
app.add_typer(cache.app, name="cache")
app.add_typer(config_app, name="config")

INTERRUPTED = 130
USAGE_ERRORS = (ConfigError, PolicyError, ParameterError, UnsupportedParameterError, DeviceError)


@config_app.command()
def show(app_name: App = None, as_json: AsJson = False) -> None:
    """Print each setting in force and where it came from."""
    from stablegen.config import load_settings
    from stablegen.store.cache import cache_path

    effective = load_settings(app_name)
    values = effective.settings.model_dump(mode="json")
    values["model"] = values["model"] or "tiny-gpt2"
    values["policy"] = values["policy"] or "by the model"
    values["cache_dir"] = str(cache_path(effective.settings.cache_dir))
    if as_json:
        print(json.dumps({name: {"value": value, "origin": effective.origins[name]} for name, value in values.items()}))
        return
    for name, value in values.items():
        print(f"{name:>13}  {value!s:<24}  {effective.origins[name]}")


def main() -> NoReturn:
    """Run the command and exit with its code."""
    warnings.showwarning = _show_warning
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # finished answers are kept, as after Ctrl-C
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
        say("nothing was done")
        code = 1
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = 0
    except Exception as error:
        if not hasattr(error, "format_message"):
            raise
        # click's usage errors: wrong option, missing argument
        say(f"error: {error.format_message()}\nTry 'stablegen --help'.")
        code = 2
    if code == INTERRUPTED:
        say("stopped; every finished answer is in the cache, and the same command continues from there")
    sys.exit(code if isinstance(code, int) else 0)


def _report(error: StablegenError) -> int:
    say(f"error: {error}")
    return 2 if isinstance(error, USAGE_ERRORS) and not isinstance(error, DeviceMemoryError) else 1


def _show_warning(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
    kind = "margin warning" if issubclass(category, MarginWarning) else "warning"
    say(f"{kind}: {message}")
