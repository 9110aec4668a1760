"""VQVAE2Pipeline: an autoencoder and one prior per level, from random codes to images."""

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self, Unpack

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from sampling.guidance import check_guidance
from sampling.labels import Labels, as_labels, labels_of
from sampling.memory import batch_that_fits
from sampling.model_card import write_model_card
from sampling.params import SamplingConfig, SamplingParams
from sampling.run_config import RunConfig
from sampling.sample_level import Noise, PartialCodes, sample_level
from vqvae2 import files
from vqvae2.code_maps import CodeMaps
from vqvae2.config import Config
from vqvae2.data.code_store import CodeStore
from vqvae2.errors import UserError
from vqvae2.hub import HubOptions, PushOptions, pipeline_folder, push
from vqvae2.models import Autoencoder
from vqvae2.priors import Prior, load_prior, save_prior
from vqvae2.run_folder import RunFolder, level_names

_DEFAULTS = SamplingParams()
_DECODE_BATCH = 8


class PipelineConfig(Config):
    """Contents of config.json in a folder that `save_pretrained` wrote."""

    kind: Literal["pipeline"] = "pipeline"
    format: Literal[1] = 1
    levels: tuple[str, ...]
    class_names: tuple[str, ...] = ()
    sampling: SamplingParams = SamplingParams()  # defaults of the pipeline and of `vqvae2 sample`

    @classmethod
    def read(cls, folder: Path) -> "PipelineConfig":
        """Return the contents of config.json in a folder.

        Raises:
            UserError: If it is missing or damaged.
        """
        return cls.from_json(RunFolder(folder).pipeline_config, "Save the pipeline again.")


@dataclass(frozen=True)
class VQVAE2Pipeline:
    """An autoencoder with a prior for each of its levels.

    Call it to sample images:

    >>> from vqvae2 import AutoencoderConfig, PixelSNAILConfig, PriorSpec
    >>> autoencoder = AutoencoderConfig(channels=8, residual_channels=4).build((32, 32)).eval()
    >>> prior = PixelSNAILConfig(channels=8, residual_channels=8, blocks=1, layers=1, heads=2, kernel=3)
    >>> bottom, top = autoencoder.map_specs
    >>> priors = [prior.build(PriorSpec(level=bottom, coarser=(top,))), prior.build(PriorSpec(level=top))]
    >>> pipeline = VQVAE2Pipeline(autoencoder, tuple(each.eval() for each in priors))
    >>> tuple(pipeline(num_images=3, seed=0).shape)
    (3, 3, 32, 32)

    Args:
        autoencoder: The autoencoder, in evaluation mode.
        priors: The prior of each level, finest first, in evaluation mode.
        class_names: Names of the labels; empty for an unconditional model.
        batch_size: Images sampled at once, if memory allows.
        source: Folder that the networks were loaded from, for the model card.
        sampling: Sampling parameters of a call that is given none.
    """

    autoencoder: Autoencoder
    priors: tuple[Prior, ...]
    class_names: tuple[str, ...] = ()
    batch_size: int = 16
    source: Path | None = None
    sampling: SamplingParams = _DEFAULTS

    @classmethod
    def from_pretrained(
        cls, source: Path | str, device: torch.device | str = "cpu", batch_size: int = 16, **hub: Unpack[HubOptions]
    ) -> "VQVAE2Pipeline":
        """Load the networks of a run folder, of a folder that `save_pretrained` wrote, or of a hub repository.

        The default sampling parameters are those of the run's config, or those that were saved.

        Args:
            source: Path, name of a packaged model, or hub id `OWNER/NAME` or `OWNER/NAME@REVISION`.
            device: Device of the networks, such as "cuda"; `to` moves them later.
            batch_size: Images sampled at once, if memory allows.
            hub: `revision`, `token`, `cache_dir`, `local_files_only`, as in `huggingface_hub`.

        Raises:
            UserError: If a network is missing, damaged, or does not belong to the others.
        """
        folder = RunFolder(pipeline_folder(source, **hub))
        autoencoder = Autoencoder.load(folder.autoencoder_weights, device)
        priors: list[Prior] = []
        for index, name in enumerate(level_names(len(autoencoder.map_specs))):
            priors.append(load_prior(folder.prior_weights(name), device))
            _check_prior(folder, name, index, priors[-1], autoencoder)
        names, sampling = _class_names(folder, autoencoder, priors), _default_params(folder)
        return cls(autoencoder, tuple(priors), names, batch_size, folder.path, sampling)

    def save_pretrained(
        self, folder: Path | str, sampling: SamplingParams | None = None, dtype: torch.dtype | None = None
    ) -> None:
        """Write the networks to a folder that `from_pretrained` reads: safetensors files, config.json
        and README.md, a model card.

        Args:
            sampling: Default sampling parameters of the saved pipeline; those of this one if not given.
            dtype: Stored type of the weights, such as `torch.bfloat16` for half the size; their own if not given.

        Raises:
            UserError: If the folder is a run folder, whose weights would be overwritten.
        """
        target = RunFolder(Path(folder))
        if target.config.exists():
            raise UserError(f"{folder}: a run folder, whose weights would be overwritten. Choose another folder.")
        self.autoencoder.save(target.autoencoder_weights, dtype, **self.autoencoder.made_from)
        digest = files.digest(target.autoencoder_weights)
        for name, prior in zip(self.levels, self.priors, strict=True):
            made_from = prior.made_from | {"autoencoder": digest}
            save_prior(target.prior_weights(name), prior, prior.config, dtype, **made_from)
        params = (self.sampling if sampling is None else sampling).params
        index = PipelineConfig(levels=self.levels, class_names=self.class_names, sampling=params)
        files.write_json(target.pipeline_config, index.to_dict())
        write_model_card(target, self, params)

    def push_to_hub(
        self,
        repo_id: str,
        sampling: SamplingParams | None = None,
        dtype: torch.dtype | None = None,
        **options: Unpack[PushOptions],
    ) -> str:
        """Upload what `save_pretrained` writes to a repository on the Hugging Face hub; see `vqvae2.hub.push`.

        >>> pipeline = VQVAE2Pipeline.from_pretrained("runs/mine")  # doctest: +SKIP
        >>> pipeline.push_to_hub("someone/mine", private=True)  # doctest: +SKIP
        """
        return push(lambda folder: self.save_pretrained(folder, sampling, dtype), repo_id, **options)

    @property
    def num_codes(self) -> int:
        """Number of codes per image, over all levels."""
        return sum(level.num_codes for level in self.autoencoder.map_specs)

    @property
    def levels(self) -> tuple[str, ...]:
        """Names of the levels, finest first."""
        return level_names(len(self.priors))

    @property
    def device(self) -> torch.device:
        """Device of the networks."""
        return next(self.autoencoder.parameters()).device

    def to(self, device: torch.device | str) -> Self:
        """Move the networks to a device, and return the pipeline."""
        for network in (self.autoencoder, *self.priors):
            network.to(device)
        return self

    def __call__(
        self,
        num_images: int = 1,
        seed: int = 0,
        class_labels: Labels | None = None,
        temperature: float | Mapping[str, float] | None = None,
        top_k: int | Mapping[str, int] | None = None,
        top_p: float | Mapping[str, float] | None = None,
        guidance_scale: float | Mapping[str, float] | None = None,
        dtype: Literal["fp32", "bf16"] | None = None,
    ) -> Float[Tensor, "b c h w"]:
        """Sample images in [-1, 1]. Image k depends on the seed and k, and by rounding on the batch size.

        Args:
            class_labels: Names or numbers of the classes to cycle through, or one of them; all classes if not given.
            temperature, top_k, top_p, guidance_scale: One value, or values per level: `{"top": 1.0, "bottom": 0.9}`;
                those of `sampling` if not given, also for a level that is not named.
            dtype: Data type of the priors; that of `sampling` if not given. The autoencoder decodes in float32.

        Raises:
            UserError: If an argument is out of range or does not fit the model.
        """
        if num_images < 1:
            raise UserError(f"num_images: must be at least 1, not {num_images}")
        params = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "guidance_scale": guidance_scale}
        given = {name: value for name, value in (params | {"dtype": dtype}).items() if value is not None}
        settings = {
            "count": num_images,
            "seed": seed,
            "classes": as_labels(class_labels),
            "batch_size": self.batch_size,
        }
        config = SamplingConfig.from_dict(dict(self.sampling.params) | given | settings, "sampling")
        config = config.complete(self.sampling, self.levels)
        return torch.cat(list(self.sample_batches(range(num_images), config)))

    def sample_batches(
        self,
        numbers: Sequence[int],
        config: SamplingConfig,
        progress: Callable[[int], object] = lambda positions: None,
        batch_size: int | None = None,
    ) -> Iterator[Float[Tensor, "b c h w"]]:
        """Yield the images with the given numbers, in [-1, 1].

        Image k is always sampled in batch ⌊k / size⌋, in the same place. Rounding depends on the size of a batch, and
        one code that changes by rounding changes all codes after it. Other images of a batch are dropped.

        Args:
            numbers: Numbers of the images in ascending order, a part of a job of `config.count` images.
            progress: Called with the number of codes completed since the last call, without those of dropped images.
            batch_size: Size of all batches; that of `job_batch_size` if not given.

        Raises:
            UserError: If `config` does not fit the model.
        """
        size = batch_size or self.job_batch_size(config)
        for index, group in itertools.groupby(numbers, lambda number: number // size):
            batch, wanted = range(index * size, (index + 1) * size), [number % size for number in group]
            labels, shown = self.labels_of(batch, config.classes), scale_progress(progress, len(wanted), size)
            yield self.decode(self.sample_codes(batch, labels, config.seed, config.params, progress=shown))[wanted]

    def sample_codes(
        self,
        images: Sequence[int | tuple[int, int]],
        labels: Int[Tensor, " b"] | None,
        seed: int,
        params: SamplingParams = _DEFAULTS,
        partial: Sequence[PartialCodes | None] = (),
        progress: Callable[[int], object] = lambda positions: None,
    ) -> CodeMaps:
        """Sample the codes of images, coarse to fine, and return them finest level first.

        Args:
            images: Numbers of the images, or pairs (image, variant); the noise depends on them.
            partial: Codes to keep on each level, finest first.
            progress: Called with the number of codes completed since the last call.

        Raises:
            UserError: If `params` do not fit the model.
        """
        self.check_params(params)
        partial = partial or [None] * len(self.priors)
        codes: CodeMaps = ()
        for index, name in reversed(tuple(enumerate(self.levels))):
            noise = Noise(seed, images, index)
            level_params = params.for_level(name)
            sampled = sample_level(self.priors[index], noise, level_params, codes, labels, partial[index], progress)
            codes = (sampled, *codes)
        return codes

    def decode(self, codes: CodeMaps) -> Float[Tensor, "b c h w"]:
        """Decode codes to images in [-1, 1].

        The decoder always sees `_DECODE_BATCH` images, padded if necessary. Its rounding depends on the batch size, and
        an image must not depend on how many others are sampled with it.
        """
        count = len(codes[0])
        padded = [F.pad(level, (0, 0, 0, 0, 0, -count % _DECODE_BATCH)) for level in codes]
        parts = zip(*(level.split(_DECODE_BATCH) for level in padded), strict=True)
        return torch.cat([self.autoencoder.decode(part) for part in parts])[:count]

    def job_batch_size(self, config: SamplingConfig) -> int:
        """Return the batch size of a job: at most its count, and what fits into memory."""
        return self.batch_that_fits(min(config.batch_size, config.count), config.params, config.memory)

    def batch_that_fits(self, wanted: int, params: SamplingParams, memory: float | None = None) -> int:
        """Return `wanted`, or the largest batch size that fits into `memory` GiB, at least 1."""
        sizes = [
            batch_that_fits(prior, wanted, params.for_level(name).guidance_scale != 1, memory)
            for name, prior in zip(self.levels, self.priors, strict=True)
        ]
        return max(1, min(sizes))

    def check_params(self, params: SamplingParams) -> None:
        """Raise UserError if parameters name an unknown level, or ask for guidance that a prior does not support."""
        params.check_levels(self.levels)
        for name, prior in zip(self.levels, self.priors, strict=True):
            check_guidance(prior, params.for_level(name).guidance_scale, name)

    def labels_of(self, images: Sequence[int], class_labels: Labels | None) -> Int[Tensor, " b"] | None:
        """Return the label of each image number; see `sampling.labels.labels_of`."""
        return labels_of(images, class_labels, self.class_names, self.device)


def scale_progress(progress: Callable[[int], object], part: int, whole: int) -> Callable[[int], object]:
    """Return `progress` for batches of `whole` images of which `part` are counted."""
    return lambda positions: progress(positions * part // whole)


def _check_prior(folder: RunFolder, name: str, index: int, prior: Prior, autoencoder: Autoencoder) -> None:
    """Raise UserError if a prior is not the one of this level of this autoencoder."""
    path, maps = folder.prior_weights(name), autoencoder.map_specs
    made_from = prior.made_from.get("autoencoder")
    if made_from != autoencoder.digest:
        raise UserError(
            f"{path}: trained on codes of autoencoder {str(made_from)[:12]}…, but {folder.autoencoder_weights} is "
            f"{str(autoencoder.digest)[:12]}…. Train this prior again."
        )
    if (prior.spec.level, prior.spec.coarser) != (maps[index], maps[index + 1 :]):
        raise UserError(f"{path}: not the prior of level {name}; it was trained for other code maps. Train it again.")


def _default_params(folder: RunFolder) -> SamplingParams:
    """Return the default sampling parameters of a run or of a saved pipeline."""
    if folder.config.is_file():
        return RunConfig.from_resolved_yaml(folder.config).sampling.params
    return PipelineConfig.read(folder.path).sampling if folder.pipeline_config.is_file() else _DEFAULTS


def _class_names(folder: RunFolder, autoencoder: Autoencoder, priors: Sequence[Prior]) -> tuple[str, ...]:
    """Return the class names of a pipeline, from its index or, in a run folder, from its code store.

    Raises:
        UserError: If the code store is not the one that the priors were trained on.
    """
    if folder.pipeline_config.is_file():
        names, source = PipelineConfig.read(folder.path).class_names, folder.pipeline_config
    else:
        source = folder.code_store("train")
        header = CodeStore.open(source).header
        header.check_autoencoder(autoencoder.digest, source)
        names = header.classes
        for level, prior in zip(level_names(len(priors)), priors, strict=True):
            if prior.made_from.get("codes") != header.digest:
                raise UserError(
                    f"{folder.prior_weights(level)}: not trained on the codes in {source}. Restore that code store, or "
                    "train this prior again."
                )
    for level, prior in zip(level_names(len(priors)), priors, strict=True):
        if prior.spec.num_classes != len(names):
            raise UserError(
                f"{folder.prior_weights(level)}: has {prior.spec.num_classes} classes, but {source} has {len(names)}."
            )
    return names
