"""Test that priors learn: a Markov source to its entropy rate, copies of a coarser level, and labels."""

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from train.stages.prior import PriorObjective
from vqvae2.code_maps import MapSpec
from vqvae2.data.code_store import CodeBatch
from vqvae2.priors import PixelCNNConfig, PixelSNAILConfig, Prior, PriorConfig, PriorSpec, TransformerConfig

CODES, SIZE = 6, 8
INCREMENTS, PROBABILITIES = (0, 1, 3), (0.7, 0.2, 0.1)
CONFIGS: dict[str, PriorConfig] = {
    "pixelsnail": PixelSNAILConfig(channels=32, residual_channels=32, kernel=3, blocks=1, layers=1, heads=2, dropout=0),
    "pixelcnn": PixelCNNConfig(channels=32, kernel=3, layers=2, output_channels=32, dropout=0),
    "transformer": TransformerConfig(channels=32, layers=2, heads=2, dropout=0),
}


def train_prior(
    config: PriorConfig, spec: PriorSpec, batch: Any, steps: int, level: int = 0, rate: float = 5e-3
) -> Prior:
    """Train a prior for `steps` steps on the batches returned by `batch(step)`."""
    torch.manual_seed(0)
    objective = PriorObjective(config.build(spec), level)
    optimizer = torch.optim.Adam(objective.parameters())
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 10) * (1 - step / steps)
        loss, _ = objective(batch(step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return objective.network.eval()


@pytest.mark.parametrize("name", CONFIGS)
def test_objective_is_the_mean_negative_log_likelihood(name: str) -> None:
    level = MapSpec(codebook_size=CODES, height=3, width=5)
    torch.manual_seed(0)
    prior, codes = CONFIGS[name].build(PriorSpec(level=level)).eval(), torch.randint(CODES, (2, 3, 5))
    with torch.no_grad():
        loss, _ = PriorObjective(prior, 0)(CodeBatch((codes,), torch.full((2,), -1)))
        logits = prior(codes).double().numpy()
    chosen = np.take_along_axis(logits, codes.numpy()[:, None], 1)[:, 0]
    expected = (np.log(np.exp(logits).sum(1)) - chosen).mean()
    np.testing.assert_allclose(float(loss), expected, rtol=1e-6)


@torch.no_grad()
def nll(prior: Prior, batch: CodeBatch) -> float:
    return float(PriorObjective(prior, 0).eval()(batch)[0])


def markov_maps(count: int, seed: int) -> torch.Tensor:
    """Return code maps whose rows are Markov chains: each code stays, or increases by 1 or 3 (mod CODES)."""
    generator = np.random.default_rng(seed)
    codes = np.empty((count, SIZE, SIZE), np.int64)
    codes[:, :, 0] = generator.integers(CODES, size=(count, SIZE))
    for column in range(1, SIZE):
        increments = generator.choice(INCREMENTS, p=PROBABILITIES, size=(count, SIZE))
        codes[:, :, column] = (codes[:, :, column - 1] + increments) % CODES
    return torch.from_numpy(codes)


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_prior_learns_markov_source_to_its_entropy_rate(kind: str) -> None:
    entropy_rate = -sum(p * math.log(p) for p in PROBABILITIES)
    entropy = (math.log(CODES) + (SIZE - 1) * entropy_rate) / SIZE  # in nats per code

    def batch(count: int, seed: int) -> CodeBatch:
        return CodeBatch((markov_maps(count, seed),), _none(count))

    spec = PriorSpec(level=MapSpec(codebook_size=CODES, height=SIZE, width=SIZE))
    prior = train_prior(CONFIGS[kind], spec, lambda step: batch(64, step), steps=240 if kind == "transformer" else 130)
    found = nll(prior, batch(2000, 10_000))
    assert entropy * 0.98 < found < entropy * 1.02


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_prior_learns_to_copy_the_coarser_level(kind: str) -> None:
    top, bottom = MapSpec(codebook_size=CODES, height=4, width=4), MapSpec(codebook_size=CODES, height=8, width=8)

    def copy_batch(count: int, seed: int) -> CodeBatch:
        codes = torch.randint(CODES, (count, 4, 4), generator=torch.Generator().manual_seed(seed))
        return CodeBatch((codes.repeat_interleave(2, 1).repeat_interleave(2, 2), codes), _none(count))

    config = CONFIGS[kind].model_copy(update={"condition_layers": 1})
    prior = train_prior(config, PriorSpec(level=bottom, coarser=(top,)), lambda step: copy_batch(32, step), steps=120)
    assert nll(prior, copy_batch(200, 10_000)) < 0.05


@pytest.mark.parametrize("kind", list(CONFIGS))
def test_prior_uses_labels(kind: str) -> None:
    patterns = torch.randint(CODES, (3, SIZE, SIZE), generator=torch.Generator().manual_seed(1))

    def labeled_batch(count: int, seed: int) -> CodeBatch:
        labels = torch.randint(3, (count,), generator=torch.Generator().manual_seed(seed))
        return CodeBatch((patterns[labels],), labels)

    spec = PriorSpec(level=MapSpec(codebook_size=CODES, height=SIZE, width=SIZE), num_classes=3)
    # Without coordinates as input, a transformer needs more steps to learn positions.
    prior = train_prior(
        CONFIGS[kind], spec, lambda step: labeled_batch(32, step), steps=400 if kind == "transformer" else 100
    )
    batch = labeled_batch(60, 10_000)
    correct, wrong = nll(prior, batch), nll(prior, batch._replace(label=(batch.label + 1) % 3))
    assert correct < 0.05
    assert wrong > correct + 0.5


def test_label_dropout_trains_the_unconditional_distribution() -> None:
    def labeled_batch(count: int, seed: int) -> CodeBatch:
        labels = torch.randint(2, (count,), generator=torch.Generator().manual_seed(seed))
        return CodeBatch((labels[:, None, None].expand(count, 2, 2).clone(),), labels)

    spec = PriorSpec(level=MapSpec(codebook_size=2, height=2, width=2), num_classes=2)
    torch.manual_seed(0)
    objective = PriorObjective(CONFIGS["pixelcnn"].build(spec), 0, label_dropout=0.5)
    optimizer = torch.optim.Adam(objective.parameters(), lr=5e-3)
    for step in range(150):
        objective(labeled_batch(32, step))[0].backward()
        optimizer.step()
        optimizer.zero_grad()
    network, batch = objective.network.eval(), labeled_batch(64, 10_000)
    with torch.no_grad():
        unconditional = network(batch.codes[0], (), None).softmax(1)[:, :, 0, 0]
    assert nll(network, batch) < 0.05
    torch.testing.assert_close(unconditional, torch.full_like(unconditional, 0.5), atol=0.15, rtol=0)
    with torch.no_grad():
        after = F.cross_entropy(
            network(batch.codes[0], (), None).flatten(2)[:, :, 1:], batch.codes[0].flatten(1)[:, 1:]
        )
    assert float(after) < 0.1, "the first code determines the rest"


def _none(count: int) -> torch.Tensor:
    return torch.full((count,), -1)
