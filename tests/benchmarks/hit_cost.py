"""What a hit costs: ``complete()`` against a raw diskcache read of the same bytes, and ``import stablegen``.

Both arms run in one process, alternating in blocks, after a warm-up; medians with the 5th and 95th percentile.

Run it with: python tests/benchmarks/hit_cost.py [--out FILE]
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path

import diskcache

import stablegen
from stablegen.store.codec import encode

PROMPTS = [f"Tell me about yourself, number {number}.\nanswer : " for number in range(200)]
TOKENS = 64
BLOCKS, READS = 30, 200  # READS is a multiple of the prompts, so that each is read equally often


def microseconds(action: Callable[[int], object], start: int) -> list[float]:
    """Return how long each of ``READS`` calls took; call i gets the number start + i."""
    times = []
    for number in range(start, start + READS):
        before = time.perf_counter_ns()
        action(number)
        times.append((time.perf_counter_ns() - before) / 1000)
    return times


def summary(times: list[float]) -> dict[str, float]:
    """Return median, 5th and 95th percentile, in microseconds."""
    cuts = statistics.quantiles(times, n=20)
    return {"median_us": round(statistics.median(times), 2), "p5_us": round(cuts[0], 2), "p95_us": round(cuts[-1], 2)}


def import_milliseconds() -> dict[str, list[float]]:
    """Return how long ``import stablegen`` took in each of nine fresh processes."""
    code = "import time; t = time.perf_counter(); import stablegen; print((time.perf_counter() - t) * 1000)"
    client = code.replace("import stablegen;", "from stablegen import Client;")
    runs = {}
    for name, text in (("import stablegen", code), ("from stablegen import Client", client)):
        runs[name] = [float(subprocess.check_output([sys.executable, "-c", text])) for _ in range(9)]
    return runs


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path)
    out = parser.parse_args().out
    with tempfile.TemporaryDirectory() as folder:
        with stablegen.Client.from_pretrained(cache_dir=f"{folder}/cache") as client:
            completions = client.complete(PROMPTS, max_new_tokens=TOKENS)
        raw = diskcache.Cache(f"{folder}/raw")
        for completion in completions:
            raw[completion.key] = encode(completion.record)
        keys = [completion.key for completion in completions]
        client = stablegen.Client.from_pretrained(cache_dir=f"{folder}/cache", on_risk="raise")

        def hit(number: int) -> None:
            client.complete(PROMPTS[number % len(PROMPTS)], max_new_tokens=TOKENS)

        def read(number: int) -> None:
            raw.get(keys[number % len(keys)])

        def first_sight(number: int) -> None:
            # the prompt has not been seen by this client: tokenize and hash it
            client.session.refresh().intake.forget_prompts()
            hit(number)

        arms: dict[str, list[float]] = {"raw diskcache read": [], "hit": [], "hit, prompt not seen before": []}
        for action in (read, hit, first_sight):
            microseconds(action, 0)
        for block in range(BLOCKS):
            microseconds(hit, 0)  # the client has seen the prompts again
            for name, action in zip(arms, (read, hit, first_sight), strict=True):
                arms[name] += microseconds(action, block * READS)
        client.close()
        raw.close()
    result = {name: summary(times) for name, times in arms.items()}
    base = result["raw diskcache read"]["median_us"]
    report = {
        "bytes": len(encode(completions[0].record)),
        "calls_per_arm": BLOCKS * READS,
        **result,
        "hit_over_read": round(result["hit"]["median_us"] / base, 2),
        "first_sight_over_read": round(result["hit, prompt not seen before"]["median_us"] / base, 2),
        "import_ms": {
            name: {"median": round(statistics.median(times), 1), "max": round(max(times), 1)}
            for name, times in import_milliseconds().items()
        },
        "python": platform.python_version(),
        "machine": completions[0].record.numerics.device_model,
        "versions": {name: metadata.version(name) for name in ("diskcache", "pydantic", "tokenizers")},
    }
    text = json.dumps(report, indent=1)
    print(text)
    if out is not None:
        out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
