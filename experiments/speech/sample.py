"""The command `vqvae2 speech sample`: sample codes from the prior, and waveforms from the codes."""

from pathlib import Path

import tyro
from pydantic import Field

from experiments.speech.speech_run import SpeechRun
from sampling.guidance import check_guidance
from sampling.params import LevelSamplingParams
from sampling.processes import on_main_process
from sampling.sample_waveforms import sample_labels, sample_utterances
from vqvae2.command_line import Options


class SampleSpeechOptions(Options):
    """Sample new utterances, cycling through all speakers and contents."""

    run: tyro.conf.Positional[Path] = Field(description="folder of a speech experiment")
    count: int = Field(default=18, ge=1, le=10_000, description="number of utterances")
    temperature: float = Field(default=0.9, gt=0, description="divides the logits of the waveform")
    codes: LevelSamplingParams = Field(default=LevelSamplingParams(), description="sampling of the codes")
    seed: int = Field(default=0, ge=0, le=2**63 - 1, description="the noise of utterance k depends on the seed and k")


def sample(run: SpeechRun, options: SampleSpeechOptions) -> None:
    """Write utterances to RUN/samples, or samples-2, …, and update the run's page."""
    network, prior, contents = run.autoencoder, run.prior, run.classes_per_speaker
    check_guidance(prior, options.codes.guidance_scale, "top")
    labels = sample_labels(len(network.speakers), contents, options.count)
    waveforms = sample_utterances(network, prior, labels, contents, options.seed, options.temperature, options.codes)
    rows: dict[str, list] = {}
    for label, waveform in zip(labels, waveforms, strict=True):
        rows.setdefault(network.speakers[label // contents], []).append((run.classes[label], waveform))
    networks = [network.digest, prior.digest]
    run.write_audio("Samples", list(rows.items()), options.seed, options.temperature, networks)


def main(options: SampleSpeechOptions) -> None:
    """Run the command `vqvae2 speech sample`."""
    on_main_process(sample, SpeechRun.existing(options.run), options)
