"""What commands take: options of one name and meaning wherever they occur."""

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


MaxNewTokens = Annotated[int, typer.Option(help="Tokens to generate at most.")]
Seed = Annotated[int | None, typer.Option(help="Sample, by this seed; without one decoding is greedy.")]
SampleIndex = Annotated[int | None, typer.Option(help="Which of a seed's samples.")]
Temperature = Annotated[float | None, typer.Option(help="What scores are divided by before one samples.")]
TopK = Annotated[int | None, typer.Option(help="Sample from so many tokens.")]
TopP = Annotated[float | None, typer.Option(help="Sample from the tokens that make up this share.")]
Stop = Annotated[list[str] | None, typer.Option(help="A text that ends the answer; may be given again.")]
Model = Annotated[str | None, typer.Option(help="Hub name or local directory; the embedded tiny-gpt2 if not given.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit on the hub.")]
Policy = Annotated[str | None, typer.Option(help=f"How misses run: {', '.join(policy_forms())}.")]
Dtype = Annotated[str | None, typer.Option(help="float32, float16 or bfloat16.")]
Device = Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N.")]
App = Annotated[str | None, typer.Option("--app", help="The app whose settings hold.")]
CacheDir = Annotated[Path | None, typer.Option(help="Folder of the cache.")]
PageFile = Annotated[Path | None, typer.Option("--html", help="Write it as a page to this .html file as well.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON, one object a line.")]
