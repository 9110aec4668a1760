"""Interrupt every stage at random moments, rerun the command, and compare the results with an uninterrupted run.

    python -m tests.harness.kills [--moments 20] [--kinds kill term …] [--stages autoencoder extract …] [--seed 0]

The kinds of interruptions:

    kill     SIGKILL ends the main process, as the out-of-memory killer does; its workers must exit
    term     SIGTERM requests the main process to stop; it prints how to resume and exits with status 143
    group    SIGTERM to the main process and its workers at once, as systemd and most schedulers send it
    worker   SIGKILL ends a worker; the command prints one line and exits with status 2
    disk     the disk is full after a random part of the output; the command prints one line and exits with status 2
    twice    the same command is started a second time; it waits for nothing, and is refused or finds the work complete

All output files of a stage are compared byte by byte, except for times, older checkpoints and TensorBoard logs. Of an
LMDB, the records are compared instead of the pages. The exit status is 1 if anything differs.
"""

import argparse
import contextlib
import importlib
import os
import random
import re
import shutil
import signal
import subprocess
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
from vqvae2.errors import UserError

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


def launch(stage: Stage, work: Path, name: str) -> int:
    """Start a stage in the folder `name`, and return the process id."""
    paths = {"HERE": work / name, "PHOTOGRAPHS": work / "photographs", "CONFIG": work / "config.yaml"}
    arguments = [
        re.sub("^(HERE|PHOTOGRAPHS|CONFIG)", lambda found: str(paths[found[0]]), part) for part in stage.command
    ]
    return start(arguments, work / f"{name}.log")


def finish(process: int, seconds: float = _RUN_TIMEOUT_S) -> int:
    """Wait for a command and its workers, and return its exit status."""
    status = wait(process, seconds)
    _wait_for_group(process)
    assert status is not None, f"the command does not exit within {seconds} s"
    return status


def interrupt(kind: str, stage: Stage, work: Path, moment: float) -> set[int]:
    """Run a stage in the folder `resumed`, interrupt it after `moment` seconds, and return the exit statuses."""
    process = launch(stage, work, "resumed")
    if kind == "disk":
        return {finish(process)}
    status = wait(process, moment)
    if kind == "twice":
        second = launch(stage, work, "resumed")
        return {finish(process) if status is None else status, finish(second)}
    if status is not None:
        return {status}
    if kind == "kill":
        os.kill(process, signal.SIGKILL)
    elif kind == "term":
        os.kill(process, signal.SIGTERM)
    elif kind == "group":
        os.killpg(process, signal.SIGTERM)
    elif workers := Path(f"/proc/{process}/task/{process}/children").read_text().split():
        with contextlib.suppress(ProcessLookupError):  # it may have finished
            os.kill(int(workers[-1]), signal.SIGKILL)
    return {finish(process, _RUN_TIMEOUT_S if kind == "worker" else _EXIT_TIMEOUT_S)}


# Statuses of an interrupted command. Before it installs its handler, SIGTERM has the default effect.
STATUSES = {
    "kill": {0, -signal.SIGKILL},
    "term": {0, -signal.SIGTERM, 128 + signal.SIGTERM},
    "group": {0, -signal.SIGTERM, 128 + signal.SIGTERM},
    "worker": {0, 2},
    "disk": {0, 2},
    "twice": {0, 2},
}


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Callable[[], None]]:
    """Mount a file system of `size` bytes on a folder, and yield a function that makes it large. Requires root."""
    folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=True)
    try:
        yield lambda: subprocess.run(["mount", "-o", "remount,size=1g", folder], check=True) and None
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def used_bytes(folder: Path) -> int:
    """Return the space that a folder takes on a file system with pages of 4 KiB."""
    return sum(-(-path.stat().st_blocks * 512 // 4096) * 4096 if path.is_file() else 4096 for path in folder.rglob("*"))


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
        only_times = path.name == "summary.json" and path.parent.name in ("codes", "samples")
        if name.startswith("logs/") or path.name in ("lock.mdb", "seal.json") or only_times:
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
    try:
        expected, found = contents(uninterrupted), contents(resumed)
    except (lmdb.Error, UserError) as error:
        return [str(error)]
    return sorted(name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name))


def check(name: str, kind: str, work: Path, moments: list[float]) -> int:
    """Interrupt a stage at each fraction of its duration, or of its output; return how many results differ.

    The stage has been run in the folder `uninterrupted`, from the files in the folder `before`.
    """
    stage, duration = STAGES[name], float((work / "duration").read_text())
    before, resumed, log = work / "before", work / "resumed", work / "resumed.log"
    output = used_bytes(work / "uninterrupted") - used_bytes(before)
    failures = num_stopped = 0
    for moment in moments:
        shutil.rmtree(resumed, ignore_errors=True)
        size = used_bytes(before) + int(moment * output)
        with small_disk(resumed, size) if kind == "disk" else contextlib.nullcontext(lambda: None) as enlarge:
            shutil.copytree(before, resumed, dirs_exist_ok=True)
            statuses = interrupt(kind, stage, work, moment * duration)
            enlarge()
            printed = log.read_text() if log.exists() else ""  # it may have been stopped before it opened its log
            last = finish(launch(stage, work, "resumed"))
            differ = compare(work / "uninterrupted" / stage.output, resumed / stage.output)
        num_stopped += statuses != {0}
        unexpected = statuses - STATUSES[kind] or (kind == "twice" and 0 not in statuses)
        if differ or last or unexpected or "Traceback" in printed:
            failures += 1
            print(f"{name}: {kind} at {moment:.3f}: status {statuses}, then {last}; {differ}\n{printed[-2000:]}")
        log.unlink(missing_ok=True)
    print(f"{name}: {kind}: {num_stopped} of {len(moments)} times stopped before its end; {failures} failures")
    return failures


def run_uninterrupted(name: str, work: Path) -> None:
    """Run a stage in the folder `uninterrupted`; keep the files it starts from in `before`, and its duration."""
    shutil.rmtree(work / "before", ignore_errors=True)
    shutil.copytree(work / "uninterrupted", work / "before")
    started = time.monotonic()
    status = finish(launch(STAGES[name], work, "uninterrupted"))
    assert status == 0, (work / "uninterrupted.log").read_text()[-2000:]
    (work / "duration").write_text(str(time.monotonic() - started))


def photographs(folder: Path, count: int) -> None:
    """Write a dataset of `count` small images, one of which is truncated."""
    for number in range(count):
        path = folder / scenes.CLASSES[scenes.label(number)] / f"{number:04d}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(scenes.render(number, 48, 40)).save(path)
    path.write_bytes(path.read_bytes()[:300])


def main() -> None:
    """Print one line per stage and kind."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--moments", type=int, default=20)
    parser.add_argument("--kinds", nargs="+", default=list(STATUSES), choices=list(STATUSES))
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=list(STAGES))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--images", type=int, default=900)
    parser.add_argument("--steps", type=int, default=120, help="training steps of each stage")
    options = parser.parse_args()
    sys.stdout.reconfigure(line_buffering=True)  # pyright: ignore[reportAttributeAccessIssue]
    torch.set_num_threads(1)  # forking a multithreaded process is unsafe
    for each in COMMANDS.values():
        importlib.import_module(each.target.partition(":")[0])
    rng = random.Random(options.seed)
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        photographs(work / "photographs", options.images)
        config = CONFIG.replace("PHOTOGRAPHS", str(work / "photographs")).replace("STEPS", str(options.steps))
        (work / "config.yaml").write_text(config)
        (work / "uninterrupted").mkdir()
        failures = 0
        for name in STAGES:
            run_uninterrupted(name, work)
            for kind in options.kinds if name in options.stages else ():
                failures += check(name, kind, work, [rng.random() for _ in range(options.moments)])
    sys.exit(failures > 0)


if __name__ == "__main__":
    main()
