"""What a prior is conditioned on, made into one feature map: the coarser levels' codes and the label."""

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from vqvae2.code_maps import CodeMaps
from vqvae2.priors.base import PriorSpec
from vqvae2.priors.layers import upsample_to


class Conditioner(nn.Module):
    """Coarser code maps and labels to features (B, channels, h, w) at the size of the finest coarser level.

    From the coarsest level down, each map's embeddings join the features repeated from above; a residual stack follows.
    Labels are added at every position; without coarser maps they alone make a 1 × 1 map. It runs once a batch.
    """

    def __init__(self, spec: PriorSpec, channels: int, kernel: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.spec = spec
        self.embeddings = nn.ModuleList(nn.Embedding(level.codebook_size, channels) for level in spec.coarser)
        # The last entry stands for "no label": what guidance and label dropout ask for.
        self.labels = nn.Embedding(spec.num_classes + 1, channels) if spec.num_classes else None
        stack = [weight_norm(nn.Conv2d(channels, channels, kernel, padding=kernel // 2))]
        stack += [_Residual(channels, kernel, dropout) for _ in range(layers)]
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
        cls, spec: PriorSpec, channels: int, kernel: int, layers: int, dropout: float
    ) -> "Conditioner | None":
        """A conditioner where the spec has anything to condition on."""
        return cls(spec, channels, kernel, layers, dropout) if spec.coarser or spec.num_classes else None


class _Residual(nn.Module):
    """The gated residual block without causality: it sees whole neighbourhoods."""

    def __init__(self, channels: int, kernel: int, dropout: float) -> None:
        super().__init__()
        self.first = weight_norm(nn.Conv2d(channels, channels, kernel, padding=kernel // 2))
        self.second = weight_norm(nn.Conv2d(channels, 2 * channels, kernel, padding=kernel // 2))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.glu(self.second(self.dropout(F.elu(self.first(F.elu(x))))), 1)
