"""Conditioning features of a prior, from the codes of the coarser levels and the label."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from vqvae2.code_maps import CodeMaps
from vqvae2.priors.base import PriorSpec
from vqvae2.priors.layers import upsample_to


class Conditioner(nn.Module):
    """Network from coarser code maps and labels to features (B, channels, h, w) at the finest coarser level's size.

    From the coarsest level on, the upsampled features are added to each level's code embeddings. A residual stack and
    the label embedding, added at all positions, follow. Without coarser levels, the label embedding is a 1 × 1 map.
    """

    def __init__(self, spec: PriorSpec, channels: int, kernel_size: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.spec = spec
        self.embeddings = nn.ModuleList(nn.Embedding(level.codebook_size, channels) for level in spec.coarser)
        # The last entry is the null label, for label dropout and classifier-free guidance.
        self.labels = nn.Embedding(spec.num_classes + 1, channels) if spec.num_classes else None
        stack = [weight_norm(nn.Conv2d(channels, channels, kernel_size, padding=kernel_size // 2))]
        stack += [_GatedResidualBlock(channels, kernel_size, dropout) for _ in range(layers)]
        self.stack = nn.Sequential(*stack) if spec.coarser else nn.Identity()

    def forward(self, batch: int, coarser: CodeMaps, labels: Int[Tensor, " b"] | None) -> Float[Tensor, "b c h w"]:
        features: Tensor | None = None
        for embedding, codes in zip(reversed(self.embeddings), reversed(coarser), strict=True):
            embedded = embedding(codes).movedim(-1, 1)
            features = embedded if features is None else embedded + upsample_to(features, *codes.shape[1:])
        features = None if features is None else self.stack(features)
        if self.labels is not None:
            if labels is None:
                labels = torch.full((batch,), self.spec.num_classes, device=self.labels.weight.device)
            label = self.labels(labels)[:, :, None, None]
            features = label if features is None else features + label
        assert features is not None, "a prior without coarser levels and labels has no conditioner"
        return features

    @classmethod
    def if_needed(
        cls, spec: PriorSpec, channels: int, kernel_size: int, layers: int, dropout: float
    ) -> "Conditioner | None":
        """Return a conditioner, or None if the spec has neither coarser levels nor labels."""
        return cls(spec, channels, kernel_size, layers, dropout) if spec.coarser or spec.num_classes else None


class ConditionRows:
    """Conditioning features of each row of a finer map, for sampling."""

    def __init__(self, condition: Float[Tensor, "b c h w"] | None, height: int) -> None:
        self.condition = None if condition is None else condition.permute(2, 3, 0, 1).contiguous()  # (h, w, B, C)
        self.height = height  # of the finer map

    def __getitem__(self, row: int) -> Float[Tensor, "w b c"] | None:
        """Return the features above row `row` of the finer map, None without conditioning."""
        return None if self.condition is None else self.condition[row * len(self.condition) // self.height]


class _GatedResidualBlock(nn.Module):
    """Non-causal gated residual block."""

    def __init__(self, channels: int, kernel_size: int, dropout: float) -> None:
        super().__init__()
        self.first = weight_norm(nn.Conv2d(channels, channels, kernel_size, padding=kernel_size // 2))
        self.second = weight_norm(nn.Conv2d(channels, 2 * channels, kernel_size, padding=kernel_size // 2))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.glu(self.second(self.dropout(F.elu(self.first(F.elu(x))))), 1)
