"""Pages from templates: one file that holds its style, script and data, and shows text only as text."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import platform
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from functools import cache
from importlib import resources
from math import isfinite
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from stablegen.errors import ParameterError
from stablegen.machine.plan import version_of

SUFFIXES = (".html", ".htm")
_INVISIBLE = {
    **{code: f"\\x{code:02x}" for code in (*range(0x20), *range(0x7F, 0xA0))},
    **{code: f"\\u{code:04x}" for code in (0x61C, 0x200E, 0x200F, *range(0x202A, 0x202F), *range(0x2066, 0x206A))},
    ord("\n"): "⏎",
    ord("\r"): "␍",
    ord("\t"): "⇥",
}
"""How control characters and those that change the text direction are shown on one line."""
_LINES = {**_INVISIBLE, ord("\n"): "\n", ord("\t"): "\t"}
_UNSAFE = {code: f"\\u{code:04x}" for code in (*map(ord, "<>&\u2028\u2029"), *_INVISIBLE)}
"""JSON escapes of characters that could end a script element or a line in it, or change the text direction."""


def check_page(file: Path) -> None:
    """Raise ``ParameterError`` where no page could be written, before long work ends in it."""
    if file.suffix.lower() not in SUFFIXES:
        raise ParameterError(f"html={str(file)!r}", accepted=f"a file that ends in {' or '.join(SUFFIXES)}")
    if not file.absolute().parent.is_dir():
        raise ParameterError(f"html={str(file)!r}: there is no such folder", accepted="a file in a folder that exists")
    if file.is_dir():
        raise ParameterError(f"html={str(file)!r} is a folder", accepted="a file in a folder that exists")


def write_page(template: str, file: Path, *, machine: str | None = None, **content: Any) -> None:
    """Write the page of a template to ``file``, completely or not at all; its footer names the ``machine``.

    ``check_page`` tells beforehand whether it can be written.
    """
    page = render_page(template, machine=machine, **content)
    draft = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        # a lone surrogate cannot be encoded
        draft.write_text(page, encoding="utf-8", errors="replace")
        draft.replace(file)
    except OSError as error:
        raise ParameterError(f"html={str(file)!r} cannot be written: {error.strerror}") from error
    finally:
        draft.unlink(missing_ok=True)


def render_page(template: str, *, machine: str | None = None, **content: Any) -> str:
    """Return the page of a template in ``stablegen/pages``."""
    return _environment().get_template(template).render(made=_made(machine), **content)


def embedded(name: str, value: Any) -> Markup:
    """Return a script element that holds a value as JSON, which the page's own script reads by its id."""
    text = json.dumps(_finite(value), ensure_ascii=False, separators=(",", ":")).translate(_UNSAFE)
    return Markup('<script type="application/json" id="{}">{}</script>').format(name, Markup(text))


def one_line(text: str) -> str:
    """Return text with line breaks, control characters and changes of direction made visible."""
    return text.translate(_INVISIBLE)


def many_lines(text: str) -> str:
    """Return text with its line breaks, and with other invisible characters made visible."""
    return text.translate(_LINES)


def arrows(text: str) -> str:
    """Return a reason with real arrows."""
    return text.replace("->", "\N{RIGHTWARDS ARROW}")


def plain(value: Any) -> str:
    """Return a setting as people write it; a dash for None."""
    if isinstance(value, list | tuple):
        return one_line(", ".join(map(plain, value))) or "none"
    return "\N{EN DASH}" if value is None else one_line(str(value))


@cache
def part(name: str) -> str:
    """Return the text of a style sheet or script in this package."""
    return (resources.files("stablegen.pages") / name).read_text(encoding="utf-8")


def _script(name: str) -> Markup:
    return Markup(f"<script>{part(name)}</script>")


def _security(scripts: Sequence[str]) -> str:
    """Return a security policy that loads nothing and runs only these scripts."""
    hashes = [base64.b64encode(hashlib.sha256(part(name).encode()).digest()).decode() for name in scripts]
    allowed = " ".join(f"'sha256-{digest}'" for digest in hashes) or "'none'"
    rest = "base-uri 'none'; form-action 'none'"
    return f"default-src 'none'; style-src 'unsafe-inline'; script-src {allowed}; img-src data:; {rest}"


def _finite(value: Any) -> Any:
    """Return a value without infinities, which JSON does not have."""
    if isinstance(value, float):
        return value if isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return value


def _made(machine: str | None) -> dict[str, str]:
    """Return what a footer says: when the page was made, by which versions, on which machine."""
    import stablegen

    packages = ("torch", "transformers", "triton")
    versions = [f"{name} {version}" for name in packages if (version := version_of(name)) is not None]
    system = f"{platform.system()} {platform.machine()}, {os.cpu_count()} processors"
    return {
        "when": f"{datetime.now(UTC):%Y-%m-%d %H:%M:%S} UTC",
        "by": f"stablegen {stablegen.__version__}",
        "versions": ", ".join([f"Python {platform.python_version()}", *versions]),
        "machine": system if machine is None else f"{machine}; {system}",
    }


def number(value: float | None, digits: int = 3) -> str:
    """Return a number to ``digits`` significant digits, whole numbers in full; a dash for None."""
    if value is None:
        return "\N{EN DASH}"
    if isfinite(value) and value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}".replace("-", "\N{MINUS SIGN}")
    mantissa, _, exponent = f"{value:.{digits}g}".partition("e")
    power = f"\N{MULTIPLICATION SIGN}10{raised(int(exponent))}" if exponent else ""
    return mantissa.replace("-", "\N{MINUS SIGN}") + power


def raised(exponent: int) -> str:
    """Return a whole number in superscript."""
    return str(exponent).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))


def percent(value: float | None) -> str:
    """Return a share in percent, with one decimal; a dash for None."""
    return "\N{EN DASH}" if value is None else f"{value:.1%}".replace("%", "\N{NARROW NO-BREAK SPACE}%")


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("stablegen", "pages"),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=lambda value: many_lines(value) if type(value) is str else value,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals.update(
        style=Markup(part("style.css")),
        script=_script,
        security=_security,
        embedded=embedded,
    )
    environment.filters.update(
        arrows=arrows, one_line=one_line, many_lines=many_lines, plain=plain, number=number, percent=percent
    )
    return environment
