"""Settings of the evaluation of a run."""

from pydantic import Field

from vqvae2.config import Config


class EvaluationConfig(Config):
    """What samples are compared with."""

    reference: str = Field(
        default="validation", description="`validation` for the run's held-out images, a folder of images, or an .npz"
    )
    inception_weights: str | None = Field(
        default=None, description="weights file of the Inception network; downloaded if not given"
    )
    batch_size: int = Field(default=50, ge=1, description="images per pass of the Inception network")
