"""Experiments that show batch variance on the machine they run on."""
