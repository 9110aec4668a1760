"""The stages of training: the autoencoder or its baseline, the codes of all recordings, and the prior."""

import math
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TypeVar

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from experiments.speech.speech_run import SpeechOptions, SpeechRun
from sampling.processes import processes
from sampling.sample_waveforms import decode_speech, sample_utterances
from train.accelerator import shared_batches, to_device
from train.loop import train
from train.losses import CodebookUsageTracker
from train.quantized_stage import QuantizedObjective, QuantizedStage
from train.run import is_finished
from train.stages.prior import PriorStage
from vqvae2 import checkpoint, files
from vqvae2.audio.log_mel import LogMel
from vqvae2.audio.mu_law import expand
from vqvae2.audio.spectrogram_plot import save_spectrograms
from vqvae2.data import lmdb_environment
from vqvae2.data.code_store import RECORDS_PER_VALUE, CodeHeader, CodeStore, CodeWriter
from vqvae2.data.recordings import Clip, Recordings, collate
from vqvae2.data.samplers import SequentialBatchSampler, evenly_spaced
from vqvae2.distributed import all_reduce_sum
from vqvae2.models.speech_autoencoder import SpeechAutoencoder, UnconditionalWaveNet

SpeechNetworkT = TypeVar("SpeechNetworkT", SpeechAutoencoder, UnconditionalWaveNet)
_PREVIEW_CLIPS = 4


class SpeechObjective(QuantizedObjective):
    """Negative log-likelihood of the waveform in nats per sample, plus the loss of the quantizer.

    The auxiliary term is the mean squared error of the log-mel spectrogram, predicted from the codes and the speaker.
    A strong autoregressive decoder learns slowly to use the codes; this term tells the encoder early what matters.
    """

    def __init__(
        self, network: SpeechAutoencoder | UnconditionalWaveNet, spectrum_weight: float, log_mel: LogMel
    ) -> None:
        super().__init__()
        self.network, self.spectrum_weight, self.log_mel = network, spectrum_weight, log_mel
        if isinstance(network, SpeechAutoencoder):
            self.usage = CodebookUsageTracker({"top": network.quantizer.codebook_size})

    def forward(self, batch: Clip) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss and its unweighted terms."""
        values = batch.values.long()
        logits, quantization, spectrum = self.network(values, batch.speaker, self.quantized)
        nll = F.cross_entropy(logits.float().flatten(0, 1), values.flatten())
        if quantization is None:
            return nll, {"nll": nll}
        if self.usage and self.training and self.quantized:
            self.usage.update([quantization])
        error = F.mse_loss(spectrum.float(), self.log_mel(expand(batch.values)))
        loss = nll + quantization.loss + self.spectrum_weight * error
        return loss, {"nll": nll, "spectrum": error} | quantization.loss_terms


class WaveformStage(QuantizedStage[SpeechNetworkT, SpeechObjective]):
    """What the training of the autoencoder and of the baseline have in common."""

    monitor = "bits"

    def __init__(self, run: SpeechRun, build: Callable[[tuple[str, ...]], SpeechNetworkT]) -> None:
        self.run, self.config = run, run.config.training
        self.training_data, self.validation_data = run.recordings
        self.made_from = {"data": self.training_data.digest()}
        torch.manual_seed(self.config.seed)
        self.network = build(self.training_data.speakers)
        log_mel = LogMel(run.config.data.sample_rate, run.config.model.samples_per_code)
        self.objective = SpeechObjective(self.network, self.config.spectrum_weight, log_mel)
        self.first_quantized_step = self.config.first_quantized_step
        self.curves = {"nats per sample": ["train/nll"], "bits per recorded sample": ["validation/bits"]}

    def validate(self, accelerator: Accelerator) -> dict[str, float]:
        batch_size = self.config.micro_batch_size(accelerator.num_processes)
        return {"bits": bits_per_sample(self.network, self.validation_data, batch_size, accelerator)}


class SpeechStage(WaveformStage[SpeechAutoencoder]):
    """Training of the autoencoder."""

    name = "autoencoder"

    def __init__(self, run: SpeechRun) -> None:
        super().__init__(run, run.config.model.build)
        self.quantizers = [self.network.quantizer]
        self.curves |= {"error of the spectrum": ["train/spectrum"], "codes in use": ["train/usage_top"]}

    def preview(self, path: Path) -> None:
        """Write spectrograms of held-out recordings above those of their reconstructions."""
        data = self.validation_data
        chosen = evenly_spaced(len(data), _PREVIEW_CLIPS)
        batch = to_device(collate(data, chosen), self.network.speaker.weight.device)
        with torch.inference_mode():
            codes = self.network.encode(batch.values.long())
        decoded = decode_speech(self.network, codes, batch.speaker, lengths=batch.length)
        rows = [("original", expand(batch.values).cpu()), ("reconstruction", decoded.cpu())]
        titles = [data.caption(index) for index in chosen]
        titled = [(name, list(zip(titles, waveforms, strict=True))) for name, waveforms in rows]
        save_spectrograms(path, titled, data.config.sample_rate)

    def save(self, path: Path) -> None:
        self.network.save(path, **self.made_from)


class BaselineStage(WaveformStage[UnconditionalWaveNet]):
    """Training of the WaveNet without codes and speakers."""

    name, quantizers = "baseline", ()

    def __init__(self, run: SpeechRun) -> None:
        super().__init__(run, lambda speakers: UnconditionalWaveNet(run.config.model.decoder))

    def preview(self, path: Path) -> None:
        """Write nothing."""

    def save(self, path: Path) -> None:
        checkpoint.save_module(path, "wavenet", self.network, self.network.config, self.made_from)


@torch.inference_mode()
def bits_per_sample(network: nn.Module, data: Recordings, batch_size: int, accelerator: Accelerator) -> float:
    """Return the negative log-likelihood in bits per recorded sample; padding is not counted."""
    total = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
    for batch in shared_batches(data, batch_size, accelerator, data.config.num_workers):
        values = batch.values.long()
        with accelerator.autocast():
            logits = network(values, batch.speaker).logits
        nats = F.cross_entropy(logits.float().flatten(0, 1), values.flatten(), reduction="none").view_as(values)
        recorded = torch.arange(values.shape[1], device=values.device) < batch.length[:, None]
        total += torch.stack([nats[recorded].double().sum(), recorded.double().sum()])
    nats, samples = all_reduce_sum(total).tolist()
    return nats / samples / math.log(2)


def extract_speech_codes(run: SpeechRun) -> None:
    """Write the code stores of both splits, or resume writing them. Labels are speaker × content."""
    network = run.autoencoder
    for split, data in zip(("train", "val"), run.recordings, strict=True):
        path, values = run.folder.code_store(split), SequentialBatchSampler(len(data), RECORDS_PER_VALUE).batches
        if lmdb_environment.exists(path) and CodeStore.read_header(path).complete:
            run.store(split)
            continue
        header = CodeHeader(
            levels=(network.map_spec(data.config.length),),
            count=len(data),
            classes=data.class_names,
            split=split,
            source=data.config.path,
            data=data.digest(),
            autoencoder=str(network.digest),
        )
        with closing(CodeWriter(path, header)) as writer, torch.inference_mode():
            for number in writer.missing_values():
                batch = collate(data, values[number])
                codes = network.encode(batch.values.long())[:, None]
                labels = batch.speaker * data.classes_per_speaker + batch.content.clamp_min(0)
                writer.write(number, [codes], labels, [data.names[index] for index in values[number]])
            writer.finish()


class SpeechPriorStage(PriorStage):
    """Training of the prior of the codes."""

    def __init__(self, run: SpeechRun) -> None:
        self.run = run
        made_from = {"autoencoder": run.autoencoder.digest}
        super().__init__(("top", 0), run.store("train"), run.store("val"), run.config.prior, made_from)

    def preview(self, path: Path) -> None:
        """Write spectrograms of sampled utterances."""
        classes = self.run.classes
        labels = evenly_spaced(len(classes), _PREVIEW_CLIPS)
        sampled = sample_utterances(self.run.autoencoder, self.network, labels, self.run.classes_per_speaker)
        titled = list(zip([classes[label] for label in labels], sampled, strict=True))
        save_spectrograms(path, [("sampled", titled)], self.run.config.data.sample_rate)


def train_speech(run: SpeechRun) -> None:
    """Train all stages of a run. Finished ones are skipped."""
    folder, workers, training = run.folder, run.config.data.num_workers, run.config.training
    data = {"data": run.recordings[0].digest()}
    if not is_finished(folder.autoencoder_weights, data):
        train(SpeechStage(run), training, folder.autoencoder.path, workers)
    if processes().is_main_process:
        extract_speech_codes(run)
    processes().wait_for_everyone()
    if not is_finished(folder.prior_weights("top"), {"autoencoder": files.digest(folder.autoencoder_weights)}):
        train(SpeechPriorStage(run), run.config.prior.training, folder.prior("top").path, workers)
    if run.config.baseline and not is_finished(run.baseline.weights, data):
        train(BaselineStage(run), training, run.baseline.path, workers)


def main(options: SpeechOptions) -> None:
    """Run the command `vqvae2 speech train`."""
    train_speech(SpeechRun.open(options))
