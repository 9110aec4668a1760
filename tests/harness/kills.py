"""Interrupt every stage at random moments, rerun the command, and compare the results with an uninterrupted run.

    python -m tests.harness.kills [--moments 20] [--signals KILL TERM] [--stages autoencoder extract …] [--seed 0]

SIGKILL ends the main process immediately, as the out-of-memory killer does; its workers must exit. SIGTERM requests a
stop, as a scheduler does before preemption: the command prints how to resume and exits with status 143. All output
files of a stage are compared byte by byte, except for times, older checkpoints and TensorBoard logs. Of an LMDB, the
records are compared instead of the pages. The exit status is 1 if anything differs.
"""

import argparse
import importlib
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import lmdb
import torch
from PIL import Image

from vqvae2 import checkpoint, files
from vqvae2.__main__ import COMMANDS
from vqvae2.__main__ import main as command
from vqvae2.data import scenes

CONFIG = """
data: {path: PHOTOGRAPHS, size: 32, labels: folder, val_fraction: 0.1, flip: true, num_workers: 1}
autoencoder:
  model:
    channels: 16
    residual_channels: 8
    residual_layers: 1
    levels:
      - {stride: 4, quantizer: {kind: ema, codebook_size: 16, code_dim: 8}}
      - {stride: 2, quantizer: {kind: gradient, codebook_size: 12, code_dim: 8}}
  training:
    {steps: STEPS, batch_size: 8, ema_decay: 0.9, log_every: 7, validate_every: 20, preview_every: 40,
     checkpoint_every: 10}
extract_codes: {flip: true}
priors:
  top: &prior
    model: {kind: pixelsnail, channels: 16, residual_channels: 16, kernel: 3, blocks: 1, layers: 2, heads: 2}
    training:
      {steps: STEPS, batch_size: 8, ema_decay: 0.9, log_every: 7, validate_every: 20, preview_every: 40,
       checkpoint_every: 10, early_stopping_patience: 50}
  bottom: *prior
sampling: {count: 24, batch_size: 4}
"""
_EXIT_TIMEOUT_S = 30  # seconds for the workers of a killed process to exit
_RUN_TIMEOUT_S = 600


class Stage(NamedTuple):
    """A command and its output folder. HERE, CONFIG and PHOTOGRAPHS are placeholders for paths."""

    command: list[str]
    output: str


STAGES = {
    "prepare": Stage(["prepare", "PHOTOGRAPHS", "HERE/prepared", "--size", "24", "--num-workers", "1"], "prepared"),
    "autoencoder": Stage(["train-autoencoder", "CONFIG", "--run", "HERE/run"], "run/autoencoder"),
    "extract": Stage(["extract-codes", "CONFIG", "--run", "HERE/run"], "run/codes"),
    "prior": Stage(["train-prior", "CONFIG", "--run", "HERE/run", "--level", "bottom"], "run/prior-bottom"),
    "prior-top": Stage(["train-prior", "CONFIG", "--run", "HERE/run", "--level", "top"], "run/prior-top"),
    "sample": Stage(["sample", "HERE/run"], "run/samples"),
}


def start(arguments: list[str], log: Path, prepare: Callable[[], None] = lambda: None) -> int:
    """Run a command in a forked process with its own process group and its output in `log`; return the process id.

    The parent has imported all modules, so signals interrupt the work of the command and not the imports. The process
    calls `prepare` first.
    """
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        os.setsid()
        with log.open("a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        prepare()
        status = command(arguments)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def wait(process: int, seconds: float) -> int | None:
    """Return the exit status of a process, -N if signal N ended it, or None if it still runs after `seconds`."""
    deadline = time.monotonic() + seconds
    while True:
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            return None
        time.sleep(0.002)


def run(stage: Stage, work: Path, name: str, after: float | None = None, number: int = 0) -> tuple[int, float]:
    """Run a stage in the folder `name`, with signal `number` after `after` seconds; return status and duration."""
    paths = {"HERE": work / name, "PHOTOGRAPHS": work / "photographs", "CONFIG": work / "config.yaml"}
    arguments = [
        re.sub("^(HERE|PHOTOGRAPHS|CONFIG)", lambda found: str(paths[found[0]]), part) for part in stage.command
    ]
    started = time.monotonic()
    process = start(arguments, work / f"{name}.log")
    status = wait(process, _RUN_TIMEOUT_S if after is None else after)
    if status is None:
        os.kill(process, number)
        status = wait(process, _EXIT_TIMEOUT_S)
        _wait_for_group(process)
    assert status is not None, f"{' '.join(arguments)}: does not exit within {_EXIT_TIMEOUT_S} s"
    return status, time.monotonic() - started


def _wait_for_group(leader: int) -> None:
    """Wait until all processes in the group of a killed process have exited."""
    deadline = time.monotonic() + _EXIT_TIMEOUT_S
    while time.monotonic() < deadline:
        try:
            os.killpg(leader, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    os.killpg(leader, signal.SIGKILL)
    raise AssertionError(f"workers still run {_EXIT_TIMEOUT_S} s after their command was killed")


def contents(folder: Path) -> dict[str, Any]:
    """Return, for every file in a folder, the contents that must be equal."""
    found: dict[str, Any] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = str(path.relative_to(folder))
        if name.startswith("logs/") or path.name in ("lock.mdb", "seal.json"):
            continue
        found[name] = _content(path)
    return found


def _content(path: Path) -> Any:
    if path.name == "data.mdb":
        with lmdb.open(str(path.parent), readonly=True, lock=False) as environment, environment.begin() as transaction:
            return list(transaction.cursor())
    if path.name == "state.safetensors":
        tensors, metadata = checkpoint.load(path)
        return metadata | {"seconds": 0}, {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}
    if path.name == "summary.json":
        return {name: value for name, value in files.read_json(path).items() if name in ("steps", "validation")}
    return path.read_bytes()


def compare(uninterrupted: Path, resumed: Path) -> list[str]:
    """Return the names of the files that differ.

    Only the newest checkpoint is compared, because the one written at a signal is kept.
    """
    for folder in (uninterrupted, resumed):
        for old in sorted((folder / "checkpoints").glob("0*"))[:-1]:
            shutil.rmtree(old)
    expected, found = contents(uninterrupted), contents(resumed)
    return sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))


def check(name: str, work: Path, moments: Iterator[float], signals: list[int], report: Callable[[str], None]) -> int:
    """Interrupt a stage at each fraction of its duration with each signal; return how many results differ."""
    stage, failures = STAGES[name], 0
    before = work / "before"
    shutil.rmtree(before, ignore_errors=True)
    shutil.copytree(work / "uninterrupted", before)
    status, duration = run(stage, work, "uninterrupted")
    assert status == 0, (work / "uninterrupted.log").read_text()[-2000:]
    num_stopped = 0
    for moment in moments:
        for number in signals:
            shutil.rmtree(work / "resumed", ignore_errors=True)
            shutil.copytree(before, work / "resumed")
            first, _ = run(stage, work, "resumed", moment * duration, number)
            num_stopped += first != 0
            second, _ = run(stage, work, "resumed")
            differ = compare(work / "uninterrupted" / stage.output, work / "resumed" / stage.output)
            # Before the command installs its handler, SIGTERM has the default effect.
            expected = {0, -number} | ({128 + number} if number == signal.SIGTERM else set())
            if differ or second or first not in expected:
                failures += 1
                log = (work / "resumed.log").read_text()[-1000:]
                report(
                    f"{name}: {signal.Signals(number).name} at {moment:.2f}: status {first}, {second}; {differ}\n{log}"
                )
            (work / "resumed.log").unlink()
    report(
        f"{name}: {duration:.1f} s uninterrupted; {num_stopped} times stopped before its end; {failures} results differ"
    )
    return failures


def photographs(folder: Path, count: int) -> None:
    """Write a dataset of `count` small images, one of which is truncated."""
    for number in range(count):
        path = folder / scenes.CLASSES[scenes.label(number)] / f"{number:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(scenes.render(number, 48, 40)).save(path)
    path.write_bytes(path.read_bytes()[:300])


def main() -> None:
    """Print one line per stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moments", type=int, default=20)
    parser.add_argument("--signals", nargs="+", default=["KILL", "TERM"], choices=["KILL", "TERM"])
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=list(STAGES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", type=int, default=900)
    parser.add_argument("--steps", type=int, default=120, help="training steps of each stage")
    options = parser.parse_args()
    torch.set_num_threads(1)  # forking a multithreaded process is unsafe
    for each in COMMANDS.values():
        importlib.import_module(each.target.partition(":")[0])
    rng = random.Random(options.seed)
    signals = [int(getattr(signal, f"SIG{name}")) for name in options.signals]
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        photographs(work / "photographs", options.images)
        config = CONFIG.replace("PHOTOGRAPHS", str(work / "photographs")).replace("STEPS", str(options.steps))
        (work / "config.yaml").write_text(config)
        (work / "uninterrupted").mkdir()
        failures = 0
        for name, stage in STAGES.items():
            if name in options.stages:
                moments = (rng.random() for _ in range(options.moments))
                failures += check(name, work, moments, signals, lambda text: print(text, flush=True))
            else:
                run(stage, work, "uninterrupted")
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
