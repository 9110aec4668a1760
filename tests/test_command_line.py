"""The command line: option parsing, help, one-line errors, and user files that shadow this project's packages."""

import importlib.util
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from experiments.likelihoods.likelihood_run import CapacityConfig, LikelihoodConfig
from experiments.speech.speech_run import SpeechConfig
from experiments.video.three_codes import ThreeCodesConfig
from sampling.run_config import RunConfig
from tests.test_commands import fails
from tests.test_configs import CONFIGS
from train.accelerator import make_accelerator
from train.run import ConfigOptions
from vqvae2.__main__ import COMMANDS, main
from vqvae2.command_line import option_names, options_class, parse
from vqvae2.config import Config
from vqvae2.errors import UserError
from vqvae2.priors import PixelSNAILConfig

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


def test_boolean_forms_of_an_option_that_also_accepts_other_types() -> None:
    def attention(*arguments: str) -> object:
        prior = apply(*arguments, "--data.flip", "true").priors["top"].model
        assert isinstance(prior, PixelSNAILConfig)
        return prior.attention

    option = "--priors.top.model.attention"
    for word in ("false", "False", "FALSE"):
        assert attention(option, word) is False
        assert attention(f"{option}={word}") is False
    assert attention(option, "true") is True
    assert attention(option, "0", "1") == (0, 1)
    assert attention(f"{option}=1") == (1,)


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
        (["--data.autoencoder.training.steps", "5"], "Did you mean --autoencoder.training.steps?"),
        (
            ["--autoencoder.loss.perceptual.weight", "1", "--autoencoder.training.steps", "4"],
            "autoencoder.training: ",
        ),
        (
            ["--priors.bottom.training.steps", "9000", "--priors.top.training.steps", "1"],
            "priors.top.training: ",
        ),
        (
            ["--priors.bottom.training.steps", "9000", "--priors.top.training.steps", "0"],
            "--priors.top.training.steps: Input should be greater",
        ),
        (["--priors.top.training.warmup-steps", "9999"], "priors.top.training: warmup_steps (9999) must be less than"),
        (["--autoencoder.training.betas", "1.5", "0.9"], "--autoencoder.training.betas.0: Input should be less than 1"),
        (["stray"], "stray: unexpected argument"),
    ],
)
def test_errors_are_one_line_and_name_the_option(arguments: list[str], message: str) -> None:
    with pytest.raises(UserError) as error:
        apply(*arguments)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_an_invalid_item_is_one_problem_and_named_once() -> None:
    with pytest.raises(UserError) as error:
        apply("--evaluation.features", "foo")
    assert str(error.value).startswith("--evaluation.features.0: no network 'foo'; the networks are inception")
    assert str(error.value).endswith("timm:NAME")


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


def documented(part: str, section: str) -> dict[str, str]:
    """Return the default of each option or setting that a section of docs/commands.md lists, as text."""
    page = (CONFIGS.parent / "docs" / "commands.md").read_text(encoding="utf-8")
    text = page.split(f"\n# {part}\n")[1].split("\n# ")[0] if part else page.split("\n# ")[0]
    text = text.split(f"\n## {section}\n")[1].split("\n## ")[0]
    rows = [re.split(r"(?<!\\) \| ", line.strip("| ")) for line in text.splitlines() if line.startswith("| `")]
    return {row[0].strip("`"): row[2].strip() for row in rows}


def as_text(value: Any) -> str:
    if value is None or value == ():
        return ""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, tuple):
        return " ".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def test_commands_page_has_the_defaults_of_options(capsys: pytest.CaptureFixture[str]) -> None:
    for name, command in COMMANDS.items():
        module, _, function = command.target.partition(":")
        cls = options_class(getattr(importlib.import_module(module), function))
        if not issubclass(cls, ConfigOptions):  # whose defaults come from a file
            defaults = {key.replace("_", "-"): value for key, value in option_names(cls)}
            for option, default in documented("", f"vqvae2 {name}").items():
                if option.startswith("--") and default != "required":
                    assert default == as_text(defaults[option[2:]]), f"{name} {option}"
    assert documented("", "vqvae2 video predict")["--codes.temperature"] == "0.5"
    assert main(["video", "predict", "--help"]) == 0
    assert "0.5)" in capsys.readouterr().out.split("--codes.temperature")[1].split("--codes.top-k")[0]


def settings(config: Config, section: str) -> Iterator[tuple[str, str, Any]]:
    """Yield section, name and value of the settings of a config, as docs/commands.md names them."""
    for name, value in config:
        path = f"{section}.{name}" if section else name
        if isinstance(value, Config):
            yield from settings(value, f"{path} (kind: {value.kind})" if "kind" in type(value).model_fields else path)
        elif not (isinstance(value, tuple) and value and isinstance(value[0], Config)):
            yield section or "top level", name, value


@pytest.mark.parametrize(
    ("part", "config", "section"),
    [
        ("Settings of speech experiments", SpeechConfig(), ""),
        ("Settings of comparisons of likelihoods", LikelihoodConfig(), ""),
        ("Settings of comparisons of likelihoods", CapacityConfig(), "capacities.N"),
        ("Settings of video experiments", ThreeCodesConfig(), "three_codes"),
    ],
)
def test_commands_page_has_the_defaults_of_settings(part: str, config: Config, section: str) -> None:
    listed = list(settings(config, section))
    assert len(listed) > 10
    for name, setting, value in listed:
        assert documented(part, name)[setting] == as_text(value), f"{name}.{setting}"


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
