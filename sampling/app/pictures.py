"""The pictures of the tabs: samples, inpaintings, variations, and reconstructions from the coarser levels."""

from collections.abc import Callable

import torch
from jaxtyping import Bool, UInt8
from pydantic import Field
from torch import Tensor

from sampling.editing import sample_variants
from sampling.masks import keep_coarsest, keep_masked
from sampling.params import ClassLabels, SamplingConfig, SamplingParams
from sampling.pipeline import VQVAE2Pipeline
from sampling.reconstruct import progressive_levels
from sampling.sample_level import PartialCodes
from vqvae2.code_maps import CodeMaps
from vqvae2.data.images import to_float, to_uint8

MAX_IMAGES = 64  # samples of one request
MAX_VARIANTS = 16
Progress = Callable[[int], object]  # called with the number of codes completed since the last call


class EditSettings(SamplingParams):
    """Settings of inpaintings and variations of one image."""

    variants: int = Field(default=4, ge=1, le=MAX_VARIANTS)
    seed: int = Field(default=0, ge=0, le=2**63 - 1)
    classes: ClassLabels = ()  # the label of the image, for a class-conditional model


def sample(pipeline: VQVAE2Pipeline, config: SamplingConfig, progress: Progress) -> UInt8[Tensor, "b c h w"]:
    """Sample images, the same as `vqvae2 sample` with these settings.

    Raises:
        UserError: If the settings do not fit the model.
    """
    batches = pipeline.sample_batches(range(config.count), config, progress)
    return torch.cat([to_uint8(batch).cpu() for batch in batches])


def inpaint(
    pipeline: VQVAE2Pipeline,
    image: UInt8[Tensor, "c h w"],
    painted: Bool[Tensor, "h w"],
    settings: EditSettings,
    progress: Progress,
) -> UInt8[Tensor, "v c h w"]:
    """Redraw the painted part of an image, several times.

    Raises:
        UserError: If the settings do not fit the model.
    """
    partial = keep_masked(encode(pipeline, image[None]), ~painted, pipeline.autoencoder.map_specs)
    return _sample_variants(pipeline, partial, settings, progress)


def vary(
    pipeline: VQVAE2Pipeline,
    image: UInt8[Tensor, "c h w"],
    keep_levels: int,
    settings: EditSettings,
    progress: Progress,
) -> UInt8[Tensor, "v c h w"]:
    """Keep the `keep_levels` coarsest levels of an image, and sample the finer levels several times.

    Raises:
        UserError: If the model has too few levels, or the settings do not fit it.
    """
    partial = keep_coarsest(encode(pipeline, image[None]), keep_levels)
    return _sample_variants(pipeline, partial, settings, progress)


def encode(pipeline: VQVAE2Pipeline, images: UInt8[Tensor, "b c h w"]) -> CodeMaps:
    """Return the codes of images, finest level first."""
    return pipeline.autoencoder.encode(to_float(images.to(pipeline.device)))


def reconstruct(pipeline: VQVAE2Pipeline, image: UInt8[Tensor, "c h w"]) -> UInt8[Tensor, "l c h w"]:
    """Return reconstructions from the coarsest level, from the two coarsest levels, …, from all levels."""
    codes, names = encode(pipeline, image[None]), progressive_levels(pipeline.autoencoder)
    return torch.cat([to_uint8(pipeline.autoencoder.decode(codes, levels)).cpu() for levels in names])


def _sample_variants(
    pipeline: VQVAE2Pipeline, partial: tuple[PartialCodes, ...], settings: EditSettings, progress: Progress
) -> UInt8[Tensor, "v c h w"]:
    pipeline.check_params(settings.params)
    codes = sample_variants(
        pipeline, partial, settings.classes, settings.variants, settings.seed, settings.params, progress
    )
    return to_uint8(pipeline.decode(codes)).cpu()
