"""Batch-invariant operations: Triton on CUDA, torch on a CPU, behind one interface (``base.KernelSet``)."""
