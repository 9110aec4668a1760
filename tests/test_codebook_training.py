"""Test codebook training: usage between log steps, optimizer moments of restarted codes, and unquantized steps."""

from pathlib import Path

import numpy as np
import pytest
import torch

from tests.conftest import TINY
from tests.inception_fixture import two_processes
from train.losses import CodebookUsageTracker
from train.quantized_stage import reset_moments
from train.run import RunOptions, open_run
from train.stages.autoencoder import AutoencoderObjective, AutoencoderStage
from vqvae2.data.images import ImageSample
from vqvae2.distributed import get_rank, get_world_size
from vqvae2.models import AutoencoderConfig, LevelConfig
from vqvae2.quantizers import EMAConfig, GradientConfig, QuantizerOutput


def usage_over_steps(*steps: list[int]) -> dict[str, float]:
    usage = CodebookUsageTracker({"top": 8})
    for codes in steps:
        zero = torch.zeros(())
        usage.update([QuantizerOutput(torch.zeros(1, 1, len(codes)), torch.tensor([codes]), zero, {})])
    values = usage.take()
    assert usage.take() == {}, "take() resets the counts"
    return values


def usage_of_this_rank() -> dict[str, float]:
    return usage_over_steps(*[[[0, 1]], [[2, 2, 3]]][torch.distributed.get_rank()])


def test_usage_counts_codes_of_all_steps_since_the_last_log() -> None:
    probabilities = np.array([1, 1, 2, 1]) / 5
    expected = {"usage_top": 0.5, "perplexity_top": np.exp(-(probabilities * np.log(probabilities)).sum())}
    assert usage_over_steps([0, 1], [2], [2, 3]) == pytest.approx(expected)
    for values in two_processes(usage_of_this_rank):
        assert values == pytest.approx(expected)


def test_usage_counts_training_batches_only() -> None:
    levels = (
        LevelConfig(stride=4, quantizer=EMAConfig(codebook_size=6, code_dim=4)),
        LevelConfig(quantizer=GradientConfig(code_dim=4)),
    )
    objective = AutoencoderObjective(AutoencoderConfig(levels=levels, channels=8).build((16, 16)))
    batch = ImageSample(torch.randint(0, 256, (2, 3, 16, 16), dtype=torch.uint8), torch.zeros(2))
    objective.eval()
    objective(batch)
    assert objective.usage.take() == {}
    objective.train()
    objective(batch)
    assert objective.usage.take().keys() == {f"{a}_{b}" for a in ("usage", "perplexity") for b in ("bottom", "top")}


def test_optimizer_moments_of_restarted_codes_are_reset() -> None:
    quantizer = GradientConfig(
        codebook_size=4, code_dim=2, kmeans_init=False, dead_code_threshold=0.1, ema_decay=0.5
    ).build()
    with torch.no_grad():
        quantizer.embedding.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, -1.0], [50.0, 50.0]]))
    optimizer = torch.optim.AdamW(quantizer.parameters(), lr=1e-3)
    for step in range(8):
        x = torch.randn(16, 2, 4, generator=torch.Generator().manual_seed(step))
        (quantizer(x).loss + quantizer.embedding.sum()).backward()  # gives the unused code a gradient too
        optimizer.step()
        before = {name: value.clone() for name, value in optimizer.state[quantizer.embedding].items()}
        quantizer.update()
        rows = quantizer.restarted
        assert rows is not None
        reset_moments(optimizer, quantizer.embedding, rows)
        for name in ("exp_avg", "exp_avg_sq"):
            moment = optimizer.state[quantizer.embedding][name]
            torch.testing.assert_close(moment, torch.where(rows[:, None], 0.0, before[name]))
        if rows.any():
            break
    assert rows.tolist() == [False, False, False, True]


def codebook_after_kmeans() -> torch.Tensor:
    features = torch.randn(4, 2, 16, generator=torch.Generator().manual_seed(0))
    mine = features.chunk(get_world_size())[get_rank()]
    quantizer = EMAConfig(codebook_size=8, code_dim=2).build()
    quantizer(mine)
    return quantizer.codebook


def test_kmeans_on_few_features_is_the_same_on_two_processes() -> None:
    expected = codebook_after_kmeans()
    for codebook in two_processes(codebook_after_kmeans):
        torch.testing.assert_close(codebook, expected)


def test_restarts_are_off_if_the_threshold_is_zero() -> None:
    quantizer = GradientConfig(codebook_size=4, code_dim=2, kmeans_init=True, dead_code_threshold=0).build()
    quantizer(torch.randn(8, 2, 16, generator=torch.Generator().manual_seed(0)))
    quantizer.update()
    assert quantizer.restarted is None, "k-means before the first step is not a restart"


def test_first_steps_are_unquantized_and_then_initialize_the_codebooks(
    tmp_path: Path,
) -> None:
    config = tmp_path / "tiny.yaml"
    config.write_text(TINY.replace("steps: 6,", "steps: 20,"))
    run = open_run(RunOptions.from_arguments([str(config), "--run", str(tmp_path / "run")], "vqvae2 train-autoencoder"))
    assert run.config.autoencoder.training.first_quantized_step == 2, "a tenth of the steps, if that is fewer than 100"
    stage = AutoencoderStage(run)
    batch = ImageSample(torch.stack([stage.training_data[index].image for index in range(8)]), torch.zeros(8))
    stage.before_update(1)
    loss, terms = stage.objective(batch)
    assert list(terms) == ["reconstruction"]
    loss.backward()
    assert all(parameter.grad is not None for parameter in stage.network.parameters()), (
        "DistributedDataParallel expects a gradient for every parameter"
    )
    stage.network.update_codebooks()
    assert not any(bool(level.initialized) for level in stage.network.quantizers)
    assert stage.logged_values() == {}
    stage.before_update(2)
    _, terms = stage.objective(batch)
    assert {"commitment_bottom", "commitment_top"} <= terms.keys()
    assert all(bool(level.initialized) for level in stage.network.quantizers)
