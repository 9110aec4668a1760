"""Tests for `vqvae2 fid`: agreement with pytorch-fid, feature extraction, caching and errors."""

import contextlib
import io
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from sampling.evaluation import fid
from sampling.evaluation.features import FeatureSummary, KeepOptions, summarize_features, summarize_features_cached
from sampling.evaluation.image_sets import ImageBatch, ImageFolder, open_image_set
from tests.inception_fixture import extractor, fill, pytorch_fid_command, two_processes, weights
from vqvae2.command_line import run_command
from vqvae2.errors import UserError
from vqvae2.metrics.frechet import GaussianStatistics
from vqvae2.metrics.inception_score import inception_score

N = 9


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two folders of images; the second has lower contrast, and contains a grayscale file and a JPEG."""
    folder = tmp_path_factory.mktemp("sets")
    first, second = fill(folder / "first", N), fill(folder / "second", N, seed=1, tint=0.3)
    Image.open(second / "000.png").convert("L").save(second / "000.png")
    Image.open(second / "001.png").save(second / "0001.jpg")
    return first, second


def command(*arguments: object) -> str:
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        run_command(
            fid.main,
            ["--inception-weights", str(weights()), "--num-workers", "0", "--device", "cpu", *map(str, arguments)],
            "vqvae2 fid",
        )
    return printed.getvalue()


def number(printed: str) -> float:
    """Return the value on the `FID:` line, which both commands print."""
    (line,) = (line for line in printed.splitlines() if line.startswith("FID:  "))
    return float(line.removeprefix("FID:  "))


@pytest.mark.parametrize("dims", [64, 192, 768, 2048])
def test_fid_matches_pytorch_fid(dims: int, sets: tuple[Path, Path]) -> None:
    arguments = ["--dims", str(dims), "--batch-size", "4", *map(str, sets)]
    assert number(command(*arguments)) == pytest.approx(number(pytorch_fid_command(*arguments)), rel=1e-4)


def test_statistics_files_are_interchangeable_with_pytorch_fid(
    sets: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = sets
    expected = number(command("--dims", 64, first, second))
    printed = command("--dims", 64, "--save-stats", second, tmp_path / "ours")
    assert printed.startswith(f"Saving statistics for {second}")
    pytorch_fid_command("--dims", "64", "--save-stats", str(second), str(tmp_path / "theirs.npz"))
    for file in ("ours.npz", "theirs.npz"):
        assert number(command("--dims", 64, first, tmp_path / file)) == pytest.approx(expected, rel=1e-4)
        theirs = pytorch_fid_command("--dims", "64", str(first), str(tmp_path / file))
        assert number(theirs) == pytest.approx(expected, rel=1e-4)
    with pytest.raises(UserError, match="already exists"):
        command("--dims", 64, "--save-stats", second, tmp_path / "ours")
    (tmp_path / "folder").mkdir()
    monkeypatch.chdir(tmp_path / "folder")
    command("--dims", 64, "--save-stats", second, ".")
    assert (tmp_path / "folder.npz").read_bytes() == (tmp_path / "ours.npz").read_bytes()
    # Two statistics files need no Inception weights.
    run_command(fid.main, ["--dims", "64", str(tmp_path / "ours.npz"), str(tmp_path / "theirs.npz")], "vqvae2 fid")


def test_few_images_and_other_weights_are_reported(sets: tuple[Path, Path], tmp_path: Path) -> None:
    printed = command("--dims", 64, *sets).splitlines()
    assert printed[1] == "too few images for a comparable FID: 9, fewer than 2048"
    assert "not the standard weights of inception" in printed[2]
    first, second = sets
    formats = f"images of {first} are png and those of {second} are jpg/png; lossy compression changes the distances"
    assert printed[3:] == [formats]
    small = fill(tmp_path / "small", 2, size=(24, 20))
    (size,) = command("--dims", 64, first, small).splitlines()[3:]
    assert size.startswith(f"images of {first} are 32×40 pixels and those of {small} are 20×24; resize")
    statistics = GaussianStatistics(64)
    statistics.update(torch.randn(2048, 64, generator=torch.Generator().manual_seed(0)))
    statistics.save(tmp_path / "many.npz")
    assert len(command("--dims", 64, tmp_path / "many.npz", tmp_path / "many.npz").splitlines()) == 1


def test_npz_of_images_matches_the_folder(sets: tuple[Path, Path], tmp_path: Path) -> None:
    pixels = np.stack([np.asarray(Image.open(file)) for file in sorted(sets[0].iterdir())])
    np.savez(tmp_path / "plain.npz", pixels)
    np.savez_compressed(tmp_path / "compressed.npz", arr_0=pixels, arr_1=np.arange(N))
    for file in ("plain.npz", "compressed.npz"):
        images = open_image_set(tmp_path / file)
        assert len(images) == N
        assert images.formats == {"npz": N}
        batches = list(images.batches(4))
        assert torch.cat([batch.indices for batch in batches]).tolist() == list(range(N))
        assert np.array_equal(torch.cat([batch.images for batch in batches]).permute(0, 2, 3, 1).numpy(), pixels)
    assert number(command("--dims", 64, sets[0], tmp_path / "plain.npz")) == pytest.approx(0, abs=1e-9)


def test_num_workers_and_batch_size_do_not_change_the_images(sets: tuple[Path, Path]) -> None:
    def pixels(batch_size: int, num_workers: int) -> torch.Tensor:
        return torch.cat([batch.images for batch in ImageFolder(sets[1]).batches(batch_size, num_workers)])

    assert torch.equal(pixels(3, 0), pixels(50, 1))
    assert ImageFolder(sets[1]).formats == {"jpg": 1, "png": N}


def test_features_and_inception_score_come_from_one_pass(sets: tuple[Path, Path]) -> None:
    folder = ImageFolder(sets[0])
    (batch,) = folder.batches()
    features, logits = extractor(64)(batch.images, logits=True)
    assert logits is not None
    whole = summarize_features(folder.batches(4), N, extractor(64), KeepOptions(features=100, splits=3))
    torch.testing.assert_close(whole.features, features, rtol=1e-4, atol=1e-5)
    assert whole.inception_score == pytest.approx(inception_score(logits, 3), rel=1e-4)
    assert whole.image_size == (32, 40)
    np.testing.assert_allclose(
        whole.statistics.covariance, np.cov(features.numpy(), rowvar=False), rtol=1e-3, atol=1e-5
    )
    some = summarize_features(folder.batches(2), N, extractor(64), KeepOptions(features=4))
    assert some.features is not None
    assert some.features.shape == (4, 64)
    chosen = np.sort(np.random.RandomState(2020).permutation(N)[:4])
    torch.testing.assert_close(some.features, features[chosen], rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="expected 10 images, but received 9"):
        summarize_features(folder.batches(4), 10, extractor(64))


def shared(folder: Path, cache: Path) -> tuple[FeatureSummary, float]:
    summary = summarize_features(ImageFolder(folder).batches(2), N, extractor(64), KeepOptions(features=5, splits=3))
    again = summarize_features_cached(ImageFolder(folder), extractor(64), cache, KeepOptions(features=5, splits=3), 2)
    return summary, again.statistics.distance(summary.statistics)


def test_two_processes_match_one(sets: tuple[Path, Path], tmp_path: Path) -> None:
    one = summarize_features(
        ImageFolder(sets[0]).batches(2), N, extractor(64), KeepOptions(features=5, splits=3)
    )  # also creates the weights file for both processes
    other = summarize_features(ImageFolder(sets[1]).batches(), N + 1, extractor(64)).statistics
    for two, again in two_processes(shared, sets[0], tmp_path):
        assert two.statistics.count == N
        assert two.statistics.distance(other) == pytest.approx(one.statistics.distance(other), rel=1e-6)
        torch.testing.assert_close(two.features, one.features, rtol=1e-4, atol=1e-5)
        assert two.inception_score == pytest.approx(one.inception_score, rel=1e-6)
        assert two.image_size == one.image_size
        assert again == pytest.approx(0, abs=1e-9)
    assert len(list(tmp_path.iterdir())) == 1


def test_fid_command_on_two_processes(sets: tuple[Path, Path]) -> None:
    first, second = two_processes(command, "--inception-weights", weights(), "--dims", 64, *sets)
    assert second == ""
    assert number(first) == pytest.approx(number(command("--dims", 64, *sets)), rel=1e-6)


def test_folder_cache_is_valid_until_a_file_changes(tmp_path: Path) -> None:
    folder, cache = fill(tmp_path / "images", 3), tmp_path / "cache"
    summarize_features_cached(ImageFolder(folder), extractor(64), cache)
    (file,) = cache.iterdir()
    first = file.stat().st_mtime_ns

    def files() -> int:
        summarize_features_cached(ImageFolder(folder), extractor(64), cache)
        return len(list(cache.iterdir()))

    assert files() == 1
    assert file.stat().st_mtime_ns == first
    file.write_bytes(file.read_bytes()[:200])  # damaged, so it is recomputed
    assert files() == 1
    assert GaussianStatistics.load(file).count == 3
    os.utime(folder / "000.png", ns=(1, 1))
    assert files() == 2
    (folder / "001.png").rename(folder / "009.png")
    assert files() == 3
    summarize_features_cached(ImageFolder(folder), extractor(64), cache, KeepOptions(features=2))
    summarize_features_cached(ImageFolder(folder), extractor(192), cache)
    assert len(list(cache.iterdir())) == 5


def test_feature_summary_round_trip_and_plain_statistics(sets: tuple[Path, Path], tmp_path: Path) -> None:
    summary = summarize_features(ImageFolder(sets[0]).batches(), N, extractor(64), KeepOptions(features=5, splits=2))
    summary.save(tmp_path / "s.npz")
    loaded = FeatureSummary.load(tmp_path / "s.npz")
    assert torch.equal(loaded.features, summary.features)
    assert (loaded.inception_score, loaded.image_size) == (summary.inception_score, summary.image_size)
    assert loaded.statistics.count == N
    summary.statistics.save(tmp_path / "plain.npz")
    assert FeatureSummary.load(tmp_path / "plain.npz").features is None
    np.savez(tmp_path / "odd.npz", **summary.statistics.to_arrays(), features=np.zeros((3, 5), np.float32))
    with pytest.raises(UserError, match=r"odd\.npz: `features`"):
        FeatureSummary.load(tmp_path / "odd.npz")


def test_interrupted_pass_writes_no_cache_file(tmp_path: Path) -> None:
    folder = ImageFolder(fill(tmp_path / "images", 3))

    class Interrupted(ImageFolder):
        def batches(self, batch_size: int = 50, num_workers: int = 0):
            yield ImageBatch(torch.tensor([0]), folder[0][1][None])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        summarize_features_cached(Interrupted(folder.path), extractor(64), tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def error_of(*arguments: object) -> str:
    """Return the one-line error of the command with these arguments."""
    with pytest.raises(UserError) as caught:
        command("--dims", 64, *arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_folders_with_too_few_images_raise_with_a_hint(sets: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "notes.txt").write_text("")
    assert "empty: no images found (bmp, " in error_of(sets[0], tmp_path / "empty")
    fill(tmp_path / "capitals", 1)
    (tmp_path / "capitals" / "000.png").rename(tmp_path / "capitals" / "000.PNG")
    assert "Upper-case extensions are ignored" in error_of(sets[0], tmp_path / "capitals")
    assert "found one image, but FID needs at least two" in error_of(sets[0], fill(tmp_path / "one", 1))
    assert "no such folder" in error_of(sets[0], tmp_path / "none")
    assert "not a folder, archive or .npz file" in error_of(sets[0], sets[0] / "000.png")


@pytest.mark.parametrize("num_workers", [0, 1])
def test_errors_name_invalid_images(num_workers: int, tmp_path: Path) -> None:
    def first_error() -> str:
        with pytest.raises(UserError) as caught:
            list(ImageFolder(tmp_path).batches(2, num_workers))
        assert "\n" not in str(caught.value)
        return str(caught.value)

    fill(tmp_path, 4)
    whole = (tmp_path / "002.png").read_bytes()
    (tmp_path / "002.png").write_bytes(whole[: len(whole) // 2])
    assert "002.png: not a readable image" in first_error()
    (tmp_path / "002.png").write_bytes(b"")
    assert "002.png: not a readable image" in first_error()
    Image.fromarray(np.full((32, 40), 40_000, np.uint16)).save(tmp_path / "002.png")
    assert "002.png: more than 8 bits per channel (mode I;16)" in first_error()
    # First a size that differs within a batch, then one that differs from the previous batch.
    for index in (3, 2):
        Image.new("RGB", (41, 32)).save(tmp_path / f"{index:03d}.png")
        other = {3: "002.png has 40×32 pixels, 003.png has 41×32", 2: "000.png has 40×32 pixels, 002.png has 41×32"}
        if index == 3:
            (tmp_path / "002.png").write_bytes(whole)
        assert other[index] in first_error()


BAD = {
    "grayscale": ({"arr_0": np.zeros((3, 8, 8), np.uint8)}, r"uint8 \(3, 8, 8\); expected uint8 images"),
    "one channel": ({"arr_0": np.zeros((3, 8, 8, 1), np.uint8)}, "expected uint8 images"),
    "16 bits": ({"arr_0": np.zeros((3, 8, 8, 3), np.uint16)}, r"uint16 \(3, 8, 8, 3\)"),
    "one image": ({"arr_0": np.zeros((1, 8, 8, 3), np.uint8)}, "found 1 images"),
    "other keys": ({"images": np.zeros((3, 8, 8, 3), np.uint8)}, "expected arrays `mu` and `sigma`"),
    "half statistics": ({"mu": np.zeros(64)}, "no array `sigma`"),
    "other dimensions": ({"mu": np.zeros(3), "sigma": np.eye(3)}, "statistics of 3 dimensions, but --dims 64"),
}


@pytest.mark.parametrize("name", BAD)
def test_npz_with_other_contents_raises(name: str, sets: tuple[Path, Path], tmp_path: Path) -> None:
    arrays, message = BAD[name]
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(UserError, match=message) as caught:
        command("--dims", 64, tmp_path / "bad.npz", sets[0])
    assert str(tmp_path / "bad.npz") in str(caught.value)


def test_damaged_npz_raises(sets: tuple[Path, Path], tmp_path: Path) -> None:
    path = tmp_path / "images.npz"
    pixels = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)
    for save in (np.savez, np.savez_compressed):
        save(path, pixels)
        whole = path.read_bytes()
        path.write_bytes(whole[:-30])
        assert "images.npz: not a readable .npz" in error_of(path, sets[0])
        path.write_bytes(whole[:6000] + bytes(50) + whole[6050:])
        assert "images.npz: not a readable .npz" in error_of(path, sets[0])
    assert "missing.npz: no such file" in error_of(tmp_path / "missing.npz", sets[0])


def test_invalid_options_raise(sets: tuple[Path, Path], tmp_path: Path) -> None:
    assert "--batch-size" in error_of("--batch-size", 0, *sets)
    assert "--device nonsense: not a torch device" in error_of("--device", "nonsense", *sets)
    assert "none.pth: no such file" in error_of("--inception-weights", tmp_path / "none.pth", *sets)


def test_subfolders_and_archives_have_the_images_of_a_flat_folder(sets: tuple[Path, Path], tmp_path: Path) -> None:
    nested = tmp_path / "nested"
    for index, file in enumerate(sorted(sets[0].iterdir())):
        target = nested / f"class{index * 2 // N}" / file.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(file, target)
    (nested / ".cache").mkdir()
    shutil.copy(file, nested / ".cache" / "x.png")
    (nested / "class0" / "loop").symlink_to(nested)
    archives = [Path(shutil.make_archive(str(tmp_path / "images"), kind, nested / "class0")) for kind in ("zip", "tar")]
    part = shutil.copytree(nested / "class0", tmp_path / "part", ignore=shutil.ignore_patterns("loop"))
    expected = torch.cat([batch.images for batch in ImageFolder(sets[0]).batches(4)])
    found = open_image_set(nested)
    assert torch.equal(torch.cat([batch.images for batch in found.batches(4, num_workers=1)]), expected)
    assert found.formats == {"png": N}
    for path in (*archives, part):
        images = open_image_set(path)
        assert torch.equal(torch.cat([batch.images for batch in images.batches(2)]), expected[: len(images)])
        assert len(images) == len(list(part.iterdir()))
    assert found.digest() != open_image_set(part).digest()
    assert number(command("--dims", 64, nested, sets[0])) == pytest.approx(0, abs=1e-9)


def test_sample_folders_and_damaged_archives_raise(sets: tuple[Path, Path], tmp_path: Path) -> None:
    samples = tmp_path / "samples"
    shutil.copytree(sets[0], samples / "images")
    (samples / "manifest.json").write_text("{}")
    shutil.copy(samples / "images" / "000.png", samples / "grid.png")
    assert error_of(samples, sets[0]).endswith(f"Give its images: {samples / 'images'}")
    (tmp_path / "a.zip").write_bytes(b"damaged")
    assert f"{tmp_path / 'a.zip'} is not a readable .zip archive" in error_of(sets[0], tmp_path / "a.zip")
    assert "no such archive: " in error_of(sets[0], tmp_path / "gone.tar")
