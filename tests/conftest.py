"""Set up what must be decided before any test module is imported."""

import os
from pathlib import Path

# Triton asks once, when it is imported: without a GPU its kernels run in the interpreter.
if not Path("/dev/nvidia0").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")
