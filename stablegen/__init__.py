"""stablegen: a cached LLM generation client with a determinism guard."""

__version__ = "0.1.0"
