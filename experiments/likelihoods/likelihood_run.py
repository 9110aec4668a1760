"""Settings of a comparison of likelihoods, and the models of its run folder."""

from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, ClassVar, Self

from pydantic import Field, model_validator

from experiments.likelihoods.networks import LatentModel, NetworkConfig
from experiments.likelihoods.vae import VAE
from experiments.likelihoods.vimco import VIMCO
from experiments.likelihoods.vqvae import VQVAE
from sampling.run_config import BaseRunConfig
from sampling.run_data import open_run_datasets
from train.run import BaseRun, ConfigOptions
from vqvae2.config import Config
from vqvae2.data.images import DataConfig, ImageDataset
from vqvae2.quantizers import EMAConfig, QuantizerConfig
from vqvae2.run_folder import StageFolder
from vqvae2.training_config import QuantizedTrainingConfig

KINDS = (VAE.kind, VQVAE.kind, VIMCO.kind)


class CapacityConfig(Config):
    """One capacity of the latents, at which the three models are compared."""

    latents: int = Field(
        default=1,
        ge=1,
        le=4096,
        description="latents per position of the map: Gaussian variables of the VAE, codes of the other models",
    )
    quantizer: QuantizerConfig = Field(
        default=EMAConfig(codebook_size=256, code_dim=32),
        description="quantizer of the VQ-VAE; VIMCO has as many categories and dimensions",
    )


class BoundsConfig(Config):
    """How the bounds of the trained models are measured."""

    samples: int = Field(
        default=50, ge=1, le=10**6, description="samples per image of the bound of the VAE and VIMCO beside their own"
    )
    batch_size: int = Field(default=100, ge=1, le=2**20, description="images that are measured together")
    seed: int = Field(default=0, ge=0, le=2**63 - 1, description="seed of the samples")


class LikelihoodConfig(BaseRunConfig):
    """The sections of the YAML file of a comparison of likelihoods."""

    data: DataConfig = DataConfig(size=32)
    network: NetworkConfig = NetworkConfig()
    capacities: Annotated[tuple[CapacityConfig, ...], Field(min_length=1)] = (CapacityConfig(),)
    vimco_samples: int = Field(default=5, ge=2, le=1024, description="samples per image of VIMCO's bound in training")
    training: QuantizedTrainingConfig = QuantizedTrainingConfig(steps=100_000)
    evaluation: BoundsConfig = BoundsConfig()

    @model_validator(mode="after")
    def _check(self) -> Self:
        for side in self.data.shape:
            if side % self.network.stride:
                stride = self.network.stride
                raise ValueError(f"data.size: {side} is not divisible by network.stride = {stride}. Choose a divisor.")
        sizes = [(each.latents, each.quantizer.codebook_size) for each in self.capacities]
        for latents, codebook_size in sizes:
            if sizes.count((latents, codebook_size)) > 1:
                raise ValueError(f"capacities: {latents} latents with {codebook_size} codes occur twice. Remove one.")
        return self

    @property
    def positions(self) -> int:
        """Number of positions of the latent map."""
        height, width = self.data.shape
        return height * width // self.network.stride**2

    @property
    def labels(self) -> list[str]:
        """Number of latents of an image and size of the codebook, for each capacity."""
        return [f"{each.latents * self.positions}, K = {each.quantizer.codebook_size}" for each in self.capacities]


class LikelihoodOptions(ConfigOptions, LikelihoodConfig):
    """Train a VAE, a VQ-VAE and VIMCO with the same encoder and decoder, and compare their likelihoods.

    Run the same command again to resume. The table is printed and written to RUN/results.json, its plot to
    RUN/likelihoods.png.
    """

    config_class: ClassVar[type[Config]] = LikelihoodConfig


@dataclass(frozen=True)
class LikelihoodRun(BaseRun):
    """A config, its run folder, and the models in it."""

    config: LikelihoodConfig

    config_class: ClassVar[type[Config]] = LikelihoodConfig
    command: ClassVar[str] = "vqvae2 likelihoods"

    @cached_property
    def images(self) -> tuple[ImageDataset, ImageDataset]:
        """Images for training and for validation."""
        return open_run_datasets(self.config.data, self.folder)

    def stage(self, kind: str, capacity: CapacityConfig) -> StageFolder:
        """Return the folder of a model. Capacities with as many latents share a VAE, which has no codebook."""
        size = "" if kind == VAE.kind else f"x{capacity.quantizer.codebook_size}"
        return StageFolder(self.folder.path / f"{kind}-{capacity.latents}{size}")

    def stages(self) -> dict[StageFolder, tuple[str, CapacityConfig]]:
        """Return kind and capacity of every model, by its folder."""
        return {self.stage(kind, capacity): (kind, capacity) for capacity in self.config.capacities for kind in KINDS}

    def build(self, kind: str, capacity: CapacityConfig) -> LatentModel:
        """Build a model with random weights."""
        network, channels, latents = self.config.network, self.config.data.channels, capacity.latents
        quantizer = capacity.quantizer
        if kind == VAE.kind:
            return VAE(network, channels, latents)
        if kind == VQVAE.kind:
            return VQVAE(network, channels, latents, quantizer)
        sizes = quantizer.codebook_size, quantizer.code_dim
        return VIMCO(network, channels, latents, *sizes, self.config.vimco_samples)
