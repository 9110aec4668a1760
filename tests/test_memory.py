"""Test the memory estimate of incremental decoding, and that a memory limit splits batches without other effects."""

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
def test_decoder_bytes_matches_actual_memory(kind: str, settings: dict[str, Any]) -> None:
    prior = build(size=(8, 6), kind=kind, **settings)

    def actual_bytes(batch: int) -> int:
        given = inputs(prior, batch)
        decoder = prior.incremental_decoder(batch, given["coarser"], given["labels"])
        for row in range(8):
            decoder.begin_row(row)
            for column in range(6):
                decoder.logits(column)
                decoder.set_codes(column, given["codes"][:, row, column])
        with mock.patch.object(IncrementalRowConv, "max_cache_bytes", 0):  # the row caches have been allocated already
            return memory._reachable_bytes(decoder)

    estimated = {batch: decoder_bytes(prior, batch) for batch in (1, 2, 5)}
    assert estimated[5] - estimated[2] == 3 * (estimated[2] - estimated[1]) > 0
    for batch in (2, 5):
        # Small buffers that are initially shared are reallocated during decoding.
        assert estimated[batch] == pytest.approx(actual_bytes(batch), rel=0.1)


def test_transformer_cache_size_is_keys_and_values() -> None:
    prior = build(size=(8, 6), kind="transformer")
    each = decoder_bytes(prior, 3) - decoder_bytes(prior, 2)
    cache = 2 * 2 * 48 * 16 * 4  # layers, keys and values, positions, channels, bytes
    assert cache <= each <= cache + 1024
    noise = 6 * 11 * 4
    gibibytes = (10.5 * (each + noise) + decoder_bytes(prior, 1)) / 2**30
    assert batch_that_fits(prior, 100, False, gibibytes) == 10 + 1
    assert batch_that_fits(prior, 100, True, gibibytes) == 5
    assert batch_that_fits(prior, 3, False, gibibytes) == batch_that_fits(prior, 3, False, None) == 3


def test_memory_limit_does_not_change_the_images(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    batches: list[int] = []
    sample_codes = VQVAE2Pipeline.sample_codes

    def recording(self: VQVAE2Pipeline, images: list[int], *rest: Any, **options: Any) -> Any:
        batches.append(len(images))
        return sample_codes(self, images, *rest, **options)

    monkeypatch.setattr(VQVAE2Pipeline, "sample_codes", recording)
    config = SamplingConfig(count=5, batch_size=5)
    expected = contents(sample_run(finished_run, config, tmp_path / "expected") / "images")
    assert batches == [5]
    tight = sample_run(finished_run, config.model_copy(update={"memory": 1e-9}), tmp_path / "tight")
    assert batches == [5] + 5 * [1]
    assert contents(tight / "images") == expected
    pipeline = VQVAE2Pipeline.from_pretrained(finished_run)
    each = max(decoder_bytes(prior, 2) for prior in pipeline.priors)
    assert 1 < pipeline.batch_that_fits(1000, SamplingParams(), 20 * each / 2**30) < 100
    summary = json.loads((tight / "summary.json").read_text())
    assert summary["images"] == 5
    assert summary["images_per_second"] > 0
    assert torch.isfinite(torch.tensor(summary["seconds"]))


def test_unknown_free_memory_does_not_limit_the_batch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    prior = build(size=(8, 6), kind="pixelsnail")
    for content in (None, "MemTotal: 100 kB\n", ""):  # no file, as on macOS, or one without the value
        if content is not None:
            (tmp_path / "meminfo").write_text(content)
        monkeypatch.setattr(memory, "Path", lambda _: tmp_path / "meminfo")
        assert memory.free_bytes(torch.device("cpu")) == float("inf")
        assert batch_that_fits(prior, 100, False, None) == 100
