"""The hardware and software of this machine, found without torch."""
