"""Open a session from a model and settings: the one way in which a client is made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from stablegen.config import Effective
from stablegen.core.policy import default_policy, load_policy
from stablegen.errors import ConfigError
from stablegen.machine.digests import DigestMemory
from stablegen.session.session import Session
from stablegen.sources.base import Source
from stablegen.store.base import Store
from stablegen.store.cache import Cache, cache_path, open_cache

NAMED = object()
"""In place of a model: the one that the settings name."""


def open_session(model: Any, tokenizer: Any, effective: Effective, store: Store | None = None) -> Session:
    """Return a session around ``model``: a source, a live model, or ``NAMED``.

    ``store`` replaces the cache folder that the settings name. The session takes over store and source, and closes
    them when it is closed; where it cannot be opened, a store that was given stays open. Where the settings name no
    policy, the most preferred one under which the model can run is used.
    """
    settings = effective.settings
    if store is not None:
        refuse_arguments(effective, ("cache_dir", "size_limit"), "beside a store, which has its own place and size")
    cache = open_cache(settings.cache_dir, settings.size_limit) if store is None else Cache(store)
    try:
        source = open_source(model, tokenizer, effective, keeps_digests=store is None)
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
        if store is None:
            cache.close()
        raise


def open_source(model: Any, tokenizer: Any, effective: Effective, *, keeps_digests: bool) -> Source:
    """Return ``model`` itself if it is a source, or a source around a live model or of the model that is named.

    ``keeps_digests``: whether digests of files are remembered in the cache's folder.
    """
    settings = effective.settings
    if model is NAMED:
        from stablegen.sources.checkpoint import CheckpointSource

        digests = DigestMemory(cache_path(settings.cache_dir) / "digests.json" if keeps_digests else None)
        return CheckpointSource.open(
            settings.model, settings.revision, digests=digests, kv_cache_size=settings.kv_cache_size
        )
    if isinstance(model, Source):
        if tokenizer is not None:
            raise ConfigError("a tokenizer was given beside a source, which has its own", accepted="Client(source)")
        refuse_arguments(effective, ("kv_cache_size",), "beside a source, which makes its own engine")
        return model
    refuse_arguments(effective, ("dtype", "device"), "for a model that is loaded already; use model.to(...)")
    from stablegen.sources.live import LiveSource

    return LiveSource(model, tokenizer, kv_cache_size=settings.kv_cache_size)


def refuse_arguments(effective: Effective, names: Sequence[str], why: str) -> None:
    """Raise ``ConfigError`` for settings given as arguments that would change nothing."""
    for name in names:
        if effective.origins[name] == "argument":
            value = getattr(effective.settings, name)
            raise ConfigError(f"{name}={value!s} was given {why}", hint=f"Leave {name} out")
