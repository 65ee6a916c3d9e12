"""A transformers pipeline over a stabilized model: sampled with a seed, the same answers in batches of 1 and of 8.

Run it twice: the second time every answer comes from the cache, exact.
"""

from __future__ import annotations

from pathlib import Path

from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, pipeline

import stablegen

MODEL = Path(stablegen.__file__).parent / "models" / "tiny-gpt2"  # or the directory of any GPT-2
PROMPTS = [f"What do you think about {subject}?\nanswer : " for subject in ("music", "books", "the sea", "work")]


def main() -> None:
    end = "<|endoftext|>"
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(MODEL / "tokenizer.json"), eos_token=end, pad_token=end)
    model = AutoModelForCausalLM.from_pretrained(MODEL).eval()
    stablegen.stabilize(model, tokenizer, policy="invariant")  # the one line that changes

    generator = pipeline("text-generation", model=model, tokenizer=tokenizer)
    settings = {"max_new_tokens": 24, "do_sample": True, "temperature": 0.7, "seed": 1, "return_full_text": False}
    alone = generator(PROMPTS, batch_size=1, **settings)
    together = generator(PROMPTS, batch_size=8, **settings)
    for prompt, (one,), (other,) in zip(PROMPTS, alone, together, strict=True):
        assert one == other, (one, other)
        print(f"{prompt!r}\n  {one['generated_text']!r}")

    inputs = tokenizer(PROMPTS[0], return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=24, return_dict_in_generate=True)
    (completion,) = output.completions
    print(f"greedy: {completion.text!r}, cached {completion.cached}, {completion.verdict.status}")

    stablegen.restore(model)


if __name__ == "__main__":
    main()
