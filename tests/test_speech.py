"""Test the speech experiment's networks: µ-law, WaveNet, incremental sampling, autoencoder."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from experiments.speech.autoencoder import SpeechAutoencoder, SpeechModelConfig
from experiments.speech.incremental import IncrementalWaveNet, incremental_logits, sample_waveforms
from experiments.speech.mu_law import SILENCE, compand, expand
from experiments.speech.wavenet import WaveNet, WaveNetConfig
from vqvae2.quantizers import EMAConfig

SMALL = WaveNetConfig(channels=12, skip_channels=10, condition_channels=6, cycles=2, layers=4)


def wavenet(conditioned: bool = True) -> WaveNet:
    torch.manual_seed(0)
    return SMALL.build(conditioned).eval()


def autoencoder(**changes: object) -> SpeechAutoencoder:
    torch.manual_seed(0)
    quantizer = EMAConfig(codebook_size=16, code_dim=5)
    settings = {"downsamplings": 3, "channels": 8, "residual_layers": 1, "quantizer": quantizer, "decoder": SMALL}
    return SpeechModelConfig(**settings | changes).build(("anna", "ben")).eval()


def values(batch: int = 2, length: int = 64) -> Tensor:
    return torch.randint(256, (batch, length), generator=torch.Generator().manual_seed(1))


def test_mu_law_is_the_formula() -> None:
    x = np.linspace(-1, 1, 4001)
    companded = np.sign(x) * np.log(1 + 255 * np.abs(x)) / np.log(256)
    expected = np.floor((companded + 1) / 2 * 255 + 0.5)
    found = compand(torch.from_numpy(x)).numpy()
    assert (found != expected).mean() < 1e-3  # values on the border between two steps
    assert np.abs(found.astype(int) - expected).max() <= 1
    y = np.arange(256) / 255 * 2 - 1
    waveform = np.sign(y) * (256 ** np.abs(y) - 1) / 255
    np.testing.assert_allclose(expand(torch.arange(256)).numpy(), waveform, atol=1e-6)


@given(st.lists(st.floats(-2, 2, width=32), min_size=1, max_size=20))
def test_mu_law_round_trip(samples: list[float]) -> None:
    waveform = torch.tensor(samples)
    found = compand(waveform)
    assert torch.equal(compand(expand(found)), found)
    # A step is at most ln(256) · 2 / 255 times (|x| + 1 / 255) wide, and values are rounded to its middle.
    assert ((expand(found) - waveform.clamp(-1, 1)).abs() <= 0.023 * (waveform.abs().clamp(max=1) + 1 / 255)).all()


def test_wavenet_logits_do_not_depend_on_their_own_and_later_values() -> None:
    network, condition = wavenet(), torch.randn(2, 8, 6)
    original = values()
    for time in (0, 17, 63):
        changed = original.clone()
        changed[:, time] = (changed[:, time] + 128) % 256
        moved = (network(original, condition) - network(changed, condition)).abs().amax((0, 2)) > 0
        assert not moved[: time + 1].any()
        assert moved[time + 1 : time + 2].all()


def test_wavenet_gradient_reaches_exactly_the_receptive_field() -> None:
    network, time = wavenet(), 60
    inputs = []
    network.embedding.register_forward_hook(lambda _, __, output: inputs.append(output) or output.retain_grad())
    network(values(), torch.randn(2, 8, 6))[:, time].square().sum().backward()
    reached = inputs[0].grad.abs().sum((0, 2)) > 0  # position t holds the value of sample t − 1
    field = SMALL.receptive_field
    assert field == 1 + 2 * (1 + 2 + 4 + 8)
    assert reached.nonzero().flatten().tolist() == list(range(time - field + 1, time + 1))


@pytest.mark.parametrize("conditioned", [True, False])
def test_incremental_logits_equal_those_of_the_full_pass(conditioned: bool) -> None:
    network, samples = wavenet(conditioned), values(3, 96)
    condition = torch.randn(3, 12, 6) if conditioned else None
    torch.testing.assert_close(
        incremental_logits(network, samples, condition), network(samples, condition), atol=1e-4, rtol=1e-4
    )


def test_samples_follow_the_distribution_and_do_not_depend_on_the_batch() -> None:
    network, condition = wavenet(), torch.randn(4, 3, 6)
    with torch.no_grad():
        network.logits.bias[200] = 8.0
    together = sample_waveforms(network, condition, 16, seed=3)
    assert together.shape == (4, 48)
    assert torch.equal(together, sample_waveforms(network, condition, 16, seed=3))
    assert torch.equal(together[2:3], sample_waveforms(network, condition[2:3], 16, seed=3, clips=[2]))
    assert not torch.equal(together, sample_waveforms(network, condition, 16, seed=4))
    many = sample_waveforms(network, condition[:1, :1].expand(2000, 1, 6), 1, seed=0).flatten()
    expected = network(torch.full((1, 1), SILENCE), condition[:1, :1])[0, 0].softmax(0)
    observed = torch.bincount(many, minlength=256) / 2000
    assert 0.1 < expected[200] < 0.95
    assert (observed - expected).abs().sum() < 0.3
    assert abs(observed[200] - expected[200]) < 4 * (expected[200] / 2000) ** 0.5


def test_low_temperature_selects_the_most_likely_value() -> None:
    network, condition = wavenet(), torch.randn(2, 2, 6)
    sampled = sample_waveforms(network, condition, 8, temperature=1e-4)
    assert torch.equal(sampled, network(sampled, condition).argmax(2))


def test_incremental_decoder_reuses_its_memory() -> None:
    decoder = IncrementalWaveNet(wavenet(), batch=2)
    with torch.inference_mode():
        buffers = [slot.data_ptr() for ring in decoder.rings for slot in ring]
        for _ in range(20):
            decoder.logits(torch.tensor([1, 2]))
        assert buffers == [slot.data_ptr() for ring in decoder.rings for slot in ring]
    assert [len(ring) for ring in decoder.rings] == list(SMALL.dilations)


def test_autoencoder_forward_equals_encoding_and_decoding() -> None:
    network, samples, speaker = autoencoder(), values(3), torch.tensor([0, 1, 1])
    logits, output = network(samples, speaker)
    codes = network.encode(samples)
    assert codes.shape == (3, 8)
    assert torch.equal(codes, output.codes)
    torch.testing.assert_close(network.decoder(samples, network.condition(codes, speaker)), logits)
    other, _ = network(samples, 1 - speaker)
    assert (other - logits).abs().max() > 1e-3


def test_instance_normalization_removes_what_is_constant() -> None:
    network = autoencoder(instance_norm=True)
    features = network.features(values())
    torch.testing.assert_close(features.mean(2), torch.zeros(2, 5), atol=1e-5, rtol=0)
    with torch.no_grad():
        network.pre_quant.bias += 3
    torch.testing.assert_close(network.features(values()), features, atol=1e-4, rtol=0)


def test_jitter_replaces_codes_by_neighbors_in_training_only() -> None:
    network = autoencoder(jitter=0.4)
    vectors = torch.arange(1000.0).expand(2, 5, 1000)
    assert torch.equal(network._jitter(vectors), vectors)
    shift = network.train()._jitter(vectors) - vectors
    assert set(shift.unique().tolist()) == {-1, 0, 1}
    assert (shift == shift[:, :1]).all()  # whole vectors
    assert abs(float((shift != 0).float().mean()) - 0.4) < 0.05


def test_quantizer_computes_in_float32_under_autocast() -> None:
    network = autoencoder().train()
    with torch.autocast("cpu", torch.bfloat16):
        logits, output = network(values(), torch.tensor([0, 1]))
    assert output.quantized.dtype == torch.float32
    (logits.float().square().mean() + output.loss).backward()
    assert all(parameter.grad is not None for parameter in network.parameters())
