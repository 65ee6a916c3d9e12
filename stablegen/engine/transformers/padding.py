"""Left padding: what transformers is fed where rows of one batch differ in length."""

from __future__ import annotations

import torch

from stablegen.core.policy import Batch


def left_padded(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the token ids [S, W] that a batch's rows are fed, padded on the left, and the mask.

    Filler rows hold one token.
    """
    prompts = [(0,) if row is None else row.given for row in batch.rows]
    width = max(map(len, prompts)) if batch.shape.width is None else batch.shape.width
    ids = torch.zeros(len(prompts), width, dtype=torch.int64)
    mask = torch.zeros(len(prompts), width, dtype=torch.int64)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    return ids, mask
