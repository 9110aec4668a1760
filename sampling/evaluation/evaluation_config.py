"""Settings of the evaluation of a run."""

from pathlib import Path

from pydantic import Field

from sampling.evaluation.classifier import SMALL_IMAGE_SIZE, Architecture, ClassifierConfig
from vqvae2.config import Config
from vqvae2.metrics.pretrained_features import INCEPTION, NETWORKS_HELP, NetworkSetting


class CasConfig(Config):
    """Classification accuracy score: whether to measure it, and how its classifier is trained."""

    enabled: bool = Field(default=False, description="train a ResNet on the samples and test it on held-out images")
    real: bool = Field(
        default=False, description="train another on real images, and count the samples that it recognizes"
    )
    model: Architecture | None = Field(default=None, description="resnet18 up to 64 px, else resnet50, if not given")
    steps: int = Field(default=2000, ge=1, le=2**40, description="optimizer steps")
    batch_size: int = Field(default=128, ge=2, description="batch size")
    learning_rate: float = Field(default=1e-3, gt=0, description="peak learning rate of AdamW")
    weight_decay: float = Field(default=0.05, ge=0, description="weight decay of AdamW")
    seed: int = Field(
        default=0, ge=0, le=2**63 - 1, description="seed of the weights, the data order and the augmentation"
    )

    def classifier(self, classes: tuple[str, ...], size: tuple[int, int]) -> ClassifierConfig:
        """Return the config of a classifier for images of (height, width) `size`."""
        architecture = self.model or ("resnet18" if max(size) <= SMALL_IMAGE_SIZE else "resnet50")
        return ClassifierConfig(architecture=architecture, classes=classes, size=size)


class EvaluationConfig(Config):
    """What samples are compared with, and by which network."""

    reference: str = Field(
        default="validation",
        description="`validation` for the run's held-out images, a folder or archive of images, or an .npz",
    )
    features: tuple[NetworkSetting, ...] = Field(
        default=(INCEPTION,), min_length=1, description=f"networks whose features are compared: {NETWORKS_HELP}"
    )
    inception_weights: str | None = Field(
        default=None, description="weights file of the Inception network; downloaded if not given"
    )
    batch_size: int = Field(default=50, ge=1, description="images per pass of a network")
    cas: CasConfig = CasConfig()

    @property
    def inception_path(self) -> Path | None:
        """Path of the Inception weights, if given."""
        return Path(self.inception_weights) if self.inception_weights else None

    @property
    def weights_files(self) -> list[Path]:
        """Weights files of networks that are given."""
        given = [self.inception_weights, *(network.partition("=")[2] for network in self.features)]
        return [Path(path) for path in given if path]
