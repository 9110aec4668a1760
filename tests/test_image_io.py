"""Test decoding: conversion of every image mode to 8-bit channels, orientation, cropping, and unreadable files."""

import struct
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features
from PIL.PngImagePlugin import PngInfo

from vqvae2.data.image_io import UnreadableImageError, read_image
from vqvae2.data.sources.base import is_image

RAMP = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)


def png16(path: Path, pixels: np.ndarray) -> Path:
    """Write a 16-bit PNG of gray (H, W) or RGB (H, W, 3) pixels. Pillow cannot write 16-bit RGB."""
    height, width = pixels.shape[:2]
    rows = pixels.astype(">u2").reshape(height, -1)
    data = zlib.compress(b"".join(b"\0" + row.tobytes() for row in rows))
    header = struct.pack(">IIBBBBB", width, height, 16, 2 if pixels.ndim == 3 else 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", data), (b"IEND", b"")]
    body = b"".join(
        struct.pack(">I", len(part)) + kind + part + struct.pack(">I", zlib.crc32(kind + part)) for kind, part in chunks
    )
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + body)
    return path


@pytest.mark.parametrize("kind", ["png gray", "png rgb", "tiff gray", "pgm"])
def test_16_bit_images_are_scaled_not_clipped(tmp_path: Path, kind: str) -> None:
    if kind == "png gray":
        path = png16(tmp_path / "a.png", RAMP)
    elif kind == "png rgb":
        path = png16(tmp_path / "a.png", np.stack([RAMP] * 3, -1))
    elif kind == "tiff gray":
        path = tmp_path / "a.tif"
        Image.fromarray(RAMP).save(path)
    else:
        path = tmp_path / "a.pgm"
        path.write_bytes(b"P5 8 8 65535\n" + RAMP.astype(">u2").tobytes())
    found = read_image(path, (8, 8))
    np.testing.assert_allclose(found[..., 0], RAMP / 257, atol=1)
    assert (found.min(), found.max()) == (0, 255)
    assert (found == found[..., :1]).all()


def test_float_and_32_bit_images_raise(tmp_path: Path) -> None:
    Image.fromarray(np.full((8, 8), 0.5, np.float32)).save(tmp_path / "float.tif")
    Image.fromarray(np.full((8, 8), 70_000, np.int32)).save(tmp_path / "wide.tif")
    with pytest.raises(UnreadableImageError, match=r"float\.tif: .*floating-point"):
        read_image(tmp_path / "float.tif", (8, 8))
    with pytest.raises(UnreadableImageError, match=r"wide\.tif: .*more than 16 bits"):
        read_image(tmp_path / "wide.tif", (8, 8))


def palette(path: Path, **options: object) -> Path:
    image = Image.new("P", (8, 8), 1)
    image.putpalette([0, 0, 0, 200, 100, 50])
    image.paste(0, (0, 0, 4, 8))
    image.save(path, **options)
    return path


def test_palette_images_with_and_without_transparency(tmp_path: Path) -> None:
    opaque = read_image(palette(tmp_path / "a.png"), (8, 8))
    assert (opaque[:, :4] == 0).all()
    assert (opaque[:, 4:] == (200, 100, 50)).all()
    path = palette(tmp_path / "b.png", transparency=0)
    assert (read_image(path, (8, 8))[:, :4] == 255).all()
    kept = read_image(path, (8, 8), 4)
    assert (kept[:, :4, 3] == 0).all()
    assert (kept[:, 4:] == (200, 100, 50, 255)).all()


@pytest.mark.parametrize("mode", ["RGBA", "LA"])
def test_transparency_is_composited_over_white_or_kept(tmp_path: Path, mode: str) -> None:
    image = Image.new("RGBA", (8, 8), (100, 100, 100, 255))
    image.paste((100, 100, 100, 0), (0, 0, 4, 8))
    image.putpixel((7, 7), (0, 0, 0, 128))
    image.convert(mode).save(tmp_path / "a.png")
    for channels in (1, 3):
        found = read_image(tmp_path / "a.png", (8, 8), channels)
        assert (found[:, :4] == 255).all()
        assert (found[:7, 4:] == 100).all()
        assert abs(int(found[7, 7, 0]) - 127) <= 1
    kept = read_image(tmp_path / "a.png", (8, 8), 4)
    assert (kept[0, 0, 3], kept[0, 7, 3], kept[7, 7, 3]) == (0, 255, 128)


def test_cmyk_is_converted(tmp_path: Path) -> None:
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "red.jpg", quality=100)
    assert np.abs(read_image(tmp_path / "red.jpg", (16, 16)).astype(int) - (255, 0, 0)).max() < 6
    Image.new("CMYK", (16, 16), (0, 0, 0, 255)).save(tmp_path / "black.tif")
    assert read_image(tmp_path / "black.tif", (16, 16)).max() == 0


@pytest.mark.parametrize("extension", ["webp", "png", "gif", "tif"])
def test_first_frame_of_an_animation_is_read(tmp_path: Path, extension: str) -> None:
    frames = [Image.new("RGB", (16, 16), color) for color in ((255, 0, 0), (0, 0, 255))]
    options = {"lossless": True} if extension == "webp" else {}
    frames[0].save(tmp_path / f"a.{extension}", save_all=True, append_images=frames[1:], **options)
    assert (read_image(tmp_path / f"a.{extension}", (16, 16)) == (255, 0, 0)).all()


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_exif_orientation_is_applied_to_jpegs(tmp_path: Path, orientation: int) -> None:
    upright = np.zeros((64, 32), np.uint8)
    upright[:32, :16], upright[32:, :16], upright[:32, 16:] = 250, 150, 50
    back = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # the Transpose that undoes each orientation
    image = Image.fromarray(upright).convert("RGB")
    if orientation > 1:
        image = image.transpose(Image.Transpose(back[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "a.jpg", exif=exif, quality=95)
    found = read_image(tmp_path / "a.jpg", (16, 8), 1)[..., 0].astype(int)
    corners = found[2, 1], found[13, 1], found[2, 6], found[13, 6]
    np.testing.assert_allclose(corners, (250, 150, 50, 0), atol=6)


@pytest.mark.parametrize("limit", [50, 30], ids=["Pillow warns", "Pillow raises"])
def test_decompression_bombs_raise_without_warnings(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    Image.new("L", (8, 9)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)  # Pillow's own limit is raised to `max_pixels` if lower
    with warnings.catch_warnings(record=True) as leaked:
        warnings.simplefilter("always")
        with pytest.raises(UnreadableImageError, match=rf"bomb\.png: .*more than data.max_pixels = {limit} pixels"):
            read_image(tmp_path / "bomb.png", (8, 8), max_pixels=limit)
        assert read_image(tmp_path / "bomb.png", (8, 8), max_pixels=72).shape == (8, 8, 3)
    assert leaked == []


def test_corrupted_metadata_gives_no_warning(tmp_path: Path) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.jpg", exif=b"Exif\0\0II*\0\x08\0\0\0\xff\xff\x12\x01")
    assert read_image(tmp_path / "a.jpg", (8, 8)).shape == (8, 8, 3)


def test_crop_at_full_scale_is_pixel_exact(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (16, 21, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    for where, left in (((0.0, 0.0), 0), ((0.5, 0.5), 3), ((1.0, 1.0), 5)):
        assert (read_image(tmp_path / "a.png", (16, 16), crop_position=where) == pixels[:, left : left + 16]).all()


@pytest.mark.parametrize("where", [(0.0, 0.0), (0.3, 0.7), (1.0, 1.0)])
def test_crops_stay_within_the_image(where: tuple[float, float]) -> None:
    for width in range(230, 250):  # 97 / (97 / 233) > 233 in floating point; so is 245
        assert read_image(Image.new("L", (width, 700)), (96, 97), 1, where).shape == (96, 97, 1)


def test_missing_file_raises_file_not_found(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_image(tmp_path / "missing.png", (8, 8))


def test_png_with_large_metadata_is_readable(tmp_path: Path) -> None:
    metadata = PngInfo()
    metadata.add_text("XML:com.adobe.xmp", "x" * 2**21, zip=True)
    Image.new("RGB", (8, 8), (1, 2, 3)).save(tmp_path / "xmp.png", pnginfo=metadata)
    assert (read_image(tmp_path / "xmp.png", (8, 8)) == (1, 2, 3)).all()


@pytest.mark.parametrize("suffix", [".avif", ".gif", ".heic", ".jfif"])
def test_formats_of_phones_and_the_web(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    color = (200, 30, 60)
    path = tmp_path / f"image{suffix}"
    assert is_image(path.name)
    image = Image.new("RGB", (40, 40), color)
    if suffix == ".heic":
        heif = pytest.importorskip("pillow_heif")
        heif.from_pillow(image).save(path, quality=95)
    elif suffix == ".avif" and not features.check("avif"):
        pytest.skip("this Pillow has no AVIF")
    else:
        image.save(path, format={".jfif": "JPEG"}.get(suffix))
    for file in (path, path.read_bytes()):
        difference = read_image(file, (8, 8)).astype(int) - color
        assert abs(difference).max() <= 4
    if suffix == ".heic":
        monkeypatch.setitem(sys.modules, "pillow_heif", None)
        monkeypatch.setattr(Image, "ID", [name for name in Image.ID if name != "HEIF"])
        with pytest.raises(UnreadableImageError, match=r"pip install 'vqvae2\[heic\]'"):
            read_image(path, (8, 8))
