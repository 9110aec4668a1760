"""Sample the codes of one level, with reproducible noise per image."""

import copy
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.utils import parametrize

from sampling.guidance import make_decoder
from sampling.params import CodeSamplingParams, LevelSamplingParams
from sampling.row_sampler import RowSampler
from sampling.wavefront_sampler import sample_wavefront
from vqvae2.code_maps import CodeMaps
from vqvae2.priors import Prior
from vqvae2.priors.base import WavefrontDecoder


class Noise:
    """Uniform variates with one random stream per image, a function of (seed, image, level) only.

    The variates are drawn on the CPU, so that a GPU samples the same images.

    Args:
        images: Numbers of the images, or tuples of numbers, such as (image, variant).
    """

    def __init__(self, seed: int, images: Sequence[int | tuple[int, ...]], level: int) -> None:
        keys = [image if isinstance(image, tuple) else (image,) for image in images]
        self.generators = [
            torch.Generator().manual_seed(
                int(np.random.SeedSequence((seed, *key, level)).generate_state(1, np.uint64)[0] >> 1)
            )
            for key in keys
        ]

    def draw(self, *shape: int) -> Float[Tensor, "b ..."]:
        """Return the next variates in [0, 1) of each image, of shape `shape`."""
        return torch.stack([torch.rand(shape, generator=generator) for generator in self.generators])


class PartialCodes(NamedTuple):
    """Codes of one level, some of which are kept while the others are sampled."""

    codes: Int[Tensor, "b h w"]
    keep: Bool[Tensor, "b h w"]


@torch.inference_mode()
def sample_level(
    prior: Prior,
    noise: Noise,
    params: CodeSamplingParams | None = None,
    coarser: CodeMaps = (),
    labels: Int[Tensor, " b"] | None = None,
    partial: PartialCodes | None = None,
    progress: Callable[[int], object] = lambda positions: None,
) -> Int[Tensor, "b h w"]:
    """Sample the code maps of one level for a batch of images, computing each position once.

    Args:
        noise: Noise of the images; its length is the batch size.
        coarser: Code maps of the coarser levels, finest first, on the prior's device.
        labels: Class labels. Required if `params.guidance_scale` is not 1.
        partial: Codes to keep. In raster order, rows after the last sampled code are not computed.
        progress: Called with the number of positions completed since the last call.
    """
    params = params or CodeSamplingParams()
    guidance_scale = params.guidance_scale if isinstance(params, LevelSamplingParams) else 1.0
    height, width = prior.spec.level.shape
    batch = len(noise.generators)
    device = next(prior.parameters()).device
    codes = torch.zeros(batch, height, width, dtype=torch.int64, device=device)
    rows = height
    if partial is not None:
        codes.copy_(partial.codes)
        sampled = (~partial.keep).any(2).any(0).nonzero()
        if prior.is_raster_order or not len(sampled):
            rows = int(sampled.max()) + 1 if len(sampled) else 0
    if rows == 0:
        progress(codes.numel())
        return codes
    if params.dtype == "bf16":
        prior = _to_bfloat16(prior)
    uniform = noise.draw(height, width).to(device)
    decoder = make_decoder(prior, batch, rows, coarser, labels, guidance_scale)
    if isinstance(decoder, WavefrontDecoder):
        sample_wavefront(decoder, params, uniform, codes, None if partial is None else partial.keep, progress)
    else:
        sampler = RowSampler(decoder, params, batch, prior.spec.level, device)
        for row in range(rows):
            keep = None if partial is None else partial.keep[:, row]
            codes[:, row] = sampler.sample(row, uniform[:, row], codes[:, row], keep)
            progress(batch * width)
    if rows < height:
        progress(batch * width * (height - rows))
    return codes


def _to_bfloat16(prior: Prior) -> Prior:
    """Return a copy in bfloat16, with weight norm folded into the weights beforehand."""
    # The copy's parameters share the memory of the prior's until they are converted.
    shared: dict[int, Any] = {id(each): nn.Parameter(each.detach(), False) for each in prior.parameters()}
    copied = copy.deepcopy(prior, shared)
    for module in copied.modules():
        if parametrize.is_parametrized(module, "weight"):
            cls: Any = type(module)  # `remove_parametrizations` changes this class, which the prior's module has, too
            cls = type(cls.__name__, cls.__bases__, dict(vars(cls)))
            module.__class__ = cls
            parametrize.remove_parametrizations(module, "weight")
    return copied.eval().requires_grad_(False).bfloat16()
