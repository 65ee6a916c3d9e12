"""What the guard's judgement of one record costs: the prior, and a calibration of each kind.

Run it with: python tests/benchmarks/judge_cost.py [--steps 128] [--records 2000] [--out FILE]
"""

import argparse
import json
import platform
import statistics
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random

sys.path.insert(0, str(Path(__file__).parents[1]))
from noise import shaken, steady, traces
from support import MODEL, numerics, record

import stablegen
from stablegen.core.record import Record
from stablegen.core.trace import Trace
from stablegen.guard.calibration import fit
from stablegen.guard.verdicts import judge
from stablegen.machine.device import cpu_model


def microseconds(records: list[Record], judged: Callable[[Record], object]) -> dict[str, float]:
    """Return median and range of the time of one judgement, of records whose columns nobody has looked at yet."""
    took = []
    for one in records:
        assert one.trace is not None
        unread = one._replace(trace=Trace(bytes(one.trace)))
        before = time.perf_counter()
        judged(unread)
        took.append((time.perf_counter() - before) * 1e6)
    cuts = statistics.quantiles(took, n=100)
    return {"median": round(cuts[49], 1), "p5": round(cuts[4], 1), "p95": round(cuts[94], 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=128)
    parser.add_argument("--records", type=int, default=2000)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    before, now = numerics(policy="native"), numerics(policy="invariant")
    noise = steady(Random(1), 0.1)
    found = {}
    for name, grid in (("scores of any value", None), ("scores on a grid", 0.125)):
        made = traces(3, options.records, options.steps, grid)
        records = [record(traced=trace, numerics=before) for trace in made]
        pairs = [(trace, shaken(trace, noise, grid)) for trace in traces(2, 75, grid=grid)]
        calibration = fit(MODEL, before, now, pairs, prompts=75)
        for basis, chosen in (("prior", None), ("calibrated", calibration)):
            judged = partial(judge, numerics=now, check=None, calibration=chosen)
            microseconds(records[:100], judged)  # warms up
            found[f"{basis}, {name}"] = microseconds(records, judged)
            print(f"{basis}, {name}: {found[f'{basis}, {name}']}", flush=True)
    report = {
        "microseconds": found,
        "steps": options.steps,
        "records": options.records,
        "cpu": cpu_model(),
        "python": platform.python_version(),
        "stablegen": stablegen.__version__,
    }
    if options.out is not None:
        options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
