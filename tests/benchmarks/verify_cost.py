"""What it costs to verify answers of ``invariant`` in one pass, against generating them anew with the same engine.

Both arms take turns, after a warm-up of both, on answers of their own: neither finds what the other has computed.

Run it with: python tests/benchmarks/verify_cost.py [--model DIR [--random]] [--dtypes bfloat16] [--batches 1,32]
[--out FILE]
"""

import random
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

from subjects import client_of, parse, parser_of, subject_of, tell

from stablegen.client import Client
from stablegen.lab.reports.bench import Spread
from stablegen.machine.digests import DigestMemory
from stablegen.sources.checkpoint import open_checkpoint

PROMPT, NEW = 32, 128


def seconds(action: Callable[[], object]) -> float:
    """Return how long an action takes."""
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def measure(client: Client, vocabulary: int, batch: int, repeats: int) -> dict[str, Any]:
    """Return the times of verifying and of generating ``batch`` answers anew, in milliseconds, and their ratio."""
    draw = random.Random(batch)
    asked = [
        client.make_request([draw.randrange(vocabulary) for _ in range(PROMPT)], {"max_new_tokens": NEW})
        for _ in range(2 * batch * (repeats + 2))
    ]
    made = [done.record for done in client.run(asked)]
    groups = [made[start : start + batch] for start in range(0, len(made), batch)]
    proving, anew = [], []
    for at in range(0, len(groups), 2):
        proving.append(seconds(partial(client.verify, groups[at])))
        anew.append(seconds(partial(client.verify, groups[at + 1], from_scratch=True)))
    ratios = [one / other for one, other in zip(proving[2:], anew[2:], strict=True)]
    return {
        "verify_ms": Spread.of([1e3 * one for one in proving[2:]]).model_dump(exclude={"values"}),
        "generate_ms": Spread.of([1e3 * one for one in anew[2:]]).model_dump(exclude={"values"}),
        "ratio": round(statistics.median(ratios), 4),
    }


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--dtypes", default="bfloat16")
    parser.add_argument("--batches", default="1,32")
    parser.add_argument("--repeats", type=int, default=9)
    options = parse(parser)
    dtypes = options.dtypes.split(",")
    report: dict[str, Any] = {"prompt_tokens": PROMPT, "new_tokens": NEW}
    with subject_of(options) as (model, folder):
        vocabulary = open_checkpoint(model, None, DigestMemory(None)).vocabulary
        for dtype in dtypes:
            with client_of(model, "invariant", dtype, options.device, f"{folder}/{dtype}") as client:
                report[dtype] = {
                    batch: measure(client, vocabulary, int(batch), options.repeats)
                    for batch in options.batches.split(",")
                }
                report["numerics"] = client.numerics.model_dump(exclude_none=True)  # torch's version and the GPU's name
    tell(report, options, shown=("prompt_tokens", "new_tokens", *dtypes))


if __name__ == "__main__":
    main()
