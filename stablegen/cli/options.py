"""The options that commands share, each with one name and meaning."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from stablegen.core.policy import policy_forms


class OnRiskChoice(StrEnum):
    """What happens to a flagged hit."""

    serve = "serve"
    warn = "warn"
    verify = "verify"
    recompute = "recompute"
    raise_ = "raise"


MaxNewTokens = Annotated[int, typer.Option(help="The most tokens to generate.")]
Seed = Annotated[int | None, typer.Option(help="Sample with this seed; without one, decoding is greedy.")]
SampleIndex = Annotated[int | None, typer.Option(help="Which of a seed's samples, from 0.")]
Temperature = Annotated[float | None, typer.Option(help="Divide scores by this number before sampling.")]
TopK = Annotated[int | None, typer.Option(help="Sample from this many of the most probable tokens.")]
TopP = Annotated[
    float | None, typer.Option(help="Sample from the most probable tokens that add up to this probability.")
]
Stop = Annotated[list[str] | None, typer.Option(help="A text that ends the answer; may be repeated.")]
Model = Annotated[str | None, typer.Option(help="Hub name or local directory; the embedded tiny-gpt2 if not given.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")]
Policy = Annotated[str | None, typer.Option(help=f"How misses run: {', '.join(policy_forms())}.")]
Dtype = Annotated[str | None, typer.Option(help="float32, float16 or bfloat16.")]
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N.")]
App = Annotated[str | None, typer.Option("--app", help="The app whose settings apply.")]
CacheDir = Annotated[Path | None, typer.Option(help="Folder of the cache.")]
PageFile = Annotated[Path | None, typer.Option("--html", help="Also write it as a page to this .html file.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, one object a line.")]
