"""``stabilize(model)``: the same model object, whose ``generate`` goes through a client; ``restore`` undoes it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from stablegen.client import Client
from stablegen.core.policy import ExecutionPolicy
from stablegen.errors import ModelError, PolicyError
from stablegen.guard.verdicts import OnRisk

_ATTRIBUTE = "stablegen"
_POSITIONAL = (
    *("logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn", "synced_gpus", "assistant_model"),
    *("streamer", "negative_prompt_ids", "negative_prompt_attention_mask", "custom_generate"),
)
"""Arguments of transformers' ``generate`` behind the first two, in order."""


def stabilize(
    model: Any,
    tokenizer: Any = None,
    *,
    policy: str | ExecutionPolicy | None = None,
    on_risk: OnRisk | None = None,
    accepted_risk: float | None = None,
    cache_dir: str | Path | None = None,
    size_limit: int | None = None,
    kv_cache_size: int | None = None,
    app: str | None = None,
    unsupported: str = "raise",
) -> Any:
    """Return the transformers model itself, its ``generate`` now stable and cached; ``model.stablegen`` is the client.

    What is left None comes from the configuration, as for ``Client.from_pretrained``; where no place names a policy it
    is ``invariant`` for a GPT-2 and ``single`` for any other architecture. Without a tokenizer, texts (stop strings,
    ``Completion.text``) are not to be had. ``unsupported`` is the default of ``generate``'s argument of that name.
    Stabilized again, a model gets a new client. Raises what ``Client`` raises.
    """
    from stablegen.config import load_settings

    given: dict[str, Any] = {
        "policy": policy,
        "on_risk": on_risk,
        "accepted_risk": accepted_risk,
        "cache_dir": cache_dir,
        "size_limit": size_limit,
        "kv_cache_size": kv_cache_size,
    }
    effective = load_settings(app, **{name: value for name, value in given.items() if value is not None})
    settings = effective.settings
    chosen = settings.policy
    if effective.origins["policy"] == "built-in" and not _is_gpt2(model):
        chosen = "single"
    client = Client(
        model,
        tokenizer,
        policy=chosen,
        on_risk=settings.on_risk,
        accepted_risk=settings.accepted_risk,
        cache_dir=settings.cache_dir,
        size_limit=settings.size_limit,
        kv_cache_size=settings.kv_cache_size,
        app=effective.app,
    )
    if _ATTRIBUTE in vars(model):
        restore(model)
    setattr(model, _ATTRIBUTE, client)
    model.generate = StableGenerate(client, unsupported, vars(model).get("generate"))
    return model


def restore(model: Any) -> Any:
    """Return a stabilized model as it was, its client closed; raise ``ModelError`` for one that is not stabilized."""
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
    """What stands in the place of a model's ``generate``: it belongs to one model object, as its client does."""

    def __init__(self, client: Client, unsupported: str, replaced: Any) -> None:
        self._client = client
        self.replaced = replaced
        """What the model object itself, and not its class, had in this place."""
        self._unsupported = unsupported

    def __call__(self, inputs: Any = None, generation_config: Any = None, *positional: Any, **arguments: Any) -> Any:
        """Generate as ``Client.generate`` does."""
        if len(positional) > len(_POSITIONAL):
            raise TypeError(f"generate takes {2 + len(_POSITIONAL)} arguments by place, not {2 + len(positional)}")
        arguments |= dict(zip(_POSITIONAL, positional, strict=False))
        return self._client.generate(inputs, generation_config, **{"unsupported": self._unsupported, **arguments})


def _is_gpt2(model: Any) -> bool:
    from stablegen.engine.invariant.architectures import check_invariant

    try:
        check_invariant(model.config.to_dict())
    except (PolicyError, AttributeError):
        return False
    return True
