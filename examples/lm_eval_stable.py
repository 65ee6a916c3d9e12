"""An evaluation by lm-eval that gives the same digits at every batch size: ``pip install 'stablegen[lm-eval]'``.

The task is a file of its own, so that nothing is downloaded. On the command line the same is
``python -m stablegen.lm_eval run --model stablegen --tasks NAME --include_path FOLDER --batch_size 16``.
"""

from __future__ import annotations

import json
from pathlib import Path
from tempfile import TemporaryDirectory

import lm_eval
from lm_eval.tasks import TaskManager

from stablegen import Client
from stablegen.lm_eval import StablegenLM

ITEMS = [
    {"question": "The opposite of cold is", "answers": [" hot", " table", " slowly"], "gold": 0},
    {"question": "Birds can", "answers": [" window", " fly", " seven"], "gold": 1},
    {"question": "He drank a glass of", "answers": [" stone", " music", " water"], "gold": 2},
]
TASK = """
task: three_questions
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/items.jsonl}, cache_dir: FOLDER}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{answers}}"
doc_to_target: gold
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


def main() -> None:
    with TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in ITEMS))
        (folder / "three_questions.yaml").write_text(TASK.replace("FOLDER", name))
        manager = TaskManager(include_path=name, include_defaults=False)
        outputs = []
        for batch_size in (1, 2, "auto"):
            with Client.from_pretrained(policy="invariant", cache_dir=folder / f"cache-{batch_size}") as client:
                model = StablegenLM(client=client, batch_size=batch_size)
                found = lm_eval.simple_evaluate(
                    model, tasks=["three_questions"], task_manager=manager, bootstrap_iters=0, log_samples=True
                )
            outputs.append([sample["resps"] for sample in found["samples"]["three_questions"]])
            print(f"batch size {batch_size}: {found['results']['three_questions']['acc,none']:.3f}")
        assert outputs[0] == outputs[1] == outputs[2]
        for item, choices in zip(ITEMS, outputs[0], strict=True):
            print(item["question"], [choice[0][0] for choice in choices])


if __name__ == "__main__":
    main()
