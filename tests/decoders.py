"""Logits of whole maps and recordings by the incremental and wavefront decoders, to compare with the full pass."""

import torch
from jaxtyping import Float, Int
from torch import Tensor

from vqvae2.audio.mu_law import SILENCE
from vqvae2.code_maps import CodeMaps
from vqvae2.models.incremental_wavenet import IncrementalWaveNet
from vqvae2.models.wavenet import WaveNet
from vqvae2.priors import Prior


@torch.inference_mode()
def incremental_logits(
    prior: Prior,
    codes: Int[Tensor, "b h w"],
    coarser: CodeMaps = (),
    labels: Int[Tensor, " b"] | None = None,
    as_tensors: bool = False,
) -> Float[Tensor, "b k h w"]:
    """Compute the logits of `Prior.forward` with the incremental decoder.

    `as_tensors` passes columns as tensors, as on a GPU.
    """
    batch, height, width = codes.shape
    decoder = prior.incremental_decoder(batch, coarser, labels)
    rows = []
    for row in range(height):
        decoder.begin_row(row)
        columns = []
        for index in range(width):
            column = torch.tensor([index]) if as_tensors else index
            columns.append(decoder.logits(column).clone())
            decoder.set_codes(column, codes[:, row, index])
        rows.append(torch.stack(columns, -1))
    return torch.stack(rows, 2)


@torch.inference_mode()
def wavefront_logits(
    prior: Prior,
    codes: Int[Tensor, "b h w"],
    coarser: CodeMaps = (),
    labels: Int[Tensor, " b"] | None = None,
) -> Float[Tensor, "b k h w"] | None:
    """Compute the logits of `Prior.forward` with the wavefront decoder."""
    batch, height, width = codes.shape
    decoder = prior.wavefront_decoder(batch, height, coarser, labels)
    if decoder is None:
        return None
    result = torch.empty(batch, height, width, prior.spec.level.codebook_size)
    for wave in decoder.shape.waves():
        rows, columns = decoder.shape.index_tensors(wave, codes.device)
        result[:, rows, columns] = decoder.logits(wave).transpose(0, 1)
        decoder.set_codes(wave, codes[:, rows, columns].T)
    return result.movedim(-1, 1)


@torch.inference_mode()
def incremental_wavenet_logits(
    network: WaveNet, values: Int[Tensor, "b t"], condition: Float[Tensor, "b f c"] | None = None
) -> Float[Tensor, "b t 256"]:
    """Compute the logits of `WaveNet.forward` one sample at a time."""
    batch, length = values.shape
    decoder = IncrementalWaveNet(network, batch)
    previous, rows = torch.full((batch,), SILENCE), []
    for time in range(length):
        if condition is not None and time % (length // condition.shape[1]) == 0:
            decoder.begin_frame(condition[:, time * condition.shape[1] // length])
        rows.append(decoder.logits(previous))
        previous = values[:, time]
    return torch.stack(rows, 1)
