"""The contents of metrics.json. Each metric is either its values or the reason why it is missing."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import Discriminator, Field, Tag

from sampling.params import SamplingParams
from vqvae2.config import Config, Measured
from vqvae2.errors import UserError

_FIX = "Delete it and run `vqvae2 evaluate` again."


class Missing(Config):
    """Why a metric was not measured."""

    missing: str


def _tag(value: Any) -> str:
    return "missing" if isinstance(value, Missing) or (isinstance(value, dict) and "missing" in value) else "measured"


_Metric = TypeVar("_Metric")
OrMissing = Annotated[Annotated[_Metric, Tag("measured")] | Annotated[Missing, Tag("missing")], Discriminator(_tag)]


class Reconstruction(Config):
    """Errors of the reconstructions of held-out images."""

    mse: Measured
    psnr: Measured
    ssim: Measured


class CodebookMetrics(Config):
    """Use of the codebook of a level on held-out images."""

    usage: Measured
    perplexity: Measured


class Likelihood(Config):
    """Negative log-likelihood of the held-out codes of a level, and its baselines, per code."""

    nll: Measured
    bits: Measured
    uniform: Measured
    unigram: Measured


class Distance(Config):
    """A Fréchet distance."""

    value: Measured
    text: str  # the value with the number of images
    comparable: bool  # whether there are enough images to compare it with other values


class Score(Config):
    """Mean and standard deviation over subsets of the images."""

    mean: Measured
    std: Measured


class Neighborhoods(Config):
    """Metrics of nearest neighbors in feature space."""

    precision: Measured
    recall: Measured
    density: Measured
    coverage: Measured


class FeatureMetrics(Config):
    """Metrics in the features of one network."""

    fd: OrMissing[Distance]  # Fréchet distance of samples from the reference
    rfd: OrMissing[Distance]  # Fréchet distance of reconstructions from the held-out images
    kd: OrMissing[Score]  # kernel distance of samples from the reference, KID in other features
    precision_recall: OrMissing[Neighborhoods]
    weights: str  # digest
    standard_weights: bool


class ClassificationAccuracy(Config):
    """Accuracies of a classifier that was trained on samples or on real images, and how it was trained."""

    top1: Measured
    top5: Measured | None = None
    trained_on: int
    tested_on: int
    classifier: str  # file name
    model: str
    steps: int
    batch_size: int
    learning_rate: float
    weight_decay: float
    seed: int
    warning: str | None = None
    recognized: Measured | None = None  # share of the samples that a classifier of real images assigns to their class
    real: "ClassificationAccuracy | None" = None


class MadeFrom(Config):
    """What the metrics were measured on."""

    samples: str  # digest of the manifest
    autoencoder: str  # digest
    reference: str
    reference_digest: str | None = None
    inception_weights: str | None = None
    weights: dict[str, str | None] = Field(default_factory=dict)  # digests of weights files that were given
    features: tuple[str, ...] = ("inception",)


class SampleProtocol(Config):
    """The samples, and how they were sampled."""

    count: int
    size: tuple[int, int] | None
    formats: dict[str, int]
    seed: int
    sampling_params: SamplingParams
    autoencoder: str
    priors: tuple[str, ...]


class ReferenceProtocol(Config):
    """The images that the samples were compared with."""

    name: str
    split: str | None
    count: int | None
    size: tuple[int, int] | None
    formats: dict[str, int]


class Protocol(Config):
    """How the images were compared."""

    samples: SampleProtocol
    reference: ReferenceProtocol
    resize: str
    crop: str
    inception_weights: str | None = None  # digest; None without Inception
    standard_weights: bool = True
    versions: dict[str, str]


class Metrics(Config):
    """Contents of metrics.json. Without Inception, `fid` has the reason, and its other metrics are not set."""

    made_from: MadeFrom
    reconstruction: OrMissing[Reconstruction]
    codes: dict[str, OrMissing[CodebookMetrics]]  # by level
    likelihood: dict[str, OrMissing[Likelihood]]  # by level
    bits_per_image: OrMissing[Measured]
    bits_per_dimension: OrMissing[Measured]
    cas: OrMissing[ClassificationAccuracy] | None = None  # None if not requested
    fid: OrMissing[Distance]
    rfid: OrMissing[Distance] | None = None
    inception_score: OrMissing[Score] | None = None
    kid: OrMissing[Score] | None = None
    precision_recall: OrMissing[Neighborhoods] | None = None
    features: dict[str, OrMissing[FeatureMetrics]] = Field(default_factory=dict)  # by network, without Inception
    warnings: tuple[str, ...] = Field(default=())
    protocol: Protocol | None = None


def read_metrics(path: Path) -> dict[str, Any] | None:
    """Return the validated contents of a metrics.json, or None if there is none.

    Raises:
        UserError: If the file is invalid.
    """
    if not path.is_file():
        return None
    metrics = Metrics.from_json(path, _FIX).model_dump(mode="json", exclude_unset=True)
    return {name: value for name, value in metrics.items() if value is not None}


def attempt(measure: Callable[[], Any]) -> Any:
    """Return what `measure` returns, or the reason why the metric is missing if it raises UserError."""
    try:
        return measure()
    except UserError as error:
        return Missing(missing=str(error)).to_dict()
