"""Stops every stage at random moments, runs the same command again, and compares what it made with an undisturbed run.

    python -m tests.harness.kills [--moments 20] [--signals KILL TERM] [--stages autoencoder extract …] [--seed 0]

KILL ends the main process at once, as a lost machine or the kernel's memory killer does; its workers have to notice.
TERM asks, as a cluster does before it takes a machine away: the command says how to go on and leaves with status 143.
Everything a stage leaves behind is compared, byte for byte but for times and older checkpoints, the pages of a
database, whose records are compared instead, and TensorBoard's logs. Exit status 1 where anything differs.
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
    {steps: 120, batch_size: 8, ema_decay: 0.9, log_every: 7, validate_every: 20, preview_every: 40,
     checkpoint_every: 10}
extract_codes: {flip: true}
priors:
  top: &prior
    model: {kind: pixelsnail, channels: 16, residual_channels: 16, kernel: 3, blocks: 1, layers: 2, heads: 2}
    training:
      {steps: 120, batch_size: 8, ema_decay: 0.9, log_every: 7, validate_every: 20, preview_every: 40,
       checkpoint_every: 10, early_stopping_patience: 50}
  bottom: *prior
sampling: {count: 24, batch_size: 4}
"""
_LEAVES_S = 30  # how long workers of a killed process may take to notice
_LONGEST_S = 600


class Stage(NamedTuple):
    """A command, and the folder that it fills; HERE, CONFIG and PHOTOGRAPHS stand for paths."""

    command: list[str]
    makes: str


STAGES = {
    "prepare": Stage(["prepare", "PHOTOGRAPHS", "HERE/prepared", "--size", "24", "--num-workers", "1"], "prepared"),
    "autoencoder": Stage(["train-autoencoder", "CONFIG", "--run", "HERE/run"], "run/autoencoder"),
    "extract": Stage(["extract-codes", "CONFIG", "--run", "HERE/run"], "run/codes"),
    "prior": Stage(["train-prior", "CONFIG", "--run", "HERE/run", "--level", "bottom"], "run/prior-bottom"),
    "prior-top": Stage(["train-prior", "CONFIG", "--run", "HERE/run", "--level", "top"], "run/prior-top"),
    "sample": Stage(["sample", "HERE/run"], "run/samples"),
}


def start(arguments: list[str], log: Path) -> int:
    """Run a command in a forked process, in a group of its own, with what it prints in a file; the process's number.

    A fork has everything imported already, so moments fall into the work and not into the start of Python.
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
        status = command(arguments)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def wait(process: int, seconds: float) -> int | None:
    """The exit status of a process, minus the signal that ended it; None where it is still there after the time."""
    ends = time.monotonic() + seconds
    while True:
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > ends:
            return None
        time.sleep(0.002)


def run(stage: Stage, work: Path, name: str, after: float | None = None, number: int = 0) -> tuple[int, float]:
    """Run a stage in the folder `name`, with a signal `after` so many seconds; exit status and seconds."""
    places = {"HERE": work / name, "PHOTOGRAPHS": work / "photographs", "CONFIG": work / "config.yaml"}
    arguments = [
        re.sub("^(HERE|PHOTOGRAPHS|CONFIG)", lambda found: str(places[found[0]]), part) for part in stage.command
    ]
    started = time.monotonic()
    process = start(arguments, work / f"{name}.log")
    status = wait(process, _LONGEST_S if after is None else after)
    if status is None:
        os.kill(process, number)
        status = wait(process, _LEAVES_S)
        _wait_for_group(process)
    assert status is not None, f"{' '.join(arguments)}: does not leave within {_LEAVES_S} s"
    return status, time.monotonic() - started


def _wait_for_group(leader: int) -> None:
    """Until the last process that a killed one has started is gone."""
    ends = time.monotonic() + _LEAVES_S
    while time.monotonic() < ends:
        try:
            os.killpg(leader, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    os.killpg(leader, signal.SIGKILL)
    raise AssertionError(f"workers are still there {_LEAVES_S} s after their command was killed")


def contents(folder: Path) -> dict[str, Any]:
    """What must be equal in every file below a folder."""
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


def compare(undisturbed: Path, resumed: Path) -> list[str]:
    """Names of the files that differ; of checkpoints the newest counts, since one that was made at a signal stays."""
    for folder in (undisturbed, resumed):
        for old in sorted((folder / "checkpoints").glob("0*"))[:-1]:
            shutil.rmtree(old)
    ours, theirs = contents(undisturbed), contents(resumed)
    return sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))


def check(name: str, work: Path, moments: Iterator[float], signals: list[int], report: Callable[[str], None]) -> int:
    """Disturb one stage at each of these shares of its time with each signal; how many results differed."""
    stage, failures = STAGES[name], 0
    before = work / "before"
    shutil.rmtree(before, ignore_errors=True)
    shutil.copytree(work / "undisturbed", before)
    status, taken = run(stage, work, "undisturbed")
    assert status == 0, (work / "undisturbed.log").read_text()[-2000:]
    disturbed = 0
    for moment in moments:
        for number in signals:
            shutil.rmtree(work / "resumed", ignore_errors=True)
            shutil.copytree(before, work / "resumed")
            first, _ = run(stage, work, "resumed", moment * taken, number)
            disturbed += first != 0
            again, _ = run(stage, work, "resumed")
            differ = compare(work / "undisturbed" / stage.makes, work / "resumed" / stage.makes)
            # A signal to a process that is not a command yet ends it as it ends any other.
            expected = {0, -number} | ({128 + number} if number == signal.SIGTERM else set())
            if differ or again or first not in expected:
                failures += 1
                log = (work / "resumed.log").read_text()[-1000:]
                report(
                    f"{name}: {signal.Signals(number).name} at {moment:.2f}: statuses {first}, {again}; {differ}\n{log}"
                )
            (work / "resumed.log").unlink()
    report(f"{name}: {taken:.1f} s undisturbed; {disturbed} times stopped within it; {failures} results differ")
    return failures


def photographs(folder: Path, count: int) -> None:
    """A data set of small pictures, one of them damaged."""
    for number in range(count):
        path = folder / scenes.CLASSES[scenes.label(number)] / f"{number:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(scenes.render(number, 48, 40)).save(path)
    path.write_bytes(path.read_bytes()[:300])


def main() -> None:
    """Print a line a stage."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moments", type=int, default=20)
    parser.add_argument("--signals", nargs="+", default=["KILL", "TERM"], choices=["KILL", "TERM"])
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=list(STAGES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", type=int, default=900)
    options = parser.parse_args()
    torch.set_num_threads(1)  # a process with threads cannot be forked well
    for each in COMMANDS.values():
        importlib.import_module(each.target.partition(":")[0])
    chance = random.Random(options.seed)
    signals = [int(getattr(signal, f"SIG{name}")) for name in options.signals]
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        photographs(work / "photographs", options.images)
        (work / "config.yaml").write_text(CONFIG.replace("PHOTOGRAPHS", str(work / "photographs")))
        (work / "undisturbed").mkdir()
        failures = 0
        for name, stage in STAGES.items():
            if name in options.stages:
                moments = (chance.random() for _ in range(options.moments))
                failures += check(name, work, moments, signals, lambda text: print(text, flush=True))
            else:
                run(stage, work, "undisturbed")
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
