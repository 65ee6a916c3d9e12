"""Any causal language model of transformers, over its own KV cache or one of fixed length."""
