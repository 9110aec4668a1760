"""Memory of a walk: the estimate is what a real one holds, and what does not fit is split, with no other change."""

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from sampling import memory
from sampling.memory import batch_that_fits, decoder_bytes
from sampling.params import SamplingParams
from sampling.pipeline import VQVAE2Pipeline
from sampling.sample import SamplingConfig, sample_run
from tests.test_commands import contents
from tests.test_priors import build, inputs
from vqvae2.priors.toom_cook import IncrementalRowConv

KINDS = ["pixelsnail", "pixelcnn", "transformer"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("settings", [{}, {"coarser": ((4, 3),), "classes": 3}], ids=["alone", "conditioned"])
def test_the_estimate_is_what_a_whole_walk_holds(kind: str, settings: dict[str, Any]) -> None:
    prior = build(size=(8, 6), kind=kind, **settings)

    def held(batch: int) -> int:
        given = inputs(prior, batch)
        steps = prior.incremental_decoder(batch, given["coarser"], given["labels"])
        for row in range(8):
            steps.begin_row(row)
            for column in range(6):
                steps.logits(column)
                steps.set_codes(column, given["codes"][:, row, column])
        with mock.patch.object(IncrementalRowConv, "max_cache_bytes", 0):  # the cached rows exist by now
            return memory._reachable_bytes(steps)

    found = {batch: decoder_bytes(prior, batch) for batch in (1, 2, 5)}
    assert found[5] - found[2] == 3 * (found[2] - found[1]) > 0
    for batch in (2, 5):
        # What differs is small: a walk makes new what it only reads in the beginning.
        assert found[batch] == pytest.approx(held(batch), rel=0.1)


def test_a_transformers_cache_is_its_keys_and_values() -> None:
    prior = build(size=(8, 6), kind="transformer")
    each = decoder_bytes(prior, 3) - decoder_bytes(prior, 2)
    cache = 2 * 2 * 48 * 16 * 4  # layers, keys and values, positions, channels, bytes
    assert cache <= each <= cache + 1024
    noise = 6 * 11 * 4
    gibibytes = (10.5 * (each + noise) + decoder_bytes(prior, 1)) / 2**30
    assert batch_that_fits(prior, 100, False, gibibytes) == 10 + 1
    assert batch_that_fits(prior, 100, True, gibibytes) == 5
    assert batch_that_fits(prior, 3, False, gibibytes) == batch_that_fits(prior, 3, False, None) == 3


def test_images_are_the_same_however_small_the_memory(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[int] = []
    sample_codes = VQVAE2Pipeline.sample_codes

    def watched(self: VQVAE2Pipeline, images: list[int], *rest: Any, **options: Any) -> Any:
        batches.append(len(images))
        return sample_codes(self, images, *rest, **options)

    monkeypatch.setattr(VQVAE2Pipeline, "sample_codes", watched)
    config = SamplingConfig(count=5, batch_size=5)
    whole = contents(sample_run(finished_run, config, tmp_path / "whole") / "images")
    assert batches == [5]
    tight = sample_run(finished_run, config.model_copy(update={"memory": 1e-9}), tmp_path / "tight")
    assert batches == [5] + 5 * [1]
    assert contents(tight / "images") == whole
    two = VQVAE2Pipeline.from_pretrained(finished_run)
    each = max(decoder_bytes(prior, 2) for prior in two.priors)
    assert 1 < two.batch_that_fits(1000, SamplingParams(), 20 * each / 2**30) < 100
    summary = json.loads((tight / "summary.json").read_text())
    assert summary["images"] == 5
    assert summary["images_per_second"] > 0
    assert torch.isfinite(torch.tensor(summary["seconds"]))
