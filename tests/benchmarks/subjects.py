"""The models and clients that the measurements of the guard share."""

import shutil
from pathlib import Path

import torch

from stablegen.client import Client


def random_gpt2_small(tokenizer: str, folder: Path) -> str:
    """Write GPT-2 small with random weights, beside the tokenizer of a checkpoint; return its directory."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    directory = folder / "gpt2-small-random"
    GPT2LMHeadModel(GPT2Config()).save_pretrained(directory)
    for file in Path(tokenizer).glob("tokenizer*"):
        shutil.copy(file, directory)
    return str(directory)


def native_client(model: str | None, dtype: str, device: str, cache_dir: str) -> Client:
    """Return a client of the control: transformers as it is."""
    return Client.from_pretrained(model, policy="native", dtype=dtype, device=device, cache_dir=cache_dir)
