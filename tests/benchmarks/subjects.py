"""What the measurements of the guard share: their options, the model they measure, its clients, and their reports."""

import argparse
import json
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from stablegen.client import Client
from stablegen.lab.subject import RANDOM
from stablegen.sources.checkpoint import EMBEDDED


def parser_of(about: str | None) -> argparse.ArgumentParser:
    """Return a parser of the options that all have."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", metavar="DIR", help=f"a GPT-2; {EMBEDDED} if none")
    parser.add_argument("--random", action="store_true", help="GPT-2 small with random weights, and DIR's tokenizer")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, metavar="FILE")
    return parser


def parse(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Return the options given."""
    options = parser.parse_args()
    if options.random and options.model is None:
        parser.error("--random wants the directory of a GPT-2 for its tokenizer: --model DIR")
    warnings.simplefilter("ignore")  # of hits that are flagged
    return options


@contextmanager
def subject_of(options: argparse.Namespace) -> Iterator[tuple[str | None, str]]:
    """Yield the model that is asked for, and a folder for caches that goes away in the end."""
    with TemporaryDirectory() as folder:
        yield _random_gpt2_small(options.model, Path(folder)) if options.random else options.model, folder


def client_of(model: str | None, policy: str, dtype: str, device: str, cache_dir: str) -> Client:
    """Return a client over the model."""
    return Client.from_pretrained(model, policy=policy, dtype=dtype, device=device, cache_dir=cache_dir)


def tell(report: Mapping[str, Any], options: argparse.Namespace, *, shown: tuple[str, ...]) -> None:
    """Print a part of a report, and write all of it to the file that was asked for."""
    name = RANDOM if options.random else Path(options.model or EMBEDDED).name
    print(json.dumps({"model": name, **{key: report[key] for key in shown}}, indent=1))
    if options.out is not None:
        options.out.write_text(json.dumps({"model": name, **report}, indent=1) + "\n", encoding="utf-8")


def _random_gpt2_small(tokenizer: str, folder: Path) -> str:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    directory = folder / "gpt2-small-random"
    GPT2LMHeadModel(GPT2Config()).save_pretrained(directory)
    for file in Path(tokenizer).glob("tokenizer*"):
        shutil.copy(file, directory)
    return str(directory)
