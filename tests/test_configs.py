"""Test the configs in configs/: they load, their networks can be built, and sizes are as documented."""

from pathlib import Path

import pytest
import torch

from sampling.run_config import RunConfig
from vqvae2.models import Autoencoder
from vqvae2.priors import Prior, PriorSpec

CONFIGS = Path(__file__).parents[1] / "configs"
IMAGES = sorted(
    path.stem for path in CONFIGS.glob("*.yaml") if not path.stem.startswith(("speech-", "likelihoods-", "video-"))
)


def build(name: str) -> tuple[RunConfig, Autoencoder, dict[str, Prior]]:
    experiment = RunConfig.from_yaml(CONFIGS / f"{name}.yaml")
    with torch.device("meta"):
        autoencoder = experiment.autoencoder.model.build(experiment.data.shape, experiment.data.channels)
        classes = 10 if experiment.data.labels == "folder" else 0
        priors = {
            level: experiment.priors[level].model.build(
                PriorSpec(level=autoencoder.map_specs[at], coarser=autoencoder.map_specs[at + 1 :], num_classes=classes)
            )
            for at, level in enumerate(experiment.levels)
        }
    return experiment, autoencoder, priors


def millions(module: torch.nn.Module) -> float:
    return sum(parameter.numel() for parameter in module.parameters()) / 1e6


@pytest.mark.parametrize("name", IMAGES)
def test_every_config_builds_and_round_trips(name: str, tmp_path: Path) -> None:
    experiment, _, priors = build(name)
    copy = tmp_path / "copy.yaml"
    copy.write_text(experiment.to_yaml())
    assert RunConfig.from_yaml(copy) == experiment
    assert set(priors) == set(experiment.levels)


@pytest.mark.parametrize(
    ("name", "maps"),
    [
        ("ffhq256", [(64, 64), (32, 32)]),
        ("imagenet256", [(64, 64), (32, 32)]),
        ("imagenet256-base", [(64, 64), (32, 32)]),
        ("imagenet256-small", [(64, 64), (32, 32)]),
        ("ffhq1024", [(128, 128), (64, 64), (32, 32)]),
        ("cifar10", [(8, 8)]),
        ("imagenet128", [(32, 32)]),
        ("demo", [(16, 16), (8, 8)]),
        ("photographs64", [(16, 16), (8, 8)]),
        ("photographs128", [(32, 32), (16, 16)]),
    ],
)
def test_code_maps_have_the_documented_sizes(name: str, maps: list[tuple[int, int]]) -> None:
    _, autoencoder, _ = build(name)
    assert [level.shape for level in autoencoder.map_specs] == maps
    if name not in ("demo", "photographs64"):
        assert {level.codebook_size for level in autoencoder.map_specs} == {512}


@pytest.mark.parametrize(
    ("name", "least", "most"),
    [("ffhq256", 75, 95), ("imagenet256-base", 75, 95), ("imagenet256-small", 18, 25), ("imagenet256", 700, 2000)],
)
def test_priors_have_the_documented_parameter_counts(name: str, least: float, most: float) -> None:
    _, _, priors = build(name)
    for prior in priors.values():
        assert least < millions(prior) < most
