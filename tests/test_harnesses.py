"""The harnesses that stop stages and damage files at random, a few times; `benchmarks/` says how to run them whole."""

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("arguments", [["kills", "--moments", "1"], ["fuzz", "--times", "18"]], ids=["kills", "fuzz"])
def test_nothing_is_lost_and_nothing_is_wrong(arguments: list[str]) -> None:
    name, *options = arguments
    command = [sys.executable, "-m", f"tests.harness.{name}", *options]
    done = subprocess.run(
        command, cwd=Path(__file__).parents[1], capture_output=True, text=True, check=False, timeout=600
    )
    assert done.returncode == 0, done.stdout + done.stderr
