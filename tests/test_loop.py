"""Test the training loop: schedules, resuming, accumulation, EMA weights, signals, NaN losses, and checkpoints."""

import json
import math
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import Tensor, nn

from tests.inception_fixture import two_processes
from train import loop
from train.checkpoints import Checkpoints, TrainingState
from train.loop import TrainingStage, train
from train.lr_schedule import learning_rate
from train.metric_log import MetricLog, StepValues
from vqvae2 import checkpoint
from vqvae2.distributed import get_rank
from vqvae2.errors import Stopped, UserError
from vqvae2.pictures import save_image
from vqvae2.training_config import TrainingConfig


class RandomPoints:
    """A dataset of 37 random points with three coordinates."""

    def __init__(self) -> None:
        self.x = torch.randn(37, 3, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, key: Any) -> tuple[Tensor]:
        return (self.x[key[0]],)


class Regression(nn.Module):
    """Linear regression with dropout, so that every step depends on the random state."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.dropout = nn.Linear(3, 1), nn.Dropout(0.5)
        self.nan_at: int | None = None
        self.calls = 0

    def forward(self, batch: tuple[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        (x,) = batch
        self.calls += 1
        error = (self.layer(self.dropout(x))[:, 0] - x.sum(1)).square().mean()
        if self.nan_at is not None and self.calls == self.nan_at:
            error = error * torch.nan
        return error, {"error": error}


class LineStage(TrainingStage):
    monitor = "weight"

    def __init__(self, stop_at: int | None = None) -> None:
        self.name, self.training_data, self.curves = "line", RandomPoints(), {"loss": ["train/loss"]}
        torch.manual_seed(0)
        self.objective = Regression()
        self.stop_at, self.updates = stop_at, 0

    @property
    def network(self) -> nn.Module:
        return self.objective

    def validate(self, accelerator: Accelerator) -> dict[str, float]:
        assert not self.objective.training
        return {"weight": float(self.objective.layer.weight.detach().sum())}

    def preview(self, path: Path) -> None:
        path.parent.mkdir(exist_ok=True)
        save_image(path, torch.zeros(3, 4, 4, dtype=torch.uint8))

    def save(self, path: Path) -> None:
        torch.save(self.objective.state_dict(), path)

    def after_update(self, optimizer: torch.optim.Optimizer) -> None:
        self.updates += 1
        if self.updates == self.stop_at:
            os.kill(os.getpid(), signal.SIGTERM)


def config(**changes: Any) -> TrainingConfig:
    settings = {"steps": 12, "batch_size": 8, "learning_rate": 0.01, "checkpoint_every": 4, "validate_every": 5}
    return TrainingConfig(**settings | {"log_every": 3, "preview_every": 6, "ema_decay": 0.9} | changes)


def newest_state(folder: Path) -> dict[str, Tensor]:
    tensors = load_file(max((folder / "checkpoints").iterdir()) / "state.safetensors")
    # load_file maps the file into memory, so clones protect the values from later writes.
    return {name: tensor.clone() for name, tensor in tensors.items()}


def log_entries(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("stop_at", [1, 4, 7])
def test_resumed_run_matches_uninterrupted_run_bit_for_bit(tmp_path: Path, stop_at: int) -> None:
    uninterrupted, interrupted = tmp_path / "uninterrupted", tmp_path / "interrupted"
    summary = train(LineStage(), config(), uninterrupted, num_workers=0)
    with pytest.raises(
        Stopped, match=rf"stopped by SIGTERM at step {stop_at}; .*same command again to resume"
    ) as stopped:
        train(LineStage(stop_at), config(), interrupted, num_workers=0)
    assert stopped.value.status == 143
    resumed = train(LineStage(), config(), interrupted, num_workers=0)
    one, other = newest_state(uninterrupted), newest_state(interrupted)
    assert one.keys() == other.keys()
    for name in one:
        assert torch.equal(one[name], other[name]), name
    assert resumed["validation"] == summary["validation"]
    assert [entry["step"] for entry in log_entries(interrupted)] == [
        entry["step"] for entry in log_entries(uninterrupted)
    ]


def test_signal_after_the_last_checkpoint_stops_before_the_next_stage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save = loop._save

    def save_and_stop(state: TrainingState, *arguments: Any) -> None:
        save(state, *arguments)
        if state.step == 12:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(loop, "_save", save_and_stop)
    with pytest.raises(Stopped, match=r"^stopped by SIGTERM; run the same command again to resume$") as stopped:
        train(LineStage(), config(), tmp_path, num_workers=0)
    assert stopped.value.status == 143
    assert not (tmp_path / "model.safetensors").exists()
    assert train(LineStage(), config(), tmp_path, num_workers=0)["steps"] == 12
    assert (tmp_path / "model.safetensors").exists()


def test_killed_run_resumes_from_the_last_checkpoint(tmp_path: Path) -> None:
    uninterrupted, interrupted = tmp_path / "uninterrupted", tmp_path / "interrupted"
    train(LineStage(), config(), uninterrupted, num_workers=0)
    stage = LineStage()
    stage.after_update = lambda _: (
        (_ for _ in ()).throw(ZeroDivisionError) if len(log_entries(interrupted)) > 2 else None
    )
    with pytest.raises(ZeroDivisionError):
        train(stage, config(), interrupted, num_workers=0)
    kept = sorted(path.name for path in (interrupted / "checkpoints").iterdir())
    assert kept == ["00000004", "00000005"], "every fourth step, and the best validation"
    train(LineStage(), config(), interrupted, num_workers=0)
    for name, tensor in newest_state(uninterrupted).items():
        assert torch.equal(tensor, newest_state(interrupted)[name]), name


def test_corrupted_newest_checkpoint_is_skipped_with_a_warning(tmp_path: Path) -> None:
    uninterrupted = tmp_path / "uninterrupted"
    train(LineStage(), config(), uninterrupted, num_workers=0)
    expected = newest_state(uninterrupted)
    file = uninterrupted / "checkpoints" / "00000012" / "state.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(bytes(content))
    with pytest.warns(UserWarning, match="00000012: damaged checkpoint; using the previous one"):
        train(LineStage(), config(), uninterrupted, num_workers=0)
    for name, tensor in expected.items():
        assert torch.equal(tensor, newest_state(uninterrupted)[name]), name


def test_checkpoint_after_a_damaged_one_replaces_it(tmp_path: Path) -> None:
    folder, settings = tmp_path / "checkpoints", {"checkpoint_every": 4, "keep_checkpoints": 1, "validate_every": 100}
    train(LineStage(), config(**settings, steps=4), tmp_path, num_workers=0)
    (folder / "00000007").mkdir()
    with (
        pytest.warns(UserWarning, match="00000007: damaged checkpoint"),
        pytest.raises(Stopped),
    ):
        train(LineStage(stop_at=2), config(**settings), tmp_path, num_workers=0)
    assert sorted(path.name for path in folder.iterdir()) == ["00000004", "00000006"]  # the best and the newest


def test_checkpoints_are_in_order_of_their_steps(tmp_path: Path) -> None:
    steps = [99_999_999, 100_000_000, 1_000_000_000]
    for step in steps:
        (tmp_path / f"{step:08d}").mkdir()
    (tmp_path / "1 copy").mkdir()
    assert [int(folder.name) for folder in Checkpoints(tmp_path, keep=1).all()] == steps


def test_gradient_accumulation_matches_full_batch(tmp_path: Path) -> None:
    results = []
    for accumulate in (1, 4):
        stage = LineStage()
        stage.objective.dropout = nn.Dropout(0)
        train(stage, config(gradient_accumulation_steps=accumulate), tmp_path / str(accumulate), num_workers=0)
        results.append(stage.objective.layer.weight.detach().clone())
    torch.testing.assert_close(*results, atol=1e-6, rtol=0)


def test_bfloat16_trains_and_keeps_float32_weights(tmp_path: Path) -> None:
    summary = train(LineStage(), config(mixed_precision="bf16", steps=80, learning_rate=0.1), tmp_path, num_workers=0)
    assert summary["validation"]["weight"] > 1, "the true weights sum to three"
    assert newest_state(tmp_path)["objective/layer.weight"].dtype == torch.float32


def test_num_workers_does_not_change_the_result(tmp_path: Path) -> None:
    results = []
    for workers in (0, 2):
        stage = LineStage()
        train(stage, config(), tmp_path / str(workers), num_workers=workers)
        results.append(stage.objective.layer.weight.detach().clone())
    assert torch.equal(*results)


def test_nan_loss_error_names_step_term_and_last_checkpoint(tmp_path: Path) -> None:
    stage = LineStage()
    stage.objective.nan_at = 10
    with pytest.raises(
        UserError, match=r"^line: step 10: the loss term `loss` is nan; .*checkpoints/00000008"
    ) as raised:
        train(stage, config(), tmp_path, num_workers=0)
    assert str(raised.value).endswith("00000008. Lower the learning rate or set max_grad_norm.")
    stage.objective.nan_at, stage.objective.calls = 1, 0
    with pytest.raises(UserError, match=r"no checkpoint yet. Lower the learning rate\.$"):
        train(stage, config(max_grad_norm=1), tmp_path / "other", num_workers=0)
    assert all(tensor.isfinite().all() for tensor in newest_state(tmp_path).values())


def read_log_of_this_rank(path: Path) -> list[tuple[int, dict[str, float]]]:
    log, rank = MetricLog(path, writes=False), get_rank()
    log.add(StepValues(1, ("loss", "error"), torch.tensor([1.0 + rank, 2.0])))
    log.add(StepValues(2, ("loss",), torch.tensor([math.nan if rank else 0.0])))
    return log.read()


def test_logged_values_are_means_over_all_processes(tmp_path: Path) -> None:
    for first, second in two_processes(read_log_of_this_rank, tmp_path / "metrics.jsonl"):
        assert first == (1, {"loss": 1.5, "error": 2.0})
        assert math.isnan(second[1]["loss"]), "also on the rank without it"


def test_no_checkpoint_is_written_from_weights_that_are_not_finite(tmp_path: Path) -> None:
    stage = LineStage()
    stage.objective.layer.weight.register_hook(lambda gradient: gradient * (math.nan if stage.updates == 7 else 1))
    with pytest.raises(UserError, match=r"step 8: `ema/layer.weight` is not finite after the update; .*00000005"):
        train(stage, config(log_every=100), tmp_path, num_workers=0)
    assert max((tmp_path / "checkpoints").iterdir()).name == "00000005"


def test_nan_loss_is_found_before_a_checkpoint_and_named_with_its_step(tmp_path: Path) -> None:
    stage = LineStage()
    stage.objective.nan_at = 6
    with pytest.raises(UserError, match=r"step 6: the loss term `loss` is nan; .*checkpoints/00000005"):
        train(stage, config(log_every=100, preview_every=100, checkpoint_every=8), tmp_path, num_workers=0)


def test_validation_uses_ema_weights_and_training_keeps_its_own(tmp_path: Path) -> None:
    stage = LineStage()
    train(stage, config(steps=10, validate_every=10), tmp_path, num_workers=0)
    tensors = newest_state(tmp_path)
    averaged, latest = tensors["ema/layer.weight"], tensors["objective/layer.weight"]
    assert not torch.equal(averaged, latest)
    assert torch.equal(stage.objective.layer.weight, latest)
    assert log_entries(tmp_path)[-1]["validation/weight"] == pytest.approx(float(averaged.sum()))


def test_validation_and_training_values_are_logged_separately(tmp_path: Path) -> None:
    train(LineStage(), config(steps=10, validate_every=5, log_every=4), tmp_path, num_workers=0)
    logged = log_entries(tmp_path)
    assert [entry["step"] for entry in logged if "validation/weight" in entry] == [5, 10]
    assert [entry["step"] for entry in logged if "train/loss" in entry] == [4, 8, 10]
    assert all(entry.keys() in ({"step", "validation/weight"}, TRAINING_KEYS) for entry in logged)


TRAINING_KEYS = {"step", "train/loss", "train/error", "train/learning_rate"}


def test_learning_rate_warms_up_and_follows_a_cosine() -> None:
    settings = config(steps=110, warmup_steps=10, schedule="cosine", learning_rate=1.0)
    assert [learning_rate(settings, step) for step in (0, 4, 9, 10)] == pytest.approx([0.1, 0.5, 1.0, 1.0])
    assert learning_rate(settings, 60) == pytest.approx(0.5)
    assert learning_rate(settings, 109) < 0.001
    with pytest.raises(ValueError, match=r"warmup_steps \(12\) must be less than steps \(12\)"):
        config(warmup_steps=12)


class EmbeddingStage(LineStage):
    """A stage whose objective has an embedding between its other parameters, with a learning rate of its own."""

    def __init__(self, embedding_learning_rate: float | None) -> None:
        super().__init__()
        self.embedding_learning_rate = embedding_learning_rate
        self.objective.embedding = nn.Embedding(2, 1)
        self.objective.last = nn.Linear(1, 1)
        self.objective.register_forward_hook(self._use_embedding)

    def _use_embedding(self, objective: nn.Module, inputs: object, output: Any) -> Any:
        loss, terms = output
        return loss + objective.last(objective.embedding.weight).square().sum(), terms


def test_embeddings_can_have_a_learning_rate_of_their_own(tmp_path: Path) -> None:
    stage = EmbeddingStage(embedding_learning_rate=0.08)
    before = {name: value.clone() for name, value in stage.objective.state_dict().items()}
    train(stage, config(steps=1, ema_decay=None), tmp_path, num_workers=0)
    change = {name: (value - before[name]).abs() for name, value in stage.objective.state_dict().items()}
    # The first update of Adam is the learning rate, whatever the gradient.
    assert change["embedding.weight"].flatten().tolist() == pytest.approx([0.08] * 2, rel=1e-3)
    assert change["layer.weight"].flatten().tolist() == pytest.approx([0.01] * 3, rel=1e-3)
    assert change["last.weight"].item() == pytest.approx(0.01, rel=1e-3)


def test_embedding_learning_rate_can_change_when_training_resumes(tmp_path: Path) -> None:
    train(EmbeddingStage(None), config(steps=4), tmp_path, num_workers=0)
    moments = newest_state(tmp_path)
    train(EmbeddingStage(0.08), config(steps=5), tmp_path, num_workers=0)  # refuses moments of another shape
    assert newest_state(tmp_path).keys() == moments.keys()


def test_newest_and_best_checkpoints_are_kept(tmp_path: Path) -> None:
    train(LineStage(), config(checkpoint_every=2, keep_checkpoints=2), tmp_path, num_workers=0)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["00000005", "00000010", "00000012"]


class RisingStage(LineStage):
    """A stage whose validation loss is lowest at step 4 and rises afterwards."""

    def validate(self, accelerator: Accelerator) -> dict[str, float]:
        return {"weight": abs(self.updates - 4.0) + 1}


def test_early_stopping_returns_the_best_weights(tmp_path: Path) -> None:
    settings = {"steps": 20, "batch_size": 4, "validate_every": 2, "checkpoint_every": 100, "keep_checkpoints": 1}
    until_best = TrainingConfig(**settings | {"steps": 4})
    four, early = RisingStage(), RisingStage()
    train(four, until_best, tmp_path / "four", num_workers=0)
    summary = train(early, TrainingConfig(**settings, early_stopping_patience=3), tmp_path / "early", num_workers=0)
    assert summary["steps"] == 4
    assert summary["validation"] == {"weight": 1.0}
    kept = sorted(path.name for path in (tmp_path / "early" / "checkpoints").iterdir())
    assert kept == ["00000004", "00000010"], "the best and the newest"
    assert torch.equal(early.objective.layer.weight, four.objective.layer.weight)
    (tmp_path / "early" / "model.safetensors").unlink()  # as if killed before the result was written
    assert (
        train(RisingStage(), TrainingConfig(**settings, early_stopping_patience=3), tmp_path / "early", num_workers=0)
        == summary
    )
    assert train(RisingStage(), TrainingConfig(**settings), tmp_path / "all", num_workers=0)["steps"] == 20


def change_state(folder: Path, change: Callable[[dict[str, Tensor], dict[str, Any]], object]) -> None:
    """Change tensors and metadata of the newest checkpoint, and write it with a valid checksum."""
    path = max((folder / "checkpoints").iterdir()) / "state.safetensors"
    tensors, metadata = checkpoint.load(path)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    change(tensors, metadata)
    checkpoint.save(path, tensors, metadata)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda _, metadata: metadata.update(step=-1), "step"),
        (lambda _, metadata: metadata.update(step=10**12), "which is not the name of its folder"),
        (lambda _, metadata: metadata.update(step="x"), "step"),
        (lambda _, metadata: metadata.update(seconds=math.inf), "seconds"),
        (lambda _, metadata: metadata.pop("unlogged"), "unlogged"),
        (lambda _, metadata: metadata.update(unlogged={"terms": {"loss": [None]}, "stage": {}}), "unlogged.terms"),
        (lambda _, metadata: metadata.update(best=[1, 2]), "best"),
        (lambda tensors, _: tensors.pop("optimizer/0/step"), "is incomplete"),
        (lambda tensors, _: tensors.update({"optimizer/0/step": torch.zeros(2)}), "optimizer/0/step"),
        (lambda tensors, _: tensors.update({"optimizer/0/exp_avg": torch.zeros(1)}), "optimizer/0/exp_avg"),
        (lambda tensors, _: tensors["optimizer/0/exp_avg"].fill_(math.nan), "is not finite"),
        (lambda tensors, _: tensors.update({"optimizer/9/step": torch.zeros(())}), "unexpected tensor"),
        (lambda tensors, _: tensors.update({"optimizer/x": torch.zeros(())}), "unexpected tensor"),
        (lambda tensors, _: tensors.update({"ema/layer.weight": torch.zeros(1)}), "ema/layer.weight"),
        (lambda tensors, _: tensors.update({"other": torch.zeros(1)}), "unexpected tensors"),
    ],
)
def test_invalid_state_is_refused(tmp_path: Path, change: Callable[..., object], words: str) -> None:
    train(LineStage(), config(steps=4), tmp_path, num_workers=0)
    change_state(tmp_path, change)
    with pytest.raises(UserError, match=rf"00000004/state\.safetensors: .*{words}.*Delete the checkpoint's folder"):
        train(LineStage(), config(steps=8), tmp_path, num_workers=0)


def test_state_without_optimizer_is_refused(tmp_path: Path) -> None:
    train(LineStage(), config(steps=4), tmp_path, num_workers=0)
    change_state(
        tmp_path, lambda tensors, _: [tensors.pop(name) for name in list(tensors) if name.startswith("optimizer")]
    )
    with pytest.raises(UserError, match="no state of the optimizer"):
        train(LineStage(), config(steps=8), tmp_path, num_workers=0)


@pytest.mark.parametrize("text", ["", "null\n", "[" * 5000, None])
def test_run_with_a_damaged_log_finishes_with_a_warning(tmp_path: Path, text: str | None) -> None:
    train(LineStage(), config(steps=4), tmp_path, num_workers=0)
    log = tmp_path / "metrics.jsonl"
    log.unlink()
    if text is not None:
        log.write_text(text)
    with pytest.warns(UserWarning, match=r"metrics\.jsonl: lacks entries of earlier steps"):
        train(LineStage(), config(), tmp_path, num_workers=0)
    assert [entry["step"] for entry in log_entries(tmp_path)] == [5, 6, 9, 10, 12, 12]
