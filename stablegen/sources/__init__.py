"""Where a model comes from: a checkpoint, the hub, a live transformers model."""
