"""A generative and a multiple-choice task for lm-eval, made from prompts that ship with the package; no network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from stablegen.lab.prompts import SAMPLE

ANSWERS = (" I like it very much.", " I do not know what that is.", " the man said to her, and smiled.")
_BEGINNINGS = (
    *("", "My friend asked me this today. ", "It is raining outside. ", "Nobody had asked before. "),
    *("She looked up from her book. ", "Well, let us see! ", "In the morning the letter came. "),
)
_GENERATE = """
task: stablegen_generate
output_type: generate_until
doc_to_text: "{{question}}"
doc_to_target: "{{answers[gold]}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: NEW, do_sample: false}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
_CHOOSE = """
task: stablegen_choose
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{answers}}"
doc_to_target: gold
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
  - {metric: acc_norm, aggregation: mean, higher_is_better: true}
"""
_ROLL = """
task: stablegen_perplexity
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{question}}"
metric_list: [{metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}]
"""
TASKS = ("stablegen_generate", "stablegen_choose", "stablegen_perplexity")


def questions(count: int) -> list[str]:
    """Return so many different prompts, 525 at most, of different lengths."""
    assert count <= len(_BEGINNINGS) * len(SAMPLE)
    return [(beginning + prompt).strip() for beginning in _BEGINNINGS for prompt in SAMPLE][:count]


def write_tasks(folder: Path, *, items: int, new: int = 32) -> Path:
    """Write the tasks' files, of so many items and new tokens, into a folder; return it."""
    rows = [
        {"question": question, "answers": ANSWERS, "gold": at % len(ANSWERS)}
        for at, question in enumerate(questions(items))
    ]
    data = folder / "items.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    where = f'{{data_files: {{test: "{data}"}}, cache_dir: "{folder}"}}'
    source = f"dataset_path: json\ndataset_kwargs: {where}\ntest_split: test\n"
    for name, text in zip(TASKS, (_GENERATE, _CHOOSE, _ROLL), strict=True):
        (folder / f"{name}.yaml").write_text(text.replace("NEW", str(new)) + source, encoding="utf-8")
    return folder


def evaluate(model: Any, folder: Path, tasks: tuple[str, ...] = TASKS) -> tuple[dict[str, Any], dict[str, list[Any]]]:
    """Return lm-eval's metrics by task, and each item's raw output."""
    import lm_eval
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    found = lm_eval.simple_evaluate(
        model, tasks=list(tasks), task_manager=manager, bootstrap_iters=0, log_samples=True, verbosity="ERROR"
    )
    metrics = {
        task: {name: float(value) for name, value in found["results"][task].items() if "," in name and value != "N/A"}
        for task in tasks
    }
    return metrics, {task: [sample["resps"] for sample in found["samples"][task]] for task in tasks}
