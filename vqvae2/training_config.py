"""Settings of a training loop and of the losses of the autoencoder and the priors."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from vqvae2.config import Config
from vqvae2.models.discriminator import DiscriminatorConfig

Tracker = Literal["tensorboard", "wandb", "mlflow", "none"]
Beta = Annotated[float, Field(ge=0, lt=1)]  # decay rate of a moment estimate of Adam


class TrainingConfig(Config):
    """How one network is trained. All intervals count optimizer steps."""

    steps: int = Field(ge=1, le=2**40, description="optimizer steps")
    batch_size: int = Field(
        default=128, ge=1, le=2**24, description="global batch size: all processes and accumulation steps"
    )
    gradient_accumulation_steps: int = Field(default=1, ge=1, le=2**20, description="micro-batches per optimizer step")
    learning_rate: float = Field(default=3e-4, gt=0, description="peak learning rate of AdamW")
    schedule: Literal["constant", "cosine"] = Field(default="constant", description="learning rate after the warmup")
    warmup_steps: int = Field(default=0, ge=0, description="steps of linear warmup")
    weight_decay: float = Field(default=0.0, ge=0, description="weight decay of AdamW")
    betas: tuple[Beta, Beta] = Field(default=(0.9, 0.999), description="betas of AdamW")
    max_grad_norm: float | None = Field(default=None, gt=0, description="clip the gradient norm to this value")
    ema_decay: float | None = Field(
        default=None, gt=0, lt=1, description="keep an exponential moving average of the weights, and save it"
    )
    mixed_precision: Literal["fp32", "bf16", "fp16"] = Field(default="fp32", description="autocast data type")
    compile: bool = Field(default=False, description="use torch.compile (worthwhile on GPUs)")
    seed: int = Field(default=0, ge=0, le=2**63 - 1, description="seed of the weights, the data order and dropout")
    log_every: int = Field(default=50, ge=1, description="steps between log entries")
    validate_every: int = Field(default=1000, ge=1, description="steps between validations")
    preview_every: int = Field(default=5000, ge=1, description="steps between preview images")
    checkpoint_every: int = Field(default=1000, ge=1, description="steps between checkpoints")
    keep_checkpoints: int = Field(default=2, ge=1, description="how many recent checkpoints to keep, besides the best")
    early_stopping_patience: int | None = Field(
        default=None,
        ge=1,
        description="stop after this many validations without improvement, and save the best weights",
    )

    @property
    def intervals(self) -> tuple[int, ...]:
        """Steps between log entries, validations, previews and checkpoints."""
        return self.log_every, self.validate_every, self.preview_every, self.checkpoint_every

    def micro_batch_size(self, num_processes: int) -> int:
        """Return the number of images that a process passes through the network at once."""
        return max(1, self.batch_size // (num_processes * self.gradient_accumulation_steps))

    def phase(self, step: int) -> tuple[int, int]:
        """Return the first step, and the step after the last, of the learning-rate schedule that a step belongs to."""
        return 0, self.steps

    @model_validator(mode="after")
    def _check(self) -> "TrainingConfig":
        if self.warmup_steps >= self.steps > 0:
            raise ValueError(f"warmup_steps ({self.warmup_steps}) must be less than steps ({self.steps})")
        return self


class QuantizedTrainingConfig(TrainingConfig):
    """How a network with codes is trained."""

    unquantized_steps: int = Field(
        default=100,
        ge=0,
        description="first steps that train without quantization, at most a tenth of all steps; without them, a level "
        "may collapse before the decoder has learned to use it",
    )

    @property
    def first_quantized_step(self) -> int:
        """Index of the first step that quantizes, from 0."""
        return min(self.unquantized_steps, self.steps // 10)


class AutoencoderTrainingConfig(QuantizedTrainingConfig):
    """How the autoencoder is trained."""

    steps: int = Field(
        default=0, ge=0, le=2**40, description="optimizer steps; 0 uses pretrained weights without training them"
    )
    decoder_steps: int = Field(
        default=0,
        ge=0,
        description="last steps, which train only the decoder, with an optimizer and a learning-rate schedule of their "
        "own; they are faster, and no longer change the codes of an image",
    )

    @property
    def first_quantized_step(self) -> int:
        """Index of the first step that quantizes, from 0."""
        return min(self.unquantized_steps, self.first_decoder_step // 10)

    @property
    def first_decoder_step(self) -> int:
        """Index of the first step that trains only the decoder, from 0."""
        return self.steps - self.decoder_steps

    def phase(self, step: int) -> tuple[int, int]:
        first = self.first_decoder_step
        return (0, first) if step < first else (first, self.steps)

    @model_validator(mode="after")
    def _check_decoder_steps(self) -> "AutoencoderTrainingConfig":
        if self.decoder_steps > self.steps:
            raise ValueError(f"decoder_steps ({self.decoder_steps}) must be at most steps ({self.steps})")
        if self.decoder_steps and self.early_stopping_patience is not None:
            raise ValueError(
                "early_stopping_patience: not possible with decoder_steps, whose squared error may be higher than that "
                "of the steps before"
            )
        lengths = [length for length in (self.first_decoder_step, self.decoder_steps) if length]
        if lengths and self.warmup_steps >= min(lengths):
            raise ValueError(
                f"warmup_steps ({self.warmup_steps}) must be less than decoder_steps ({self.decoder_steps}), and than "
                f"the steps before them ({self.first_decoder_step})"
            )
        return self


class PriorTrainingConfig(TrainingConfig):
    """How a prior is trained."""

    embedding_learning_rate: float | None = Field(
        default=None,
        gt=0,
        description="peak learning rate of the embeddings of codes and labels; `learning_rate` if not given",
    )
    gradient_checkpointing: bool = Field(
        default=False, description="recompute activations in the backward pass, to save memory"
    )


class PerceptualLossConfig(Config):
    """The perceptual term: LPIPS (Zhang et al. 2018, arXiv 1801.03924), or distances of EfficientNet-Lite0 features."""

    weight: float = Field(default=0.0, ge=0, description="weight of the term; 0 disables it")
    network: Literal["vgg", "alex", "squeeze", "efficientnet-lite0"] = Field(
        default="vgg", description="network whose features are compared"
    )
    weights: str | None = Field(
        default=None,
        description="file with the network's weights; if not given, torchvision's are downloaded, and those of "
        "efficientnet-lite0 are in its package",
    )
    start: int = Field(default=0, ge=0, description="first step that uses the term; steps without it are faster")
    size: int | None = Field(
        default=None,
        ge=16,
        le=1024,
        description="shorter side in pixels to which images are resized for the network; their own size if not given",
    )


class AdversarialLossConfig(Config):
    """The adversarial term and the training of its discriminator (Esser et al. 2021, arXiv 2012.09841)."""

    weight: float = Field(default=0.0, ge=0, description="weight of the term; 0 disables it")
    start: int = Field(default=0, ge=0, description="first step that uses the term and trains the discriminator")
    learning_rate: float = Field(default=1e-4, gt=0, description="peak learning rate of the discriminator")
    betas: tuple[Beta, Beta] = Field(default=(0.5, 0.9), description="betas of the discriminator's AdamW")
    discriminator: DiscriminatorConfig = DiscriminatorConfig()


class AutoencoderLossConfig(Config):
    """Reconstruction loss of the autoencoder. The default is mean squared error alone, as in the papers."""

    pixel: Literal["mse", "l1"] = Field(default="mse", description="pixel-wise term")
    perceptual: PerceptualLossConfig = PerceptualLossConfig()
    adversarial: AdversarialLossConfig = AdversarialLossConfig()

    @property
    def pixel_term(self) -> str:
        """Name of the pixel-wise term in the log."""
        return "l1" if self.pixel == "l1" else "reconstruction"

    @property
    def terms(self) -> tuple[str, ...]:
        """Names of the active terms, including the discriminator's own loss."""
        perceptual = ("perceptual",) if self.perceptual.weight else ()
        return (self.pixel_term, *perceptual, *(("adversarial", "discriminator") if self.adversarial.weight else ()))


class PriorLossConfig(Config):
    """Loss of a prior: cross-entropy per code."""

    label_dropout: float = Field(
        default=0.0, ge=0, lt=1, description="fraction of training images without a label, for classifier-free guidance"
    )
