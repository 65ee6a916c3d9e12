"""A golden set that passes at any batch size, and replays from the cache without loading the model.

The answers are recorded once, one prompt at a time, then in batches of three and all at once, each with an empty
cache: every score row must have the same bits. The last run is served from the cache and imports no torch.

Run it with: python examples/golden_set.py
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import stablegen

QUESTIONS = [
    "Tell me about yourself.\nanswer : ",
    "What did you do last weekend?\nanswer : ",
    "Do you like old films?\nanswer : ",
    "Who is your favourite singer?\nanswer : ",
    "What is the best book you have read?\nanswer : ",
    "The captain looked at the sea and",
    "He opened the letter with trembling hands, and",
]

REPLAY = """
import sys, stablegen
with stablegen.Client.from_pretrained(policy="invariant", cache_dir=sys.argv[1], on_risk="raise") as client:
    hits = client.complete(sys.argv[2:], max_new_tokens=32)
print(sum(hit.cached for hit in hits), "of", len(hits), "from the cache; torch loaded:", "torch" in sys.modules)
"""


def run(folder: Path, batch_size: int) -> list[stablegen.Completion]:
    """Return the answers, computed ``batch_size`` prompts at a time."""
    with stablegen.Client.from_pretrained(policy="invariant", cache_dir=folder) as client:
        answers = []
        for start in range(0, len(QUESTIONS), batch_size):
            answers += client.complete(QUESTIONS[start : start + batch_size], max_new_tokens=32)
        return answers


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        golden = run(folder / "golden", batch_size=1)
        for batch_size in (3, len(QUESTIONS)):
            answers = run(folder / f"batch-{batch_size}", batch_size)
            equal = sum(a.trace == b.trace for a, b in zip(answers, golden, strict=True))
            print(f"batch size {batch_size}: {equal} of {len(golden)} answers equal, every score row bit for bit")
            assert equal == len(golden)
        subprocess.run([sys.executable, "-c", REPLAY, str(folder / "golden"), *QUESTIONS], check=True)


if __name__ == "__main__":
    main()
