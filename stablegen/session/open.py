"""Open a session from a model and settings: the one way in which a client is made."""

from __future__ import annotations

from typing import Any

from stablegen.config import Effective
from stablegen.core.policy import default_policy, load_policy
from stablegen.errors import ConfigError
from stablegen.machine.digests import DigestMemory
from stablegen.session.session import Session
from stablegen.sources.base import Source
from stablegen.store.base import Store
from stablegen.store.cache import Cache, cache_path, open_cache


def open_session(model: Any, tokenizer: Any, effective: Effective, store: Store | None = None) -> Session:
    """Return a session around ``model``, a source or a live model.

    ``store`` replaces the cache folder that the settings name; the session closes it. Where the settings name no
    policy, the most preferred one under which the model can run is used.
    """
    settings = effective.settings
    cache = open_cache(settings.cache_dir, settings.size_limit) if store is None else Cache(store)
    try:
        source = open_source(model, tokenizer, effective)
        policy = default_policy(source.can_run) if settings.policy is None else load_policy(settings.policy)
        return Session(
            source,
            cache,
            policy=policy,
            dtype=settings.dtype,
            device=settings.device,
            on_risk=settings.on_risk,
            accepted_risk=settings.accepted_risk,
            app=effective.app,
        )
    except BaseException:
        cache.close()
        raise


def open_source(model: Any, tokenizer: Any, effective: Effective) -> Source:
    """Return ``model`` itself if it is a source, or a source around a live model."""
    if isinstance(model, Source):
        if tokenizer is not None:
            raise ConfigError("a tokenizer was given beside a source, which has its own", accepted="Client(source)")
        return model
    for name in ("dtype", "device"):
        if effective.origins[name] == "argument":
            raise ConfigError(
                f"{name}={getattr(effective.settings, name)!r} was given for a model that is already loaded",
                accepted="the model's own dtype and device",
                hint=f"Leave {name} out, and convert or move the model itself with model.to(...)",
            )
    from stablegen.sources.live import LiveSource

    return LiveSource(model, tokenizer, kv_cache_size=effective.settings.kv_cache_size)


def named_source(effective: Effective) -> Source:
    """Return the source of the model that the settings name: a directory, a hub name, or None for the embedded one."""
    from stablegen.sources.checkpoint import CheckpointSource

    settings = effective.settings
    digests = DigestMemory(cache_path(settings.cache_dir) / "digests.json")
    return CheckpointSource.open(
        settings.model, settings.revision, digests=digests, kv_cache_size=settings.kv_cache_size
    )
