"""The command line: option parsing, help, one-line errors, and user files that shadow this project's packages."""

import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from sampling.run_config import RunConfig
from tests.test_commands import fails
from tests.test_configs import CONFIGS
from train.accelerator import make_accelerator
from vqvae2.__main__ import COMMANDS, main
from vqvae2.command_line import parse
from vqvae2.errors import UserError

DEMO = RunConfig.from_yaml(CONFIGS / "demo.yaml")


def apply(*arguments: str) -> RunConfig:
    return parse(RunConfig, arguments, "vqvae2 run", DEMO)


def test_boolean_forms() -> None:
    for form in (["--data.flip"], ["--data.flip", "true"], ["--data.flip=True"], ["--data.flip", "TRUE"]):
        assert apply(*form).data.flip
    for form in (["--data.no-flip"], ["--data.flip", "false"], ["--data.flip=false"]):
        assert not apply("--data.flip", *form).data.flip
    config = apply("--data.flip", "false", "--extract_codes.flip", "true", "--data.size", "48", "64")
    assert (config.data.flip, config.extract_codes.flip, config.data.shape) == (False, True, (48, 64))
    with pytest.raises(UserError, match="maybe"):
        apply("--data.flip", "maybe")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data.pathh", "x"], "--data.pathh: unknown option. Did you mean --data.path?"),
        (["--autoencodr.training.steps", "5"], "Did you mean --autoencoder.training.steps?"),
        (["--data.size"], "--data.size: the value is missing"),
        (["--data.labels", "x"], "--data.labels: must be none, folder, or a .csv"),
        (["--autoencoder.training.steps", "-1"], "--autoencoder.training.steps: Input should be greater than or equal"),
        (
            ["--autoencoder.training.steps", "0", "--autoencoder.training.decoder-steps", "0"],
            "--autoencoder.training.steps: must be at least 1 without",
        ),
        (["--autoencoder.training.steps", "many"], "--autoencoder.training.steps: "),
        (["--priors.top.training.warmup-steps", "9999"], "priors.top.training: warmup_steps (9999) must be less than"),
        (["stray"], "stray: unexpected argument"),
    ],
)
def test_errors_are_one_line_and_name_the_option(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError) as error:
        apply(*arguments)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_unknown_command_suggests_the_closest(capsys: pytest.CaptureFixture[str]) -> None:
    fails(capsys, ["sampel"], "sampel: no such command", "sample")
    fails(capsys, ["run"], "CONFIG: missing", "vqvae2 run CONFIG.yaml")


def test_help_lists_every_command_quickly() -> None:
    durations = []
    for _ in range(3):
        started = time.perf_counter()
        result = subprocess.run([sys.executable, "-m", "vqvae2", "--help"], capture_output=True, text=True, check=True)
        durations.append(time.perf_counter() - started)
    assert min(durations) < 0.3
    for name, command in COMMANDS.items():
        assert f"  {name} " in result.stdout
        assert command.summary in result.stdout


@pytest.mark.parametrize("name", COMMANDS)
def test_command_help_shows_defaults_and_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*name.split(), "--help"]) == 0
    printed = capsys.readouterr().out
    assert f"usage: vqvae2 {name}" in printed
    assert COMMANDS[name].example in printed
    assert "(default: " in printed


def test_commands_page_is_current() -> None:
    spec = importlib.util.spec_from_file_location("make_commands", CONFIGS.parent / "docs" / "make_commands.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    page = (CONFIGS.parent / "docs" / "commands.md").read_text(encoding="utf-8")
    assert page == module.commands_page(), "run: python docs/make_commands.py"


@pytest.fixture
def shadowed(tmp_path: Path) -> Path:
    """A working directory with files of the user that have the names of this project's packages."""
    for name in ("train", "experiments"):
        (tmp_path / f"{name}.py").write_text(f"raise RuntimeError('{name}.py of the user was imported')\n")
    (tmp_path / "sampling").mkdir()
    (tmp_path / "sampling" / "__init__.py").write_text("raise RuntimeError('sampling of the user was imported')\n")
    return tmp_path


SCRIPT = str(Path(sys.executable).with_name("vqvae2"))
LAUNCHERS = {
    "script": [SCRIPT],
    "python": [sys.executable, "-m", "vqvae2"],
    "accelerate": [sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "-m", "vqvae2"],
    "torchrun": [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "1",
        "-m",
        "vqvae2",
    ],
}


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_user_files_do_not_shadow_this_project(launcher: str, shadowed: Path) -> None:
    for arguments in (["report", "missing"], ["train-prior", "missing.yaml"]):
        command = [*LAUNCHERS[launcher], *arguments]
        result = subprocess.run(command, cwd=shadowed, capture_output=True, text=True, check=False, timeout=120)
        assert result.returncode != 0
        assert "of the user was imported" not in result.stderr
        assert "vqvae2: missing" in result.stderr


@pytest.mark.parametrize("redirect", ["| true", "| head -c 5 >/dev/null", "2>&-", ">&-", ">&- 2>&-"])
@pytest.mark.parametrize("command", ["--help", "inspect missing", "sample n\u00f6\u2026"])
def test_closed_streams_and_pipes_give_no_traceback(redirect: str, command: str, tmp_path: Path) -> None:
    script = f"{sys.executable} -m vqvae2 {command} {redirect}"
    environment = os.environ | {"PYTHONIOENCODING": "latin-1"}
    result = subprocess.run(script, shell=True, cwd=tmp_path, env=environment, capture_output=True, check=False)
    assert b"Traceback" not in result.stderr
    assert b"Exception ignored" not in result.stderr


@pytest.mark.parametrize(
    ("name", "value", "key"),
    [
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "training.gradient_accumulation_steps"),
        ("ACCELERATE_MIXED_PRECISION", "bf16", "training.mixed_precision"),
    ],
)
def test_launcher_settings_that_differ_from_the_config_are_refused(
    name: str, value: str, key: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=f"{name}={value}: differs from {key}"):
        make_accelerator()


@pytest.mark.parametrize("name", ["ACCELERATE_DYNAMO_BACKEND", "ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_invalid_variables_of_accelerate_give_one_line_errors(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(name, "garbage")
    with pytest.raises(UserError, match=rf"{name}.*Unset the variable"):
        make_accelerator()


def test_run_folder_that_is_not_utf8_gives_one_line_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="TensorBoard cannot log to a name that is not valid UTF-8"):
        make_accelerator(folder=tmp_path / "caf\udce9", tracker="tensorboard")


def test_unknown_matplotlib_backend_gives_one_line_error() -> None:
    code = "from vqvae2.pictures import make_figure; make_figure(1)"
    environment = os.environ | {"MPLBACKEND": "garbage"}
    result = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert "UserError: MPLBACKEND=garbage: not a backend of matplotlib" in result.stderr


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore"), "out of memory (CUDA out of"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:117] data. DefaultCPUAllocator: can't allocate memory"), "117]"),
        (MemoryError(), "out of memory (MemoryError). Use a smaller batch size"),
        (ImportError("libtorch_cpu.so: failed to map segment from shared object"), "Check the limit on memory"),
    ],
)
def test_too_little_memory_gives_one_line_errors(
    error: Exception, message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(_: list[str]) -> None:
        raise error

    monkeypatch.setattr("vqvae2.__main__._dispatch", fail)
    fails(capsys, ["report", "runs/demo"], message)


def test_allocation_that_fails_gives_a_one_line_error(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("vqvae2.__main__._dispatch", lambda _: torch.empty(2**50, dtype=torch.uint8))
    fails(capsys, ["report", "runs/demo"], "out of memory", "smaller batch size")


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="needs glibc")
def test_freed_memory_is_reused() -> None:
    script = """
import resource, torch
from vqvae2.__main__ import main
main(["--version"])
for step in range(30):
    if step == 10:  # by then the heap has its size
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""
    printed = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True).stdout
    assert int(printed.split()[-1]) < 100  # otherwise at least 32 for each of 20 tensors of 64 MiB


def test_other_errors_keep_their_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(_: list[str]) -> None:
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr("vqvae2.__main__._dispatch", fail)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        main(["report", "runs/demo"])


def test_uninstalled_clone_says_so(tmp_path: Path) -> None:
    shutil.copytree(CONFIGS.parent / "vqvae2", tmp_path / "vqvae2", ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-S", "-m", "vqvae2"]  # -S leaves out installed packages
    for arguments, expected in ((["--version"], "not installed"), (["sample", "x"], "vqvae2: not installed")):
        result = subprocess.run([*command, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert expected in result.stdout + result.stderr
        assert "Traceback" not in result.stderr
