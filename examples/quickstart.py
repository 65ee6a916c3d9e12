"""A miss, a hit, and a hit recorded under other numerics: what a caller sees of each.

Run it with: python examples/quickstart.py
"""

import tempfile
import warnings

import stablegen

PROMPT = "Tell me about yourself.\nanswer : "


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        with stablegen.Client.from_pretrained(policy="invariant", cache_dir=folder) as client:
            first = client.complete(PROMPT, max_new_tokens=48)
            again = client.complete(PROMPT, max_new_tokens=48)
            print(f"first time  cached={first.cached}  {first.text!r}")
            print(f"again       cached={again.cached}   verdict {again.verdict.status}: {again.verdict.reason}")
            assert again.trace == first.trace

        # The same question, asked by a client that computes in bfloat16: still a hit, and judged.
        with (
            warnings.catch_warnings(record=True) as caught,
            stablegen.Client.from_pretrained(policy="invariant", dtype="bfloat16", cache_dir=folder) as client,
        ):
            warnings.simplefilter("always")
            hit = client.complete(PROMPT, max_new_tokens=48)
            verdict = hit.verdict
            print(f"in bfloat16 cached={hit.cached}   verdict {verdict.status}, p={verdict.probability:.3g}")
            print(f"            most fragile: step {verdict.step}, margin {verdict.margin:.3g}; {verdict.reason}")
            for warning in caught:
                print(f"            {warning.category.__name__}: {warning.message}")
            print(f"            {len(client.warnings())} hit(s) kept for `stablegen warnings`")


if __name__ == "__main__":
    main()
