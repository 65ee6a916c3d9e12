"""Values: no I/O, no torch."""
