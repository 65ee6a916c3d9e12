"""A checkpoint's transformers model without weights, which resolves arguments as the model itself would."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

import torch


def skeleton_of(directory: Path) -> Any:
    """Return a directory's model on the meta device; it is made anew where a configuration file has changed."""
    files = (directory / "config.json", directory / "generation_config.json")
    return _skeleton(directory, *(file.read_text(encoding="utf-8") if file.is_file() else "" for file in files))


@lru_cache(maxsize=4)
def _skeleton(directory: Path, *_: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(directory, local_files_only=True))
    if (directory / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(directory, local_files_only=True)
    return model.eval()
