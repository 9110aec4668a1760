"""The built-in pictures: reproducible from the index alone, one scene at every size, with structure and texture."""

import hashlib
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from vqvae2.data import scenes
from vqvae2.errors import UserError

N = len(scenes.CLASSES)


def make_encoder(picture: NDArray[np.uint8], factor: int) -> NDArray[np.float64]:
    """Average blocks of factor x factor pixels."""
    height, width, _ = picture.shape
    blocks = picture.reshape(height // factor, factor, width // factor, factor, 3)
    averages: NDArray[np.float64] = blocks.mean(axis=(1, 3))
    return averages


def rms(a: NDArray[np.float64], b: NDArray[np.float64]) -> float:
    return float(np.sqrt(((a - b) ** 2).mean()))


def test_classes_are_distinct_names_and_label_cycles_through_them() -> None:
    assert N >= 8
    assert len(set(scenes.CLASSES)) == N
    assert all(name.isidentifier() for name in scenes.CLASSES)
    assert [scenes.label(index) for index in range(2 * N)] == [*range(N), *range(N)]


@pytest.mark.parametrize("index", range(N))
def test_the_same_index_gives_the_same_bytes_whatever_happened_before(index: int) -> None:
    first = scenes.render(index, 32, 32)
    np.random.seed(index)
    scenes.render(index + 1, 48, 40)
    assert np.array_equal(first, scenes.render(index, 32, 32))


def test_the_global_generator_is_left_alone() -> None:
    np.random.seed(7)
    expected = np.random.random(3)
    np.random.seed(7)
    for index in range(N):
        scenes.render(index, 16, 16)
    assert np.array_equal(expected, np.random.random(3))


def test_another_process_draws_the_same_pictures() -> None:
    script = (
        "import hashlib; from vqvae2.data.scenes import CLASSES, render;"
        "pictures = [render(k, 24, 31).tobytes() for k in reversed(range(len(CLASSES)))];"
        "print(hashlib.sha256(b''.join(pictures[::-1])).hexdigest())"
    )
    there = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout.strip()
    here = b"".join(scenes.render(index, 24, 31).tobytes() for index in range(N))
    assert there == hashlib.sha256(here).hexdigest()


@settings(max_examples=40, deadline=None)
@given(index=st.integers(0, 10**9), height=st.integers(8, 70), width=st.integers(8, 70))
def test_any_size_from_eight_pixels_up(index: int, height: int, width: int) -> None:
    picture = scenes.render(index, height, width)
    assert picture.shape == (height, width, 3)
    assert picture.dtype == np.uint8
    assert picture.std() > 5.0, "a picture is never blank"


@pytest.mark.parametrize("index", range(2 * N))
@pytest.mark.parametrize(("height", "width"), [(8, 8), (9, 150), (150, 9)])
def test_extreme_frames(index: int, height: int, width: int) -> None:
    assert scenes.render(index, height, width).shape == (height, width, 3)


@pytest.mark.parametrize(("height", "width"), [(7, 64), (64, 7), (0, 0), (-3, 64)])
def test_too_small_a_picture_is_refused_in_one_line(height: int, width: int) -> None:
    with pytest.raises(UserError, match=f"got {height} × {width}") as refusal:
        scenes.render(0, height, width)
    assert "\n" not in str(refusal.value)
    assert "8" in str(refusal.value)


@pytest.mark.parametrize("index", range(3 * N))
def test_a_scene_is_the_same_at_every_size(index: int) -> None:
    small = scenes.render(index, 64, 64).astype(np.float64)
    assert rms(make_encoder(scenes.render(index, 128, 128), 2), small) < 12.0
    # Another picture of the same class is no such match: the bound above can fail.
    assert rms(make_encoder(scenes.render(index + N, 128, 128), 2), small) > 15.0


@pytest.mark.parametrize("kind", range(N))
def test_pictures_of_one_class_all_differ(kind: int) -> None:
    pictures = [scenes.render(kind + N * k, 32, 32).astype(np.float64) for k in range(6)]
    assert min(rms(a, b) for i, a in enumerate(pictures) for b in pictures[:i]) > 5.0


@pytest.mark.parametrize("kind", range(N))
def test_there_is_fine_texture_but_no_noise(kind: int) -> None:
    """What a blur over 2 x 2 pixels removes: enough for a bottom level to carry, too little to be unlearnable."""
    lost = []
    for k in range(8):
        picture = scenes.render(kind + N * k, 64, 64)
        blurred = make_encoder(picture, 2).repeat(2, axis=0).repeat(2, axis=1)
        lost.append(rms(picture.astype(np.float64), blurred))
    assert 3.0 < np.mean(lost) < 20.0


def test_classes_can_be_told_apart_by_layout() -> None:
    """Nearest class mean on 16 x 16 thumbnails, judged on pictures that the means have not seen."""

    def thumbnails(start: int, rounds: int) -> NDArray[np.float64]:
        pictures = [
            make_encoder(scenes.render(index, 32, 32), 2).ravel() for index in range(start * N, (start + rounds) * N)
        ]
        return np.stack(pictures).reshape(rounds, N, -1)

    means = thumbnails(0, 24).mean(axis=0)
    held_out = thumbnails(24, 12)
    distances = np.linalg.norm(held_out[:, :, None] - means, axis=-1)
    right = distances.argmin(axis=-1) == np.arange(N)
    assert right.mean() > 0.5, dict(zip(scenes.CLASSES, right.mean(axis=0), strict=True))
