"""Test the WaveNet: causality, receptive field, incremental decoder, sampling."""

import pytest
import torch
from torch import Tensor

from sampling.sample_waveforms import sample_waveforms
from tests.decoders import incremental_wavenet_logits
from vqvae2.audio.mu_law import SILENCE
from vqvae2.models.incremental_wavenet import IncrementalWaveNet
from vqvae2.models.wavenet import WaveNet, WaveNetConfig

SMALL = WaveNetConfig(channels=12, skip_channels=10, condition_channels=6, cycles=2, layers=4)


def wavenet(conditioned: bool = True) -> WaveNet:
    torch.manual_seed(0)
    return SMALL.build(conditioned).eval()


def values(batch: int = 2, length: int = 64) -> Tensor:
    return torch.randint(256, (batch, length), generator=torch.Generator().manual_seed(1))


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
        incremental_wavenet_logits(network, samples, condition), network(samples, condition), atol=1e-4, rtol=1e-4
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
