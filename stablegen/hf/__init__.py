"""Between transformers and stablegen: a loaded model as a source, ``generate``'s arguments and results."""
