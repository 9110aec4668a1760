"""Test what the runs of all experiments share: a moved run has a new folder, and one command at a time uses it."""

from pathlib import Path

import pytest

from experiments.likelihoods.likelihood_run import LikelihoodOptions
from experiments.speech.speech_run import SpeechOptions
from experiments.video.video_run import VideoOptions
from tests.test_commands import fails
from tests.test_configs import CONFIGS
from tests.test_run_data import locked_by_another_process
from train.run import ConfigOptions

KINDS: dict[str, tuple[type[ConfigOptions], str]] = {
    "speech": (SpeechOptions, "speech-digits.yaml"),
    "video": (VideoOptions, "video-mazes.yaml"),
    "likelihoods": (LikelihoodOptions, "likelihoods-32.yaml"),
}


def write_resolved_config(kind: str, folder: Path, run: Path) -> Path:
    """Write the resolved config of a run at `run` to a folder."""
    options, name = KINDS[kind]
    path = folder / "config.yaml"
    path.write_text(options.from_config(CONFIGS / name, ["--run", str(run)], kind).config.to_yaml())
    return path


@pytest.mark.parametrize("kind", KINDS)
def test_config_of_a_moved_run_names_its_folder(kind: str, tmp_path: Path) -> None:
    path = write_resolved_config(kind, tmp_path, tmp_path / "before")
    assert KINDS[kind][0].from_config(path, [], kind).run == str(tmp_path)


@pytest.mark.parametrize(
    "command",
    [
        "likelihoods",
        "speech train",
        "speech convert",
        "speech sample",
        "speech evaluate",
        "video train",
        "video predict",
        "video evaluate",
        "video three-codes",
    ],
)
def test_two_commands_cannot_use_one_run_folder(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_resolved_config(command.split()[0], tmp_path, tmp_path)
    takes_config = command.endswith(("train", "likelihoods"))
    with locked_by_another_process(tmp_path) as pid:
        arguments = [*command.split(), str(config if takes_config else tmp_path)]
        fails(capsys, arguments, str(tmp_path), f"in use by process {pid} on")
