"""What a stabilized model must show: the tokens of ``generate``, lm-eval's digits and pipelines at every batch size.

``python tests/benchmarks/drop_in.py --model DIR [--random] [--device cuda] [--dtype bfloat16] [--out FILE]``. DIR is a
GPT-2 with its tokenizer (the embedded one if none). Parts: ``tokens`` (greedy float32 under ``single`` against
``model.generate``), ``evaluation`` (lm-eval), ``pipeline`` (sampled, with a seed), ``speed`` (sampled steps).
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import subjects
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from local_tasks import TASKS, evaluate, questions, write_tasks

import stablegen
from stablegen.machine.device import Device
from stablegen.machine.plan import find_device, version_of

BATCH_SIZES = (1, 4, 16, 64)
PARTS = ("tokens", "evaluation", "pipeline", "speed")
PROMPTS, NEW = 500, 32
SAMPLED = {"do_sample": True, "temperature": 0.8, "top_k": 50, "top_p": 0.95}
ROUNDS = 5
SPEED_NEW, SPEED_ROWS = 64, (1, 8, 32)


def main() -> None:
    parser = subjects.parser_of(__doc__)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--items", type=int, default=300)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS)
    options = subjects.parse(parser)
    device = find_device(options.device, options.dtype)
    with subjects.subject_of(options) as (directory, folder):
        report: dict[str, Any] = {
            "device": device.model,
            "versions": {name: version_of(name) for name in ("torch", "triton", "transformers", "lm-eval")},
        }
        for part in options.parts:
            report[part] = globals()[f"measure_{part}"](directory, device, options, Path(folder) / part)
            print(json.dumps({part: report[part]}, indent=1), flush=True)
        subjects.tell(report, options, shown=("device", "versions"))


def load(directory: str | None, device: Device, dtype: str) -> tuple[Any, Any]:
    """Return the model and its tokenizer, as a user of transformers has them."""
    from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

    path = Path(directory or Path(stablegen.__file__).parent / "models" / "tiny-gpt2")
    model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).eval().to(device.name)
    end = "<|endoftext|>"
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(path / "tokenizer.json"), eos_token=end, pad_token=end)
    tokenizer.padding_side = "left"
    return model, tokenizer


def measure_tokens(directory: str | None, device: Device, _: Any, folder: Path) -> dict[str, Any]:
    """Compare tokens, and on a CPU score rows too, of greedy float32 answers with ``model.generate``'s."""
    model, tokenizer = load(directory, device, "float32")
    settings = {"max_new_tokens": NEW, "do_sample": False, "pad_token_id": tokenizer.pad_token_id}
    settings |= {"return_dict_in_generate": True, "output_scores": True}
    inputs = [tokenizer(prompt, return_tensors="pt").to(model.device) for prompt in questions(PROMPTS)]
    theirs = [model.generate(**one, **settings) for one in inputs]
    stablegen.stabilize(model, tokenizer, policy="single", cache_dir=folder)
    tokens = scores = rows = 0
    for one, other in zip(inputs, theirs, strict=True):
        ours = model.generate(**one, **settings)
        tokens += torch.equal(ours.sequences, other.sequences)
        rows += len(other.scores)
        scores += sum(torch.equal(mine, yours) for mine, yours in zip(ours.scores, other.scores, strict=True))
    stablegen.restore(model)
    return {"prompts": len(inputs), "equal_tokens": tokens, "score_rows": rows, "equal_score_rows": scores}


def measure_evaluation(directory: str | None, device: Device, options: Any, folder: Path) -> dict[str, Any]:
    """Run lm-eval at every batch size: its own model as it is, over a stabilized model, and the model ``stablegen``."""
    from lm_eval.models.huggingface import HFLM

    from stablegen.lm_eval import StablegenLM

    folder.mkdir()
    tasks = write_tasks(folder, items=options.items, new=NEW)
    model, tokenizer = load(directory, device, options.dtype)

    def plain(batch_size: int) -> Any:
        return HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size, device=device.name), TASKS

    def stabilized(batch_size: int) -> Any:
        stablegen.stabilize(model, tokenizer, policy="invariant", cache_dir=folder / f"hf-{batch_size}")
        return plain(batch_size)[0], TASKS[:1]

    def own(batch_size: int) -> Any:
        stablegen.stabilize(model, tokenizer, policy="invariant", cache_dir=folder / f"own-{batch_size}")
        return StablegenLM(client=model.stablegen, batch_size=batch_size), TASKS

    return {
        "items": options.items,
        "dtype": options.dtype,
        "batch_sizes": BATCH_SIZES,
        "HFLM": _evaluations(plain, tasks),
        "HFLM over a stabilized model": _evaluations(stabilized, tasks),
        "stablegen": _evaluations(own, tasks),
    }


def _evaluations(make: Callable[[int], tuple[Any, Sequence[str]]], tasks: Path) -> dict[str, Any]:
    """Return metrics at every batch size, and how many items of each task differ from batch size 1."""
    found = []
    for batch_size in BATCH_SIZES:
        wrapped, names = make(batch_size)
        started = time.perf_counter()
        metrics, outputs = evaluate(wrapped, tasks, tuple(names))
        found.append((metrics, outputs, time.perf_counter() - started))
        model = getattr(wrapped, "model", None)
        if model is not None and "stablegen" in vars(model):
            stablegen.restore(model)
    first = found[0]
    return {
        "seconds": [round(seconds, 2) for *_, seconds in found],
        "metrics": [metrics for metrics, *_ in found],
        "metrics_equal": all(metrics == first[0] for metrics, *_ in found),
        "items_that_differ_from_batch_size_1": {
            name: [sum(a != b for a, b in zip(outputs[name], first[1][name], strict=True)) for _, outputs, _ in found]
            for name in first[1]
        },
    }


def measure_pipeline(directory: str | None, device: Device, options: Any, folder: Path) -> dict[str, Any]:
    """Sample with a seed through transformers' pipeline in batches of 1 and of 8."""
    from transformers import pipeline

    model, tokenizer = load(directory, device, options.dtype)
    prompts = questions(64)
    report: dict[str, Any] = {"prompts": len(prompts), "dtype": options.dtype}
    for name in ("plain", "invariant"):
        found = []
        for batch_size in (1, 8):
            settings: dict[str, Any] = {"max_new_tokens": NEW, "return_tensors": True, "do_sample": True}
            if name != "plain":
                settings["seed"] = 7
                stablegen.stabilize(model, tokenizer, policy=name, cache_dir=folder / f"{name}-{batch_size}")
            torch.manual_seed(7)
            generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
            answers = generator(prompts, batch_size=batch_size, **settings)
            # batches are padded on the left, and behind their ends
            skip = {tokenizer.pad_token_id}
            found.append([[t for t in one[0]["generated_token_ids"] if t not in skip] for one in answers])
            if name != "plain":
                stablegen.restore(model)
        report[name] = {"differ": sum(one != other for one, other in zip(*found, strict=True))}
    return report


def measure_speed(directory: str | None, device: Device, options: Any, folder: Path) -> dict[str, Any]:
    """Time answers: ``model.generate`` against ``invariant``, in one run, both warmed up, nothing cached."""
    model, tokenizer = load(directory, device, options.dtype)
    own = type(model).generate
    stablegen.stabilize(model, tokenizer, policy="invariant", cache_dir=folder)
    report: dict[str, Any] = {"dtype": options.dtype, "new_tokens": SPEED_NEW, "rounds": ROUNDS, "settings": SAMPLED}
    asked = iter(questions(ROUNDS * sum(SPEED_ROWS) + sum(SPEED_ROWS)))
    fixed: dict[str, Any] = {"max_new_tokens": SPEED_NEW, "pad_token_id": tokenizer.pad_token_id, "eos_token_id": None}
    for rows in SPEED_ROWS:
        times: dict[str, list[float]] = {"generate": [], "invariant": [], "invariant, greedy": []}
        for attempt in range(ROUNDS + 1):
            prompts = [next(asked) for _ in range(rows)]
            inputs = tokenizer(prompts, return_tensors="pt", padding=True).to(model.device)
            calls: dict[str, Callable[[], Any]] = {
                "generate": lambda: own(model, **inputs, **fixed, **SAMPLED),  # noqa: B023 - called before the next
                "invariant": lambda: model.generate(**inputs, **fixed, **SAMPLED, seed=attempt),  # noqa: B023
                "invariant, greedy": lambda: model.generate(**inputs, **fixed, do_sample=False),  # noqa: B023
            }
            for name, call in calls.items():
                started = time.perf_counter()
                call().cpu()
                if attempt:
                    times[name].append(1000 * (time.perf_counter() - started) / SPEED_NEW)
        medians = {name: statistics.median(taken) for name, taken in times.items()}
        report[f"rows {rows}"] = {
            "milliseconds a step": {name: round(median, 3) for name, median in medians.items()},
            "spread": {name: [round(min(taken), 3), round(max(taken), 3)] for name, taken in times.items()},
            "times as fast as generate": round(medians["generate"] / medians["invariant"], 2),
        }
    stablegen.restore(model)
    return report


if __name__ == "__main__":
    main()
