"""The worked examples in docstrings."""

import doctest
import importlib

import pytest
import torch

MODULES = [
    "experiments.likelihoods.vae",
    "experiments.likelihoods.vimco",
    "experiments.likelihoods.vqvae",
    "sampling.sample_waveforms",
    "vqvae2.audio.log_mel",
    "vqvae2.audio.mu_law",
    "vqvae2.data.clips",
    "vqvae2.data.code_store",
    "vqvae2.data.index",
    "vqvae2.data.samplers",
    "vqvae2.data.scenes.landscapes",
    "vqvae2.metrics.codebook_usage",
    "vqvae2.metrics.frechet",
    "vqvae2.models.autoencoder",
    "vqvae2.models.discriminator",
    "vqvae2.models.speech_autoencoder",
    "vqvae2.models.wavenet",
    "vqvae2.priors.pixelcnn",
    "vqvae2.priors.pixelsnail",
    "vqvae2.priors.transformer",
    "vqvae2.quantizers.ema",
    "vqvae2.quantizers.fsq",
    "vqvae2.quantizers.gradient",
]


@pytest.mark.parametrize("name", MODULES)
def test_examples_in_docstrings_run(name: str) -> None:
    torch.manual_seed(0)
    module = importlib.import_module(name)
    result = doctest.testmod(module)
    assert result.attempted > 0, f"{name} has no examples"
    assert result.failed == 0
