"""Pictures of codes: code maps in color, where a code occurs, and patches of images that use it."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from jaxtyping import Bool, UInt8
from torch import Tensor

from sampling.app.pictures import encode
from sampling.pipeline import VQVAE2Pipeline
from vqvae2.code_maps import CodeMaps, MapSpec
from vqvae2.models import Autoencoder
from vqvae2.quantizers import Quantizer

_PATCH_CELLS = 3  # height and width of a patch, in cells of the code map; the cell of the code is at the center
_DIMMED = 0.375  # brightness of the cells that do not have the code


class CodedImages(NamedTuple):
    """Images with their codes."""

    images: UInt8[Tensor, "b c h w"]
    codes: CodeMaps  # finest level first


class CodeUse(NamedTuple):
    """Where a set of images uses one code."""

    occurrences: int
    images: int  # images that use it
    patches: UInt8[Tensor, "n c p q"]


def encode_images(pipeline: VQVAE2Pipeline, images: UInt8[Tensor, "b c h w"]) -> CodedImages:
    """Return images with their codes, on the CPU."""
    return CodedImages(images, tuple(level.cpu() for level in encode(pipeline, images)))


@torch.no_grad()
def code_colors(autoencoder: Autoencoder, level: int) -> UInt8[Tensor, "k 3"]:
    """Return a color for each code of a level. Codes with similar features have similar colors.

    The channels are the three principal components of the codebook, each replaced by its rank.
    """
    spec = autoencoder.map_specs[level]
    quantizer = autoencoder.quantizers[level]
    assert isinstance(quantizer, Quantizer)
    codes = torch.arange(spec.codebook_size, device=next(autoencoder.parameters()).device)
    features = quantizer.lookup(codes[None])[0].T.float().cpu()  # (K, D)
    centered = features - features.mean(0)
    components = torch.linalg.svd(centered, full_matrices=False)[2][:3]
    ranks = (centered @ components.T).argsort(0).argsort(0)  # (K, up to 3)
    ranks = F.pad(ranks, (0, 3 - ranks.shape[1]), value=spec.codebook_size // 2)
    return (ranks * 255 // max(1, spec.codebook_size - 1)).to(torch.uint8)


def color_map(codes: Tensor, colors: UInt8[Tensor, "k 3"]) -> UInt8[Tensor, "3 h w"]:
    """Return the picture of a code map (H, W), one pixel per code."""
    return colors[codes].movedim(-1, 0)


def dim_others(image: UInt8[Tensor, "c h w"], cells: Bool[Tensor, "rows columns"]) -> UInt8[Tensor, "c h w"]:
    """Darken an image outside the cells of a code map that are true."""
    height, width = image.shape[1] // cells.shape[0], image.shape[2] // cells.shape[1]
    kept = cells.repeat_interleave(height, 0).repeat_interleave(width, 1)
    dimmed = (image[:3] * _DIMMED).to(torch.uint8)
    return torch.cat([torch.where(kept, image[:3], dimmed), image[3:]])


def find_code(coded: CodedImages, spec: MapSpec, level: int, code: int, max_patches: int) -> CodeUse:
    """Return how often images use a code of a level, and patches around its first occurrences.

    A patch is three cells high and wide; beyond the border of the image, its edge is repeated.
    """
    found = (coded.codes[level] == code).nonzero()  # (N, 3): image, row, column
    height, width = coded.images.shape[2] // spec.height, coded.images.shape[3] // spec.width
    margin = _PATCH_CELLS // 2
    padding = [margin * width, margin * width, margin * height, margin * height]
    patches = []
    for image, row, column in found[:max_patches].tolist():
        padded = F.pad(coded.images[image, None].float(), padding, mode="replicate")[0].to(torch.uint8)
        top, left = row * height, column * width
        patches.append(padded[:, top : top + _PATCH_CELLS * height, left : left + _PATCH_CELLS * width])
    shape = (0, coded.images.shape[1], _PATCH_CELLS * height, _PATCH_CELLS * width)
    return CodeUse(
        occurrences=len(found),
        images=len(found[:, 0].unique()),
        patches=torch.stack(patches) if patches else torch.zeros(shape, dtype=torch.uint8),
    )
