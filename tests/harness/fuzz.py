"""Change one file, name or environment variable at random, run a command that reads it, and check the outcome.

    python -m tests.harness.fuzz [--times 1000] [--seed 0] [--targets store checkpoint …] [--processes 2]

The command must exit within ten seconds and with at most 2 GiB of memory, either with status 0 and the same result as
before the change, or with status 2 and a one-line error without a traceback. After an error, it must succeed once the
file is restored. A corrupted input image may change or remove its own record, but no other. The exit status is 1 if
anything else happens.
"""

import argparse
import collections
import contextlib
import importlib
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from tests.harness import mutations
from tests.harness.kills import photographs, start, wait
from tests.harness.targets import CONFIG, TARGETS, Target
from tests.inception_fixture import weights as inception_weights
from vqvae2.__main__ import COMMANDS

_TIMEOUT_S = 10
_MAX_MEMORY = 2 * 2**30  # bytes, resident
_MAX_ADDRESS_SPACE = 64 * 2**30  # bytes; a guard against commands that would use up the memory of the machine
_PREPARE_TIMEOUT_S = 600
_PATHS = ("config.yaml", "run", "out", "prepared", "grid.png", "photographs", "fresh", "run/codes/train")
_LINKED_SUFFIXES = (".png", ".jpg", ".safetensors", ".json", ".yaml", ".jsonl")  # replaced as a whole
Environment = dict[str, str | None]


class Outcome(NamedTuple):
    """How a command ended."""

    status: int | None  # None after a timeout
    printed: str
    memory: int  # peak, in bytes


def run(target: Target, work: Path, path: Path, environment: Environment) -> Outcome:
    """Run the command of a target."""
    log = work / "log"
    log.unlink(missing_ok=True)
    arguments = [
        str(work / part) if part in _PATHS else str(path) if part == "ARCHIVE" else part for part in target.command
    ]
    process = start(arguments, log, partial(_prepare_process, environment))
    deadline = time.monotonic() + _TIMEOUT_S
    while True:
        found, status, usage = os.wait4(process, os.WNOHANG)
        if found:
            code = os.waitstatus_to_exitcode(status)
            return Outcome(code, log.read_text(errors="replace"), usage.ru_maxrss * 1024)
        if time.monotonic() > deadline:
            os.killpg(process, signal.SIGKILL)
            os.waitpid(process, 0)
            return Outcome(None, log.read_text(errors="replace"), 0)
        time.sleep(0.002)


def _prepare_process(environment: Environment) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (_MAX_ADDRESS_SPACE, _MAX_ADDRESS_SPACE))
    for name, value in environment.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value


def check(name: str, work: Path, path: Path, expected: Any, environment: Environment) -> str:
    """Run the command and return "same", "rejected" or "skipped", or the description of a failure."""
    target = TARGETS[name]
    outcome = run(target, work, path, environment)
    printed = outcome.printed[-1500:]
    lines = [line for line in outcome.printed.splitlines() if line.startswith("vqvae2: ") and ": warning: " not in line]
    if "Traceback" in outcome.printed or outcome.status not in (0, 2):
        return f"status {outcome.status}\n{printed}"
    if outcome.memory > _MAX_MEMORY:
        return f"{outcome.memory / 2**30:.1f} GiB of memory\n{printed}"
    if outcome.status == 2:
        return "rejected" if len(lines) == 1 else f"{len(lines)} error lines\n{printed}"
    found = target.result(work)
    if name == "image" and found != expected:
        own = str(path.relative_to(work / "photographs"))
        others, before = ({key: value for key, value in each.items() if key != own} for each in (found, expected))
        return "skipped" if others == before else "other records differ"
    return "same" if found == expected else "different result"


def prepare(work: Path) -> None:
    """Complete a small run in the work folder, and every output that a target reads."""
    photographs(work / "photographs", 60)
    config = CONFIG.replace("PHOTOGRAPHS", str(work / "photographs")).replace("INCEPTION", str(inception_weights()))
    (work / "config.yaml").write_text(config)
    run_folder, out, prepared = str(work / "run"), str(work / "out"), str(work / "prepared")
    common = [str(work / "config.yaml"), "--run", run_folder]
    for arguments in (
        ["train-autoencoder", *common],
        ["extract-codes", *common],
        ["train-prior", *common],
        ["sample", run_folder, "--out", out],
        ["diagnose", run_folder, "--count", "2"],
        ["evaluate", run_folder, "--samples", out],
        ["report", run_folder, "--samples", out],
        ["prepare", str(work / "photographs"), prepared, "--size", "24", "--max-unreadable-fraction", "0.1"],
        ["inspect", prepared, "--out", str(work / "grid.png")],
    ):
        status = wait(start(arguments, work / "log"), _PREPARE_TIMEOUT_S)
        assert status == 0, (work / "log").read_text()
    for suffix in (".zip", ".tar"):
        (work / f"photographs{suffix}").touch()


def restore(base: Path, work: Path) -> None:
    """Restore the work folder from `base`. Files that commands do not change in place are hard links."""
    shutil.rmtree(work)
    shutil.copytree(base, work, copy_function=_link_or_copy)


def _link_or_copy(source: str, target: str) -> None:
    if source.endswith(_LINKED_SUFFIXES):
        os.link(source, target)
    else:
        shutil.copy2(source, target)


def trial(name: str, base: Path, work: Path, rng: random.Random, expected: Any) -> str:
    """Change one file of a target, or the environment, in a restored work folder and return the outcome."""
    target = TARGETS[name]
    restore(base, work)
    for output in target.removed:
        shutil.rmtree(work / output) if (work / output).is_dir() else (work / output).unlink()
    environment: Environment = {}
    path = work
    if target.changes_environment:
        environment = mutations.mutate_environment(rng)
        description = str(environment)
    else:
        path = rng.choice(sorted(path for path in work.glob(target.files) if path.is_file()))
        description = target.change(path, rng)
    found = check(name, work, path, expected, environment)
    if found == "rejected" and path.is_file() and target.change is not mutations.write_archive:
        # A changed store has another seal.
        for changed in (path, path.with_name("seal.json")) if path.name == "data.mdb" else (path,):
            changed.unlink()
            shutil.copy2(base / changed.relative_to(work), changed)
        after_restore = check(name, work, path, expected, {})
        if after_restore != "same":
            printed = (work / "log").read_text(errors="replace")
            found = f"after restoring the file: {after_restore}\n{printed[-1500:]}"
    if found not in ("same", "rejected", "skipped"):
        print(f"{name}: {path.relative_to(work)}: {description}: {found}", flush=True)
        return "FAILED"
    return found


def run_share(names: list[str], times: int, seed: int, share: int, num_shares: int) -> dict[str, dict[str, float]]:
    """Run every `num_shares`-th trial, and return the number of each outcome and the seconds by target."""
    results: dict[str, dict[str, float]] = {}
    # A changed environment may make libraries write files to relative paths.
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
        # All trials use the same path, because artifacts record the path of their data.
        work, base = Path(folder, "work"), Path(folder, "base")
        work.mkdir()
        prepare(work)
        unchanged = {name: None if "fresh" in TARGETS[name].command else TARGETS[name].result(work) for name in names}
        shutil.copytree(work, base)
        for index, name in enumerate(names):
            expected = unchanged[name] if unchanged[name] is not None else True
            counts: collections.Counter[str] = collections.Counter()
            started = time.monotonic()
            for number in range(share, (times + index) // len(names), num_shares):
                counts[trial(name, base, work, random.Random(f"{seed} {name} {number}"), expected)] += 1
            results[name] = {**counts, "seconds": time.monotonic() - started}
    return results


def main() -> None:
    """Print every failure, and one line per target."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=1000, help="trials over all targets")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=1, help="trials at the same time")
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    options = parser.parse_args()
    torch.set_num_threads(1)  # forking a multithreaded process is unsafe
    for each in COMMANDS.values():
        importlib.import_module(each.target.partition(":")[0])
    inception_weights()
    count = options.processes
    share = partial(run_share, options.targets, options.times, options.seed, num_shares=count)
    with ProcessPoolExecutor(count, multiprocessing.get_context("fork")) as pool:
        shares = list(pool.map(share, range(count)))
    for name in options.targets:
        total = sum((collections.Counter(each[name]) for each in shares), collections.Counter())
        seconds = total.pop("seconds")
        outcomes = ", ".join(f"{int(value)} {key}" for key, value in sorted(total.items()))
        print(f"{name}: {outcomes}; {seconds / max(1, sum(total.values())):.1f} s per trial", flush=True)
    sys.exit(any("FAILED" in each[name] for each in shares for name in options.targets))


if __name__ == "__main__":
    main()
