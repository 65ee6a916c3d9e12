"""Two apps with a policy each share one cache: answers that one of them recorded are judged for the other.

Run it with: python examples/policy_per_app/run.py
"""

import os
import shutil
from pathlib import Path

import stablegen

HERE = Path(__file__).parent
PROMPTS = ["Tell me about yourself.\nanswer : ", "Do you like old films?\nanswer : "]


def main() -> None:
    os.chdir(HERE)  # stablegen.toml is searched for from the current folder upwards
    shutil.rmtree("answers", ignore_errors=True)

    with stablegen.Client.for_app("chat") as chat:
        for answer in chat.complete(PROMPTS, max_new_tokens=48):
            print(f"chat         {answer.verdict.status:8} {answer.text!r:.60}")

    with stablegen.Client.for_app("golden-eval") as golden:
        try:
            golden.complete(PROMPTS, max_new_tokens=48)
        except stablegen.DivergenceRiskError as error:
            print(f"golden-eval  refused: {error}")

    shutil.rmtree("answers")


if __name__ == "__main__":
    main()
