"""Classifier-free guidance."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vqvae2.code_maps import CodeMaps
from vqvae2.priors import IncrementalDecoder, Prior
from vqvae2.priors.base import Column


class ClassifierFreeGuidance(IncrementalDecoder):
    """Classifier-free guidance (Ho and Salimans 2022, arXiv 2207.12598), computed in one batch of twice the size.

    The logits are u + scale · (c − u), with c conditioned on the labels and u unconditional: scale 0 ignores the
    labels, 1 is the prior itself, above 1 exaggerates the effect of the label.
    """

    def __init__(self, prior: Prior, coarser: CodeMaps, labels: Int[Tensor, " b"], scale: float) -> None:
        unconditional = torch.full_like(labels, prior.spec.num_classes)
        doubled = tuple(codes.repeat(2, 1, 1) for codes in coarser)
        self.decoder = prior.incremental_decoder(2 * len(labels), doubled, torch.cat([labels, unconditional]))
        self.scale = scale

    def begin_row(self, row: int) -> None:
        self.decoder.begin_row(row)

    def logits(self, column: Column) -> Float[Tensor, "b k"]:
        conditional, unconditional = self.decoder.logits(column).float().chunk(2)
        return unconditional + self.scale * (conditional - unconditional)

    def set_codes(self, column: Column, codes: Int[Tensor, " b"]) -> None:
        self.decoder.set_codes(column, codes.repeat(2))
