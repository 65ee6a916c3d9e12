"""Whether the guard is right: calibrated on one set of prompts, judged on another, against a bare margin threshold.

Each prompt of the second set is answered alone under ``native``; its answer is judged, then recomputed in batches of
each size. Kept: recall, precision and flagged share at several values of ``accepted_risk``, calibration error, Brier
scores, and the precision-recall curves of the predicted probability and of the smallest margin. Answers come from
several processes that share a cache: transformers waits for the CPU most of the time.

Run it with: python tests/benchmarks/guard_recall.py [--model DIR [--random]] [--dtype bfloat16] [--sampled] [--out F]
"""

import random
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from itertools import repeat
from multiprocessing import get_context
from typing import Any

from subjects import client_of, parse, parser_of, subject_of, tell

from stablegen.client import Client
from stablegen.core.audit import Share
from stablegen.core.verdict import DEFAULT_ACCEPTED_RISK
from stablegen.lab.prompts import SAMPLE
from stablegen.reports.audit import brier, calibration_error, reliability

_TEXT = """
rain bread war gold tea night dogs ships kings letters horses silence friends winter school trains cats tears rivers
stones birds trees fire wind clocks doors roads walls glass salt milk honey wool iron paper ink songs games dreams
mirrors maps bells boats bridges towers gardens flowers grass snow ice sand dust smoke light shadows stars clouds
fields hills caves islands castles markets kitchens cellars attics windows ladders wheels engines lamps candles
soldiers farmers sailors doctors painters teachers judges bakers thieves lions wolves bears foxes owls bees apples
cherries pepper coffee wine mountains deserts storms
"""
WORDS = _TEXT.split()
FRAMES = (
    "Long ago {} was",
    "Nobody knows about {}, but",
    "Tell me: what about {}?\nanswer : ",
    "My opinion of {} is",
    "He said that {}",
    "I have always loved {} because",
    "There is no {} without",
    "Please explain {}.\nanswer : ",
    "First came {}, and then",
    "The truth about {}",
)
ACCEPTED_RISKS = sorted({0.01, 0.005, 0.003, 0.002, 0.001, DEFAULT_ACCEPTED_RISK}, reverse=True)
SAMPLED = {"do_sample": True, "seed": 1, "temperature": 0.8, "top_k": 50, "top_p": 0.95}
Told = list[tuple[float, bool]]


def curve(told: Told) -> list[dict[str, float]]:
    """Return precision, recall and flagged share as the score above which is flagged falls."""
    total = sum(parted for _, parted in told)
    points, found = [], 0
    ordered = sorted(told, reverse=True)
    for count, (score, parted) in enumerate(ordered, start=1):
        found += parted
        if count == len(ordered) or ordered[count][0] != score:
            points.append(
                {
                    "at": score,
                    "precision": round(found / count, 5),
                    "recall": round(found / total, 5) if total else 0.0,
                    "flagged": round(count / len(told), 5),
                }
            )
    return points


def at_accepted_risk(told: Told, accepted_risk: float) -> dict[str, object]:
    """Return what the guard catches where it flags every answer of a larger probability."""
    flagged = [parted for probability, parted in told if probability > accepted_risk]
    return {
        "accepted_risk": accepted_risk,
        "recall": Share.over(sum(flagged), sum(parted for _, parted in told)).model_dump(),
        "precision": Share.over(sum(flagged), len(flagged)).model_dump(),
        "flagged": round(len(flagged) / len(told), 5),
    }


def thinned(points: Sequence[dict[str, float]]) -> list[dict[str, float]]:
    """Return 200 to 400 points of a curve, its last among them; all where they are fewer."""
    step = max(1, len(points) // 200)
    return [*points[:-1:step], *points[-1:]]


def flagged_at(told: Told, recall: float) -> float | None:
    """Return the least share that must be flagged to catch so many of those that part."""
    return next((point["flagged"] for point in curve(told) if point["recall"] >= recall), None)


def best_threshold(told: Told) -> float:
    """Return the Brier score of the best single threshold, which says 0 or 1 and is chosen on the very answers."""
    ordered = sorted(told, reverse=True)
    wrong = sum(parted for _, parted in ordered)  # nothing flagged
    best = wrong
    for count, (score, parted) in enumerate(ordered, start=1):
        wrong += -1 if parted else 1
        if count == len(ordered) or ordered[count][0] != score:
            best = min(best, wrong)
    return best / len(told)


class Worker:
    """What one process of the pool holds."""

    client: Client

    @classmethod
    def start(cls, *asked_of: str) -> None:
        """Make the process's client."""
        warnings.simplefilter("ignore")
        cls.client = client_of(*asked_of)


def answer(prompts: list[str], settings: Mapping[str, Any]) -> int:
    """Answer each prompt alone; the cache keeps it."""
    return sum(len(Worker.client.complete(prompt, **settings).token_ids) for prompt in prompts)


def parts(keys: list[str]) -> list[bool]:
    """Return of each answer whether it comes out otherwise in a batch of them all."""
    return [one.verdict.status == "diverged" for one in Worker.client.verify(keys, from_scratch=True)]


def pieces(whole: list[str], size: int) -> Iterator[list[str]]:
    """Yield a list in parts of a size."""
    for start in range(0, len(whole), size):
        yield whole[start : start + size]


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--sizes", default="2,8,32,128")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--calibrate", type=int, default=60, help="prompts of the first set, beside the package's own")
    parser.add_argument("--judge", type=int, default=600, help="prompts of the second set")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--sampled", action="store_true", help=f"sample: {SAMPLED}")
    options = parse(parser)
    sizes = [int(size) for size in options.sizes.split(",")]
    prompts = [frame.format(word) for word in WORDS for frame in FRAMES]
    random.Random(0).shuffle(prompts)
    calibrating = [*SAMPLE, *prompts[: options.calibrate]]
    judging = prompts[options.calibrate :][: options.judge]
    settings = {"max_new_tokens": options.tokens, **(SAMPLED if options.sampled else {})}
    started = time.perf_counter()
    with subject_of(options) as (model, folder):
        asked_of = (model, "native", options.dtype, options.device, f"{folder}/cache")
        with (
            client_of(*asked_of) as client,
            ProcessPoolExecutor(
                options.workers,
                mp_context=get_context("spawn"),
                initializer=Worker.start,
                initargs=asked_of,  # type: ignore[arg-type]
            ) as pool,
        ):
            asked = calibrating + judging
            list(pool.map(answer, pieces(asked, 8), repeat(settings)))
            keys = [client.request(prompt, **settings).key for prompt in asked]
            first, last = keys[: len(calibrating)], keys[len(calibrating) :]
            second = [client.inspect(key) for key in last]
            priors = [client.judge(record).probability or 0.0 for record in second]
            batches = [batch for size in sizes for batch in pieces(last, size)]
            recomputed = pool.map(parts, batches)  # meanwhile
            (calibration,) = client.calibrate(first, sizes=sizes)
            verdicts = [client.judge(record) for record in second]
            truth = [one for found in recomputed for one in found]
            numerics = client.numerics
    parted = {size: truth[len(second) * at : len(second) * (at + 1)] for at, size in enumerate(sizes)}
    told = list(zip([verdict.probability or 0.0 for verdict in verdicts] * len(sizes), truth, strict=True))
    before = list(zip(priors * len(sizes), truth, strict=True))
    margins = [-min(record.trace.margins) for record in second if record.trace is not None]
    bare = list(zip(margins * len(sizes), truth, strict=True))
    report = {
        "numerics": numerics.model_dump(exclude_none=True),
        "calibration": {"prompts": calibration.prompts, "steps": calibration.steps, "flips": calibration.flips},
        "settings": settings,
        "completions": len(truth),
        "diverged": {size: sum(rows) for size, rows in parted.items()},
        "at_accepted_risk": [at_accepted_risk(told, accepted_risk) for accepted_risk in ACCEPTED_RISKS],
        "calibration_error": round(calibration_error(reliability(told)), 5),
        "calibration_error_of_the_prior": round(calibration_error(reliability(before)), 5),
        "brier": round(brier(told), 5),
        "brier_of_the_prior": round(brier(before), 5),
        "brier_of_the_best_threshold": round(best_threshold(bare), 5),
        "flagged_at_recall_0.995": {"probability": flagged_at(told, 0.995), "margin": flagged_at(bare, 0.995)},
        "reliability": [one.model_dump() for one in reliability(told)],
        "curve_of_the_probability": thinned(curve(told)),
        "curve_of_the_margin": thinned(curve(bare)),
        "seconds": round(time.perf_counter() - started, 1),
    }
    long = ("curve", "numerics", "reliability")
    tell(report, options, shown=tuple(name for name in report if not name.startswith(long)))


if __name__ == "__main__":
    main()
