"""Edit images by sampling: inpaint what lies outside a mask, or vary the fine levels."""

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from sampling.labels import Labels, require_labels
from sampling.masks import keep_coarsest, keep_masked
from sampling.params import SamplingParams
from sampling.pipeline import VQVAE2Pipeline, scale_progress
from sampling.sample_level import PartialCodes
from vqvae2.code_maps import CodeMaps
from vqvae2.errors import UserError

_DEFAULTS = SamplingParams()


def inpaint(
    pipeline: VQVAE2Pipeline,
    images: Float[Tensor, "b c h w"],
    keep: Bool[Tensor, "..."],
    class_labels: Labels | None = None,
    variants: int = 4,
    seed: int = 0,
    params: SamplingParams = _DEFAULTS,
) -> Float[Tensor, "b v c h w"]:
    """Keep the part of images that a mask covers, and sample the rest several times.

    On each level, a code is kept if all of its pixels are. The others are sampled in raster order: a code depends
    on the kept codes before it and, through the coarser levels, on those after it. Kept codes near the border of
    the mask were computed from pixels on both sides. Variant v of image k depends on the image, the seed, k and v, and
    by rounding on the batch size.

    Args:
        images: Images in [-1, 1].
        keep: Mask (H, W) or (B, H, W), true for pixels to keep.

    Raises:
        UserError: If the mask has another size, or labels are missing.
    """
    if tuple(keep.shape) not in (pipeline.autoencoder.size, (len(images), *pipeline.autoencoder.size)):
        height, width = pipeline.autoencoder.size
        raise UserError(f"mask: its size is {tuple(keep.shape)}, but the model's images are {height} × {width}")
    partial = keep_masked(pipeline.autoencoder.encode(images), keep, pipeline.autoencoder.map_specs)
    codes = sample_variants(pipeline, partial, class_labels, variants, seed, params)
    return pipeline.decode(codes).unflatten(0, (len(images), variants))


def variations(
    pipeline: VQVAE2Pipeline,
    images: Float[Tensor, "b c h w"],
    keep_levels: int = 1,
    class_labels: Labels | None = None,
    variants: int = 4,
    seed: int = 0,
    params: SamplingParams = _DEFAULTS,
) -> Float[Tensor, "b v c h w"]:
    """Keep the `keep_levels` coarsest levels of images, and sample the finer levels several times.

    The other arguments and the result are those of `inpaint`.
    """
    partial = keep_coarsest(pipeline.autoencoder.encode(images), keep_levels)
    codes = sample_variants(pipeline, partial, class_labels, variants, seed, params)
    return pipeline.decode(codes).unflatten(0, (len(images), variants))


def sample_variants(
    pipeline: VQVAE2Pipeline,
    partial: Sequence[PartialCodes],
    class_labels: Labels | None,
    variants: int,
    seed: int,
    params: SamplingParams,
    progress: Callable[[int], object] = lambda positions: None,
) -> CodeMaps:
    """Sample several variants of partially kept codes.

    Returns:
        Codes (B · variants, H_l, W_l), finest level first: all variants of the first image, then of the second, …
    """
    count = len(partial[0].codes)
    require_labels(class_labels, pipeline.class_names)
    labels = pipeline.labels_of(range(count), class_labels)
    pairs = [(image, variant) for image in range(count) for variant in range(variants)]
    batches: list[CodeMaps] = []
    total, size = len(pairs), pipeline.batch_that_fits(min(pipeline.batch_size, len(pairs)), params)
    pairs += pairs[-1:] * (-total % size)  # rounding depends on the size of a batch
    for start in range(0, total, size):
        batch = pairs[start : start + size]
        rows = torch.tensor([image for image, _ in batch], device=pipeline.device)
        batch_labels = None if labels is None else labels[rows]
        kept = [PartialCodes(codes[rows], keep[rows]) for codes, keep in partial]
        shown = scale_progress(progress, min(size, total - start), size)
        batches.append(pipeline.sample_codes(batch, batch_labels, seed, params, kept, shown))
    return tuple(torch.cat(level)[:total] for level in zip(*batches, strict=True))
