"""The stages of training: the autoencoder or its baseline, the codes of all recordings, and the prior."""

import math
from contextlib import closing
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from experiments.speech.autoencoder import SpeechAutoencoder, UnconditionalWaveNet
from experiments.speech.decoding import decode, sample_utterances, save_spectrograms
from experiments.speech.mu_law import expand
from experiments.speech.recordings import Clip, Recordings, collate
from experiments.speech.spectrum import LogMel
from experiments.speech.speech_run import SpeechOptions, SpeechRun
from sampling.processes import processes
from train.accelerator import to_device
from train.loop import TrainingStage, train
from train.losses import CodebookUsageTracker
from train.run import is_finished, open_folder
from train.stages.autoencoder import update_codebook
from train.stages.prior import PriorStage
from vqvae2 import checkpoint, files
from vqvae2.code_maps import MapSpec
from vqvae2.data import lmdb_environment
from vqvae2.data.code_store import RECORDS_PER_VALUE, CodeHeader, CodeStore, CodeWriter
from vqvae2.data.samplers import SequentialBatchSampler, load_batches
from vqvae2.distributed import all_reduce_sum

_PREVIEW_CLIPS = 4


class SpeechObjective(nn.Module):
    """Negative log-likelihood of the waveform in nats per sample, plus the loss of the quantizer.

    The auxiliary term is the mean squared error of the log-mel spectrogram, predicted from the codes and the speaker.
    A strong autoregressive decoder learns slowly to use the codes; this term tells the encoder early what matters.
    """

    def __init__(
        self, network: SpeechAutoencoder | UnconditionalWaveNet, spectrum_weight: float, log_mel: LogMel
    ) -> None:
        super().__init__()
        self.network, self.quantized = network, True
        self.spectrum_weight, self.log_mel = spectrum_weight, log_mel
        self.usage = None
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


class SpeechStage(TrainingStage):
    """Training of the autoencoder, or of the baseline without codes."""

    monitor = "bits"

    def __init__(self, run: SpeechRun, baseline: bool) -> None:
        self.run, self.name, self.config = run, "baseline" if baseline else "autoencoder", run.config.training
        self.training_data, self.validation_data = run.recordings
        self.made_from = {"data": self.training_data.digest()}
        torch.manual_seed(self.config.seed)
        model = run.config.model
        self._network: SpeechAutoencoder | UnconditionalWaveNet = (
            UnconditionalWaveNet(model.decoder) if baseline else model.build(self.training_data.speakers)
        )
        self.objective = self._objective = SpeechObjective(
            self._network, self.config.spectrum_weight, LogMel(run.config.data.sample_rate, model.samples_per_code)
        )
        self.curves = {"nats per sample": ["train/nll"], "bits per recorded sample": ["validation/bits"]}
        if not baseline:
            self.curves |= {"error of the spectrum": ["train/spectrum"], "codes in use": ["train/usage_top"]}

    @property
    def network(self) -> SpeechAutoencoder | UnconditionalWaveNet:
        return self._network

    def before_update(self, step: int) -> None:
        self._objective.quantized = step >= self.config.unquantized_steps

    def after_update(self, optimizer: torch.optim.Optimizer) -> None:
        if isinstance(self.network, SpeechAutoencoder):
            update_codebook(self.network.quantizer, optimizer)

    def logged_values(self) -> dict[str, float]:
        return self._objective.usage.take() if self._objective.usage else {}

    def pending_values(self) -> dict[str, list[int]]:
        return self._objective.usage.pending() if self._objective.usage else {}

    def restore_pending(self, pending: dict[str, list[int]]) -> None:
        if self._objective.usage:
            self._objective.usage.resume(pending, next(self.network.parameters()).device)

    def validate(self, accelerator: Accelerator) -> dict[str, float]:
        batch_size = self.config.micro_batch_size(accelerator.num_processes)
        return {"bits": bits_per_sample(self.network, self.validation_data, batch_size, accelerator)}

    def preview(self, path: Path) -> None:
        """Write spectrograms of held-out recordings above those of their reconstructions."""
        if not isinstance(self.network, SpeechAutoencoder):
            return
        data = self.validation_data
        chosen = list(range(0, len(data), max(1, len(data) // _PREVIEW_CLIPS)))[:_PREVIEW_CLIPS]
        device = self.network.speaker.weight.device
        batch = to_device(collate(data, chosen), device)
        with torch.inference_mode():
            decoded = decode(
                self.network, self.network.encode(batch.values.long()), batch.speaker, lengths=batch.length
            )
        rows = {"original": expand(batch.values).cpu(), "reconstruction": decoded.cpu()}
        titles = [data.caption(index) for index in chosen]
        titled = {name: list(zip(titles, waveforms, strict=True)) for name, waveforms in rows.items()}
        save_spectrograms(path, titled, data.config.sample_rate)

    def save(self, path: Path) -> None:
        if isinstance(self.network, SpeechAutoencoder):
            self.network.save(path, **self.made_from)
        else:
            metadata = {"network": "wavenet", "config": self.run.config.model.decoder.to_dict()}
            checkpoint.save(path, self.network.state_dict(), metadata | {"made_from": dict(self.made_from)})


@torch.inference_mode()
def bits_per_sample(network: nn.Module, data: Recordings, batch_size: int, accelerator: Accelerator) -> float:
    """Return the negative log-likelihood in bits per recorded sample; padding is not counted."""
    sampler = SequentialBatchSampler(len(data), batch_size, accelerator.process_index, accelerator.num_processes)
    total = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
    for batch in load_batches(data, sampler, data.config.num_workers):
        batch = to_device(batch, accelerator.device)
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
        path, spec = run.folder.code_store(split), network.config
        if lmdb_environment.exists(path) and CodeStore.read_header(path).complete:
            run.store(split)
            continue
        level = MapSpec(
            codebook_size=network.quantizer.codebook_size, height=1, width=data.config.length // spec.samples_per_code
        )
        header = CodeHeader(
            levels=(level,),
            count=len(data),
            classes=data.class_names,
            split=split,
            source=data.config.path,
            data=data.digest(),
            autoencoder=str(network.digest),
        )
        with closing(CodeWriter(path, header)) as writer, torch.inference_mode():
            for number in writer.missing_values():
                first = number * RECORDS_PER_VALUE
                indices = range(first, min(first + RECORDS_PER_VALUE, len(data)))
                batch = collate(data, indices)
                codes = network.encode(batch.values.long())[:, None]
                labels = batch.speaker * data.classes_per_speaker + batch.content.clamp_min(0)
                writer.write(number, [codes], labels, [data.names[index] for index in indices])
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
        labels = list(range(0, len(classes), max(1, len(classes) // _PREVIEW_CLIPS)))[:_PREVIEW_CLIPS]
        sampled = sample_utterances(self.run.autoencoder, self.network, labels, self.run.classes_per_speaker)
        titled = list(zip([classes[label] for label in labels], sampled, strict=True))
        save_spectrograms(path, {"sampled": titled}, self.run.config.data.sample_rate)


def train_speech(run: SpeechRun) -> None:
    """Train all stages of a run. Finished ones are skipped."""
    folder, workers, training = run.folder, run.config.data.num_workers, run.config.training
    data = {"data": run.recordings[0].digest()}
    if not is_finished(folder.autoencoder_weights, data):
        train(SpeechStage(run, baseline=False), training, folder.autoencoder.path, workers)
    if processes().is_main_process:
        extract_speech_codes(run)
    processes().wait_for_everyone()
    if not is_finished(folder.prior_weights("top"), {"autoencoder": files.digest(folder.autoencoder_weights)}):
        train(SpeechPriorStage(run), run.config.prior.training, folder.prior("top").path, workers)
    if run.config.baseline and not is_finished(run.baseline.weights, data):
        train(SpeechStage(run, baseline=True), training, run.baseline.path, workers)


def main(options: SpeechOptions) -> None:
    """Run the command `vqvae2 speech train`."""
    train_speech(SpeechRun(*open_folder(options)))
