"""Prompts from a file or a pipe: JSON lines or plain text lines, each kept with its line number."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass

from stablegen.errors import InputFileError


@dataclass(frozen=True, slots=True)
class PromptLine:
    """One line of input: its number (from 1; 0 for an argument), and its prompt or the error in it."""

    number: int
    prompt: str | None
    error: InputFileError | None = None


def read_prompts(lines: Iterable[bytes], name: str) -> list[PromptLine]:
    """Return the prompts of a file or pipe; blank lines are skipped, lines that cannot be read have their error.

    The input is JSON lines if its ``name`` ends in ``.jsonl`` or its first line begins with ``{``: objects with a
    string ``prompt``, whose other members are ignored. Otherwise each line is a prompt.
    """
    found: list[PromptLine] = []
    as_json = True if name.endswith((".jsonl", ".ndjson")) else None
    for number, raw in enumerate(lines, start=1):
        try:
            line = raw.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            if not line.strip():
                continue
            if as_json is None:  # the first readable line decides
                as_json = line.lstrip().startswith("{")
            found.append(PromptLine(number, _prompt(line) if as_json else line))
        except (ValueError, RecursionError) as problem:  # invalid UTF-8 and invalid JSON are ValueErrors
            error = InputFileError(
                f"{name}, line {number}: {problem}", accepted='UTF-8; {"prompt": "..."} or plain text on each line'
            )
            found.append(PromptLine(number, None, error))
    return found


def _prompt(line: str) -> str:
    content = json.loads(line)
    if not isinstance(content, dict) or not isinstance(content.get("prompt"), str):
        raise ValueError("is JSON, but not an object with a string 'prompt'")
    return str(content["prompt"])


_SUBJECTS = (
    *("music", "films", "books", "travel", "food", "sports", "politics", "history"),
    *("science", "weather", "animals", "art", "love", "money", "work"),
)
_OPENINGS = (
    "What do you think about {}?\nanswer : ",
    "The old man began to speak about {}, and",
    "She had never cared for {}; but",
    "Why is {} so important to you, my friend?\nanswer : ",
    "In those days {} was",
)
SAMPLE = tuple(opening.format(subject) for subject in _SUBJECTS for opening in _OPENINGS)
"""Prompts with which a model is measured where the user names none."""
