"""Classifier-based rejection: of many candidates keep those that a classifier finds likeliest to be of their label.

Razavi, van den Oord, Vinyals 2019 (VQ-VAE-2), section 3.3: it gives up diversity for quality.
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

from sampling.evaluation.classifier import Classifier, LabelledSamples, load_classifier
from sampling.output_folder import write_grids
from sampling.processes import processes
from vqvae2 import distributed, files
from vqvae2.data.code_store import CodeStore
from vqvae2.data.samplers import SequentialBatchSampler, load_batches
from vqvae2.errors import UserError
from vqvae2.run_folder import RunFolder


def select(scores: Sequence[float], labels: Sequence[int], fraction: float) -> list[int]:
    """Which candidates to keep, ascending: of each label the best `fraction` by score.

    ⌊N · fraction⌋ are kept in all, at least one. A label with n candidates keeps n · fraction of them, rounded down or
    up; up are the labels with the largest remainders. Equal scores: the earlier candidate is kept.
    """
    counts = Counter(labels)
    shares = {label: count * _exact(fraction) for label, count in counts.items()}
    quotas = {label: math.floor(share) for label, share in shares.items()}
    spare = max(math.floor(len(labels) * _exact(fraction)), min(len(labels), 1)) - sum(quotas.values())
    for label in sorted(shares, key=lambda label: quotas[label] - shares[label])[:spare]:
        quotas[label] += 1
    kept = []
    for candidate in sorted(range(len(labels)), key=lambda candidate: -scores[candidate]):
        if quotas[labels[candidate]]:
            quotas[labels[candidate]] -= 1
            kept.append(candidate)
    return sorted(kept)


def candidates(count: int, fraction: float) -> int:
    """The fewest candidates of which `select` keeps `count`."""
    return math.ceil(count / _exact(fraction))


def _exact(fraction: float) -> Fraction:
    """The decimal that was typed: 0.1 of 30 is 3, and not a little less."""
    return Fraction(str(fraction))


@dataclass(frozen=True)
class Rejection:
    """A classifier that is to keep a fraction of the samples of a run."""

    fraction: float
    classifier: Classifier
    classes: tuple[str, ...]  # of the run

    @classmethod
    def plan(cls, run: Path, fraction: float | None, source: str | None) -> "Rejection | None":
        """What `--keep-fraction` and `--classifier` ask for, None where neither is given.

        Raises UserError, before anything is sampled, where only one is given, the fraction is not in (0, 1], the run
        has no labels, or the classifier cannot judge its classes.
        """
        if fraction is None and source is None:
            return None
        if source is None:
            raise UserError("--keep-fraction: needs --classifier, a torchvision name such as resnet50 or a local file")
        if fraction is None:
            raise UserError("--classifier: needs --keep-fraction, the fraction of candidates to keep, such as 0.1")
        if not 0 < fraction <= 1:
            raise UserError(f"--keep-fraction {fraction}: expected a fraction above 0 and at most 1, such as 0.1")
        classes = CodeStore.open(RunFolder.existing(run).code_store("train")).header.classes
        if not classes:
            raise UserError(
                "--keep-fraction: this run has no class labels (data.labels is `none`), so none to be sure of"
            )
        classifier = load_classifier(source, processes().device or "cpu")
        classifier.columns(classes)
        return cls(fraction, classifier, classes)

    def enlarge(self, count: int, classes: tuple[int, ...]) -> dict[str, Any]:
        """Settings that sample the candidates of `count` images.

        Their labels are those that the images alone would have: with fewer images than classes, the first ones.
        """
        labels = classes or tuple(range(len(self.classes)))
        return {
            "count": candidates(count, self.fraction),
            "classes": labels[:count] if count < len(labels) else classes,
        }

    def keep_best(self, folder: Path, batch_size: int) -> Path:
        """Judge the candidates in `folder`; the folder `accepted` in it, laid out as one that `vqvae2 sample` wrote.

        It holds images/, grid.png, classes.png, manifest.json, and rejection.json, which says who was chosen and how
        sure the classifier was. It is written at once or not at all. Where it holds what was chosen otherwise it is
        kept, and the name is accepted-2 and so on.
        """
        samples = LabelledSamples(folder)
        made_from = {
            "fraction": self.fraction,
            "classifier": Path(self.classifier.source).name,
            "classifier_digest": self.classifier.digest,
            "candidates_digest": files.digest(folder / "manifest.json"),
        }
        accepted = _free_folder(folder / "accepted", made_from)
        if accepted.is_dir():
            return accepted
        scores = self._scores(samples, batch_size)
        if processes().is_main_process:
            _write(accepted, samples, scores, select(scores, samples.labels, self.fraction), made_from)
        processes().wait_for_everyone()
        return accepted

    def _scores(self, samples: LabelledSamples, batch_size: int) -> list[float]:
        """The log-probability of each candidate's label; processes share the work."""
        columns = torch.tensor(self.classifier.columns(samples.classes))
        order = SequentialBatchSampler(len(samples), batch_size, distributed.get_rank(), distributed.get_world_size())
        scores = torch.zeros(len(samples), device=next(self.classifier.network.parameters()).device)
        batches = tqdm(load_batches(samples, order, 0), "judging", len(order), disable=distributed.get_rank() > 0)
        for indices, (pixels, labels) in zip(order, batches, strict=True):
            found = self.classifier.log_probabilities(pixels)
            scores[indices] = found.gather(1, columns[labels].to(found.device)[:, None])[:, 0]
        return distributed.all_reduce_sum(scores).tolist()


def _free_folder(first: Path, made_from: dict[str, Any]) -> Path:
    """The first of `accepted`, `accepted-2`, … that is new or was made from just this."""
    folder, number = first, 1
    while folder.exists() and files.read_json(folder / "rejection.json")["made_from"] != made_from:
        number += 1
        folder = first.with_name(f"{first.name}-{number}")
    return folder


def _write(
    folder: Path, samples: LabelledSamples, scores: list[float], kept: list[int], made_from: dict[str, Any]
) -> None:
    sure = [math.exp(score) for score in scores]
    labels = [samples.labels[candidate] for candidate in kept]
    chosen = [
        {"image": image, "candidate": candidate, "label": label, "probability": sure[candidate]}
        for image, (candidate, label) in enumerate(zip(kept, labels, strict=True))
    ]
    mean = {
        "mean_probability": sum(sure) / len(sure),
        "mean_probability_accepted": sum(sure[candidate] for candidate in kept) / len(kept),
    }
    record = {"made_from": made_from, "candidates": len(sure), "accepted": len(kept), **mean, "chosen": chosen}
    with files.atomic_write(folder) as partial:
        (partial / "images").mkdir(parents=True)
        for image, candidate in enumerate(kept):
            shutil.copyfile(samples.path(candidate), partial / "images" / f"{image:06d}.png")
        write_grids(partial, len(kept), labels, samples.classes)
        manifest = samples.manifest | {"count": len(kept), "labels": labels, "rejection": made_from}
        files.write_json(partial / "manifest.json", manifest)
        files.write_json(partial / "rejection.json", record)
