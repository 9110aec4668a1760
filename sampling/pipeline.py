"""From nothing to images: sample the coarsest level, then each finer one given those above it, then decode."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from sampling.masks import keep_coarsest, keep_masked
from sampling.memory import batch_that_fits
from sampling.params import SamplingParams
from sampling.sample_level import Noise, PartialCodes, sample_level
from vqvae2.code_maps import CodeMaps
from vqvae2.data.code_store import CodeStore
from vqvae2.errors import UserError
from vqvae2.models import Autoencoder
from vqvae2.priors import Prior, load_prior
from vqvae2.run_folder import RunFolder, level_names

_AS_TRAINED = SamplingParams()


@dataclass(frozen=True)
class VQVAE2Pipeline:
    """An autoencoder with a prior for each of its levels, finest first."""

    autoencoder: Autoencoder
    priors: tuple[Prior, ...]
    classes: tuple[str, ...] = ()  # names of the labels; empty where the priors know none
    batch_size: int = 16  # images sampled at once, at most

    @classmethod
    def load(cls, run: Path | str, device: torch.device | str = "cpu", batch_size: int = 16) -> "VQVAE2Pipeline":
        """The trained networks of a run folder; UserError where one is missing or made from other weights."""
        folder = RunFolder.existing(Path(run))
        autoencoder = Autoencoder.load(folder.autoencoder_weights, device)
        priors = []
        for name in level_names(len(autoencoder.map_specs)):
            path = folder.prior_weights(name)
            prior = load_prior(path, device)
            made_from = prior.made_from.get("autoencoder")
            if made_from != autoencoder.digest:
                raise UserError(
                    f"{path}: trained on codes of the autoencoder {str(made_from)[:12]}…, but "
                    f"{folder.autoencoder_weights} is {str(autoencoder.digest)[:12]}…; train this prior again"
                )
            priors.append(prior)
        classes = CodeStore.open(folder.code_store("train")).header.classes
        return cls(autoencoder, tuple(priors), classes, batch_size)

    @property
    def positions(self) -> int:
        """Codes that make up one image."""
        return sum(level.num_codes for level in self.autoencoder.map_specs)

    @property
    def levels(self) -> tuple[str, ...]:
        """Names of the levels, finest first."""
        return level_names(len(self.priors))

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return next(self.autoencoder.parameters()).device

    def sample(
        self,
        count: int,
        seed: int = 0,
        labels: Sequence[int] | None = None,
        temperature: float | Mapping[str, float] = 1.0,
        top_k: int | Mapping[str, int] = 0,
        top_p: float | Mapping[str, float] = 1.0,
        guidance_scale: float | Mapping[str, float] = 1.0,
    ) -> Float[Tensor, "b c h w"]:
        """Sample images in [-1, 1]; image k depends on the seed and k. `labels` are used by turns.

        The last four are one value for all levels, or values by level: `{"top": 1.0, "bottom": 0.9}`.
        """
        settings = {"temperature": temperature, "top_k": top_k, "top_p": top_p, "guidance_scale": guidance_scale}
        choices = SamplingParams.parse(settings, "sample")
        images = range(count)
        codes = self.sample_codes(images, self.labels_of(images, labels), seed, choices)
        return self.autoencoder.decode(codes)

    def sample_codes(
        self,
        images: Sequence[int | tuple[int, int]],
        labels: Int[Tensor, " b"] | None,
        seed: int,
        choices: SamplingParams,
        known: Sequence[PartialCodes | None] = (),
        progress: Callable[[int], object] = lambda positions: None,
    ) -> CodeMaps:
        """Codes of the images with these numbers, finest first; `known` are codes to keep on each level, finest first.

        UserError where `choices` do not fit the run.
        """
        self.check(choices)
        known = known or [None] * len(self.priors)
        codes: CodeMaps = ()
        for level, name in reversed(tuple(enumerate(self.levels))):
            noise, choice, scale = Noise(seed, images, level), choices.of(name), choices.guidance_scale_of(name)
            found = sample_level(self.priors[level], noise, choice, codes, labels, progress, scale, known[level])
            codes = (found, *codes)
        return codes

    def inpaint(
        self,
        images: Float[Tensor, "b c h w"],
        keep: Bool[Tensor, "..."],
        labels: Sequence[int] | None = None,
        variants: int = 4,
        seed: int = 0,
        choices: SamplingParams = _AS_TRAINED,
    ) -> Float[Tensor, "b v c h w"]:
        """Sample what lies outside the mask `keep`, true (H, W) or (B, H, W) where pixels are kept, several times.

        On each level a code is kept where all of its pixels are; the rest is sampled in raster order, so that a code
        knows all kept ones before it and, through the coarser levels, of those after it. Codes were made from the
        whole image: a kept one near the border knows a little of what is beyond. Images in [-1, 1], in and out; variant
        v of image k depends on the image, the seed, k and v. Raises UserError for a mask of another size, and where the
        run has classes and `labels` are missing.
        """
        if tuple(keep.shape) not in (self.autoencoder.size, (len(images), *self.autoencoder.size)):
            height, width = self.autoencoder.size
            raise UserError(f"a mask of size {tuple(keep.shape)}; the images of this run are {height} × {width}")
        known = keep_masked(self.autoencoder.encode(images), keep, self.autoencoder.map_specs)
        codes = self.resample(known, labels, variants, seed, choices)
        return self.decode(codes).unflatten(0, (len(images), variants))

    def variations(
        self,
        images: Float[Tensor, "b c h w"],
        keep_levels: int = 1,
        labels: Sequence[int] | None = None,
        variants: int = 4,
        seed: int = 0,
        choices: SamplingParams = _AS_TRAINED,
    ) -> Float[Tensor, "b v c h w"]:
        """Keep the `keep_levels` coarsest levels of each image and sample the finer ones, several times.

        Images, variants and labels are those of `complete`.
        """
        known = self.keep_levels(self.autoencoder.encode(images), keep_levels)
        codes = self.resample(known, labels, variants, seed, choices)
        return self.decode(codes).unflatten(0, (len(images), variants))

    def keep_levels(self, codes: CodeMaps, count: int) -> tuple[PartialCodes, ...]:
        """Codes of which the coarsest levels are kept; UserError where that leaves none to sample, or keeps none."""
        if len(self.priors) == 1:
            raise UserError("this run has one level: with its codes kept, nothing is left to sample")
        if not 1 <= count < len(self.priors):
            raise UserError(f"of {len(self.priors)} levels, 1 to {len(self.priors) - 1} can be kept, not {count}")
        return keep_coarsest(codes, count)

    def resample(
        self,
        known: Sequence[PartialCodes],
        labels: Sequence[int] | None,
        variants: int,
        seed: int,
        choices: SamplingParams,
        progress: Callable[[int], object] = lambda positions: None,
    ) -> CodeMaps:
        """Codes (B · variants, H_l, W_l) of all variants of the first image, then of the second, and so on."""
        count = len(known[0].codes)
        self.check_labels(labels)
        of_image = self.labels_of(range(count), labels)
        pairs = [(image, variant) for image in range(count) for variant in range(variants)]
        found: list[CodeMaps] = []
        size = self.batch_that_fits(min(self.batch_size, len(pairs)), choices)
        for start in range(0, len(pairs), size):
            batch = pairs[start : start + size]
            rows = torch.tensor([image for image, _ in batch], device=self.device)
            chosen = None if of_image is None else of_image[rows]
            kept = [PartialCodes(codes[rows], keep[rows]) for codes, keep in known]
            found.append(self.sample_codes(batch, chosen, seed, choices, kept, progress))
        return tuple(torch.cat(level) for level in zip(*found, strict=True))

    def decode(self, codes: CodeMaps) -> Float[Tensor, "b c h w"]:
        """Images in [-1, 1], decoded a batch at a time."""
        parts = zip(*(level.split(self.batch_size) for level in codes), strict=True)
        return torch.cat([self.autoencoder.decode(part) for part in parts])

    def batch_that_fits(self, wanted: int, choices: SamplingParams, memory: float | None = None) -> int:
        """How many images to sample at once: `wanted`, or as many as fit into `memory` GiB, at least one."""
        sizes = [
            batch_that_fits(prior, wanted, choices.guidance_scale_of(name) != 1, memory)
            for name, prior in zip(self.levels, self.priors, strict=True)
        ]
        return max(1, min(sizes))

    def check_labels(self, labels: Sequence[int] | None) -> None:
        """UserError where the run has classes and it is not said which the images have."""
        if self.classes and not labels:
            last = len(self.classes) - 1
            raise UserError(f"this run has class labels: say which the images have, --classes with numbers 0 to {last}")

    def check(self, choices: SamplingParams) -> None:
        """UserError where a setting names no level of this run, or asks for guidance that a prior cannot give."""
        choices.check_levels(self.levels)
        for name, prior in zip(self.levels, self.priors, strict=True):
            if (scale := choices.guidance_scale_of(name)) == 1:
                continue
            if not prior.spec.num_classes:
                raise UserError(
                    f"guidance_scale {scale:g}: the prior of level {name} knows no class labels to be guided by"
                )
            if not prior.made_from.get("label_dropout", 0):
                raise UserError(
                    f"guidance_scale {scale:g}: the prior of level {name} was trained without label dropout, so it does not "
                    "know what images of no label look like; train it with label dropout, or use guidance_scale 1"
                )

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
        return torch.tensor([chosen[image % len(chosen)] for image in images], device=self.device)
