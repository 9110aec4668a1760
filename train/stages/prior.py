"""Stage 3: train one prior for each level on the cached codes."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn

from sampling.evaluation.training_checks import prior_warnings
from sampling.sample_level import LevelSamplingParams, Noise, sample_level
from train.loop import Stage, to_device, train
from train.run import Run, open_run, print_main
from vqvae2 import files
from vqvae2.data.code_store import CodeBatch, CodeStore, to_int64
from vqvae2.data.images import to_uint8
from vqvae2.data.samplers import SequentialBatchSampler, load_batches
from vqvae2.distributed import all_reduce_sum
from vqvae2.errors import UserError
from vqvae2.metrics.codebook_usage import CodebookUsage
from vqvae2.models import Autoencoder
from vqvae2.pictures import interleave_rows, save_grid
from vqvae2.priors import Prior, PriorSpec, save_prior

_PREVIEW_IMAGES = 8


class PriorObjective(nn.Module):
    """Negative log-likelihood of one level's codes, in nats per code.

    In training a share `label_dropout` of the images comes without its label, so that the network learns both
    distributions that classifier-free guidance compares (Ho and Salimans 2022, arXiv 2207.12598).
    """

    def __init__(self, network: Prior, level: int, label_dropout: float = 0.0) -> None:
        super().__init__()
        self.network, self.level, self.label_dropout = network, level, label_dropout

    def forward(self, batch: CodeBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss for a batch of codes of all levels; it has no other terms."""
        batch = to_int64(batch)
        labels = batch.label if self.network.spec.num_classes else None
        if labels is not None and self.label_dropout and self.training:
            dropped = torch.rand(len(labels), device=labels.device) < self.label_dropout
            labels = labels.masked_fill(dropped, self.network.spec.num_classes)
        logits = self.network(batch.codes[self.level], batch.codes[self.level + 1 :], labels)
        return F.cross_entropy(logits.float(), batch.codes[self.level]), {}


class PriorStage(Stage):
    """The prior of one level of an experiment."""

    monitor = "nll"

    def __init__(self, run: Run, level: str) -> None:
        self.run, self.name = run, f"prior-{level}"
        self.training_data = store = _open_store(run, "train")
        self.validation_data = _open_store(run, "val")
        header = store.header
        self.codes_digest = header.digest
        self.level = run.experiment.levels.index(level)
        maps = header.levels
        spec = PriorSpec(level=maps[self.level], coarser=maps[self.level + 1 :], num_classes=len(header.classes))
        self.config = run.experiment.priors[level]
        torch.manual_seed(self.config.training.seed)
        self.network = self.config.model.build(spec)
        self.network.gradient_checkpointing = self.config.gradient_checkpointing
        self.objective = PriorObjective(self.network, self.level, self.config.label_dropout)
        self.autoencoder = Autoencoder.load(run.folder.autoencoder_weights)
        self.unigram = self._unigram_entropy()
        self.curves = {"nats per code": ["train/loss", "validation/nll", "validation/uniform", "validation/unigram"]}

    @property
    def trained(self) -> nn.Module:
        return self.network

    def validate(self, accelerator: Accelerator) -> dict[str, float]:
        """Mean negative log-likelihood in nats and bits per code, beside what knowing nothing, or only how often each
        code is used, would give."""
        nll = mean_nll(self.network, self.level, self.validation_data, self.config.training.batch_size, accelerator)
        return {
            "nll": nll,
            "bits": nll / math.log(2),
            "uniform": math.log(self.network.spec.level.codebook_size),
            "unigram": self.unigram,
        }

    def training_warnings(self, entries: Sequence[Mapping[str, float]]) -> list[str]:
        return prior_warnings(self.run.experiment.levels[self.level], entries)

    def preview(self, path: Path) -> None:
        """Held-out images over the same with this level sampled, given their coarser levels."""
        count = min(_PREVIEW_IMAGES, len(self.validation_data))
        batch = self.validation_data.read(range(count))
        labels = batch.label if self.network.spec.num_classes else None
        device = next(self.network.parameters()).device
        coarser = to_device(batch.codes[self.level + 1 :], device)
        labels = None if labels is None else labels.to(device)
        sampled = sample_level(
            self.network, Noise(0, range(count), self.level), LevelSamplingParams(), coarser, labels
        ).cpu()
        codes = (*batch.codes[: self.level], sampled, *batch.codes[self.level + 1 :])
        # Finer levels of these images say nothing about the sampled one, so both rows go without them.
        shown = tuple(index >= self.level for index in range(len(codes)))
        before, after = (to_uint8(self.autoencoder.decode(maps, only=shown)) for maps in (batch.codes, codes))
        save_grid(path, *interleave_rows(before, after, columns=_PREVIEW_IMAGES))

    def save(self, path: Path) -> None:
        made_from = {"autoencoder": self.autoencoder.digest, "codes": self.codes_digest}
        made_from["label_dropout"] = self.config.label_dropout
        save_prior(path, self.network, self.config.model, **made_from)

    def _unigram_entropy(self) -> float:
        usage = CodebookUsage(self.network.spec.level.codebook_size)
        for indices in SequentialBatchSampler(len(self.validation_data), 256):
            usage.update(self.validation_data.read(indices).codes[self.level])
        return usage.entropy


@torch.inference_mode()
def mean_nll(network: Prior, level: int, store: CodeStore, batch_size: int, accelerator: Accelerator) -> float:
    """Negative log-likelihood in nats per code over a whole store, each image counted once."""
    order = SequentialBatchSampler(len(store), batch_size, accelerator.process_index, accelerator.num_processes)
    total = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
    for batch in load_batches(store, order, num_workers=0):
        batch = to_device(batch, accelerator.device)
        with accelerator.autocast():
            loss, _ = PriorObjective(network, level)(batch)
        codes = batch.codes[level].numel()
        total += torch.tensor([float(loss) * codes, codes], dtype=torch.float64, device=total.device)
    nats, codes = all_reduce_sum(total).tolist()
    return nats / codes


def train_prior(run: Run, level: str) -> None:
    """Train one level's prior, or go on where it was stopped; nothing to do where it is finished."""
    if level not in run.experiment.levels:
        raise UserError(f"--level: {level!r} is not one of {', '.join(run.experiment.levels)}")
    folder, weights = run.folder.prior(level), run.folder.prior_weights(level)
    if weights.is_file():
        print_main(f"prior-{level}: finished, {weights}")
        return
    stage = PriorStage(run, level)
    train(stage, stage.config.training, folder, run.experiment.data.num_workers)


def _open_store(run: Run, split: str) -> CodeStore:
    store = CodeStore.open(run.folder.code_store(split))
    store.header.check_autoencoder(files.digest(run.folder.autoencoder_weights), store.path)
    return store


def main(arguments: list[str]) -> None:
    """The command `vqvae2 train-prior`."""
    description = "Train the prior of one level on the cached codes (stage 3)."
    run, level = open_run("train-prior", arguments, description, level=True)
    train_prior(run, level)
