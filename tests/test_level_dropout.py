"""Test level dropout: which levels are dropped, decoding of the coarser levels, validation, previews and the report."""

import json
import re
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.conftest import TINY
from vqvae2.__main__ import main
from vqvae2.models import Autoencoder, AutoencoderConfig, LevelConfig
from vqvae2.quantizers import GradientConfig


def with_dropout(*dropouts: float) -> Autoencoder:
    levels = tuple(
        LevelConfig(quantizer=GradientConfig(codebook_size=7, code_dim=4, kmeans_init=False), dropout=dropout)
        for dropout in dropouts
    )
    torch.manual_seed(0)
    return AutoencoderConfig(levels=levels, channels=8, residual_channels=4, residual_layers=1).build((32, 32))


@pytest.mark.parametrize(
    ("dropouts", "expected"),
    [
        # Probability that an image is decoded from 1, 2, … levels: a level is only kept if the coarser ones are.
        ((0.3, 0.0), (0.3, 0.7)),
        ((0.25, 0.5, 0.0), (0.5, 0.5 * 0.25, 0.5 * 0.75)),
        ((0.0, 0.5, 0.0), (0.5, 0.0, 0.5)),
    ],
)
def test_level_dropout_zeros_a_level_and_all_finer_ones(
    dropouts: tuple[float, ...], expected: tuple[float, ...]
) -> None:
    model = with_dropout(*dropouts)
    maps = model._drop_levels([torch.ones(20_000, 1, 1, 1) for _ in dropouts])
    kept = torch.stack([features.flatten() for features in maps])  # finest first
    assert ((kept == 0) | (kept == 1)).all()
    assert (kept.diff(dim=0) >= 0).all()
    shares = [(kept.sum(0) == count + 1).float().mean().item() for count in range(len(dropouts))]
    assert shares == pytest.approx(expected, abs=0.015)


def test_level_dropout_affects_only_the_decoding_in_training() -> None:
    model = with_dropout(0.5, 0.5, 0.0)
    images = torch.rand(16, 3, 32, 32) * 2 - 1
    torch.manual_seed(1)
    trained = model.train()(images)
    evaluated = model.eval()(images)
    for level, other in zip(trained.levels, evaluated.levels, strict=True):
        assert torch.equal(level.codes, other.codes)
    codes = tuple(level.codes for level in evaluated.levels)
    progressive = [model.decode(codes, levels) for levels in model.config.progressive_levels]
    torch.testing.assert_close(progressive[-1], evaluated.images.clamp(-1, 1))
    decoded_from = [
        [number for number, decoded in enumerate(progressive) if torch.allclose(image, decoded[index], atol=1e-5)]
        for index, image in enumerate(trained.images.clamp(-1, 1))
    ]
    assert {tuple(found) for found in decoded_from} == {(0,), (1,), (2,)}, "each image is decoded from some levels"


def test_progressive_levels() -> None:
    assert with_dropout(0.0, 0.0).config.progressive_levels == (("bottom", "top"),)
    assert with_dropout(0.3, 0.0).config.progressive_levels == (("top",), ("bottom", "top"))
    assert with_dropout(0.3, 0.2, 0.0).config.progressive_levels == (
        ("top",),
        ("middle", "top"),
        ("bottom", "middle", "top"),
    )
    assert with_dropout(0.3, 0.0, 0.0).config.progressive_levels == (("middle", "top"), ("bottom", "middle", "top"))
    with pytest.raises(ValueError, match="coarsest level, the last in the list, cannot have dropout"):
        with_dropout(0.0, 0.1)


def test_dropped_level_gets_no_gradient() -> None:
    model = with_dropout(0.5, 0.0).train()
    images = torch.rand(1, 3, 32, 32) * 2 - 1
    torch.manual_seed(next(seed for seed in range(100) if is_dropped(seed)))
    model(images).images.square().mean().backward()
    names = {
        name for name, parameter in model.named_parameters() if parameter.grad is not None and parameter.grad.any()
    }
    assert any(name.startswith("pre_quant_convs.1") for name in names)
    assert not any(name.startswith("pre_quant_convs.0") for name in names), "no gradient through a dropped level"


def is_dropped(seed: int) -> bool:
    torch.manual_seed(seed)
    return bool(torch.rand(1, 1, 1, 1) < 0.5)


def test_run_with_level_dropout_shows_progressive_reconstructions(tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(TINY.replace("{stride: 4,", "{stride: 4, dropout: 0.3,"))
    run = tmp_path / "run"
    assert main(["train-autoencoder", str(config), "--run", str(run)]) == 0
    values = json.loads((run / "autoencoder" / "summary.json").read_text())["validation"]
    assert values["psnr_top"] > 5
    assert values["psnr_top"] != values["psnr"]
    assert "psnr_bottom" not in values
    (preview,) = (run / "autoencoder" / "previews").glob("*6.png")
    with Image.open(preview) as grid:
        assert grid.height == 2 * 3 * (96 + 2) + 2, "two blocks of original, top, and all levels"
    assert main(["report", str(run)]) == 0
    text = re.sub(r"\s+", " ", (run / "report.html").read_text())
    assert "Held-out images, each above its reconstructions from the levels top, top + bottom, after 6 steps" in text
    out = tmp_path / "out.png"
    assert main(["reconstruct", str(run), str(preview), "--levels", "--out", str(out)]) == 0
