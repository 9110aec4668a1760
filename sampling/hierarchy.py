"""From nothing to images: sample the coarsest level, then each finer one given those above it, then decode."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sampling.decode import Choice, Noise, sample_level
from vqvae2.data.codes import CodeStore
from vqvae2.errors import UserError
from vqvae2.maps import CodeMaps
from vqvae2.models import Autoencoder
from vqvae2.priors import Prior, load_prior
from vqvae2.run_folder import RunFolder, level_names


@dataclass(frozen=True)
class Generator:
    """An autoencoder with a prior for each of its levels, finest first."""

    autoencoder: Autoencoder
    priors: tuple[Prior, ...]
    classes: tuple[str, ...] = ()  # names of the labels; empty where the priors know none

    @classmethod
    def load(cls, run: Path | str, device: torch.device | str = "cpu") -> "Generator":
        """The trained networks of a run folder; UserError where one is missing or made from other weights."""
        folder = RunFolder.existing(Path(run))
        autoencoder = Autoencoder.load(folder.autoencoder_weights, device)
        priors = []
        for name in level_names(len(autoencoder.maps)):
            path = folder.prior_weights(name)
            prior = load_prior(path, device)
            made_from = prior.made_from.get("autoencoder")
            if made_from != autoencoder.digest:
                raise UserError(
                    f"{path}: trained on codes of the autoencoder {str(made_from)[:12]}…, but "
                    f"{folder.autoencoder_weights} is {str(autoencoder.digest)[:12]}…; train this prior again"
                )
            priors.append(prior)
        return cls(autoencoder, tuple(priors), CodeStore.open(folder.code_store("train")).header.classes)

    @property
    def positions(self) -> int:
        """Codes that make up one image."""
        return sum(level.size for level in self.autoencoder.maps)

    def sample(
        self,
        count: int,
        seed: int = 0,
        labels: Sequence[int] | None = None,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
    ) -> Float[Tensor, "b c h w"]:
        """Sample images in [-1, 1]; image k depends on the seed and k. `labels` are used by turns."""
        choice = Choice(temperature=temperature, top_k=top_k, top_p=top_p)
        images = range(count)
        codes = self.sample_codes(images, self.labels_of(images, labels), seed, choice)
        return self.autoencoder.decode_codes(codes)

    def sample_codes(
        self,
        images: Sequence[int],
        labels: Int[Tensor, " b"] | None,
        seed: int,
        choice: Choice,
        given: CodeMaps = (),
        progress: Callable[[int], object] = lambda positions: None,
    ) -> CodeMaps:
        """Codes of the images with these numbers, finest first; `given` are the coarsest maps, where known."""
        codes: CodeMaps = given
        for level in reversed(range(len(self.priors) - len(given))):
            noise = Noise(seed, images, level)
            codes = (sample_level(self.priors[level], noise, choice, codes, labels, progress), *codes)
        return codes

    def labels_of(self, images: Sequence[int], labels: Sequence[int] | None) -> Int[Tensor, " b"] | None:
        """The label of each image: `labels` by turns, every class by turns where none are given."""
        if not self.classes:
            if labels:
                raise UserError("this run has no class labels (data.labels is `none`); leave the classes out")
            return None
        chosen = list(labels or range(len(self.classes)))
        for label in chosen:
            if not 0 <= label < len(self.classes):
                raise UserError(f"class {label} does not exist; the classes are 0 to {len(self.classes) - 1}")
        device = next(self.autoencoder.parameters()).device
        return torch.tensor([chosen[image % len(chosen)] for image in images], device=device)
