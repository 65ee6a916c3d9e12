"""The architectures that the batch-invariant engine computes, each in a file named after its ``model_type``.

An architecture is found by the ``model_type`` of a model's configuration: here, in ``<model_type>.py``; in another
package, where that has called ``register_architecture``, or names a module under ``<model_type>`` among its entry
points of the group ``stablegen.architectures``. Neither this package nor the check of a configuration loads torch.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import metadata
from typing import TYPE_CHECKING, Any, Protocol

from stablegen.core.policy import BATCH_INVARIANT, TRANSFORMERS, policies_run_by
from stablegen.errors import PolicyError

if TYPE_CHECKING:
    import torch

    from stablegen.engine.invariant.model import Model
    from stablegen.kernels.base import KernelSet

ENTRY_POINTS = "stablegen.architectures"
"""The group of entry points by which other packages add architectures."""


class BuildModel(Protocol):
    """Makes a model of a configuration and weights by their names in a checkpoint."""

    def __call__(
        self,
        config: Mapping[str, Any],
        tensors: Mapping[str, torch.Tensor],
        kernels: KernelSet,
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> Model:
        """Return the model on a device; raise ``CheckpointError`` for weights that it cannot be built of."""
        ...


@dataclass(frozen=True, slots=True)
class Architecture:
    """One architecture: its ``model_type`` and what people call it, which of its models can run, and how one is built.

    ``problem`` returns why a configuration cannot run, None where it can; it raises ``CheckpointError`` for one that
    makes no model. It loads no torch.
    """

    model_type: str
    title: str
    problem: Callable[[Mapping[str, Any]], str | None]
    build: BuildModel


_REGISTERED: dict[str, Architecture] = {}


def register_architecture(architecture: Architecture) -> None:
    """Make an architecture known under its ``model_type``; raise ``PolicyError`` where another one has that."""
    known = _REGISTERED.setdefault(architecture.model_type, architecture)
    if known is not architecture:
        raise PolicyError(
            f"two architectures are registered for the model_type {architecture.model_type!r}: {known.title} and "
            f"{architecture.title}",
            hint="Register one of them",
        )


def find_architecture(config: Mapping[str, Any]) -> Architecture:
    """Return the architecture of a model; raise ``PolicyError`` where none is known for it."""
    name = config.get("model_type")
    if isinstance(name, str) and name not in _REGISTERED:
        _import(name)
    if name in _REGISTERED:
        return _REGISTERED[name]
    for other in _built_in():
        _import(other)
    titles = sorted(architecture.title for architecture in _REGISTERED.values())
    raise _refusal(f"the model is {name!r}, not {' or '.join(titles)}")


def check_invariant(config: Mapping[str, Any]) -> None:
    """Raise ``PolicyError`` for a model that the batch-invariant engine does not compute."""
    problem = find_architecture(config).problem(config)
    if problem is not None:
        raise _refusal(problem)


def _refusal(problem: str) -> PolicyError:
    return PolicyError(
        f"policy {policies_run_by(BATCH_INVARIANT)} cannot run this model: {problem}",
        accepted=f"{policies_run_by(TRANSFORMERS)} for this model",
    )


def _built_in() -> list[str]:
    return [module.name for module in pkgutil.iter_modules(__path__)]


def _import(model_type: str) -> None:
    """Import the module that registers an architecture, if there is one."""
    if model_type in _built_in():
        importlib.import_module(f"{__name__}.{model_type}")
        return
    for entry in metadata.entry_points(group=ENTRY_POINTS, name=model_type):
        entry.load()
