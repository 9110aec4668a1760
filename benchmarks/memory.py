"""Compute the peak memory of a training step of every network of a config, without allocating it and without a GPU.

    python -m benchmarks.memory configs/*.yaml
    python -m benchmarks.memory configs/imagenet256.yaml --gpus 8 --no-checkpointing

One optimizer step runs with fake tensors, which have shapes and no contents. The peak is that of all live tensors:
weights, gradients, Adam's moments, averaged weights, activations and temporary results. Not included: workspaces inside
kernels, the allocator's unused blocks, and the CUDA context, together about 1 to 3 GiB. `--gpus` is the number in the
config's header if not given.
"""

import re
import weakref
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple, cast
from unittest import mock

import torch
from pydantic import Field
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from tyro.conf import Positional

from sampling.run_config import RunConfig
from train.losses import make_perceptual_loss
from train.stages.autoencoder import AutoencoderObjective
from train.stages.prior import PriorObjective
from vqvae2.command_line import Options, run_command
from vqvae2.data.code_store import CodeBatch
from vqvae2.data.images import ImageSample
from vqvae2.priors import PriorSpec
from vqvae2.training_config import TrainingConfig

_GIB = 2**30
_BLOCK_BYTES = 512  # granularity of the CUDA allocator
_NUM_CLASSES = 1000


class MemoryOptions(Options):
    """Print the computed peak memory of training, per network."""

    configs: Positional[tuple[Path, ...]] = Field(min_length=1, description="YAML files")
    gpus: int | None = Field(default=None, ge=1, description="number of GPUs")
    checkpointing: bool = Field(default=True, description="gradient checkpointing where the config has it")


class LiveBytes(TorchDispatchMode):
    """Count the bytes of all live tensors that operations return.

    Attributes:
        now: Bytes at the moment.
        peak: Largest value of `now` so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._seen: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._track(leaf.untyped_storage())
        return result

    def _track(self, storage: torch.UntypedStorage) -> None:
        address = storage._cdata
        if address in self._seen:
            return
        self._seen.add(address)
        size = -(-storage.nbytes() // _BLOCK_BYTES) * _BLOCK_BYTES
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, address, size)

    def _free(self, address: int, size: int) -> None:
        self._seen.discard(address)
        self.now -= size


class Peak(NamedTuple):
    """Memory of training one network."""

    network: str
    micro_batch: int
    checkpointing: bool
    fixed: float  # GiB of weights, gradients, moments and averages
    peak: float  # GiB


def step_peak(objective: nn.Module, network: nn.Module, batch: Any, training: TrainingConfig, gpus: int) -> float:
    """Run optimizer steps under FakeTensorMode, and return the GiB of the network's training state."""
    parameters = sum(parameter.numel() for parameter in objective.parameters() if parameter.requires_grad)
    optimizer = torch.optim.AdamW(objective.parameters(), foreach=False)
    average = {n: p.detach().clone() for n, p in network.named_parameters()} if training.ema_decay else {}
    enabled = training.mixed_precision != "fp32"
    in_buckets = gpus > 1  # DDP keeps gradients in its buckets, between steps too
    for parameter in objective.parameters():
        if in_buckets and parameter.requires_grad:
            parameter.grad = torch.zeros_like(parameter)
    for _ in range(2):  # the second step has the optimizer's moments
        for _ in range(min(2, training.gradient_accumulation_steps)):  # the second has gradients already
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                loss, _terms = objective(batch)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=not in_buckets)
    return (16 * parameters + 4 * sum(each.numel() for each in average.values())) / _GIB


def measure(config: RunConfig, gpus: int, checkpointing: bool) -> list[Peak]:
    """Return the peaks of the autoencoder and of every prior."""
    return [_measure_stage(config, name, each, gpus, checkpointing) for name, each in stages_of(config).items()]


def stages_of(config: RunConfig) -> dict[str, TrainingConfig]:
    """Return the training settings of the autoencoder and of every prior."""
    priors = {f"prior-{name}": config.priors[name].training for name in config.levels}
    return {"autoencoder": config.autoencoder.training, **priors}


def micro_batch_of(training: TrainingConfig, gpus: int) -> int:
    """Return the images of one forward pass on one GPU."""
    return max(1, training.batch_size // (gpus * training.gradient_accumulation_steps))


def _measure_stage(config: RunConfig, name: str, training: TrainingConfig, gpus: int, checkpointing: bool) -> Peak:
    micro_batch = micro_batch_of(training, gpus)
    checkpointing = checkpointing and getattr(training, "gradient_checkpointing", False)
    perceptual = make_perceptual_loss(config.autoencoder.loss.perceptual, config.data.shape)
    peaks, fixed = [], 0.0
    for decoder_only in {False, getattr(training, "decoder_steps", 0) > 0}:
        with FakeTensorMode(allow_non_fake_inputs=True), LiveBytes() as live, ExitStack() as stack:
            _adapt_to_fake_tensors(stack)
            objective, network, batch = build_stage(config, name, micro_batch)
            if isinstance(objective, AutoencoderObjective):
                stack.enter_context(mock.patch.object(objective, "usage"))
                objective.decoder_only = decoder_only
                is_active = decoder_only or not config.autoencoder.loss.perceptual.start
                objective.perceptual = perceptual if is_active else None
            else:
                cast(Any, network).gradient_checkpointing = checkpointing
            fixed = step_peak(objective, network, batch, training, gpus)
        peaks.append(live.peak / _GIB)
    return Peak(name, micro_batch, checkpointing, fixed, max(peaks))


def _adapt_to_fake_tensors(stack: ExitStack) -> None:
    # Parameters with fake tensors cannot be converted in place; the memory format does not change their size.
    stack.enter_context(mock.patch.object(nn.Module, "to", lambda module, *_, **__: module))
    stack.enter_context(mock.patch("vqvae2.priors.layers.is_eager_cpu", return_value=False))  # as on a GPU
    # Fake tensors cannot run k-means, which depends on values.
    stack.enter_context(mock.patch("vqvae2.quantizers.codebook.CodebookQuantizer._initialize"))


def build_stage(config: RunConfig, name: str, batch_size: int) -> tuple[nn.Module, nn.Module, Any]:
    """Return the objective of a stage, its network and a batch of zeros. `name` is `autoencoder` or `prior-LEVEL`."""
    autoencoder = config.autoencoder.model.build(config.data.shape, config.data.channels)
    maps = autoencoder.map_specs
    if name != "autoencoder":
        level = config.levels.index(name.removeprefix("prior-"))
        classes = 0 if config.data.labels == "none" else _NUM_CLASSES
        spec = PriorSpec(level=maps[level], coarser=maps[level + 1 :], num_classes=classes)
        prior = config.priors[config.levels[level]].model.build(spec)
        codes = tuple(torch.zeros(batch_size, each.height, each.width, dtype=torch.int64) for each in maps)
        return PriorObjective(prior, level).train(), prior, CodeBatch(codes, torch.zeros(batch_size, dtype=torch.int64))
    objective = AutoencoderObjective(autoencoder, config.autoencoder.loss).train()
    images = torch.zeros(batch_size, config.data.channels, *config.data.shape, dtype=torch.uint8)
    return objective, autoencoder, ImageSample(images, torch.zeros(batch_size, dtype=torch.int64))  # pyright: ignore[reportArgumentType]


def gpus_in_header(path: Path) -> int:
    """Return the number of GPUs that a config's header states, 1 if it states none."""
    header = re.match(r"(?:#.*\n)*", path.read_text(encoding="utf-8"))
    found = re.search(r"Hardware: (\d+) GPU", header[0] if header else "")
    return int(found[1]) if found else 1


def main(options: MemoryOptions) -> None:
    """Print one row per network."""
    print("| config | network | GPUs | images per micro-batch | checkpointing | state (GiB) | peak (GiB) |")
    print("|---|---|---|---|---|---|---|")
    for path in options.configs:
        gpus = options.gpus or gpus_in_header(path)
        for row in measure(RunConfig.from_yaml(path), gpus, options.checkpointing):
            settings = f"{gpus} | {row.micro_batch} | {'yes' if row.checkpointing else 'no'}"
            print(f"| {path.stem} | {row.network} | {settings} | {row.fixed:.1f} | {row.peak:.1f} |", flush=True)


if __name__ == "__main__":
    import sys

    run_command(main, sys.argv[1:], "python -m benchmarks.memory")
