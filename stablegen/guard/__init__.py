"""Whether a cached answer would come out the same if it were computed now."""
