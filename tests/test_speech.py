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
from experiments.speech.recognition import mutual_information
from experiments.speech.recordings import Clip
from experiments.speech.spectrum import LogMel, mel_filters
from experiments.speech.stages import SpeechObjective
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
    output = network(samples, speaker)
    codes = network.encode(samples)
    assert codes.shape == (3, 8)
    assert output.quantization is not None
    assert torch.equal(codes, output.quantization.codes)
    torch.testing.assert_close(network.decoder(samples, network.condition(codes, speaker)), output.logits)
    other = network(samples, 1 - speaker)
    assert (other.logits - output.logits).abs().max() > 1e-3
    assert (other.spectrum - output.spectrum).abs().max() > 1e-3


def test_quantizer_computes_in_float32_under_autocast() -> None:
    network = autoencoder().train()
    with torch.autocast("cpu", torch.bfloat16):
        output = network(values(), torch.tensor([0, 1]))
    assert output.quantization is not None
    assert output.quantization.quantized.dtype == torch.float32
    (output.logits.float().square().mean() + output.spectrum.square().mean() + output.quantization.loss).backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


def test_loss_is_the_sum_of_its_weighted_terms() -> None:
    network = autoencoder().train()
    batch = Clip(values().to(torch.uint8), torch.tensor([0, 1]), torch.tensor([-1, -1]), torch.tensor([64, 64]))
    loss, terms = SpeechObjective(network, 0.5, LogMel(8000, 8))(batch)
    output = network(batch.values.long(), batch.speaker)
    probabilities = output.logits.softmax(2).gather(2, batch.values.long()[..., None])
    nll = -probabilities.log().mean()
    assert output.quantization is not None
    features = network.features(batch.values.long())
    commitment = (features - network.quantizer.lookup(output.quantization.codes)).square().mean()
    spectrum = (output.spectrum - LogMel(8000, 8)(expand(batch.values))).square().mean()
    torch.testing.assert_close(terms["nll"], nll, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(terms["commitment"], commitment.detach(), atol=1e-5, rtol=1e-3)
    torch.testing.assert_close(loss, nll + 0.25 * commitment + 0.5 * spectrum, atol=1e-3, rtol=1e-3)


def test_log_mel_is_the_formula() -> None:
    sample_rate, hop = 8000, 64
    waveform = np.random.default_rng(0).standard_normal(640).astype(np.float32)
    found = LogMel(sample_rate, hop)(torch.from_numpy(waveform)[None])[0].numpy()
    window = 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(256) / 256)
    padded = np.pad(waveform, 96)
    for frame in range(10):
        power = np.abs(np.fft.rfft(padded[frame * hop : frame * hop + 256] * window)) ** 2
        expected = np.log(mel_filters(32, 129, sample_rate) @ power + 1e-4) / 3
        np.testing.assert_allclose(found[:, frame], expected, atol=1e-4)


def test_mel_filters_are_triangles_on_the_mel_scale() -> None:
    filters = mel_filters(20, 2001, 8000)  # bins of 2 Hz
    peaks = filters.argmax(1) * 2.0
    mel = 2595 * np.log10(1 + peaks / 700)
    np.testing.assert_allclose(np.diff(mel), np.diff(mel).mean(), rtol=0.05)
    inside = slice(filters[0].argmax() + 1, filters[-1].argmax())
    np.testing.assert_allclose(filters[:, inside].sum(0), 1, atol=1e-6)  # neighbors overlap completely


def test_mutual_information_of_known_distributions() -> None:
    first = np.array([0, 0, 1, 1] * 100)
    assert mutual_information(first, first) == pytest.approx(1)
    assert mutual_information(first, np.array([0, 1, 0, 1] * 100)) == pytest.approx(0, abs=1e-12)
    assert mutual_information(first, np.array([0, 0, 0, 1] * 100)) == pytest.approx(
        0.5 * np.log2(4 / 3) + 0.25 * np.log2(2 / 3) + 0.25
    )
