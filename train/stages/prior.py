"""Stage 3: train one prior per level on the cached codes."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from pydantic import Field
from torch import Tensor, nn

from sampling.evaluation.training_checks import constant_codes_warning, prior_warnings
from sampling.params import LevelSamplingParams
from sampling.processes import processes
from sampling.run_config import PriorStageConfig
from sampling.run_data import load_run_autoencoder, open_run_codes
from sampling.sample_level import Noise, sample_level
from train.accelerator import shared_batches, to_device
from train.loop import TrainingStage, train
from train.run import Run, RunOptions, is_finished, open_run, print_main
from vqvae2 import files
from vqvae2.data import lmdb_environment
from vqvae2.data.code_store import CodeBatch, CodeStore, to_int64
from vqvae2.data.images import to_uint8
from vqvae2.data.samplers import SequentialBatchSampler
from vqvae2.distributed import all_reduce_sum
from vqvae2.errors import UserError
from vqvae2.metrics.codebook_usage import CodebookUsage
from vqvae2.pictures import interleave_rows, save_grid
from vqvae2.priors import Prior, PriorSpec, save_prior

_PREVIEW_IMAGES = 8


class TrainPriorOptions(RunOptions):
    """Train the prior of one level on the cached codes (stage 3), or resume its training."""

    level: str | None = Field(default=None, description="top, bottom, …; all levels, coarsest first, if not given")


class PriorObjective(nn.Module):
    """Negative log-likelihood of one level's codes, in nats per code.

    In training, a fraction `label_dropout` of the images has no label, so that the prior also learns the unconditional
    distribution that classifier-free guidance needs (Ho and Salimans 2022, arXiv 2207.12598).
    """

    def __init__(self, network: Prior, level: int, label_dropout: float = 0.0) -> None:
        super().__init__()
        self.network, self.level, self.label_dropout = network, level, label_dropout

    def forward(self, batch: CodeBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the loss of a batch with the codes of all levels. There are no other terms."""
        batch = to_int64(batch)
        labels = batch.label if self.network.spec.num_classes else None
        if labels is not None and self.label_dropout and self.training:
            dropped = torch.rand(len(labels), device=labels.device) < self.label_dropout
            labels = labels.masked_fill(dropped, self.network.spec.num_classes)
        logits = self.network(batch.codes[self.level], batch.codes[self.level + 1 :], labels)
        # With the codebook as the last dimension, no operation of the loss has to change the memory layout.
        return F.cross_entropy(logits.float().movedim(1, -1).flatten(0, -2), batch.codes[self.level].flatten()), {}


class PriorStage(TrainingStage[Prior, PriorObjective]):
    """Training of the prior of one level on code stores. Subclasses add the preview.

    Args:
        level: Name of the level, and its index in the code stores.
        made_from: Digests of the artifacts that the stores were made from.
    """

    monitor = "nll"

    def __init__(
        self,
        level: tuple[str, int],
        training_data: CodeStore,
        validation_data: CodeStore,
        config: PriorStageConfig,
        made_from: Mapping[str, str | None],
    ) -> None:
        (self.level_name, self.level), self.config = level, config
        self.name = f"prior-{self.level_name}"
        self.training_data, self.validation_data = training_data, validation_data
        self.has_constant_codes = has_constant_codes(training_data, self.level)
        header = training_data.header
        maps = header.levels
        spec = PriorSpec(level=maps[self.level], coarser=maps[self.level + 1 :], num_classes=len(header.classes))
        torch.manual_seed(config.training.seed)
        self.network = config.model.build(spec)
        self.network.gradient_checkpointing = config.training.gradient_checkpointing
        self.embedding_learning_rate = config.training.embedding_learning_rate
        self.objective = PriorObjective(self.network, self.level, config.loss.label_dropout)
        self.made_from = {**made_from, "codes": header.digest}
        self.unigram_entropy = self._unigram_entropy()
        self.curves = {"nats per code": ["train/loss", "validation/nll", "validation/uniform", "validation/unigram"]}

    def validate(self, accelerator: Accelerator) -> dict[str, float]:
        """Return the negative log-likelihood in nats and bits per code, and two baselines in nats per code: the uniform
        distribution, and the frequency of each code."""
        batch_size = self.config.training.micro_batch_size(accelerator.num_processes)
        nll = mean_nll(self.network, self.level, self.validation_data, batch_size, accelerator)
        return {
            "nll": nll,
            "bits": nll / math.log(2),
            "uniform": math.log(self.network.spec.level.codebook_size),
            "unigram": self.unigram_entropy,
        }

    def training_warnings(self, entries: Sequence[Mapping[str, float]]) -> list[str]:
        keeps_best = self.config.training.early_stopping_patience is not None
        return prior_warnings(self.level_name, entries, keeps_best)

    def save(self, path: Path) -> None:
        label_dropout = self.config.loss.label_dropout
        save_prior(path, self.network, self.config.model, **self.made_from, label_dropout=label_dropout)

    def _unigram_entropy(self) -> float:
        usage = CodebookUsage(self.network.spec.level.codebook_size)
        for indices in SequentialBatchSampler(len(self.validation_data), 256):
            usage.update(self.validation_data.read(indices).codes[self.level])
        return usage.entropy


class ImagePriorStage(PriorStage):
    """Training of the prior of one level of a run."""

    def __init__(self, run: Run, level: str) -> None:
        self.run, index = run, run.config.levels.index(level)
        stores = open_run_codes(run.folder, "train"), open_run_codes(run.folder, "val")
        self.autoencoder = load_run_autoencoder(run.config, run.folder)
        if stores[0].header.levels != self.autoencoder.map_specs:
            raise UserError(
                f"{stores[0].path}: other code maps than those of the autoencoder. Delete this folder and run "
                "`vqvae2 extract-codes`."
            )
        super().__init__((level, index), *stores, run.config.priors[level], {"autoencoder": self.autoencoder.digest})

    def preview(self, path: Path) -> None:
        """Write held-out images, each above the same image with this level sampled given its coarser levels."""
        count = min(_PREVIEW_IMAGES, len(self.validation_data))
        batch = self.validation_data.read(range(count))
        labels = batch.label if self.network.spec.num_classes else None
        device = next(self.network.parameters()).device
        coarser = to_device(batch.codes[self.level + 1 :], device)
        labels = None if labels is None else labels.to(device)
        noise = Noise(0, range(count), self.level)
        sampled = sample_level(self.network, noise, LevelSamplingParams(), coarser, labels).cpu()
        codes = (*batch.codes[: self.level], sampled, *batch.codes[self.level + 1 :])
        # Both rows leave out the finer levels, which belong to the original codes.
        shown = self.run.config.levels[self.level :]
        before, after = (to_uint8(self.autoencoder.decode(maps, shown)) for maps in (batch.codes, codes))
        save_grid(path, *interleave_rows(before, after, columns=_PREVIEW_IMAGES))


@torch.inference_mode()
def mean_nll(network: Prior, level: int, store: CodeStore, batch_size: int, accelerator: Accelerator) -> float:
    """Return the negative log-likelihood in nats per code over a whole store. The processes share the images."""
    total = torch.zeros(2, dtype=torch.float64, device=accelerator.device)
    for batch in shared_batches(store, batch_size, accelerator):
        with accelerator.autocast():
            loss, _ = PriorObjective(network, level)(batch)
        codes = batch.codes[level].numel()
        total += torch.stack([loss.double() * codes, total.new_full((), codes)])
    nats, codes = all_reduce_sum(total).tolist()
    return nats / codes


def has_constant_codes(store: CodeStore, level: int) -> bool:
    """Return whether all codes of a level are equal. Reading stops at the first other code."""
    first = store.read([0]).codes[level].flatten()[0]
    return all(
        bool((store.read(batch).codes[level] == first).all()) for batch in SequentialBatchSampler(len(store), 256)
    )


def train_prior(run: Run, level: str) -> None:
    """Train the prior of one level, or resume its training. Do nothing if it is complete."""
    if level not in run.config.levels:
        raise UserError(f"--level: there is no level {level!r}. The levels are {', '.join(run.config.levels)}.")
    folder = run.folder.prior(level)
    if processes().is_main_process:
        files.lock_folder(folder.path)
    if folder.weights.is_file():
        made_from: dict[str, str | None] = {"autoencoder": files.digest(run.folder.autoencoder_weights)}
        store = run.folder.code_store("train")
        if lmdb_environment.exists(store):  # it may have been deleted since
            made_from["codes"] = CodeStore.read_header(store).digest
        if is_finished(folder.weights, made_from):
            return
    stage = ImagePriorStage(run, level)
    if stage.has_constant_codes:
        print_main(f"warning: {constant_codes_warning(level)}")
    train(stage, stage.config.training, folder.path, run.config.data.num_workers, run.config.tracker)


def main(options: TrainPriorOptions) -> None:
    """Run the command `vqvae2 train-prior`."""
    run = open_run(options, shared=options.level is not None)  # another process can train another level
    for level in [options.level] if options.level else reversed(run.config.levels):
        train_prior(run, level)
