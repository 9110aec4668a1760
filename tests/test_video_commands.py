"""Test the commands of the video experiment as a user runs them, on walks through mazes and on a folder of frames."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from experiments.video.stages import FramePriorStage
from experiments.video.video_run import VideoConfig, VideoRun
from tests.test_commands import fails
from tests.test_configs import CONFIGS
from tests.test_two_processes import run_on_two_processes
from tests.test_videos import write_frames
from vqvae2.__main__ import main
from vqvae2.data.code_store import CodeStore
from vqvae2.pictures import load_image

TINY = """
data: {path: "mazes:8:6", size: 16, labels: folder, split_by: folder, val_fraction: 0.2, num_workers: 0}
autoencoder:
  model:
    channels: 8
    residual_channels: 4
    residual_layers: 1
    levels:
      - {stride: 4, quantizer: {kind: ema, codebook_size: 8, code_dim: 4}}
      - {stride: 2, quantizer: {kind: ema, codebook_size: 8, code_dim: 4}}
  training: {steps: 3, batch_size: 4, validate_every: 3, preview_every: 3, checkpoint_every: 3}
context_frames: 2
baseline_without_actions: true
priors:
  top:
    model: {kind: pixelsnail, channels: 8, residual_channels: 8, kernel: 3, blocks: 1, layers: 1, heads: 2}
    training: &training {steps: 4, batch_size: 8, validate_every: 4, preview_every: 4, checkpoint_every: 2}
  bottom:
    model: {kind: pixelcnn, channels: 8, kernel: 3, layers: 2, output_channels: 8, condition_layers: 1}
    training: *training
three_codes:
  channels: 8
  quantizer: {kind: ema, codebook_size: 8, code_dim: 4}
  decoder: {kind: pixelcnn, channels: 8, kernel: 3, layers: 2, output_channels: 8}
  training: {steps: 4, batch_size: 8, unquantized_steps: 1, validate_every: 4, preview_every: 4, checkpoint_every: 2}
"""
STAGES = ("prior-top", "prior-bottom", "prior-top-without-actions", "prior-bottom-without-actions")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    torch.set_num_threads(1)
    (folder / "tiny.yaml").write_text(TINY)
    assert main(["video", "train", str(folder / "tiny.yaml"), "--run", str(folder / "run")]) == 0
    return folder / "run"


def test_training_writes_every_prior_and_is_skipped_afterwards(
    trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.stat().st_mtime_ns for path in trained.glob("*/model.safetensors")}
    assert {path.parent.name for path in before} == {"autoencoder", *STAGES}
    assert all((trained / name / "previews" / "00000004.png").is_file() for name in STAGES)
    assert main(["video", "train", str(trained / "config.yaml")]) == 0
    assert capsys.readouterr().out.count("already complete") == 6
    assert {path: path.stat().st_mtime_ns for path in before} == before
    fails(
        capsys,
        ["video", "train", str(trained / "config.yaml"), "--context-frames", "3"],
        "was made with context_frames = 2",
    )


def test_resumed_training_gives_the_same_weights(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run, ignore=shutil.ignore_patterns("prior-*"))
    original, calls = FramePriorStage.after_update, []

    def after_update(self: FramePriorStage, optimizer: torch.optim.Optimizer) -> None:
        original(self, optimizer)
        calls.append(1)
        if len(calls) == 3:  # after the checkpoint of the second step
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(FramePriorStage, "after_update", after_update)
        assert main(["video", "train", str(run / "config.yaml")]) == 130
    assert not (run / "prior-top" / "model.safetensors").exists()
    assert main(["video", "train", str(run / "config.yaml")]) == 0
    for stage in STAGES:
        whole, resumed = (load_file(path / stage / "model.safetensors") for path in (trained, run))
        assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())


def test_predict_writes_pictures_and_animations(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["video", "predict", str(trained), "--num-frames", "3", "--futures", "3"]
    assert main([*command, "--count", "2"]) == 0
    folder = trained / "predictions"
    height = load_image(folder / "futures.png").shape[1]
    assert height == 2 + 4 * (64 + 2)  # the true clip and three futures
    with Image.open(folder / "actions.gif") as animation:
        assert (animation.n_frames, animation.width) == (5, 2 + 3 * (128 + 2))
    before = (folder / "actions.png").read_bytes()
    assert main([*command, "--count", "1"]) == 0
    assert (folder / "actions.png").read_bytes() == before
    fails(capsys, [*command, "--clip", "99"], "--clip: 99 is too large")
    fails(capsys, ["video", "predict", str(trained), "--num-frames", "9"], "no held-out clip has 11 frames")


def test_evaluate_compares_predictions(trained: Path) -> None:
    assert main(["video", "evaluate", str(trained), "--num-frames", "3", "--classifier-steps", "2"]) == 0
    metrics = json.loads((trained / "evaluation" / "metrics.json").read_text())
    for kind in ("mse", "ssim"):
        assert set(metrics[kind]) == {"prediction", "without actions", "last frame", "reconstruction"}
        assert all(len(values) == 3 for values in metrics[kind].values())
    assert set(metrics["recognized"]) == {"real", "reconstruction", "prediction", "other actions"}
    assert all(0 <= value <= 1 for values in metrics["recognized"].values() for value in values)


def test_three_codes_are_trained_once_and_measured(trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["video", "three-codes", str(trained), "--count", "8"]) == 0
    metrics = json.loads((trained / "three-codes" / "metrics.json").read_text())
    assert (metrics["bits"], metrics["bits_of_first_stage"]) == (9, 2 * 2 * 3)
    assert {"psnr_first_stage", "psnr_three_codes", "psnr_mean_frame", "nll", "nll_of_other"} <= set(metrics)
    assert 0 < metrics["usage"] <= 1
    assert main(["video", "three-codes", str(trained), "--count", "8", "--codes.dtype", "bf16"]) == 0
    assert "three-codes: already complete" in capsys.readouterr().out


def test_three_codes_of_unreadable_frames_are_refused(
    trained: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    training, held_out = VideoRun.existing(trained).stores
    damaged = CodeStore(held_out.path, held_out.header.model_copy(update={"unreadable": (0,)}))
    monkeypatch.setattr(VideoRun, "stores", (training, damaged))
    fails(capsys, ["video", "three-codes", str(trained), "--count", "8"], "unreadable frames: 1. Replace their images")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--extract-codes.flip"], "extract_codes.flip: mirror images are not frames of a clip"),
        (["--data.split-by", "image"], "data.split_by: `image` would take single frames out of clips"),
    ],
)
def test_wrong_settings_give_one_line_errors(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    fails(capsys, ["video", "train", str(CONFIGS / "video-mazes.yaml"), "--run", str(run), *arguments], message)
    assert not run.exists()


def test_names_of_clips_as_actions_are_refused_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    frames = write_frames(tmp_path / "frames", clips=8, frames=6)
    (tmp_path / "tiny.yaml").write_text(TINY)
    arguments = ["--data.path", str(frames), "--run", str(tmp_path / "run")]
    fails(capsys, ["video", "train", str(tmp_path / "tiny.yaml"), *arguments], "data.labels: the label never changes")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("command", ["predict", "evaluate", "three-codes"])
def test_guidance_is_not_offered_because_these_priors_have_no_labels(
    command: str, trained: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["video", command, str(trained), "--codes.guidance-scale", "2"]
    fails(capsys, arguments, "--codes.guidance-scale: unknown option")


def test_two_processes_train_together_and_one_writes(trained: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(trained, run, ignore=shutil.ignore_patterns("three-codes", "predictions", "evaluation"))
    printed = run_on_two_processes(
        tmp_path,
        f"video three-codes {run} --count 8",
        f"video predict {run} --num-frames 2",
        f"video evaluate {run} --num-frames 2 --classifier-steps 1",
    )
    assert printed.count("psnr three codes") == printed.count(f"{run}/three-codes/reconstructions.png") == 1
    assert printed.count(f"{run}/predictions") == printed.count("recognized, prediction:") == 1
    assert (run / "three-codes" / "metrics.json").is_file()
    assert (run / "evaluation" / "metrics.json").is_file()


def test_folder_of_frames_without_actions(tmp_path: Path) -> None:
    frames = write_frames(tmp_path / "frames", clips=6, frames=4)
    (tmp_path / "tiny.yaml").write_text(TINY)
    arguments = [
        "--data.path",
        str(frames),
        "--data.labels",
        "none",
        "--run",
        str(tmp_path / "run"),
        "--no-baseline-without-actions",
    ]
    assert main(["video", "train", str(tmp_path / "tiny.yaml"), *arguments]) == 0
    assert main(["video", "predict", str(tmp_path / "run"), "--num-frames", "2", "--count", "1"]) == 0
    assert (tmp_path / "run" / "predictions" / "clips.png").is_file()
    assert not (tmp_path / "run" / "predictions" / "actions.png").exists()
    assert main(["video", "evaluate", str(tmp_path / "run"), "--num-frames", "2"]) == 0
    assert not (tmp_path / "run" / "prior-top-without-actions").exists()


def test_wrong_commands_and_folders_give_one_line_errors(
    trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fails(capsys, ["video"], "video: no such command")
    fails(capsys, ["video", "predikt"], "Did you mean video predict?")
    fails(capsys, ["video", "train"], "CONFIG: missing")
    fails(capsys, ["video", "predict", str(tmp_path)], "not a run folder", "vqvae2 video train")
    run = tmp_path / "run"
    shutil.copytree(trained, run)
    weights = run / "prior-top" / "model.safetensors"
    shutil.rmtree(run / "prior-bottom")
    evaluate = ["video", "evaluate", str(run), "--num-frames", "3"]
    fails(capsys, evaluate, "prior-bottom")
    weights.write_bytes(b"damaged")
    fails(capsys, evaluate, "prior-")


def test_config_in_the_repository_is_valid(tmp_path: Path) -> None:
    config = VideoConfig.from_yaml(CONFIGS / "video-mazes.yaml")
    copy = tmp_path / "copy.yaml"
    copy.write_text(config.to_yaml())
    assert VideoConfig.from_resolved_yaml(copy) == config
