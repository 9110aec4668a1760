"""Continue a run with changed training settings: `--resume-with-changes`."""

import json
import shutil
from pathlib import Path
from unittest import mock

import pytest
import torch

from sampling.report.report import write_report
from tests.test_commands import contents, fails
from train.checkpoints import Checkpoints
from vqvae2 import checkpoint
from vqvae2.__main__ import main
from vqvae2.data.code_store import CodeHeader

TRAINING = "--priors.top.training"
CHANGES = [f"{TRAINING}.steps", "9", f"{TRAINING}.learning-rate", "1e-3", f"{TRAINING}.batch-size", "4"]


def train_top(run: Path, *options: str) -> list[str]:
    return ["train-prior", str(run / "config.yaml"), "--level", "top", *options]


@pytest.fixture
def run(finished_run: Path, tmp_path: Path) -> Path:
    """A finished run without samples."""
    return shutil.copytree(finished_run, tmp_path / "run", ignore=shutil.ignore_patterns("samples"))


def test_changes_need_the_option_and_are_recorded(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = contents(run)
    fails(capsys, train_top(run, *CHANGES), "priors.top.training", "add --resume-with-changes")
    assert contents(run) == before
    trained = (run / "prior-top" / "model.safetensors").read_bytes()
    assert main(train_top(run, *CHANGES, "--resume-with-changes")) == 0
    assert (run / "prior-top" / "model-00000004.safetensors").read_bytes() == trained, "the old result is kept"
    assert json.loads((run / "prior-top" / "summary.json").read_text())["steps"] == 9
    assert (run / "prior-bottom" / "model.safetensors").read_bytes() == before["prior-bottom/model.safetensors"]
    recorded = json.loads((run / "changes.json").read_text())["changes"]
    assert [(each["step"], each["setting"], each["before"], each["after"]) for each in recorded] == [
        (4, "priors.top.training.steps", 4, 9),
        (4, "priors.top.training.batch_size", 8, 4),
        (4, "priors.top.training.learning_rate", 3e-4, 1e-3),
    ]
    after = contents(run)
    assert main(train_top(run, *CHANGES, "--resume-with-changes")) == 0  # the same command again
    assert contents(run) == after
    assert main(["sample", str(run)]) == 0
    page = write_report(run).read_text()
    assert "priors.top.training.learning_rate" in page
    assert "Settings changed during training" in page


def test_changed_run_resumes_exactly(run: Path, tmp_path: Path) -> None:
    """A run that is killed after a change gives the same weights as one that is not."""
    killed = shutil.copytree(run, tmp_path / "killed")
    assert main(train_top(run, *CHANGES, "--resume-with-changes")) == 0
    save = Checkpoints.save

    def save_and_die(self: Checkpoints, state: object) -> None:
        save(self, state)  # pyright: ignore[reportArgumentType]
        raise KeyboardInterrupt

    with mock.patch.object(Checkpoints, "save", save_and_die):
        assert main(train_top(killed, *CHANGES, "--resume-with-changes")) == 130
    assert main(train_top(killed)) == 0  # the changes are part of the run's config by now
    expected, found = (checkpoint.load(each / "prior-top" / "model.safetensors")[0] for each in (run, killed))
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert (run / "changes.json").read_bytes() == (killed / "changes.json").read_bytes()


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        (f"{TRAINING}.steps", "3", "3 is less than the 4 steps trained already"),
        (f"{TRAINING}.seed", "1", "training.seed = 0, not 1"),
        ("--priors.top.model.channels", "16", "model.channels = 8, not 16"),
        ("--data.size", "64", "data.size = 32, not 64"),
        ("--autoencoder.training.steps", "9", "codes was made from the autoencoder as it is"),
    ],
)
def test_other_changes_are_refused(
    run: Path, capsys: pytest.CaptureFixture[str], option: str, value: str, expected: str
) -> None:
    before = contents(run)
    fails(capsys, train_top(run, option, value, "--resume-with-changes"), expected)
    assert contents(run) == before


def test_stage_that_stopped_early_continues_with_more_patience(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(run / "prior-top")
    early = [f"{TRAINING}.early-stopping-patience", "1", f"{TRAINING}.validate-every", "1", f"{TRAINING}.steps", "6"]
    with mock.patch("train.stages.prior.mean_nll", return_value=2.0):  # which never improves
        assert main(train_top(run, *early, "--resume-with-changes")) == 0
        log = run / "prior-top" / "metrics.jsonl"
        assert json.loads(log.read_text().splitlines()[-1])["step"] == 2
        before = contents(run)
        for change in ([f"{TRAINING}.steps", "9"], [f"{TRAINING}.learning-rate", "1e-3"]):
            expected = "training stopped early at step 2. To continue, also raise early_stopping_patience, now 1"
            fails(capsys, train_top(run, *change, "--resume-with-changes"), expected)
        fails(capsys, train_top(run, f"{TRAINING}.validate-every", "2"), "validate_every = 1, not 2")
        assert contents(run) == before
        more = [f"{TRAINING}.early-stopping-patience", "3", "--resume-with-changes"]
        assert main(train_top(run, *more)) == 0
        assert json.loads(log.read_text().splitlines()[-1])["step"] == 4


def test_stage_whose_best_weights_are_not_the_last_continues(run: Path) -> None:
    shutil.rmtree(run / "prior-top")
    whole = [f"{TRAINING}.early-stopping-patience", "5", f"{TRAINING}.validate-every", "1", "--resume-with-changes"]
    with mock.patch("train.stages.prior.mean_nll", return_value=2.0):  # so that the best step is the first
        assert main(train_top(run, *whole)) == 0
        assert json.loads((run / "prior-top" / "summary.json").read_text())["steps"] == 1
        assert main(train_top(run, f"{TRAINING}.steps", "5", "--resume-with-changes")) == 0
    log = run / "prior-top" / "metrics.jsonl"
    assert json.loads(log.read_text().splitlines()[-1])["step"] == 5


def test_max_pixels_may_change_until_images_have_been_read(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config, fewer = str(run / "config.yaml"), ["--data.max-pixels", "5000"]
    fails(capsys, ["train-autoencoder", config, *fewer], "data.max_pixels = 89478485, not 5000")
    for stage in ("autoencoder", "codes", "prior-top", "prior-bottom"):
        shutil.rmtree(run / stage)
    assert main(["train-autoencoder", config, *fewer]) == 0


def test_a_change_that_is_not_possible_is_refused_before_the_option_is_advised(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["run", str(run / "config.yaml"), "--autoencoder.training.steps", "9"]
    fails(capsys, command, "codes was made from the autoencoder as it is. Start another run")
    fails(capsys, ["run", str(run)], f"is a directory. Give its config: {run / 'config.yaml'}.")


def test_stages_that_have_not_begun_may_change_in_any_way(run: Path) -> None:
    shutil.rmtree(run / "prior-top")
    options = ["--priors.top.model.channels", "16", f"{TRAINING}.seed", "1", "--resume-with-changes"]
    assert main(train_top(run, *options)) == 0
    assert not (run / "changes.json").exists(), "nothing was trained with the old settings"


def test_stage_without_checkpoints_cannot_continue(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.rmtree(run / "prior-top" / "checkpoints")
    fails(capsys, train_top(run, *CHANGES, "--resume-with-changes"), "prior-top has no checkpoint to continue from")


def test_settings_of_a_run_that_failed_before_it_began_are_replaced(
    tiny_config: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train-autoencoder", str(tiny_config), "--run", str(tmp_path / "new")]
    fails(capsys, [*command, "--data.path", str(tmp_path / "missing"), "--data.labels", "none"], "missing")
    assert (tmp_path / "new" / "config.yaml").is_file()
    assert main(command) == 0
    fails(capsys, [*command, "--data.labels", "none"], 'data.labels = "folder", not "none"')


def test_run_of_another_kind_is_refused_before_anything_is_written(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(run)
    config = str(run / "config.yaml")
    fails(capsys, ["video", "train", config], "config.yaml: `context_frames` is missing", "run of another kind")
    fails(capsys, ["video", "predict", str(run)], "config.yaml: `context_frames` is missing")
    assert contents(run) == before
    text = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(f"context_frames: 3\n{text}")
    fails(capsys, ["sample", str(run)], "`context_frames` is unknown, so this is a run of another kind")


def test_prior_of_another_autoencoder_is_not_taken_as_complete(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Train the autoencoder further after its codes were deleted, then extract them again."""
    shutil.rmtree(run / "codes")
    config = str(run / "config.yaml")
    change = ["--autoencoder.training.steps", "8", "--resume-with-changes"]
    assert main(["train-autoencoder", config, *change]) == 0
    assert main(["extract-codes", config]) == 0
    fails(capsys, train_top(run), "prior-top/model.safetensors", "trained on another `autoencoder`", "Delete")
    (run / "prior-top" / "model.safetensors").unlink()
    fails(capsys, train_top(run), "prior-top/checkpoints", "trained on another `autoencoder`", "Delete")
    shutil.rmtree(run / "prior-top")
    assert main(train_top(run)) == 0
    with mock.patch.object(CodeHeader, "digest", "0" * 64):  # as if other images had become unreadable
        fails(capsys, train_top(run), "prior-top/model.safetensors", "trained on another `codes`", "Delete")
