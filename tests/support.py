"""What several test modules build: requests, numerics, records, small models, and Python in a process of its own."""

from __future__ import annotations

import atexit
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import stablegen
from stablegen.client import Client
from stablegen.core.audit import AuditReport, Bin, Share
from stablegen.core.numerics import Numerics
from stablegen.core.params import GenerationParams
from stablegen.core.record import Composition, Record
from stablegen.core.request import ModelIdentity, Request
from stablegen.core.trace import Trace
from stablegen.core.verdict import FlaggedHit, SelfCheck, Verdict
from stablegen.reports.audit import curve

TINY = Path(stablegen.__file__).parent / "models" / "tiny-gpt2"
MODEL = ModelIdentity(source="digest", digest="5" * 64, name="some-model")


def numerics(**changes: Any) -> Numerics:
    fields: dict[str, Any] = {
        "policy": "single",
        "dtype": "float32",
        "engine": "transformers",
        "engine_version": 1,
        "attention": "sdpa",
        "device": "cpu",
        "device_model": "a processor",
        "threads": 2,
        "torch": "2.13.0",
        "transformers": "5.23.0",
    }
    return Numerics(**(fields | changes))


def request(ids: Sequence[int] = (1, 2, 3), *, new: int = 4, prompt: str | None = None, **changes: Any) -> Request:
    fields: dict[str, Any] = {"model": MODEL, "tokenizer": "7" * 64, "params": GenerationParams(max_new_tokens=new)}
    fields |= changes
    return Request(tuple(ids), prompt=prompt, **fields)


def trace(margins: Sequence[float], *, score: float = 20.0, tokens: Sequence[int] | None = None) -> Trace:
    """Return a trace whose best scores are all ``score``, with these margins."""
    steps = range(len(margins))
    return Trace.of(
        list(steps) if tokens is None else tokens,
        [1000 + step for step in steps],
        [score] * len(margins),
        [score - margin for margin in margins],
        [0xDEADBEEF00000000 + step for step in steps],
    )


def record(
    asked: Request | None = None,
    *,
    margins: Sequence[float] = (1.0, 2.0),
    score: float = 20.0,
    traced: Trace | None = None,
    **changes: Any,
) -> Record:
    asked = request() if asked is None else asked
    fields: dict[str, Any] = {
        "key": asked.key,
        "request": asked,
        "text": "an answer",
        "finish_reason": "length",
        "trace": trace(margins, score=score) if traced is None else traced,
        "numerics": numerics(),
        "composition": Composition(1, 1, 0),
        "created": 1_700_000_000.25,
        "seconds": 0.5,
    }
    return Record(**(fields | changes))


def untraced(tokens: Sequence[int] = (1, 2), **changes: Any) -> Record:
    """Return a record made elsewhere, with tokens and no trace."""
    return record(**changes)._replace(trace=None, untraced=tuple(tokens))


def passed(under: Numerics) -> SelfCheck:
    return SelfCheck(numerics=under, passed=True)


def audit_report(told: Sequence[tuple[float, bool]] = ((0.9, True), (0.1, False)), **changes: Any) -> AuditReport:
    """Return what an audit would have found of answers with these probabilities, diverged or not."""
    parted, flagged = [one for one in told if one[1]], [one for one in told if one[0] > 0.005]
    observed = Share.over(len(parted), len(told))
    fields: dict[str, Any] = {
        "model": "some-model",
        "numerics": numerics(),
        "app": None,
        "accepted_risk": 0.005,
        "records": len(told),
        "audited": len(told),
        "skipped": {},
        "table": {"at_risk": {"bits": 0, "tokens": len(told) - len(parted), "diverged": len(parted)}},
        "exact": Share.over(0, 0),
        "recall": Share.over(len(parted), len(parted)),
        "precision": Share.over(len(parted), len(flagged)),
        "reliability": [Bin(low=0.0, high=1.0, predicted=0.5, observed=observed)],
        "curve": curve(told),
        "brier": 0.01,
        "calibration_error": 0.1,
        "wrong": [],
        "made": 1_700_000_000.0,
        "seconds": 1.5,
    }
    return AuditReport(**(fields | changes))


def near_tie(old: Record, *, margin: float = 0.0, step: int = 0, under: Numerics | None = None) -> Record:
    """Return a record as if computed under other numerics, its two best tokens nearly tying at one step."""
    assert old.trace is not None
    seconds = list(old.trace.runner_up_scores)
    seconds[step] = old.trace.scores[step] - margin
    columns = (old.trace.tokens, old.trace.runner_ups, old.trace.scores, seconds, old.trace.score_hash)
    other = Numerics(**(old.numerics.model_dump() | {"torch": "0.0.1"})) if under is None else under
    return old._replace(trace=Trace.of(*columns), numerics=other)


def with_token(old: Record, step: int, token: int) -> Record:
    """Return a record whose answer says something else at one step."""
    assert old.trace is not None
    tokens = list(old.trace.tokens)
    tokens[step] = token
    rest = (old.trace.runner_ups, old.trace.scores, old.trace.runner_up_scores, old.trace.score_hash)
    return old._replace(trace=Trace.of(tokens, *rest))


def client(cache: Path, **changes: Any) -> Client:
    """Return a client on a CPU; nothing of it comes from the environment or a configuration file."""
    settings: dict[str, Any] = {"policy": "single", "dtype": "float32", "device": "cpu", "on_risk": "warn"}
    settings |= {"accepted_risk": 0.01} | changes
    return Client.from_pretrained(settings.pop("model", "tiny-gpt2"), cache_dir=cache, **settings)


def small_gpt2(**changes: Any) -> Any:
    """Return a GPT-2 with few random weights and tiny-gpt2's vocabulary."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    shape = {"vocab_size": 4096, "n_positions": 256, "n_embd": 32, "n_layer": 2, "n_head": 2}
    torch.manual_seed(0)
    config = GPT2Config(**(shape | {"bos_token_id": 0, "eos_token_id": 0} | changes))
    return GPT2LMHeadModel(config).eval()


def small_llama() -> Any:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        bos_token_id=0,
        eos_token_id=0,
    )
    return LlamaForCausalLM(config).eval()


def save(model: Any, directory: Path, **options: Any) -> Path:
    """Save a model with tiny-gpt2's tokenizer beside it."""
    model.save_pretrained(directory, **options)
    shutil.copy(TINY / "tokenizer.json", directory)
    return directory


def python(code: str, *arguments: object) -> Any:
    """Run code in a Python of its own; return what it prints last, read as JSON."""
    command = [sys.executable, "-W", "error", "-c", code, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@cache
def small_directory() -> Path:
    """Return a directory with ``small_gpt2`` as a checkpoint, gone when the tests are."""
    directory = Path(tempfile.mkdtemp(prefix="stablegen-test-"))
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return save(small_gpt2(), directory)


def proof(old: Record, current: Any, status: Any = "diverged", **changes: Any) -> FlaggedHit:
    fields: dict[str, Any] = {
        "key": old.key,
        "app": "checker",
        "prompt": "a prompt",
        "verdict": Verdict(
            status=status, basis="verified", reason="seen", probability=1.0, step=1, token=1, runner_up=9
        ),
        "token": "a",
        "runner_up": "b",
        "recorded": old.numerics.summary(),
        "recorded_digest": old.numerics.digest,
        "current": current.summary(),
        "current_digest": current.digest,
        "seen": old.created + 1.0,
    }
    return FlaggedHit(**(fields | changes))
