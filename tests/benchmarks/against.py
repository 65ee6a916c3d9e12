"""Whether this checkout is slower than another one: a hit by name, and decode steps of the default policy.

``python tests/benchmarks/against.py OTHER_CHECKOUT --out FILE``: both are measured through the public API by processes
of their own, in turn, ``--rounds`` times; each round gives a ratio, this checkout over the other, and the medians of
the ratios are reported with their spread. Steps are those of GPT-2 small's shape with random weights in bfloat16.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).parents[2]
BATCHES = (1, 32)
PROMPT, NEW = 32, 128


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("other", type=Path, help="the checkout to compare with")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--hits-only", action="store_true", help="no decode steps: a CPU takes minutes for them")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.worker is not None:
        print(json.dumps(measure(given.worker, steps=not given.hits_only)))
        return
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "model"
        if not given.hits_only:
            save_model(model)
        rounds = []
        for number in range(given.rounds + 1):  # the first warms up disks and compiled kernels
            arms = {"this": HERE, "other": given.other.resolve()}
            order = list(arms) if number % 2 else list(reversed(arms))
            measured = {name: run_worker(arms[name], model, given) for name in order}
            if number:
                rounds.append(measured)
                print(json.dumps(measured), file=sys.stderr, flush=True)
    figures = [name for name in rounds[0]["this"] if isinstance(rounds[0]["this"][name], float)]
    report: dict[str, Any] = {"machine": rounds[0]["this"]["machine"], "prompt": PROMPT, "new_tokens": NEW}
    for name in figures:
        ratios = [one["this"][name] / one["other"][name] for one in rounds]
        report[name] = {
            "this": statistics.median(one["this"][name] for one in rounds),
            "other": statistics.median(one["other"][name] for one in rounds),
            "ratio": statistics.median(ratios),
            "ratios": [round(ratio, 4) for ratio in sorted(ratios)],
        }
        print(f"{name}: {report[name]['ratio']:.3f} ({min(ratios):.3f} to {max(ratios):.3f})")
    if given.out is not None:
        given.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


def run_worker(checkout: Path, model: Path, given: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, "-W", "ignore", __file__, str(given.other), "--worker", str(model)]
    command += ["--hits-only"] if given.hits_only else []
    environ = os.environ | {"PYTHONPATH": os.pathsep.join([str(checkout), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=True, cwd=checkout)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    assert Path(found.pop("package")).is_relative_to(checkout), "the wrong checkout was imported"
    return found


def save_model(directory: Path) -> None:
    import shutil

    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config()).save_pretrained(directory)
    shutil.copy(HERE / "stablegen" / "models" / "tiny-gpt2" / "tokenizer.json", directory)


def measure(model: Path, *, steps: bool) -> dict[str, Any]:
    import stablegen

    found: dict[str, Any] = {"package": stablegen.__file__}
    with tempfile.TemporaryDirectory() as folder:
        # a hit by name: the embedded model, float32, on the CPU
        with stablegen.Client.from_pretrained(policy="invariant", device="cpu", cache_dir=folder) as client:
            client.complete("Tell me about yourself.", max_new_tokens=8)
        with stablegen.Client.from_pretrained(policy="invariant", device="cpu", cache_dir=folder) as client:
            hit = lambda: client.complete("Tell me about yourself.", max_new_tokens=8)  # noqa: E731
            found["hit by name, ms"] = fastest(hit, 100, 300) * 1e3
        found["machine"] = client.numerics.device_model
        if steps:
            with stablegen.Client.from_pretrained(
                model, policy="invariant", dtype="bfloat16", cache_dir=f"{folder}/steps"
            ) as client:
                for batch in BATCHES:
                    found[f"step at B = {batch}, ms"] = step_time(client, batch) * 1e3
                found["machine"] = client.numerics.device_model
    return found


def step_time(client: Any, batch: int) -> float:
    """Return the seconds of one decode step: of runs of many and of few new tokens, the difference by its steps."""

    def run(new: int) -> float:
        ids = [[(7 * row + 13 * place) % 4000 for place in range(PROMPT)] for row in range(batch)]
        requests = [client.make_request(one, {"max_new_tokens": new, "eos_token_id": []}) for one in ids]
        started = time.perf_counter()
        client.run(requests, cached=False)
        return time.perf_counter() - started

    for new in (NEW, 8, NEW, 8):
        run(new)
    return statistics.median((run(NEW) - run(8)) / (NEW - 8) for _ in range(15))


def fastest(action: Callable[[], object], times: int, blocks: int) -> float:
    """Return the processor's seconds for one action, of many blocks the fastest: what else runs only adds to it."""
    action()
    rounds = []
    for _ in range(blocks):
        started = time.process_time()
        for _ in range(times):
            action()
        rounds.append((time.process_time() - started) / times)
    return min(rounds)


if __name__ == "__main__":
    main()
