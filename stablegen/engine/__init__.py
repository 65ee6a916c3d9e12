"""Engines run batches: ``transformers`` any causal language model, ``gpt2`` its own batch-invariant forward pass."""
