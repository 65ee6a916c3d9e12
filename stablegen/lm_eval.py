"""lm-evaluation-harness over a client: the model ``stablegen``, the same digits at every ``--batch_size``.

Importing ``stablegen.lm_eval`` registers it, and ``python -m stablegen.lm_eval`` is lm-eval's own command with it:
``python -m stablegen.lm_eval run --model stablegen --model_args pretrained=gpt2,policy=invariant --tasks ...``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from stablegen.client import Client
from stablegen.core.params import SAMPLING
from stablegen.core.request import Request
from stablegen.errors import MissingPackageError, ParameterError
from stablegen.machine.plan import torch_cuda_version

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
    from lm_eval.models.utils_hf import MultiTokenEOSCriteria
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:
    raise MissingPackageError(
        f"lm-eval is not installed, or in a version that is not supported: {error}",
        hint="pip install 'stablegen[lm-eval]'",
    ) from error

_T = TypeVar("_T")


@register_model("stablegen")
class StablegenLM(TemplateLM):  # type: ignore[misc]  # lm-eval is untyped here
    """A client as lm-eval's language model; it gets ``batch_size`` requests at a time, which changes no digit.

    ``client``: an existing one, such as ``model.stablegen`` of a stabilized model. Without it,
    ``pretrained`` and the settings of ``Client.from_pretrained`` make one. ``max_length``: tokens of prompt and answer
    (None: the model's context), ``max_gen_toks``: new tokens where a task names none, ``seed``: for tasks that sample.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        *,
        client: Client | None = None,
        batch_size: int | str | None = 1,
        max_batch_size: int | None = None,
        device: str | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        seed: int = 0,
        **settings: Any,
    ) -> None:
        super().__init__()
        if device is not None and device.startswith("cuda") and torch_cuda_version() is None:
            device = None  # lm-eval's command names a GPU by default
        if client is None:
            client = Client.from_pretrained(pretrained, device=device, **settings)
        self.client = client
        self.batch_size = batch_size
        self.max_length = max_length or self.client.source.context
        self.max_gen_toks = max_gen_toks
        self._seed = seed
        self.tokenizer = self.client.tokenizer.for_transformers()

    @property
    def eot_token_id(self) -> int:
        """Return the id that ends a text."""
        ends = self.client.source.eos_token_ids
        if not ends:
            raise ParameterError("the model has no end token", hint="Set eos_token_id in its generation config")
        return ends[0]

    @property
    def prefix_token_id(self) -> int:
        """Return the id that is put before a text without a context."""
        begin = self.tokenizer.bos_token_id
        return self.eot_token_id if begin is None else int(begin)

    @property
    def tokenizer_name(self) -> str:
        """Return the digest that identifies the tokenizer."""
        return self.client.tokenizer.digest

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return the token ids of a text."""
        return list(self.client.tokenizer.encode(string, special=add_special_tokens is not False))

    def _loglikelihood_tokens(
        self, requests: Sequence[tuple[Any, list[int], list[int]]], disable_tqdm: bool = False, **others: Any
    ) -> list[tuple[float, bool]]:
        found: list[tuple[float, bool]] = []
        for chunk in self._chunks(requests):
            # what does not fit is cut at its beginning, as in lm-eval's own models; the last token is not fed
            kept = [(context + continuation)[-(self.max_length + 1) :] for _, context, continuation in chunk]
            lengths = [len(continuation) for _, _, continuation in chunk]
            scores = self.client.score(
                [ids[:-length] for ids, length in zip(kept, lengths, strict=True)],
                [ids[-length:] for ids, length in zip(kept, lengths, strict=True)],
            )
            for (pair, _, _), score in zip(chunk, scores, strict=True):
                found.append((score.logprob, score.is_greedy))
                if pair is not None:
                    self.cache_hook.add_partial("loglikelihood", pair, found[-1])
        return found

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        """Return the log-likelihood of whole texts, window after window where one does not fit the context."""
        windows: list[tuple[None, list[int], list[int]]] = []
        counts = []
        for request in requests:
            ids = self.tok_encode(request.args[0])
            rolled = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1)
            own = [(None, *make_disjoint_window(window)) for window in rolled]
            counts.append(len(own))
            windows += own
        scored = iter(self._loglikelihood_tokens(windows))
        totals = [sum(next(scored)[0] for _ in range(count)) for count in counts]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        """Return texts generated up to their ends; a sampled request that is repeated gets a sample for each time."""
        repeats: Counter[str] = Counter()
        texts = []
        for chunk in self._chunks(requests):
            made = []
            for request in chunk:
                context, settings = request.args
                made.append(self._request(context, settings, repeats[repr(request.args)]))
                repeats[repr(request.args)] += 1
            answers = self.client.run([asked for asked, _ in made])
            for request, (_, until), answer in zip(chunk, made, answers, strict=True):
                text = self.tokenizer.decode(answer.token_ids, skip_special_tokens=True)
                texts.append(postprocess_generated_text(text, until, None))
                self.cache_hook.add_partial("generate_until", request.args, texts[-1])
        return texts

    def _request(self, context: str, settings: dict[str, Any], repeat: int) -> tuple[Request, list[str]]:
        """Return the request for a task's settings, and the texts that end its answer."""
        from stablegen.hf.arguments import criterion_of

        asked: dict[str, Any] = dict(normalize_gen_kwargs(settings, self.max_gen_toks))
        eos = self.tokenizer.decode([self.eot_token_id], skip_special_tokens=False)
        until = handle_stop_sequences(asked.pop("until", None), eos)
        asked["max_new_tokens"] = asked.pop("max_gen_toks")
        if asked["do_sample"]:
            asked |= {"seed": self._seed, "sample_index": repeat}
        if asked["max_new_tokens"] >= self.max_length:
            raise ParameterError(
                f"max_gen_toks={asked['max_new_tokens']} leaves no room for a prompt",
                accepted=f"less than the {self.max_length} tokens of prompt and answer",
            )
        if asked.get("num_beams") == 1:
            del asked["num_beams"]
        if not asked["do_sample"]:
            asked = {name: value for name, value in asked.items() if name not in SAMPLING}
        ids = self.tok_encode(context)[-(self.max_length - asked["max_new_tokens"]) :]
        ending = dict(criterion_of(MultiTokenEOSCriteria(text, self.tokenizer, 0, 1)) for text in until)
        return self.client.make_request(ids, asked, stopping_criteria=ending), until

    def _chunks(self, requests: Sequence[_T]) -> Iterator[Sequence[_T]]:
        size = str(self.batch_size or "")
        step = int(size) if size.isdigit() else max(len(requests), 1)  # "auto": all at once
        for start in range(0, len(requests), step):
            yield requests[start : start + step]


def main() -> None:
    """Run lm-eval's command with this model registered."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()


if __name__ == "__main__":
    main()
