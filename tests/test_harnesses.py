"""Run a few random trials of the harnesses that kill stages and change files; see docs/results.md for full runs."""

import subprocess
import sys
from pathlib import Path

import pytest

KILLS = ["kills", "--moments", "1", "--steps", "50", "--images", "300"]
KILLS += ["--stages", "autoencoder", "extract", "sample", "--kinds", "term", "group", "worker", "twice"]


@pytest.mark.parametrize("arguments", [KILLS, ["fuzz", "--times", "35"]], ids=["kills", "fuzz"])
def test_harness_finds_no_failures(arguments: list[str]) -> None:
    name, *options = arguments
    command = [sys.executable, "-m", f"tests.harness.{name}", *options]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
