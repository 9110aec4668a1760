"""Test the autoencoder: shapes for any levels, strides and sizes, decoding, gradients, and weights files."""

from pathlib import Path

import pytest
import torch

from vqvae2 import checkpoint
from vqvae2.errors import UserError
from vqvae2.models import Autoencoder, AutoencoderConfig, LevelConfig
from vqvae2.models.blocks import make_decoder, make_encoder, prime_factors
from vqvae2.quantizers import EMAConfig, FSQConfig, GradientConfig


def small(*strides: int, size: tuple[int, int] = (32, 32), channels: int = 3) -> Autoencoder:
    levels = tuple(
        LevelConfig(
            stride=stride,
            quantizer=EMAConfig(codebook_size=9, code_dim=4 + i)
            if i % 2
            else GradientConfig(codebook_size=7, code_dim=4 + i, kmeans_init=False),
        )
        for i, stride in enumerate(strides)
    )
    torch.manual_seed(0)
    config = AutoencoderConfig(levels=levels, channels=8, residual_channels=4, residual_layers=1)
    return config.build(size, channels).eval()


@pytest.mark.parametrize(
    ("strides", "size", "channels"),
    [
        ((4,), (32, 32), 3),
        ((4, 2), (32, 32), 3),
        ((2, 2, 2), (16, 24), 1),
        ((3, 2), (24, 18), 4),
        ((1, 2), (6, 10), 3),
        ((8, 1, 2), (32, 16), 3),
        ((2, 2, 2, 3), (24, 48), 3),
        ((6, 5), (60, 30), 3),
    ],
)
def test_encode_and_decode_shapes(strides: tuple[int, ...], size: tuple[int, int], channels: int) -> None:
    model = small(*strides, size=size, channels=channels)
    images = torch.rand(2, channels, *size) * 2 - 1
    codes = model.encode(images)
    height, width = size
    for level, spec, stride in zip(codes, model.map_specs, strides, strict=True):
        height, width = height // stride, width // stride
        assert level.shape == (2, height, width)
        assert spec.shape == (height, width)
        assert level.dtype == torch.int64
        assert 0 <= level.min() <= level.max() < spec.codebook_size
    reconstruction = model.reconstruct(images)
    assert reconstruction.shape == images.shape
    assert reconstruction.abs().max() <= 1
    torch.testing.assert_close(model.decode(codes), reconstruction, atol=0, rtol=0)


def test_bottom_is_conditioned_on_top_and_decoder_uses_every_level() -> None:
    model = small(4, 2, 2)
    images = torch.rand(1, 3, 32, 32) * 2 - 1
    codes = model.encode(images)
    whole = model.decode(codes)
    for index in range(3):
        changed = list(codes)
        changed[index] = (changed[index] + 1) % model.map_specs[index].codebook_size
        assert not torch.equal(model.decode(tuple(changed)), whole), f"level {index} affects the image"
    features = model.pre_quant_convs[0].weight.shape[1]
    assert features == 8 + model.map_specs[1].codebook_size - 9 + 5, (
        "the bottom pre-quantization convolution takes features and the decoded coarser level"
    )


def test_levels_without_dropout_are_replaced_by_their_mean() -> None:
    model = small(4, 2)
    codes = model.encode(torch.rand(1, 3, 32, 32) * 2 - 1)
    assert torch.equal(model.decode(codes, ["top", "bottom"]), model.decode(codes))
    bottom, top = (quantizer.lookup(level) for quantizer, level in zip(model.quantizers, codes, strict=True))
    for levels, features in (
        (["top"], (bottom.mean((2, 3), keepdim=True).expand_as(bottom), top)),
        (["bottom"], (bottom, top.mean((2, 3), keepdim=True).expand_as(top))),
    ):
        assert torch.equal(model.decode(codes, levels), model.decode_features(features).clamp(-1, 1))
    with pytest.raises(ValueError, match="levels must be some of bottom, top, got middle"):
        model.decode(codes, ["middle"])


def test_gradients_reach_every_weight() -> None:
    model = small(4, 2, 2).train()
    result = model(torch.rand(2, 3, 32, 32))
    (result.images.square().mean() + sum(level.loss for level in result.levels)).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


def test_indivisible_sizes_raise_and_suggest_valid_sizes() -> None:
    with pytest.raises(UserError, match=r"width 36 is not divisible by 8.* 32 or 40"):
        small(4, 2, size=(32, 36))
    with pytest.raises(UserError, match=r"height 4 is not divisible by 8.* 8 or 16"):
        small(4, 2, size=(4, 32))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.uint16, torch.int32])
def test_narrow_codes_are_decoded_as_code_stores_deliver_them(dtype: torch.dtype) -> None:
    model = small(4, 2)
    codes = model.encode(torch.zeros(1, 3, 32, 32))
    assert torch.equal(model.decode(tuple(level.to(dtype) for level in codes)), model.decode(codes))


def test_invalid_images_and_codes_raise() -> None:
    model = small(4, 2)
    with pytest.raises(ValueError, match=r"expected images \(batch, 3, 32, 32\), got \(1, 1, 32, 32\)"):
        model(torch.zeros(1, 1, 32, 32))
    bottom, top = model.encode(torch.zeros(1, 3, 32, 32))
    with pytest.raises(ValueError, match="finest first"):
        model.decode((top, bottom))
    with pytest.raises(ValueError, match=r"level 1: codes must be in \[0, 9\)"):
        model.decode((bottom, top + 9))


def test_save_and_load_round_trip(tmp_path: Path) -> None:
    model = small(4, 2)
    path = tmp_path / "model.safetensors"
    model.save(path, data="somewhere")
    loaded = Autoencoder.load(path)
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(loaded.reconstruct(images), model.reconstruct(images))
    assert loaded.config == model.config
    assert not loaded.training
    assert len(str(loaded.digest)) == 64


def test_save_and_load_round_trip_with_every_quantizer(tmp_path: Path) -> None:
    levels = (
        LevelConfig(stride=4, quantizer=FSQConfig(grid=(4, 3), code_dim=5)),
        LevelConfig(quantizer=GradientConfig()),
    )
    model = AutoencoderConfig(levels=levels, channels=8, residual_channels=4).build((16, 16)).eval()
    model.save(tmp_path / "model.safetensors")
    images = torch.rand(2, 3, 16, 16)
    loaded = Autoencoder.load(tmp_path / "model.safetensors")
    assert torch.equal(loaded.reconstruct(images), model.reconstruct(images))
    assert [level.codebook_size for level in loaded.map_specs] == [12, 512]


def test_missing_corrupted_and_mismatched_files_raise(tmp_path: Path) -> None:
    model = small(4, 2)
    path = tmp_path / "model.safetensors"
    model.save(path)
    tensors, metadata = checkpoint.load(path)
    cases = {
        "missing": (r"no such weights file", None),
        "truncated": (r"corrupted weights file", path.read_bytes()[:-100]),
        "text": (r"corrupted weights file", b"not weights"),
    }
    for name, (message, content) in cases.items():
        other = tmp_path / name
        if content is not None:
            other.write_bytes(content)
        with pytest.raises(UserError, match=message):
            Autoencoder.load(other)
    first = next(iter(tensors))
    for change, message in (
        ({name: tensor for name, tensor in tensors.items() if name != first}, f"missing weight `{first}`"),
        (tensors | {"extra": torch.zeros(1)}, "unexpected weight `extra`"),
        (tensors | {first: torch.zeros(2, 2)}, f"`{first}` has shape"),
    ):
        checkpoint.save(path, change, metadata)
        with pytest.raises(UserError, match=message):
            Autoencoder.load(path)


@pytest.mark.parametrize("stride", range(1, 13))
def test_encoder_and_decoder_blocks_support_any_stride(stride: int) -> None:
    x = torch.zeros(1, 3, 2 * stride, 3 * stride)
    small_map = make_encoder(3, 8, stride, 4, 1)(x)
    assert small_map.shape == (1, 8, 2, 3)
    assert make_decoder(8, 8, 5, stride, 4, 1)(small_map).shape == (1, 5, 2 * stride, 3 * stride)


def test_prime_factors() -> None:
    assert prime_factors(1) == []
    assert prime_factors(12) == [2, 2, 3]
    assert prime_factors(35) == [5, 7]
