"""The command `vqvae2 speech evaluate`: likelihood, recognition of contents and speakers, and what the codes carry."""

import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import tyro
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor
from tqdm import tqdm

from experiments.speech.speech_run import SpeechRun
from experiments.speech.stages import bits_per_sample
from sampling.evaluation.speech_recognition import recognize
from sampling.processes import processes
from sampling.sample_waveforms import decode_speech, sample_labels, sample_utterances
from train.accelerator import make_accelerator
from vqvae2 import checkpoint, files
from vqvae2.audio.mu_law import NUM_VALUES, expand
from vqvae2.command_line import Options
from vqvae2.config import Config, Measured
from vqvae2.data.recordings import collate
from vqvae2.data.samplers import SequentialBatchSampler
from vqvae2.metrics.codebook_usage import CodebookUsage
from vqvae2.metrics.mutual_information import mutual_information
from vqvae2.models.speech_autoencoder import UnconditionalWaveNet

_BATCH = 128  # clips decoded at once


class EvaluateSpeechOptions(Options):
    """Measure a speech experiment on its held-out recordings, and write RUN/evaluation/metrics.json."""

    run: tyro.conf.Positional[Path] = Field(description="folder of a speech experiment")
    temperature: float = Field(default=0.9, gt=0, description="divides the logits of the waveform")
    samples: int = Field(default=300, ge=0, le=10**6, description="utterances sampled from the prior; 0 for none")
    seed: int = Field(default=0, ge=0, le=2**63 - 1, description="seed of the waveforms")


class SpeechMetrics(Config):
    """Contents of metrics.json. Likelihoods are in bits per recorded sample, recognition in fractions."""

    temperature: float
    seed: int
    bits: dict[str, Measured]
    content_recognized: dict[str, Measured] | None  # None with fewer than two contents
    speaker_recognized: dict[str, Measured] | None  # None with a single speaker
    codes: dict[str, Measured]  # in bits per code

    def lines(self) -> list[str]:
        """Return the metrics as text."""
        sections = {name: values for name, values in self.to_dict().items() if isinstance(values, dict)}
        return [
            f"{f'{section}: {name}'.replace('_', ' '):<45} {value:.3f}"
            for section, values in sections.items()
            for name, value in values.items()
        ]


class _Utterances(NamedTuple):
    """Waveforms with the speakers and contents that they should have."""

    waveforms: Float[Tensor, "n t"]
    speaker: Int[Tensor, " n"]
    content: Int[Tensor, " n"]


def evaluate(run: SpeechRun, options: EvaluateSpeechOptions, bits: dict[str, float]) -> SpeechMetrics:
    """Measure a run; `bits` are its likelihoods. Recognition is by classifiers trained on real training recordings."""
    training, data = run.recordings
    sets = _held_out_utterances(run, options)
    if options.samples:
        sets["samples"] = _sampled_utterances(run, options)
    real, sample_rate = collate(training, range(len(training))), data.config.sample_rate
    originals = expand(real.values)
    contents = {name: (each.waveforms, each.content) for name, each in sets.items()}
    speakers = {name: (each.waveforms, each.speaker) for name, each in sets.items()}
    speakers["conversions_as_source"] = sets["conversions"].waveforms, sets["real"].speaker
    return SpeechMetrics(
        temperature=options.temperature,
        seed=options.seed,
        bits=bits,
        content_recognized=recognize(originals, real.content, contents, sample_rate),
        speaker_recognized=recognize(originals, real.speaker, speakers, sample_rate),
        codes=_code_information(run),
    )


def conversion_targets(speaker: Int[Tensor, " n"], num_speakers: int) -> Int[Tensor, " n"]:
    """Return another speaker for each recording, such that all pairs are about equally frequent."""
    return (speaker + 1 + torch.arange(len(speaker)) % max(1, num_speakers - 1)) % num_speakers


def _held_out_utterances(run: SpeechRun, options: EvaluateSpeechOptions) -> dict[str, _Utterances]:
    """Return held-out recordings, their reconstructions and conversions."""
    network, data = run.autoencoder, run.recordings[1]
    targets = conversion_targets(torch.tensor([data.labels(i)[0] for i in range(len(data))]), len(data.speakers))
    parts: dict[str, list[Tensor]] = {"real": [], "reconstructions": [], "conversions": []}
    batches = [collate(data, batch) for batch in SequentialBatchSampler(len(data), _BATCH)]
    for number, batch in enumerate(tqdm(batches, "decoding")):
        with torch.inference_mode():
            codes = network.encode(batch.values.long())
        clips = range(number * _BATCH, number * _BATCH + len(codes))
        parts["real"].append(expand(batch.values))
        for name, speaker in (("reconstructions", batch.speaker), ("conversions", targets[clips.start : clips.stop])):
            parts[name].append(
                decode_speech(network, codes, speaker, options.seed, options.temperature, clips, batch.length)
            )
    speaker, content = (torch.cat([getattr(batch, name) for batch in batches]) for name in ("speaker", "content"))
    intended = {"real": speaker, "reconstructions": speaker, "conversions": targets}
    return {name: _Utterances(torch.cat(parts[name]), intended[name], content) for name in parts}


def _sampled_utterances(run: SpeechRun, options: EvaluateSpeechOptions) -> _Utterances:
    """Return utterances sampled from the prior."""
    contents = run.classes_per_speaker
    labels = sample_labels(len(run.autoencoder.speakers), contents, options.samples)
    network, prior, seed, waveforms = run.autoencoder, run.prior, options.seed, []
    for clips in tqdm(SequentialBatchSampler(len(labels), _BATCH), "sampling"):
        chosen = [labels[k] for k in clips]
        sampled = sample_utterances(network, prior, chosen, contents, seed, options.temperature, clips=clips)
        waveforms.append(sampled)
    label = torch.tensor(labels)
    return _Utterances(torch.cat(waveforms), label // contents, label % contents)


def _bits(run: SpeechRun) -> dict[str, float]:
    """Return bits per recorded sample: of the autoencoder, of its codes, of the baseline, and of µ-law values alone."""
    data, model, accelerator = run.recordings[1], run.config.model, make_accelerator()
    usage = CodebookUsage(NUM_VALUES)
    for index in range(len(data)):
        clip = data[index]
        usage.update(clip.values[: int(clip.length)].long())

    def measure(network: torch.nn.Module) -> float:
        bits = bits_per_sample(network.to(accelerator.device), data, run.config.training.batch_size, accelerator)
        network.cpu()
        return bits

    values = {"autoencoder": measure(run.autoencoder)}
    if (weights := run.baseline.weights).is_file():
        values["baseline"] = measure(
            checkpoint.load_module(weights, "wavenet", lambda: UnconditionalWaveNet(model.decoder))
        )
    values["unigram_entropy"] = usage.entropy / math.log(2)
    values["codes_per_sample"] = math.log2(run.autoencoder.quantizer.codebook_size) / model.samples_per_code
    return values


def _code_information(run: SpeechRun) -> dict[str, float]:
    """Return the entropy of held-out codes, and their mutual information with speakers and contents, in bits."""
    data, store, hop = run.recordings[1], run.store("val"), run.config.model.samples_per_code
    codes, labels = [], []
    for index in range(len(data)):
        recorded = store.read([index]).codes[0][0, 0, : -(-int(data[index].length) // hop)]
        codes.append(recorded.numpy())
        labels.append(np.tile(data.labels(index), (len(recorded), 1)))
    joined, (speaker, content) = np.concatenate(codes), np.concatenate(labels).T
    found = {"entropy": mutual_information(joined, joined), "speaker": mutual_information(joined, speaker)}
    return found | ({"content": mutual_information(joined, content)} if data.contents else {})


def main(options: EvaluateSpeechOptions) -> None:
    """Run the command `vqvae2 speech evaluate`."""
    run = SpeechRun.existing(options.run)
    bits = _bits(run)  # measured by all processes together
    if processes().is_main_process:
        metrics = evaluate(run, options, bits)
        files.write_json(run.folder.metrics, metrics.to_dict())
        print("\n".join([*metrics.lines(), str(run.folder.metrics)]))
