"""Test wavefront sampling against the full forward pass and against sampling in raster order."""

from typing import Any
from unittest import mock

import pytest
import torch

from sampling import guidance
from sampling.params import LevelSamplingParams
from sampling.sample_level import Noise, PartialCodes, sample_level
from tests.test_priors import build, inputs
from vqvae2.priors import Prior, toom_cook
from vqvae2.priors.base import WavefrontShape, wavefront_logits

CASES: list[dict[str, Any]] = [
    {"size": (8, 9)},
    {"size": (9, 33), "kernel": 3},
    {"size": (5, 38), "kernel": 5, "layers": 2},
    {"size": (11, 40), "kernel": 7},
    {"size": (3, 50), "kernel": 5},
    {"size": (7, 35), "coarser": ((1, 1),), "classes": 3},
    {"size": (6, 36), "coarser": ((3, 18),), "classes": 3, "kernel": 5},
    {"size": (8, 32), "coarser": ((4, 16), (2, 8)), "output_layers": 2},
    {"size": (6, 10), "classes": 2, "output_layers": 1},
]


@pytest.mark.parametrize("settings", CASES, ids=str)
@pytest.mark.parametrize("min_product", [1, 10**9], ids=["tiles", "direct"])
def test_wavefront_logits_match_the_full_pass(
    settings: dict[str, Any], min_product: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(toom_cook, "_MIN_CHANNEL_PRODUCT", min_product)
    prior = build(attention=False, **settings)
    given = inputs(prior, batch=3)
    found = wavefront_logits(prior, **given)
    assert found is not None
    with torch.no_grad():
        torch.testing.assert_close(found, prior(**given), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("settings", CASES, ids=str)
@pytest.mark.parametrize(
    "params",
    [LevelSamplingParams(), LevelSamplingParams(temperature=0.7, top_k=5), LevelSamplingParams(top_p=0.8)],
    ids=str,
)
@pytest.mark.parametrize("partial", [False, True], ids=["all", "partial"])
def test_codes_equal_those_in_raster_order(
    settings: dict[str, Any], params: LevelSamplingParams, partial: bool
) -> None:
    prior = build(attention=False, **settings)
    given = inputs(prior, batch=3)
    known = None
    if partial:
        keep = torch.rand(given["codes"].shape, generator=torch.Generator().manual_seed(2)) < 0.5
        keep[:, -1] = True
        known = PartialCodes(given["codes"], keep)
    for scale in (1.0, 2.5) if prior.spec.num_classes else (1.0,):
        scaled = params.model_copy(update={"guidance_scale": scale})
        found, expected = (sample(prior, given, scaled, known, wavefront=wavefront) for wavefront in (True, False))
        assert torch.equal(found, expected)


def sample(
    prior: Prior, given: dict[str, Any], params: LevelSamplingParams, known: PartialCodes | None, wavefront: bool
) -> torch.Tensor:
    """Sample with or without the wavefront decoder, and check that it is used."""
    decoders = []
    original = type(prior).wavefront_decoder

    def record(self: Prior, *arguments: Any) -> Any:
        decoders.append(original(self, *arguments) if wavefront else None)
        return decoders[-1]

    done: list[int] = []
    with mock.patch.object(type(prior), "wavefront_decoder", record):
        codes = sample_level(
            prior, Noise(4, range(3), 0), params, given["coarser"], given["labels"], known, done.append
        )
    assert len(decoders) == 1 and (decoders[0] is not None) == wavefront
    assert sum(done) == codes.numel()
    return codes


def test_number_of_steps() -> None:
    shape = WavefrontShape(batch=1, height=64, width=64, skew=3)
    waves = list(shape.waves())
    assert len(waves) == shape.num_steps == 64 + 3 * 63
    positions = [(row, wave.step - 3 * row) for wave in waves for row in range(wave.first, wave.end)]
    assert sorted(positions) == [(row, column) for row in range(64) for column in range(64)]


@pytest.mark.parametrize(
    "settings", [{"attention": True, "size": (9, 9)}, {"attention": False, "size": (9, 1)}], ids=["attention", "narrow"]
)
def test_no_wavefront_decoder_if_it_is_not_valid_or_not_faster(settings: dict[str, Any]) -> None:
    prior = build(**settings)
    assert prior.wavefront_decoder(2, 9) is None
    assert not isinstance(guidance.make_decoder(prior, 2, 9, (), None), guidance.WavefrontDecoder)
