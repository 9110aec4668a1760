"""Test wavefront sampling against the full forward pass and against sampling in raster order."""

from typing import Any
from unittest import mock

import pytest
import torch

from sampling import guidance
from sampling.logits import sample_codes
from sampling.params import LevelSamplingParams
from sampling.sample_level import Noise, PartialCodes, sample_level
from tests.decoders import wavefront_logits
from tests.test_priors import build, inputs
from vqvae2.priors import PixelCNN, PixelSNAIL, Prior, Transformer, toom_cook
from vqvae2.priors.base import WavefrontShape

CASES: list[dict[str, Any]] = [
    {"size": (8, 9)},
    {"size": (11, 12), "kernel": 7},
    {"size": (3, 20), "kernel": 5},
    {"size": (6, 10), "classes": 2, "output_layers": 1},
]
TILED_CASES: list[dict[str, Any]] = [
    {"size": (9, 65), "kernel": 3},
    {"size": (5, 70), "kernel": 5, "layers": 2},
    {"size": (7, 67), "coarser": ((1, 1),), "classes": 3},
    {"size": (6, 66), "coarser": ((3, 33),), "classes": 3, "kernel": 5},
    {"size": (8, 64), "coarser": ((4, 32), (2, 8)), "output_layers": 2},
]


@pytest.mark.parametrize(
    ("settings", "tiles"), [(case, False) for case in CASES + TILED_CASES] + [(case, True) for case in TILED_CASES]
)
def test_wavefront_logits_match_the_full_pass(
    settings: dict[str, Any], tiles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(toom_cook, "_MIN_CHANNEL_PRODUCT", 1 if tiles else 10**9)
    prior = build(attention=False, **settings)
    given = inputs(prior, batch=3)
    decoder = prior.wavefront_decoder(3, settings["size"][0], given["coarser"], given["labels"])
    assert decoder is not None
    assert decoder.shape.skew == (8 if tiles else settings.get("kernel", 3) // 2 + 1)
    found = wavefront_logits(prior, **given)
    assert found is not None
    with torch.no_grad():
        torch.testing.assert_close(found, prior(**given), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("settings", CASES + TILED_CASES, ids=str)
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
    assert [decoder is not None for decoder in decoders] == [wavefront]
    assert sum(done) == codes.numel()
    return codes


def test_number_of_steps() -> None:
    shape = WavefrontShape(batch=1, height=64, width=64, skew=3)
    waves = list(shape.waves())
    assert len(waves) == shape.num_steps == 64 + 3 * 63
    positions = [(int(r), int(c)) for wave in waves for r, c in zip(*shape.index_tensors(wave, "cpu"), strict=True)]
    assert sorted(positions) == [(row, column) for row in range(64) for column in range(64)]


@pytest.mark.parametrize(
    ("settings", "tiles"),
    [
        ({"attention": True, "size": (9, 9)}, False),
        ({"attention": False, "size": (9, 1)}, False),
        ({"attention": False, "size": (9, 32)}, True),
    ],
    ids=["attention", "narrow", "too few rows in flight"],
)
def test_no_wavefront_decoder_if_it_is_not_valid_or_not_faster(
    settings: dict[str, Any], tiles: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if tiles:
        monkeypatch.setattr(toom_cook, "_MIN_CHANNEL_PRODUCT", 1)
    prior = build(**settings)
    assert prior.wavefront_decoder(2, 9) is None
    assert not isinstance(guidance.make_decoder(prior, 2, 9, (), None), guidance.WavefrontDecoder)


ATTENTION: list[dict[str, Any]] = [
    {"size": (6, 5)},
    {"size": (5, 9), "kernel": 5, "attention": (1,), "coarser": ((1, 3),)},
    {"size": (9, 1), "classes": 2},
    {"size": (1, 6)},
    {"size": (8, 6), "coarser": ((4, 3), (2, 1)), "classes": 3, "output_layers": 1},
    *(
        {"kind": "transformer"} | settings
        for settings in (
            {"size": (6, 5)},
            {"size": (5, 9), "coarser": ((1, 3),)},
            {"size": (9, 1), "classes": 2},
            {"size": (1, 6)},
            {"size": (8, 6), "coarser": ((4, 3), (2, 1)), "classes": 3},
        )
    ),
]


@pytest.mark.parametrize("settings", ATTENTION, ids=str)
def test_attention_in_wavefront_order_is_causal_and_matches_the_full_pass(settings: dict[str, Any]) -> None:
    prior = build(attention_order="wavefront", **settings)
    given = inputs(prior, batch=2)
    found = wavefront_logits(prior, **given)
    assert found is not None
    with torch.no_grad():
        expected = prior(**given)
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
        height, width = prior.spec.level.shape
        skew = skew_of(prior)
        steps = torch.arange(width) + skew * torch.arange(height)[:, None]
        for row in range(height):
            for column in range(width):
                changed = given["codes"].clone()
                changed[:, row, column] = (changed[:, row, column] + 1) % prior.spec.level.codebook_size
                differs = (prior(**given | {"codes": changed}) - expected).abs().amax((0, 1)) > 0
                assert not differs[steps <= steps[row, column]].any()
                if settings.get("attention", True) is True:
                    # Attention includes positions whose input is the changed code: the next one in its row.
                    reached = steps > steps[row, column]
                    assert column + 1 == width or differs[reached].all()


def skew_of(prior: PixelSNAIL | PixelCNN | Transformer) -> int:
    """Return by how many columns a row is behind the row above it in wavefront order."""
    return 2 if isinstance(prior, Transformer) else prior.config.kernel // 2 + 1


def test_transformer_in_wavefront_order_depends_on_the_last_column() -> None:
    prior = build(size=(4, 5), kind="transformer", attention_order="wavefront")
    codes = inputs(prior, batch=1)["codes"]
    changed = codes.clone()
    changed[0, 1, 4] = (changed[0, 1, 4] + 1) % prior.spec.level.codebook_size
    with torch.no_grad():
        differs = (prior(changed) - prior(codes))[0].abs().amax(0) > 0
    steps = torch.arange(5) + 2 * torch.arange(4)[:, None]
    assert torch.equal(differs, steps >= steps[2, 4])  # the code above is an input, the code to the left is not


@pytest.mark.parametrize("settings", ATTENTION, ids=str)
@pytest.mark.parametrize("partial", [False, True], ids=["all", "partial"])
def test_wavefront_attention_samples_what_the_full_pass_gives(settings: dict[str, Any], partial: bool) -> None:
    prior = build(attention_order="wavefront", **settings)
    height, width = prior.spec.level.shape
    given = inputs(prior, batch=3)
    keep = torch.zeros(3, height, width, dtype=torch.bool)
    if partial:
        keep = torch.rand(keep.shape, generator=torch.Generator().manual_seed(2)) < 0.5
        keep[:, -1] = True  # codes after the last sampled row still influence those above it
    known = PartialCodes(given["codes"], keep)
    found = sample_level(prior, Noise(4, range(3), 0), None, given["coarser"], given["labels"], known)
    uniform = Noise(4, range(3), 0).draw(height, width)
    codes = torch.where(keep, given["codes"], 0)
    skew = skew_of(prior)
    for step in range(width + skew * (height - 1)):
        with torch.no_grad():
            logits = prior(codes, given["coarser"], given["labels"])
        for row in range(height):
            if 0 <= (column := step - skew * row) < width:
                sampled = sample_codes(logits[:, :, row, column], uniform[:, row, column], LevelSamplingParams())
                codes[:, row, column] = torch.where(keep[:, row, column], codes[:, row, column], sampled)
    assert torch.equal(found, codes)
