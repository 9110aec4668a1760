"""Test the autoencoder of speech, its loss, and the information in its codes."""

import numpy as np
import pytest
import torch
from torch import Tensor

from experiments.speech.stages import SpeechObjective
from sampling.evaluation.speech_recognition import recognize
from vqvae2.audio.log_mel import LogMel
from vqvae2.audio.mu_law import expand
from vqvae2.data.recordings import Clip
from vqvae2.metrics.mutual_information import mutual_information
from vqvae2.models.speech_autoencoder import SpeechAutoencoder, SpeechModelConfig
from vqvae2.models.wavenet import WaveNetConfig
from vqvae2.quantizers import EMAConfig

SMALL = WaveNetConfig(channels=12, skip_channels=10, condition_channels=6, cycles=2, layers=4)


def autoencoder(**changes: object) -> SpeechAutoencoder:
    torch.manual_seed(0)
    quantizer = EMAConfig(codebook_size=16, code_dim=5)
    settings = {"downsamplings": 3, "channels": 8, "residual_layers": 1, "quantizer": quantizer, "decoder": SMALL}
    return SpeechModelConfig(**settings | changes).build(("anna", "ben")).eval()


def values(batch: int = 2, length: int = 64) -> Tensor:
    return torch.randint(256, (batch, length), generator=torch.Generator().manual_seed(1))


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


def test_mutual_information_of_known_distributions() -> None:
    first = np.array([0, 0, 1, 1] * 100)
    assert mutual_information(first, first) == pytest.approx(1)
    assert mutual_information(first, np.array([0, 1, 0, 1] * 100)) == pytest.approx(0, abs=1e-12)
    assert mutual_information(first, np.array([0, 0, 0, 1] * 100)) == pytest.approx(
        0.5 * np.log2(4 / 3) + 0.25 * np.log2(2 / 3) + 0.25
    )


def test_recognition_of_a_single_label_and_of_short_waveforms() -> None:
    waveforms, labels = torch.rand(4, 2048, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 0, 1])
    assert recognize(waveforms, labels, {"real": (waveforms, labels)}, 8000) == {"real": 1}
    assert recognize(waveforms, labels * 0, {"real": (waveforms, labels)}, 8000) is None
    short = waveforms[:, :32]  # less than one window
    assert recognize(short, labels, {"real": (short, labels)}, 8000) == {"real": 1}
