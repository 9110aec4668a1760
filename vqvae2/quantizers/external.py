"""Any quantizer of the package vector-quantize-pytorch, by its class name and arguments."""

import math
from typing import Any, Literal

import torch
from jaxtyping import Float, Int
from pydantic import Field
from torch import Tensor

from vqvae2.config import Config
from vqvae2.errors import UserError
from vqvae2.quantizers.base import MAX_CODES, Quantizer, QuantizerOutput

_LOOKUPS = ("get_output_from_indices", "indices_to_codes")  # methods of the package's classes
_TOLERANCE = 1e-4
_ERRORS = (StopIteration, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)


class ExternalConfig(Config):
    """Settings of a quantizer of vector-quantize-pytorch.

    >>> config = ExternalConfig(name="LFQ", arguments={"codebook_size": 512}, code_dim=64)
    >>> config.build().codebook_size
    512
    """

    kind: Literal["external"] = "external"
    name: str = Field(description="class in vector_quantize_pytorch, such as LFQ or ResidualVQ")
    arguments: dict[str, Any] = Field(
        default_factory=dict, description="its keyword arguments; `dim` is `code_dim` if not given"
    )
    code_dim: int = Field(default=64, ge=1, le=2**14, description="channels of the features to quantize")

    @property
    def codebook_size(self) -> int:
        """Number of codes. The quantizer is built to find out."""
        return self.build().codebook_size

    def build(self) -> "ExternalQuantizer":
        """Build the quantizer.

        Raises:
            UserError: If the package, the class or an argument is wrong, or the class has no lookup of single codes.
        """
        # Not on the meta device: some classes read their tensors, and compute tables that weights files lack.
        with torch.device("cpu"):
            return ExternalQuantizer(self)


class ExternalQuantizer(Quantizer):
    """Adapter of a quantizer of vector-quantize-pytorch.

    The codes (i₁, i₂, …) of a residual quantizer become one code, i₁ + K i₂ + …, so that priors can model them.
    `update` does nothing: these quantizers update their codebooks in `forward`.

    >>> arguments = {"num_quantizers": 2, "codebook_size": 16}
    >>> quantizer = ExternalConfig(name="ResidualVQ", arguments=arguments, code_dim=8).build()
    >>> quantizer.codebook_size
    256
    >>> quantizer(torch.randn(2, 8, 4, 4)).codes.shape
    torch.Size([2, 4, 4])
    """

    def __init__(self, config: ExternalConfig) -> None:
        super().__init__()
        self.config, self.code_dim = config, config.code_dim
        self.module = _build(config)
        self._base: int = getattr(self.module, "codebook_size", None) or config.arguments.get("codebook_size", 0)
        self._digits: int = getattr(self.module, "num_quantizers", 1)
        if self._base < 1 or math.log(self._base) * self._digits > math.log(MAX_CODES):
            raise UserError(
                f"quantizer.arguments: {config.name}: the codes must be 1 to {MAX_CODES:,}. Change its size."
            )
        self.codebook_size = self._base**self._digits
        self._check()

    def forward(self, features: Float[Tensor, "b d *spatial"]) -> QuantizerOutput:
        self._check_features(features)
        with torch.autocast(features.device.type, enabled=False):
            spatial = features.shape[2:]
            latents = features.float().reshape(*features.shape[:2], math.prod(spatial))
            quantized, indices, *losses = self.module(latents if self._channels_first else latents.mT)
            quantized = quantized if self._channels_first else quantized.mT
            loss = losses[0].sum() if losses and len(features) else latents.new_zeros(())
            codes = self._join(indices).reshape(len(features), *spatial)
            return QuantizerOutput(quantized.reshape(features.shape), codes, loss, {"quantizer": loss.detach()})

    def lookup(self, codes: Int[Tensor, "b *spatial"]) -> Float[Tensor, "b d *spatial"]:
        with torch.autocast(codes.device.type, enabled=False):
            flat = codes.reshape(len(codes), math.prod(codes.shape[1:]))
            digits = flat if self._digits == 1 else flat[..., None] // self._place_values(codes.device) % self._base
            name = next(name for name in _LOOKUPS if hasattr(self.module, name))
            found = getattr(self.module, name)(digits)
            found = found if self._channels_first else found.mT
            return found.reshape(len(codes), self.code_dim, *codes.shape[1:])

    @property
    def _channels_first(self) -> bool:
        return self.config.name == "LatentQuantize"

    def _check(self) -> None:
        """Check on a small input that codes have the expected shape, and that `lookup` inverts `forward`.

        Raises:
            UserError: If not.
        """
        was_training = self.training
        self.eval()
        try:
            with torch.no_grad():
                output = self(torch.linspace(-1, 1, 2 * self.code_dim).reshape(1, self.code_dim, 2))
                difference = (self.lookup(output.codes) - output.quantized).abs().max()
            problem = None if difference < _TOLERANCE else "looking up its codes gives other features"
        except _ERRORS as error:
            problem = " ".join(str(error).split()) or type(error).__name__
        self.train(was_training)
        if problem:
            raise UserError(
                f"quantizer.name: {self.config.name} does not give one code per position of features (B, N, D) "
                f"({problem}). Use another class or other arguments."
            )

    def _join(self, indices: Int[Tensor, "b n *digits"]) -> Int[Tensor, "b n"]:
        """Return one code for the codes of all residual quantizers."""
        if indices.ndim == 2:
            return indices.long()
        return (indices.long() * self._place_values(indices.device)).sum(-1)

    def _place_values(self, device: torch.device) -> Int[Tensor, " digits"]:
        return torch.tensor([self._base**digit for digit in range(self._digits)], device=device)


def _build(config: ExternalConfig) -> torch.nn.Module:
    try:
        import vector_quantize_pytorch as package  # an optional dependency  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise UserError(
            f"quantizer.name: {config.name} needs the package vector-quantize-pytorch. Install it: "
            "pip install 'vqvae2[quantizers]'"
        ) from None
    cls = getattr(package, config.name, None)
    if not (isinstance(cls, type) and issubclass(cls, torch.nn.Module)):
        raise UserError(f"quantizer.name: vector-quantize-pytorch has no class {config.name!r}. Use LFQ, for example.")
    if config.arguments.get("quantize_dropout"):
        raise UserError("quantizer.arguments: quantize_dropout: dropped quantizers have no codes. Remove the argument.")
    try:
        module = cls(**{"dim": config.code_dim} | config.arguments)
    except _ERRORS as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"quantizer.arguments: {config.name} does not accept them ({reason}).") from None
    return module
