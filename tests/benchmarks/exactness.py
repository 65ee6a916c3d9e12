"""Whether ``exact`` is exact, and whether one forward pass proves what generating anew would.

For each dtype, answers of ``invariant`` are cached. Then, in a new process and so after a restart, each is judged and
generated anew from scratch, in another order, beside other rows. Lastly the same answers, and others with divergences
planted in them (a token edited; answers of ``native`` bfloat16), are verified in one pass, and each finding is held
against generating anew: the step at which they part, and every bit of what a fresh run gives.

Run it with: python tests/benchmarks/exactness.py [--model DIR [--random]] [--dtypes float32,float16,bfloat16]
[--answers 3334] [--out FILE]
"""

import random
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Any

from subjects import client_of, parse, parser_of, subject_of, tell

from stablegen.client import Client
from stablegen.core.record import Record
from stablegen.core.trace import Trace
from stablegen.machine.digests import DigestMemory
from stablegen.sources.checkpoint import open_checkpoint

NATIVE_AT_ONCE = 32


def requests_of(client: Client, vocabulary: int, count: int, seed: int) -> list[Any]:
    """Return requests of random tokens: prompts of 1 to 200, 8 to 64 new ones."""
    draw = random.Random(seed)
    return [
        client.make_request(
            [draw.randrange(vocabulary) for _ in range(draw.choice((1, 7, 63, 64, 65, 130, 200)))],
            {"max_new_tokens": draw.choice((8, 17, 32, 64))},
        )
        for _ in range(count)
    ]


def mixed(records: Sequence[Record], seed: int) -> Iterator[list[Record]]:
    """Yield records in another order, in groups of many sizes."""
    draw = random.Random(seed)
    left = list(records)
    draw.shuffle(left)
    while left:
        size = draw.choice((1, 2, 3, 8, 33, 100, 300))
        yield left[:size]
        left = left[size:]


def with_an_edit(record: Record, vocabulary: int, seed: int) -> Record:
    """Return the record with another token at a step chosen by ``seed``."""
    draw = random.Random(seed)
    trace = record.trace
    assert trace is not None
    step = draw.randrange(len(trace))
    tokens = list(trace.tokens)
    tokens[step] = (tokens[step] + draw.randrange(1, vocabulary - 1)) % vocabulary
    edited = Trace.of(tokens, trace.runner_ups, trace.scores, trace.runner_up_scores, trace.score_hash)
    return record._replace(trace=edited)


def recompute(model: str | None, dtype: str, device: str, folder: str) -> dict[str, int]:
    """Judge each answer of a cache and generate it anew; return how many are exact by word, and by bits."""
    said = equal = count = 0
    with client_of(model, "invariant", dtype, device, folder) as client:
        records = list(client.cache.records())
        for group in mixed(records, seed=1):
            said += sum(client.judge(record).status == "exact" for record in group)
            found = client.verify(group, from_scratch=True)
            equal += sum(one.fresh is not None and one.fresh.trace == one.record.trace for one in found)
            count += len(group)
    return {"answers": count, "said_exact": said, "bit_equal": equal}


def prove(client: Client, answers: Sequence[Record]) -> dict[str, int]:
    """Verify answers in one pass and from scratch; return how many part, and in how many the two ways agree."""
    parted = agree = 0
    for group in mixed(answers, seed=2):
        proved = client.verify(group)
        anew = client.verify(group, from_scratch=True)
        for one, other in zip(proved, anew, strict=True):
            assert one.fresh is not None
            assert other.fresh is not None
            parted += other.verdict.status == "diverged"
            same = one.fresh.trace == other.fresh.trace and one.fresh.finish_reason == other.fresh.finish_reason
            agree += same and (one.verdict.status, one.verdict.step) == (other.verdict.status, other.verdict.step)
    return {"answers": len(answers), "diverged": parted, "agree": agree}


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--dtypes", default="float32,float16,bfloat16")
    parser.add_argument("--answers", type=int, default=3334, help="answers of each dtype")
    parser.add_argument("--native", type=int, default=320, help="answers of native bfloat16 to be verified")
    options = parse(parser)
    report: dict[str, Any] = {"exact": {}, "one_pass": {}}
    started = time.perf_counter()
    with subject_of(options) as (model, folder):
        vocabulary = open_checkpoint(model, None, DigestMemory(None)).vocabulary
        with client_of(model, "native", "bfloat16", options.device, f"{folder}/native") as client:
            asked = requests_of(client, vocabulary, options.native, seed=7)
            native = []
            for start in range(0, len(asked), NATIVE_AT_ONCE):
                native += [done.record for done in client.run(asked[start : start + NATIVE_AT_ONCE])]
        for dtype in options.dtypes.split(","):
            cache = f"{folder}/{dtype}"
            with client_of(model, "invariant", dtype, options.device, cache) as client:
                records = [done.record for done in client.run(requests_of(client, vocabulary, options.answers, seed=3))]
                edited = [with_an_edit(record, vocabulary, at) for at, record in enumerate(records[::4])]
                report["one_pass"][dtype] = {
                    "own": prove(client, [record for at, record in enumerate(records) if at % 4]),
                    "with an edited token": prove(client, edited),
                    "of native bfloat16": prove(client, native),
                }
                report["numerics"] = client.numerics.model_dump(exclude_none=True)
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                report["exact"][dtype] = pool.submit(recompute, model, dtype, options.device, cache).result()
    report["seconds"] = round(time.perf_counter() - started, 1)
    tell(report, options, shown=("exact", "one_pass", "seconds"))


if __name__ == "__main__":
    main()
