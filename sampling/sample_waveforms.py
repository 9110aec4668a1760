"""Sample waveforms: from a WaveNet, from the codes of a speech autoencoder, and from a prior of these codes."""

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sampling.logits import sample_codes
from sampling.params import LevelSamplingParams
from sampling.sample_level import Noise, sample_level
from vqvae2.audio.mu_law import SILENCE, expand
from vqvae2.models.incremental_wavenet import IncrementalWaveNet
from vqvae2.models.speech_autoencoder import SpeechAutoencoder
from vqvae2.models.wavenet import WaveNet
from vqvae2.priors import Prior


@torch.inference_mode()
def sample_waveforms(
    network: WaveNet,
    condition: Float[Tensor, "b f c"],
    samples_per_frame: int,
    seed: int = 0,
    clips: Sequence[int] | None = None,
    temperature: float = 1.0,
) -> Int[Tensor, "b t"]:
    """Sample µ-law values. The noise of a clip depends on the seed and the number of the clip only.

    Args:
        clips: Numbers of the clips; 0, 1, … if not given.
    """
    batch, frames, _ = condition.shape
    noise = Noise(seed, range(batch) if clips is None else clips, level=0)
    decoder, params = IncrementalWaveNet(network, batch), LevelSamplingParams(temperature=temperature)
    values = torch.full((frames * samples_per_frame + 1, batch), SILENCE, device=condition.device)
    for frame in range(frames):
        decoder.begin_frame(condition[:, frame])
        uniform = noise.draw(samples_per_frame).to(condition.device)
        for index in range(samples_per_frame):
            time = frame * samples_per_frame + index
            values[time + 1] = sample_codes(decoder.logits(values[time]), uniform[:, index], params)
    return values[1:].T.contiguous()


def decode_speech(
    network: SpeechAutoencoder,
    codes: Int[Tensor, "b f"],
    speaker: Int[Tensor, " b"],
    seed: int = 0,
    temperature: float = 1.0,
    clips: Sequence[int] | None = None,
    lengths: Int[Tensor, " b"] | None = None,
) -> Float[Tensor, "b t"]:
    """Sample waveforms in [-1, 1] from the decoder. See `sample_waveforms`.

    Args:
        lengths: Samples of each clip that were recorded; the rest becomes silent.
    """
    with torch.inference_mode():
        condition, hop = network.condition(codes, speaker), network.config.samples_per_code
    waveforms = expand(sample_waveforms(network.decoder, condition, hop, seed, clips, temperature))
    if lengths is None:
        return waveforms
    return waveforms * (torch.arange(waveforms.shape[1], device=lengths.device) < lengths[:, None])


def sample_labels(num_speakers: int, classes_per_speaker: int, count: int) -> list[int]:
    """Return classes for utterances: the speaker changes with every utterance, the content after all speakers.

    >>> sample_labels(num_speakers=2, classes_per_speaker=10, count=5)
    [0, 10, 1, 11, 2]
    """
    return [k % num_speakers * classes_per_speaker + k // num_speakers % classes_per_speaker for k in range(count)]


def sample_utterances(
    network: SpeechAutoencoder,
    prior: Prior,
    labels: Sequence[int],
    classes_per_speaker: int,
    seed: int = 0,
    temperature: float = 1.0,
    params: LevelSamplingParams | None = None,
    clips: Sequence[int] | None = None,
) -> Float[Tensor, "b t"]:
    """Sample codes of the given classes from the prior, and waveforms from the codes.

    Args:
        temperature: Of the waveform; that of the codes is in `params`.
        clips: Numbers of the utterances, on which their noise depends; 0, 1, … if not given.
    """
    device = next(prior.parameters()).device
    label = torch.tensor(labels, device=device)
    clips = range(len(labels)) if clips is None else clips
    codes = sample_level(prior, Noise(seed, clips, level=1), params, labels=label)[:, 0]
    device = network.speaker.weight.device
    return decode_speech(
        network, codes.to(device), (label // classes_per_speaker).to(device), seed, temperature, clips
    ).cpu()
