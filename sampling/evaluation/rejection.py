"""Classifier-based rejection sampling: keep the samples that a classifier assigns to their label most confidently.

Source: Razavi, van den Oord and Vinyals 2019 (VQ-VAE-2), section 3.3. It trades diversity for quality.
"""

import math
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from sampling.evaluation.classifier import Classifier, LabeledSamples, load_classifier
from sampling.output_folder import image_path, manifest_path, next_free, write_grids
from sampling.pipeline import VQVAE2Pipeline
from sampling.processes import processes
from vqvae2 import distributed, files
from vqvae2.config import Config, Measured
from vqvae2.data.samplers import SequentialBatchSampler, load_batches
from vqvae2.errors import UserError

_RECORD = "rejection.json"


class SelectedImage(Config):
    """A candidate that was accepted."""

    image: int  # its number among the accepted ones
    candidate: int
    label: int
    probability: Measured


class Selection(Config):
    """Contents of rejection.json."""

    made_from: dict[str, str | float]
    candidates: int
    accepted: int
    mean_probability: Measured
    mean_probability_accepted: Measured
    selected: tuple[SelectedImage, ...]


def select_best(scores: Sequence[float], labels: Sequence[int], fraction: float) -> list[int]:
    """Return the indices of the candidates to keep, in ascending order: of each label the best `fraction` by score.

    The total is ⌊N · fraction⌋, but at least one. A label with n candidates keeps n · fraction of them, rounded to an
    integer by the largest-remainder method. Of equal scores, the candidate with the lower index is kept.
    """
    counts = Counter(labels)
    shares = {label: count * _exact(fraction) for label, count in counts.items()}
    quotas = {label: math.floor(share) for label, share in shares.items()}
    spare = max(math.floor(len(labels) * _exact(fraction)), min(len(labels), 1)) - sum(quotas.values())
    for label in sorted(shares, key=lambda label: quotas[label] - shares[label])[:spare]:
        quotas[label] += 1
    selected = []
    for candidate in sorted(range(len(labels)), key=lambda candidate: -scores[candidate]):
        if quotas[labels[candidate]]:
            quotas[labels[candidate]] -= 1
            selected.append(candidate)
    return sorted(selected)


def num_candidates(count: int, fraction: float) -> int:
    """Return the smallest number of candidates from which `select_best` keeps `count`."""
    return math.ceil(count / _exact(fraction))


def _exact(fraction: float) -> Fraction:
    """Return the decimal number that was typed, so that 0.1 of 30 is 3 despite floating-point rounding."""
    return Fraction(str(fraction))


@dataclass(frozen=True)
class ClassifierRejection:
    """A classifier and the fraction of a model's samples to keep according to it."""

    fraction: float
    classifier: Classifier
    classes: tuple[str, ...]  # of the model that is sampled

    @classmethod
    def from_options(cls, run: Path, fraction: float | None, source: str | None) -> "ClassifierRejection | None":
        """Return the rejection that `--keep-fraction` and `--classifier` request, or None if neither is given.

        Raises:
            UserError: If only one option is given, the fraction is not in (0, 1], the model has no labels, or the
                classifier lacks one of its classes. Raised before anything is sampled.
        """
        if fraction is None and source is None:
            return None
        if source is None:
            raise UserError(
                "--keep-fraction: requires --classifier, a torchvision model such as resnet50 or a .safetensors file"
            )
        if fraction is None:
            raise UserError("--classifier: requires --keep-fraction, the fraction of candidates to keep, such as 0.1")
        if not 0 < fraction <= 1:
            raise UserError(f"--keep-fraction {fraction}: must be greater than 0 and at most 1, for example 0.1")
        classes = VQVAE2Pipeline.from_pretrained(run).class_names
        if not classes:
            raise UserError(
                "--keep-fraction: this model has no class labels (it was trained with `data.labels: none`). Train on "
                "labeled images, or sample without --keep-fraction."
            )
        classifier = load_classifier(source, processes().device or "cpu")
        classifier.class_indices(classes)
        return cls(fraction, classifier, classes)

    def candidate_settings(self, count: int, classes: tuple[int | str, ...]) -> dict[str, Any]:
        """Return the sampling settings, `count` and `classes`, of the candidates for `count` images.

        The candidates have the labels that `count` images would have: if there are fewer images than classes, only
        the first classes occur.
        """
        labels = classes or tuple(range(len(self.classes)))
        return {
            "count": num_candidates(count, self.fraction),
            "classes": labels[:count] if count < len(labels) else classes,
        }

    def keep_best(self, folder: Path, batch_size: int) -> Path:
        """Score the candidates in `folder`, write the best ones to its subfolder `accepted`, and return that subfolder.

        It has the layout of a folder written by `vqvae2 sample`, plus rejection.json with the selected candidates and
        their probabilities. It is written atomically. If it already holds another selection, the name is accepted-2,
        accepted-3 and so on.
        """
        samples = LabeledSamples(folder)
        made_from = {
            "fraction": self.fraction,
            "classifier": Path(self.classifier.source).name,
            "classifier_digest": self.classifier.digest,
            "candidates_digest": files.digest(manifest_path(folder)),
        }
        accepted = next_free(folder / "accepted", lambda path: _is_free(path, made_from))
        if accepted.is_dir():
            return accepted
        scores = self._scores(samples, batch_size)
        if processes().is_main_process:
            _write(accepted, samples, scores, select_best(scores, samples.labels, self.fraction), made_from)
        processes().wait_for_everyone()
        return accepted

    def _scores(self, samples: LabeledSamples, batch_size: int) -> list[float]:
        """Return the log-probability of each candidate's label, computed on all processes."""
        columns = torch.tensor(self.classifier.class_indices(samples.classes))
        sampler = SequentialBatchSampler(len(samples), batch_size, distributed.get_rank(), distributed.get_world_size())
        scores = torch.zeros(len(samples), device=next(self.classifier.network.parameters()).device)
        batches = tqdm(load_batches(samples, sampler, 0), "scoring", len(sampler), disable=distributed.get_rank() > 0)
        for indices, (pixels, labels) in zip(sampler, batches, strict=True):
            log_probs = self.classifier.log_probs(pixels)
            scores[indices] = log_probs.gather(1, columns[labels].to(log_probs.device)[:, None])[:, 0]
        return distributed.all_reduce_sum(scores).tolist()


def _is_free(folder: Path, made_from: dict[str, Any]) -> bool:
    """Return whether a folder does not exist, or holds the selection `made_from`."""
    fix = "Delete the folder and run the same command again."
    return not folder.exists() or Selection.from_json(folder / _RECORD, fix).made_from == made_from


def _write(
    folder: Path, samples: LabeledSamples, scores: list[float], selected: list[int], made_from: dict[str, Any]
) -> None:
    probabilities = [math.exp(score) for score in scores]
    labels = [samples.labels[candidate] for candidate in selected]
    entries = tuple(
        SelectedImage(image=image, candidate=candidate, label=label, probability=probabilities[candidate])
        for image, (candidate, label) in enumerate(zip(selected, labels, strict=True))
    )
    record = Selection(
        made_from=made_from,
        candidates=len(scores),
        accepted=len(selected),
        mean_probability=sum(probabilities) / len(probabilities),
        mean_probability_accepted=sum(probabilities[candidate] for candidate in selected) / len(selected),
        selected=entries,
    )
    with files.atomic_write(folder) as partial:
        (partial / "images").mkdir(parents=True)
        for image, candidate in enumerate(selected):
            shutil.copyfile(samples.path(candidate), image_path(partial, image, samples.manifest.format))
        write_grids(partial, len(selected), labels, samples.classes, samples.manifest.format)
        changes = {"count": len(selected), "labels": tuple(labels), "rejection": made_from}
        samples.manifest.model_copy(update=changes).write(partial)
        files.write_json(partial / _RECORD, record.to_dict())
