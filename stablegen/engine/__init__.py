"""Engines run batches: ``transformers`` any causal language model, ``invariant`` batch-invariant forward passes."""
