"""What the benchmark measures where the user leaves it to the machine; imports no torch."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stablegen.errors import ParameterError
from stablegen.lab.reports.bench import Plan
from stablegen.machine.device import Device

GOLDEN_TOKENS = 64
"""Tokens of a golden answer."""
GOLDEN_LENGTHS = (5, 200)
"""Tokens of the shortest and the longest golden prompt."""


@dataclass(frozen=True, slots=True)
class Options:
    """What the user asked for; None or empty leaves it to the machine."""

    model: str | None = None
    revision: str | None = None
    random_weights: bool = False
    dtypes: Sequence[str] = ()
    batches: Sequence[int] = ()
    prompt: int | None = None
    tokens: int | None = None
    repeats: int | None = None
    arms: Sequence[str] = ()
    prefill: str | None = None
    golden: int | None = None
    device: str = "auto"


def make_plan(options: Options, device: Device, context: int, arms: Mapping[str, bool]) -> Plan:
    """Return what to measure: what was asked, and for the rest sizes that suit the device.

    ``arms``: the arms there are, and whether each is measured at batch 1 alone unless it is named. Raises
    ``ParameterError`` for sizes that cannot be measured.
    """
    on_gpu = device.is_cuda
    half = "bfloat16" if device.capability is None or device.capability >= (8, 0) else "float16"
    unknown = [arm for arm in options.arms if arm not in arms]
    if unknown:
        raise ParameterError(f"arm {unknown[0]!r} is unknown", accepted=", ".join(arms))
    prompt = _count("prompt", options.prompt, 32)
    tokens = _count("tokens", options.tokens, 128 if on_gpu else 16, least=2)
    if prompt + tokens > context:
        raise ParameterError(
            f"prompt {prompt} and tokens {tokens} make {prompt + tokens} tokens",
            accepted=f"up to {context} together: the model's context",
        )
    batches = options.batches or ((1, 8, 32, 64, 256) if on_gpu else (1, 4))
    return Plan(
        dtypes=_unique(options.dtypes or (("float32", half) if on_gpu else ("float32",))),
        batches=_unique(_count("batch", batch, 1) for batch in batches),
        prompt=prompt,
        tokens=tokens,
        repeats=_count("repeats", options.repeats, 5),
        arms=_unique(options.arms or arms),
        once=tuple(arm for arm, once in arms.items() if once and arm not in options.arms),
        prefill=_prefill(options.prefill, (16, 512) if on_gpu else (2, 64), context),
        golden=_golden(options.golden, 1000 if on_gpu else 8, context),
        golden_lengths=(GOLDEN_LENGTHS[0], max(GOLDEN_LENGTHS[0], min(GOLDEN_LENGTHS[1], context - GOLDEN_TOKENS))),
        golden_tokens=GOLDEN_TOKENS,
    )


def _unique(values: Iterable[Any]) -> tuple[Any, ...]:
    return tuple(dict.fromkeys(values))


def _count(name: str, given: int | None, default: int, *, least: int = 1) -> int:
    value = default if given is None else given
    if value < least:
        raise ParameterError(f"{name}={value}", accepted=f"a whole number, at least {least}")
    return value


def _prefill(given: str | None, default: tuple[int, int], context: int) -> tuple[int, int] | None:
    if given == "0":
        return None
    if given is None:
        rows, length = default[0], min(default[1], context - 1)
    else:
        match = re.fullmatch(r"(\d{1,6})x(\d{1,9})", given)
        rows, length = (int(match[1]), int(match[2])) if match else (0, 0)
        if not 1 <= length < context or rows < 1:
            raise ParameterError(
                f"prefill={given!r}",
                accepted=f"PROMPTSxTOKENS such as '16x512', with 1 to {context - 1} tokens; '0' leaves it out",
            )
    return (rows, length) if length else None


def _golden(given: int | None, default: int, context: int) -> int:
    short = context < GOLDEN_LENGTHS[0] + GOLDEN_TOKENS
    if given is None:
        return 0 if short else default
    if given < 0:
        raise ParameterError(f"golden={given}", accepted="a number of prompts; 0 leaves it out")
    if given and short:
        raise ParameterError(
            f"golden={given}, and the model's context is {context}",
            accepted=f"a context of at least {GOLDEN_LENGTHS[0] + GOLDEN_TOKENS} tokens; 0 leaves it out",
        )
    return given
