"""The decoder that samples a level, and classifier-free guidance."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vqvae2.code_maps import CodeMaps
from vqvae2.errors import UserError
from vqvae2.priors import IncrementalDecoder, Prior
from vqvae2.priors.base import Column, Wave, WavefrontDecoder


def check_guidance(prior: Prior, guidance_scale: float, level: str) -> None:
    """Raise UserError if the prior of a level does not support a guidance scale."""
    if guidance_scale == 1:
        return
    if not prior.spec.num_classes:
        raise UserError(f"guidance_scale {guidance_scale:g}: the prior of level {level} has no class labels")
    if not prior.made_from.get("label_dropout", 0):
        raise UserError(
            f"guidance_scale {guidance_scale:g}: the prior of level {level} was trained without label dropout, so it "
            "has no unconditional distribution. Train it with label_dropout, or use guidance_scale 1."
        )


def make_decoder(
    prior: Prior,
    batch: int,
    height: int,
    coarser: CodeMaps,
    labels: Int[Tensor, " b"] | None,
    guidance_scale: float = 1.0,
) -> IncrementalDecoder | WavefrontDecoder:
    """Return the fastest decoder of the first `height` rows of `batch` maps, with classifier-free guidance if needed.

    Raises:
        ValueError: If guidance is asked for without labels.
    """
    guided = guidance_scale != 1
    if guided:
        if labels is None:
            raise ValueError(f"guidance_scale {guidance_scale:g} needs labels")
        coarser = tuple(codes.repeat(2, 1, 1) for codes in coarser)
        labels = torch.cat([labels, torch.full_like(labels, prior.spec.num_classes)])
        batch *= 2
    wavefront = prior.wavefront_decoder(batch, height, coarser, labels)
    if wavefront is not None:
        return WavefrontGuidance(wavefront, guidance_scale) if guided else wavefront
    decoder = prior.incremental_decoder(batch, coarser, labels)
    return ClassifierFreeGuidance(decoder, guidance_scale) if guided else decoder


def guide(logits: Float[Tensor, "*r b2 k"], scale: float) -> Float[Tensor, "*r b k"]:
    """Return u + scale · (c − u) of conditional logits c, the first half of a batch, and unconditional ones u."""
    conditional, unconditional = logits.float().chunk(2, -2)
    return unconditional + scale * (conditional - unconditional)


class ClassifierFreeGuidance(IncrementalDecoder):
    """Classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598), computed in one batch of twice the size.

    The logits are u + scale · (c − u), with c conditioned on the labels and u unconditional: scale 0 ignores the
    labels, 1 is the prior itself, above 1 exaggerates the effect of the label.
    """

    def __init__(self, decoder: IncrementalDecoder, scale: float) -> None:
        self.decoder, self.scale = decoder, scale

    def begin_row(self, row: int) -> None:
        self.decoder.begin_row(row)

    def logits(self, column: Column) -> Float[Tensor, "b k"]:
        return guide(self.decoder.logits(column), self.scale)

    def set_codes(self, column: Column, codes: Int[Tensor, " b"]) -> None:
        self.decoder.set_codes(column, codes.repeat(2))


class WavefrontGuidance(WavefrontDecoder):
    """Classifier-free guidance of a wavefront decoder, as `ClassifierFreeGuidance`."""

    def __init__(self, decoder: WavefrontDecoder, scale: float) -> None:
        self.decoder, self.scale, self.shape = decoder, scale, decoder.shape

    def logits(self, wave: Wave) -> Float[Tensor, "r b k"]:
        return guide(self.decoder.logits(wave), self.scale)

    def set_codes(self, wave: Wave, codes: Int[Tensor, "r b"]) -> None:
        self.decoder.set_codes(wave, codes.repeat(1, 2))
