"""Any causal language model of transformers, as it stands or over a KV cache of fixed length."""
