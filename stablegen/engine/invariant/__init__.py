"""The batch-invariant engine: any composition of the batch gives the same bits."""
