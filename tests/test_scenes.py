"""Test the built-in scenes: reproducibility, every size, texture, and distinct classes."""

import hashlib
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from vqvae2.data import scenes
from vqvae2.data.sources import open_source
from vqvae2.errors import UserError

N = len(scenes.CLASSES)


def downscale(image: NDArray[np.uint8], factor: int) -> NDArray[np.float64]:
    """Average blocks of factor × factor pixels."""
    height, width, _ = image.shape
    blocks = image.reshape(height // factor, factor, width // factor, factor, 3)
    averages: NDArray[np.float64] = blocks.mean(axis=(1, 3))
    return averages


def rms(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    return float(np.sqrt(((a - b) ** 2).mean()))


def test_class_names_are_unique_and_labels_cycle() -> None:
    assert N >= 8
    assert len(set(scenes.CLASSES)) == N
    assert all(name.isidentifier() for name in scenes.CLASSES)
    assert [scenes.label(index) for index in range(2 * N)] == [*range(N), *range(N)]


def test_scenes_are_rendered_once_for_all_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    first = open_source("scenes:3").open(2, (40, 24))
    monkeypatch.setattr(scenes, "render", None)
    assert open_source("scenes:5").open(2, (40, 24)) is first


@pytest.mark.parametrize("index", range(N))
def test_render_depends_only_on_the_index(index: int) -> None:
    first = scenes.render(index, 32, 32)
    np.random.seed(index)
    scenes.render(index + 1, 48, 40)
    assert np.array_equal(first, scenes.render(index, 32, 32))


def test_global_random_state_is_unchanged() -> None:
    np.random.seed(7)
    expected = np.random.random(3)
    np.random.seed(7)
    for index in range(N):
        scenes.render(index, 16, 16)
    assert np.array_equal(expected, np.random.random(3))


def test_another_process_renders_the_same_images() -> None:
    script = (
        "import hashlib; from vqvae2.data.scenes import CLASSES, render;"
        "images = [render(k, 24, 31).tobytes() for k in reversed(range(len(CLASSES)))];"
        "print(hashlib.sha256(b''.join(images[::-1])).hexdigest())"
    )
    there = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip()
    here = b"".join(scenes.render(index, 24, 31).tobytes() for index in range(N))
    assert there == hashlib.sha256(here).hexdigest()


@settings(max_examples=40, deadline=None)
@given(index=st.integers(0, 10**9), height=st.integers(8, 70), width=st.integers(8, 70))
def test_any_size_of_at_least_eight_pixels(index: int, height: int, width: int) -> None:
    image = scenes.render(index, height, width)
    assert image.shape == (height, width, 3)
    assert image.dtype == np.uint8
    assert image.std() > 5.0, "an image is never blank"


@pytest.mark.parametrize("index", range(2 * N))
@pytest.mark.parametrize(("height", "width"), [(8, 8), (9, 150), (150, 9)])
def test_extreme_aspect_ratios(index: int, height: int, width: int) -> None:
    assert scenes.render(index, height, width).shape == (height, width, 3)


@pytest.mark.parametrize(("height", "width"), [(7, 64), (64, 7), (0, 0), (-3, 64)])
def test_too_small_sizes_give_one_line_error(height: int, width: int) -> None:
    with pytest.raises(UserError, match=f"got {height} × {width}") as error:
        scenes.render(0, height, width)
    assert "\n" not in str(error.value)
    assert "8" in str(error.value)


@pytest.mark.parametrize("index", range(3 * N))
def test_scene_is_the_same_at_every_resolution(index: int) -> None:
    small = scenes.render(index, 64, 64).astype(np.float64)
    assert rms(downscale(scenes.render(index, 128, 128), 2), small) < 12.0
    # Another image of the same class is less similar, so the bound above can fail.
    assert rms(downscale(scenes.render(index + N, 128, 128), 2), small) > 15.0


@pytest.mark.parametrize("class_index", range(N))
def test_images_of_one_class_differ(class_index: int) -> None:
    images = [scenes.render(class_index + N * k, 32, 32).astype(np.float64) for k in range(6)]
    assert min(rms(a, b) for i, a in enumerate(images) for b in images[:i]) > 5.0


@pytest.mark.parametrize("class_index", range(N))
def test_images_have_fine_texture_but_no_noise(class_index: int) -> None:
    """Measure what averaging over 2 × 2 pixels removes: fine texture for the bottom level, but not noise."""
    removed = []
    for k in range(8):
        image = scenes.render(class_index + N * k, 64, 64)
        blurred = downscale(image, 2).repeat(2, axis=0).repeat(2, axis=1)
        removed.append(rms(image.astype(np.float64), blurred))
    assert 3.0 < np.mean(removed) < 20.0


def test_classes_are_separable_by_nearest_mean() -> None:
    """Classify 16 × 16 thumbnails of held-out images by the nearest class mean."""

    def thumbnails(start: int, rounds: int) -> NDArray[np.float64]:
        images = [
            downscale(scenes.render(index, 32, 32), 2).ravel() for index in range(start * N, (start + rounds) * N)
        ]
        return np.stack(images).reshape(rounds, N, -1)

    means = thumbnails(0, 24).mean(axis=0)
    held_out = thumbnails(24, 12)
    distances = np.linalg.norm(held_out[:, :, None] - means, axis=-1)
    correct = distances.argmin(axis=-1) == np.arange(N)
    assert correct.mean() > 0.5, dict(zip(scenes.CLASSES, correct.mean(axis=0), strict=True))
