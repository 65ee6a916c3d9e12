"""How far margins move between two numerics, in units in the last place: what the guard's prior rests on.

Each prompt runs alone under ``native``, then beside others at each batch size; the margin between the two tokens that
were best alone is compared step by step, up to the first flip. Then the same tokens are scored in another dtype.

Run it with: python tests/benchmarks/margin_noise.py [--model DIR] [--device cpu] [--prompts 48] [--out FILE]
"""

import argparse
import json
from pathlib import Path

import torch

from stablegen.core.params import GenerationParams
from stablegen.core.policy import Batch, control_policy
from stablegen.core.request import Request
from stablegen.engine.base import Engine
from stablegen.guard.verdicts import MANTISSA_BITS
from stablegen.lab.prompts import SAMPLE
from stablegen.machine.digests import DigestMemory
from stablegen.sources.checkpoint import Checkpoint, CheckpointSource, open_checkpoint
from stablegen.tokenizer import Tokenizer

Rows = list[torch.Tensor]


def run(engine: Engine, requests: list[Request], size: int) -> list[torch.Tensor]:
    """Return each request's score rows [steps, V], run ``size`` requests at a time."""
    answers = []
    for start in range(0, len(requests), size):
        group = requests[start : start + size]
        rows: dict[Request, Rows] = {request: [] for request in group}

        def observe(request: Request, row: torch.Tensor, rows: dict[Request, Rows] = rows) -> None:
            rows[request].append(row.cpu().clone())

        for _ in engine.generate(Batch(tuple(group)), observe):
            pass
        answers += [torch.stack(rows[request]) for request in group]
    return answers


def noise(base: torch.Tensor, other: torch.Tensor, dtype: str) -> torch.Tensor:
    """Return how far the margin of the two tokens best in ``base`` moved, in ulps of the winning score in ``dtype``."""
    pair = base.topk(2).indices
    before, after = base.gather(1, pair), other.gather(1, pair)
    ulp = torch.exp2(torch.floor(torch.log2(base.amax(1).abs().clamp(min=1))) - MANTISSA_BITS[dtype])
    return ((after[:, 0] - after[:, 1]) - (before[:, 0] - before[:, 1])) / ulp


def summary(moved: torch.Tensor) -> dict[str, float]:
    """Return the spread of the noise in ulps."""
    size = moved.abs()
    return {"std": round(float(moved.std()), 3), "p99": round(float(size.quantile(0.99)), 2), "max": float(size.max())}


def load(checkpoint: Checkpoint, device: str, dtype: str) -> Engine:
    """Return the native engine in a dtype."""
    source = CheckpointSource(checkpoint)
    return source.start(source.plan(control_policy(), dtype, device))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--sizes", default="2,8,32")
    parser.add_argument("--dtypes", default="float32,bfloat16,float16")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    memory = DigestMemory(None)
    checkpoint = open_checkpoint(options.model, None, memory)
    tokenizer = Tokenizer.from_file(checkpoint.tokenizer_file, memory.digest(checkpoint.tokenizer_file))
    prompts = SAMPLE[: options.prompts]
    params = GenerationParams(max_new_tokens=options.tokens)
    requests = [Request(tokenizer.encode(p), params, checkpoint.identity, tokenizer.digest, p) for p in prompts]
    results: list[dict[str, object]] = []
    alone: dict[str, list[torch.Tensor]] = {}
    for dtype in options.dtypes.split(","):
        engine = load(checkpoint, options.device, dtype)
        alone[dtype] = run(engine, requests, 1)
        for size in map(int, options.sizes.split(",")):
            moved, diverged = [], 0
            for before, after in zip(alone[dtype], run(engine, requests, size), strict=True):
                flips = (before.argmax(1) != after.argmax(1)).nonzero().flatten()
                diverged += len(flips) > 0
                end = int(flips[0]) + 1 if len(flips) else len(before)
                moved.append(noise(before[:end], after[:end], dtype))
            found = summary(torch.cat(moved)) | {"diverged": diverged, "of": len(requests)}
            results.append({"pair": f"{dtype}, batch size 1 -> {size}", "ulp_of": dtype, **found})
            print(results[-1], flush=True)
    for dtype in options.dtypes.split(",")[1:]:
        engine = load(checkpoint, options.device, dtype)
        model, moved = engine.model, []  # type: ignore[attr-defined]
        for request, rows in zip(requests, alone["float32"], strict=True):
            ids = torch.tensor([[*request.prompt_ids, *rows.argmax(1).tolist()]], device=model.device)
            with torch.inference_mode():
                scores = model(ids).logits[0, len(request.prompt_ids) - 1 : -1].float().cpu()
            moved.append(noise(rows, scores, dtype))
        results.append({"pair": f"float32 -> {dtype}", "ulp_of": dtype, **summary(torch.cat(moved))})
        print(results[-1], flush=True)
    report = {
        "model": Path(checkpoint.identity.name).name,
        "tokens": options.tokens,
        "numerics": engine.numerics.model_dump(exclude_none=True, exclude={"dtype"}),
        "noise_in_ulp": results,
    }
    if options.out is not None:
        options.out.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
