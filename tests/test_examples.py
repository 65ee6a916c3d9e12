"""Every file of examples/ runs as a user would run it, and prints what it is there to show."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
SHOWN = {
    "drop_in_pipeline.py": "greedy: ",
    "golden_set.py": "",
    "lm_eval_stable.py": "batch size auto: ",
    "policy_per_app/run.py": "",
    "quickstart.py": "",
}


def test_all_of_them_are_here() -> None:
    assert sorted(str(file.relative_to(EXAMPLES)) for file in EXAMPLES.rglob("*.py")) == sorted(SHOWN)


@pytest.mark.slow
@pytest.mark.parametrize("name", SHOWN)
def test_an_example_runs(name: str, tmp_path: Path) -> None:
    if name.startswith("lm_eval"):
        pytest.importorskip("lm_eval", reason="lm-eval is not installed")
    environ = {key: value for key, value in os.environ.items() if not key.startswith("STABLEGEN_")}
    # a user's cache folder and home, so that nothing of this machine answers in its place
    environ |= {"XDG_CACHE_HOME": str(tmp_path / "cache"), "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        cwd=(EXAMPLES / name).parent,
        env=environ,
    )
    assert done.returncode == 0, done.stderr
    assert SHOWN[name] in done.stdout
    assert len(done.stdout.splitlines()) > 1
