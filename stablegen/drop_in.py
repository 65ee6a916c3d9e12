"""``stabilize(model)``: the same model object, whose ``generate`` goes through a client; ``restore`` undoes it."""

from __future__ import annotations

from typing import Any, Unpack

from stablegen.client import Client
from stablegen.config import ClientSettings
from stablegen.errors import ModelError
from stablegen.store.base import Store

_ATTRIBUTE = "stablegen"
_POSITIONAL = (
    *("logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn", "synced_gpus", "assistant_model"),
    *("streamer", "negative_prompt_ids", "negative_prompt_attention_mask", "custom_generate"),
)
"""Positional arguments of transformers' ``generate`` after the first two, in order."""


def stabilize(
    model: Any,
    tokenizer: Any = None,
    *,
    app: str | None = None,
    store: Store | None = None,
    unsupported: str = "raise",
    **given: Unpack[ClientSettings],
) -> Any:
    """Return the transformers model itself, its ``generate`` now stable and cached; ``model.stablegen`` is the client.

    ``app``, ``store`` and ``given`` are those of ``Client(model, tokenizer)``, resolved in the same way. Without a
    tokenizer there are no texts (stop strings, ``Completion.text``). ``unsupported`` is the default of ``generate``'s
    argument of that name. A model that is stabilized again gets a new client. Raises what ``Client`` raises.
    """
    client = Client(model, tokenizer, app=app, store=store, **given)
    if _ATTRIBUTE in vars(model):
        restore(model)
    setattr(model, _ATTRIBUTE, client)
    model.generate = StableGenerate(client, unsupported, vars(model).get("generate"))
    return model


def restore(model: Any) -> Any:
    """Undo ``stabilize``, close the client and return the model; raise ``ModelError`` where it is not stabilized."""
    client = vars(model).get(_ATTRIBUTE)
    if not isinstance(client, Client):
        raise ModelError("the model is not stabilized", accepted="a model that stabilize() has returned")
    replaced = model.generate.replaced
    del model.generate, model.stablegen
    if replaced is not None:
        model.generate = replaced
    client.close()
    return model


class StableGenerate:
    """Replaces a model's ``generate``; it belongs to one model object, as its client does."""

    def __init__(self, client: Client, unsupported: str, replaced: Any) -> None:
        self._client = client
        self.replaced = replaced
        """The ``generate`` that the model object itself, not its class, had before; None where it had none."""
        self._unsupported = unsupported

    def __call__(self, inputs: Any = None, generation_config: Any = None, *positional: Any, **arguments: Any) -> Any:
        """Generate as ``Client.generate`` does."""
        if len(positional) > len(_POSITIONAL):
            raise TypeError(
                f"generate takes at most {2 + len(_POSITIONAL)} positional arguments, not {2 + len(positional)}"
            )
        arguments |= dict(zip(_POSITIONAL, positional, strict=False))
        return self._client.generate(inputs, generation_config, **{"unsupported": self._unsupported, **arguments})
