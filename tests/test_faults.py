"""Test failures of disks, data and processes: one-line errors, no lost results, and resuming."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.conftest import TINY
from tests.test_commands import contents, fails, images
from vqvae2.__main__ import main
from vqvae2.data.samplers import SequentialBatchSampler, load_batches
from vqvae2.errors import UserError

# A batch of 12 is divisible by one, two and three processes. The learning rate is so low that Adam does not amplify
# rounding, which depends on the number of processes, beyond the rounding of the weights.
LAUNCHED = (
    TINY.replace("validate_every: 3, preview_every: 3", "validate_every: 10, preview_every: 20")
    .replace("validate_every: 2, preview_every: 2", "validate_every: 10, preview_every: 20")
    .replace("steps: 6, batch_size: 8,", "steps: 20, batch_size: 12, learning_rate: 3.0e-5,")
    .replace("steps: 4, batch_size: 8,", "steps: 20, batch_size: 12, learning_rate: 3.0e-5,")
    .replace("layers: 2, output", "layers: 2, dropout: 0.0, output")
)
# Trains, and sends itself SIGTERM after the given number of steps.
STOPPING = """
import os, signal, sys
from vqvae2.__main__ import main
from train import loop
last, update = int(sys.argv[1]), loop._update
def updating(stage, units, batches, config, step, *rest):
    if step + 1 == last:
        os.kill(os.getpid(), signal.SIGTERM)
    return update(stage, units, batches, config, step, *rest)
loop._update = updating
sys.exit(main(sys.argv[2:]))
"""


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}


def torchrun(processes: int, *arguments: str | Path) -> list[str]:
    launch = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    return [sys.executable, "-m", *launch, *map(str, arguments)]


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "model.safetensors")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a config and a run that one process completed without interruption."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    torch.set_num_threads(1)
    (folder / "config.yaml").write_text(f"{LAUNCHED}run: {folder / 'run'}\n")
    common = [str(folder / "config.yaml")]
    assert main(["train-autoencoder", *common]) == 0
    assert main(["extract-codes", *common]) == 0
    assert main(["train-prior", *common, "--level", "bottom"]) == 0
    return folder


@pytest.mark.parametrize("stage", ["autoencoder", "prior-bottom"])
def test_training_resumes_with_any_number_of_processes(uninterrupted: Path, tmp_path: Path, stage: str) -> None:
    run, script, config = tmp_path / "run", tmp_path / "stopping.py", tmp_path / "config.yaml"
    script.write_text(STOPPING)
    config.write_text(f"{LAUNCHED}run: {run}\n")
    command = ["train-autoencoder", config]
    if stage == "prior-bottom":
        command = ["train-prior", config, "--level", "bottom"]
        shutil.copytree(uninterrupted / "run" / "autoencoder", run / "autoencoder")
        shutil.copytree(uninterrupted / "run" / "codes", run / "codes")
        (run / "config.yaml").write_text((uninterrupted / "run" / "config.yaml").read_text())
    for processes, last in ((2, 5), (3, 11), (1, 16), (2, 99)):
        single = [sys.executable, str(script), str(last), *map(str, command)]  # starts faster than torchrun
        done = subprocess.run(
            torchrun(processes, script, str(last), *command) if processes > 1 else single,
            env=environment(),
            capture_output=True,
            text=True,
            check=False,
            timeout=200,
        )
        words = "stopped by SIGTERM at step" if last < 20 else "20/20"
        assert words in done.stderr, done.stderr
    resumed = weights(run / stage)
    for name, tensor in weights(uninterrupted / "run" / stage).items():
        torch.testing.assert_close(resumed[name], tensor, atol=1e-5, rtol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


def test_killed_process_stops_the_other_and_training_resumes(uninterrupted: Path, tmp_path: Path) -> None:
    config, run = tmp_path / "config.yaml", tmp_path / "run"
    config.write_text(f"{LAUNCHED}run: {run}\n")
    command = torchrun(2, "-m", "vqvae2", "train-autoencoder", config)
    with (tmp_path / "log").open("w") as log:
        launcher = subprocess.Popen(command, env=environment(), stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + 120
        while not list((run / "autoencoder" / "checkpoints").glob("0*")) and time.monotonic() < deadline:
            time.sleep(0.01)
        workers = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children").read_text().split()
        assert len(workers) == 2
        os.kill(int(workers[1]), signal.SIGKILL)
        assert launcher.wait(60) != 0
    finally:
        launcher.kill()
    printed = (tmp_path / "log").read_text()
    assert "SIGKILL" in printed or "exitcode  : -9" in printed, "the launcher prints which process failed"
    assert main(["train-autoencoder", str(config)]) == 0
    for name, tensor in weights(uninterrupted / "run" / "autoencoder").items():
        torch.testing.assert_close(weights(run / "autoencoder")[name], tensor, atol=1e-5, rtol=1e-5)


class KillsItsWorker:
    """A dataset that kills the process that reads item 5, as the out-of-memory killer does."""

    def __len__(self) -> int:
        return 8

    def __getitem__(self, key: int) -> int:
        if key == 5:
            os.kill(os.getpid(), signal.SIGKILL)
        return key


def test_killed_worker_gives_one_line_error() -> None:
    with pytest.raises(
        UserError,
        match=r"a worker process died .*(killed by signal|exited unexpectedly).*Use fewer workers",
    ):
        list(load_batches(KillsItsWorker(), SequentialBatchSampler(8, 2), num_workers=1))


class Numbers:
    """A dataset of 64 numbers."""

    def __len__(self) -> int:
        return 64

    def __getitem__(self, key: int) -> int:
        return key


def has_processes(group: int) -> bool:
    """Return whether a process group has processes."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_worker_exits_if_main_process_dies_while_it_starts() -> None:
    program = """
import os, time
from tests.test_faults import Numbers
from vqvae2.data.samplers import SequentialBatchSampler, load_batches

os.register_at_fork(after_in_parent=lambda: os._exit(0), after_in_child=lambda: time.sleep(0.5))
next(load_batches(Numbers(), SequentialBatchSampler(64, 4), num_workers=1))
"""
    process = subprocess.Popen([sys.executable, "-c", program], env=environment(), start_new_session=True)
    assert process.wait() == 0
    deadline = time.monotonic() + 20
    while has_processes(process.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    remaining = has_processes(process.pid)
    if remaining:
        os.killpg(process.pid, signal.SIGKILL)
    assert not remaining


@pytest.mark.parametrize("option", ["ro", "size=16k"])
def test_workers_without_shared_memory_give_a_one_line_error(tmp_path: Path, option: str) -> None:
    if subprocess.run(["unshare", "--mount", "true"], capture_output=True, check=False).returncode:
        pytest.skip("requires the right to mount")
    mount = f"mount -t tmpfs -o {option} tmpfs /dev/shm"
    source = images(tmp_path / "images", 40)
    for workers in ("1", "0"):
        command = f"{sys.executable} -m vqvae2 prepare {source} {tmp_path / workers} --size 64 --num-workers {workers}"
        shell = ["unshare", "--mount", "sh", "-c", f"{mount} && exec {command}"]
        done = subprocess.run(shell, env=environment(), capture_output=True, text=True, check=False)
        if workers == "0":
            assert done.returncode == 0, done.stderr
        else:
            assert done.returncode == 2
            assert "Traceback" not in done.stderr
            assert "/dev/shm" in done.stderr.splitlines()[-1]
            assert "set data.num_workers to 0" in done.stderr


def test_death_of_a_worker_does_not_interrupt_other_code(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.2)
    batches = load_batches(KillsItsWorker(), SequentialBatchSampler(8, 1), num_workers=1)
    next(batches)
    time.sleep(0.5)  # the worker reads ahead, and dies here
    assert signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL
    with pytest.raises(UserError, match="a worker process died"):
        list(batches)


def test_data_removed_between_stages_gives_one_line_error_and_keeps_results(
    tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = images(tmp_path / "images", 40)
    common = [str(tiny_config), "--run", str(tmp_path / "run"), "--data.path", str(folder), "--data.labels", "none"]
    assert main(["train-autoencoder", *common]) == 0
    before = contents(tmp_path / "run")
    folder.rename(tmp_path / "moved")
    fails(capsys, ["extract-codes", *common], f"data.path: no such folder: {folder}. Give a folder of images")
    after = contents(tmp_path / "run")
    assert {name: after[name] for name in before} == before
    (tmp_path / "moved").rename(folder)
    assert main(["extract-codes", *common]) == 0


def test_training_on_full_disk_keeps_checkpoints_and_resumes(
    tiny_config: Path, tmp_path: Path, small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train-autoencoder", str(tiny_config), "--autoencoder.training.keep-checkpoints", "1000"]
    config = tiny_config.read_text().replace("steps: 6,", "steps: 40,")
    tiny_config.write_text(config)
    assert main([*command, "--run", str(tmp_path / "run")]) == 0
    run = small_disk / "run"
    fails(capsys, [*command, "--run", str(run)], "No space left on device", "run the same command again")
    assert not (run / "autoencoder" / "model.safetensors").exists()
    kept = sorted(path.name for path in (run / "autoencoder" / "checkpoints").glob("0*"))
    assert 0 < len(kept) < 20
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    assert main([*command, "--run", str(run)]) == 0
    assert f"resuming from step {int(kept[-1])}" in capsys.readouterr().out
    for name, tensor in weights(tmp_path / "run" / "autoencoder").items():
        assert torch.equal(weights(run / "autoencoder")[name], tensor), name


def test_read_only_run_folder_gives_one_line_error_and_is_unchanged(
    tiny_config: Path, finished_run: Path, small_disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    subprocess.run(["mount", "-o", "remount,size=64m", str(small_disk)], check=True)
    run = small_disk / "run"
    shutil.copytree(finished_run, run)
    (run / "prior-top" / "model.safetensors").unlink()
    shutil.rmtree(run / "codes" / "val")
    before = contents(run)
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    common = [str(tiny_config), "--run", str(run)]
    for command in (
        ["train-prior", *common, "--level", "top"],
        ["extract-codes", *common],
        ["sample", str(finished_run), "--count", "2", "--out", str(run / "out")],
        ["reconstruct", str(run), "missing.png"],
    ):
        fails(capsys, command)
    assert contents(run) == before
