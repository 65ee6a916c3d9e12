"""What tests compare beyond one engine: clients around it, other processes, and other GPUs.

As a script, with the repository on PYTHONPATH, it computes for others: ``record FILE`` keeps what the ``invariant``
policy gives here, ``replay FILE`` says whether another GPU gives the same.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from comparisons import Comparison
from engines import DTYPES, TINY, load_model, make_engine, make_ids, make_pool, make_request, run, traces

import stablegen
from stablegen.client import Client
from stablegen.core.numerics import Numerics
from stablegen.core.policy import Batch, Shape, load_policy
from stablegen.core.trace import Trace
from stablegen.engine.invariant.architectures.gpt2 import GPT2
from stablegen.engine.invariant.engine import InvariantEngine
from stablegen.engine.loading import kernels_for
from stablegen.machine.plan import find_device, numerics_on

# --- through the client -----------------------------------------------------------------------------------------------


class Clients:
    """Make clients around one model whose caches are empty but for one shared self-check."""

    def __init__(self, folder: Path, name: str, policy: str, dtype: str, device: str = "cpu") -> None:
        from tokenizers import Tokenizer

        self._folder, self._count = folder, 0
        self._model, self._policy = load_model(name, dtype, device), policy
        self._tokenizer = Tokenizer.from_file(str(TINY / "tokenizer.json"))
        with self._open(folder / "checked") as client:
            self.check = client.self_check()
            self.numerics = client.numerics

    def fresh(self) -> Client:
        """Return a client that has not answered anything."""
        self._count += 1
        cache = self._folder / str(self._count)
        shutil.copytree(self._folder / "checked", cache)
        return self._open(cache)

    def _open(self, cache: Path) -> Client:
        return Client(
            self._model,
            self._tokenizer,
            policy=self._policy,
            cache_dir=cache,
            on_risk="serve",
            kv_cache_size=2**29,  # many of them share a device with other processes
        )


def compare_companies_of_client(comparison: Comparison, clients: Clients, prompts: list[tuple[int, ...]]) -> list[Any]:
    """Ask for the same prompts alone, together, in other orders and half cached; return all records."""
    needle, others = prompts[0], prompts[1:]
    calls = {
        "alone": [[prompt] for prompt in prompts],
        "together": [prompts],
        "needle last": [[*others, needle]],
        "reversed": [prompts[::-1]],
        "half cached": [others[::2], [*others, needle]],
        "needle cached": [[needle], prompts],
    }
    expected: dict[str, Trace] = {}
    records = []
    for name, asked in calls.items():
        with clients.fresh() as client:
            for call in asked:
                for done in client.run([client.make_request(ids, {"max_new_tokens": 4}) for ids in call]):
                    if done.cached:
                        continue
                    assert done.trace is not None
                    first = expected.setdefault(done.key, done.trace)
                    comparison.add_hashes(name, first.score_hash, done.trace.score_hash)
                    records.append(done.record)
    return records


# --- in another process -----------------------------------------------------------------------------------------------


def fingerprints(name: str, device: str) -> dict[str, dict[str, Any]]:
    """Return, for each policy and dtype, the digest of the numerics and the hashes of every score row."""
    pool = make_pool(name, count=5)
    result = {}
    for policy, dtypes in (("invariant", DTYPES), ("single", DTYPES), ("padded:4", ("float32", "bfloat16"))):
        for dtype in dtypes:
            engine = make_engine(name, policy, dtype, device)
            if policy == "invariant":
                batches = [Batch(tuple(pool))]
            elif policy == "single":
                batches = [Batch((request,)) for request in pool[:3]]
            else:
                batches = [Batch((*pool[:3], None), Shape(64))]
            answers = [answer for batch in batches for _, answer in sorted(run(engine, batch).items())]
            hashes = [value for answer in answers for value in answer.trace.score_hash]
            result[f"{policy} {dtype}"] = {"numerics": engine.numerics.digest, "hashes": hashes}
    return result


def fingerprints_elsewhere(name: str, device: str) -> dict[str, dict[str, Any]]:
    """Return ``fingerprints`` as another process computes them."""
    package = str(Path(stablegen.__file__).parents[1])
    paths = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, __file__, "fingerprints", name, device, str(torch.get_num_threads())],
        env=os.environ | {"PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    result: dict[str, dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return result


# --- on another GPU ---------------------------------------------------------------------------------------------------

RESULTS = Path(__file__).parent / "benchmarks" / "results"
SIZES_OF_MODEL: dict[str, dict[str, Any]] = {
    "small": {"n_layer": 12, "n_embd": 768, "n_head": 12, "vocab_size": 50257, "n_positions": 1024},
    "tiny": {"n_layer": 1, "n_embd": 96, "n_head": 3, "vocab_size": 211, "n_positions": 256},
}
ONE_ARCHITECTURE = frozenset({"device_model", "sm_count"})
"""Fields of ``Numerics`` that must not matter among GPUs of one compute capability."""


@cache
def exact_weights(size: str) -> dict[str, torch.Tensor]:
    """Return a GPT-2's random weights that are the same wherever they are made: integers times powers of two."""
    shape = SIZES_OF_MODEL[size]
    width = shape["n_embd"]
    shapes: dict[str, tuple[int, ...]] = {
        "wte.weight": (shape["vocab_size"], width),
        "wpe.weight": (shape["n_positions"], width),
        "ln_f.weight": (width,),
        "ln_f.bias": (width,),
    }
    for i in range(shape["n_layer"]):
        for name, k, n in (
            ("attn.c_attn", width, 3 * width),
            ("attn.c_proj", width, width),
            ("mlp.c_fc", width, 4 * width),
            ("mlp.c_proj", 4 * width, width),
        ):
            shapes |= {f"h.{i}.{name}.weight": (k, n), f"h.{i}.{name}.bias": (n,)}
        shapes |= {f"h.{i}.ln_{j}.{part}": (width,) for j in (1, 2) for part in ("weight", "bias")}
    bits = np.random.PCG64(0)  # the raw stream of a seed never changes
    weights = {}
    for name, dims in shapes.items():
        count = int(np.prod(dims))
        numbers = bits.random_raw(-(-count // 4)).astype("<u8").view("<i2")[:count].astype(np.float32)
        # queries and keys large enough to make attention choose
        scaled = torch.from_numpy(numbers).view(dims) * 2.0 ** (-18 if "c_attn.weight" in name else -20)
        weights[name] = scaled + 1.0 if ".weight" in name and "ln_" in name else scaled
    return weights


def exact_engine(size: str, dtype: str, device: str = "cpu", kernels: Any = None, **settings: Any) -> InvariantEngine:
    """Return an engine of ``invariant`` over ``exact_weights``."""
    target = torch.device(device)
    kernels = kernels or kernels_for(target)
    config = {"model_type": "gpt2", **SIZES_OF_MODEL[size]}
    model = GPT2(config, exact_weights(size), kernels, dtype=getattr(torch, dtype), device=target)
    numerics = numerics_on(find_device(device, dtype), load_policy("invariant"), dtype)
    return InvariantEngine(model, numerics, **settings)


def answers_to_keep(engine: InvariantEngine) -> list[str]:
    """Return a digest of each answer to a fixed set of requests: its tokens, and the hashes of its score rows."""
    vocabulary, context = engine.model.vocabulary, engine.model.context
    lengths = [min(length, context - 8) for length in (1, 21, 63, 64, 65, 130, 200, 300, 513, 900)]
    lengths += [1 + 7 * i % 40 for i in range(30)]
    requests = [make_request(make_ids(i, n, vocabulary), 8 - i % 3) for i, n in enumerate(lengths)]
    found = traces(engine, Batch(tuple(requests)))
    digests = []
    for slot, request in enumerate(requests):
        if slot % 10 == 1:
            assert traces(engine, Batch((request,)))[0] == found[slot], "not even invariant here"
        trace = found[slot]
        said = json.dumps([list(trace.tokens), list(trace.score_hash)])
        digests.append(hashlib.sha256(said.encode()).hexdigest()[:32])
    return digests


def record_answers(device: str, size: str = "small") -> dict[str, Any]:
    """Return what is kept for another machine: the numerics and the answers of each dtype."""
    kept: dict[str, Any] = {"model": f"GPT-2, {size}, random weights", "size": size, "dtypes": {}}
    for dtype in DTYPES:
        engine = exact_engine(size, dtype, device)
        kept["device"] = engine.numerics.device_model
        kept["compute_capability"] = engine.numerics.compute_capability
        kept["dtypes"][dtype] = {
            "numerics": engine.numerics.model_dump(mode="json", exclude_none=True),
            "answers": answers_to_keep(engine),
        }
    return kept


def slug_of(device: str) -> str:
    """Return a device's name as it stands in the names of files."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def obstacle(kept: Mapping[str, Any], dtype: str, here: Numerics) -> str | None:
    """Return why recorded answers need not be those of these numerics; None where they must be."""
    there = Numerics(**kept["dtypes"][dtype]["numerics"])
    differences = there.differences(here)
    told = [
        f"{name} {old} there, {new} here" for name, (old, new) in differences.items() if name not in ONE_ARCHITECTURE
    ]
    return f"recorded on {kept['device']} under other numerics: {', '.join(told)}" if told else None


def compare_replayed(comparison: Comparison, kept: Mapping[str, Any], dtype: str, engine: InvariantEngine) -> None:
    """Compare what another machine recorded with what this one computes."""
    there, here = kept["dtypes"][dtype]["answers"], answers_to_keep(engine)
    for i, (old, new) in enumerate(zip(there, here, strict=True)):
        comparison.add_hashes(f"request {i} of {kept['device']}", [old], [new])


def replay_answers(kept: Mapping[str, Any], device: str) -> dict[str, str]:
    """Return, for each dtype, what came of a replay: ``equal``, ``N answers differ``, or why it says nothing."""
    told = {}
    for dtype in kept["dtypes"]:
        engine = exact_engine(kept["size"], dtype, device)
        reason = obstacle(kept, dtype, engine.numerics)
        comparison = Comparison("", "replay", kept["size"], "invariant", dtype, engine.numerics.device_model)
        if reason is None:
            compare_replayed(comparison, kept, dtype, engine)
        told[dtype] = reason or (f"{comparison.differing} answers differ" if comparison.differing else "equal")
    return told


# --- as a script ------------------------------------------------------------------------------------------------------


def main(arguments: Sequence[str] | None = None) -> int:
    """Print fingerprints, record answers, or replay them; return 1 where a replay differs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    computing = commands.add_parser("fingerprints", help="print what another process compares")
    computing.add_argument("name")
    computing.add_argument("device")
    computing.add_argument("threads", type=int)
    recording = commands.add_parser("record", help="write what this device answers")
    recording.add_argument("--size", choices=sorted(SIZES_OF_MODEL), default="small")
    replaying = commands.add_parser("replay", help="compare with what was recorded")
    for command in (recording, replaying):
        command.add_argument("file", type=Path, help="a file, or a folder for replay-DEVICE.json")
        command.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    given = parser.parse_args(arguments)
    if given.command == "fingerprints":
        torch.set_num_threads(given.threads)
        print(json.dumps(fingerprints(given.name, given.device)))
        return 0
    if given.command == "record":
        kept = record_answers(given.device, given.size)
        path = given.file / f"replay-{slug_of(kept['device'])}.json" if given.file.is_dir() else given.file
        path.write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")
        print(path)
        return 0
    told = replay_answers(json.loads(given.file.read_text(encoding="utf-8")), given.device)
    print(json.dumps(told, indent=1))
    return int(any(result.endswith("differ") for result in told.values()))


if __name__ == "__main__":
    sys.exit(main())
