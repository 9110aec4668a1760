"""Test inpainting and variations: kept codes, sampled codes against a naive sampler, commands, and errors."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sampling.editing import inpaint, sample_variants, variations
from sampling.logits import sample_codes
from sampling.masks import HALVES, keep_coarsest, keep_masked, read_mask
from sampling.params import LevelSamplingParams, SamplingParams
from sampling.pipeline import VQVAE2Pipeline
from sampling.sample_level import Noise, PartialCodes, sample_level
from tests.test_commands import contents, fails
from tests.test_commands import images as image_files
from tests.test_priors import build, inputs
from vqvae2.__main__ import main
from vqvae2.code_maps import MapSpec
from vqvae2.data.images import to_float
from vqvae2.errors import UserError

KINDS = ["pixelsnail", "pixelcnn", "transformer"]


@pytest.fixture(scope="module")
def pipeline(finished_run: Path) -> VQVAE2Pipeline:
    return VQVAE2Pipeline.from_pretrained(finished_run, batch_size=3)


def random_images(count: int = 2) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return to_float(torch.randint(0, 256, (count, 3, 32, 32), generator=generator).to(torch.uint8))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("part", ["top", "bottom", "left", "spots", "all", "nothing"])
def test_partial_codes_match_naive_sampler(kind: str, part: str) -> None:
    prior = build(size=(5, 6), coarser=((5, 3),), kind=kind)
    given = inputs(prior, batch=3)
    keep = torch.zeros(3, 5, 6, dtype=torch.bool)
    keep |= {
        "top": torch.arange(5)[:, None] < 2,
        "bottom": torch.arange(5)[:, None] >= 3,
        "left": torch.arange(6) < 3,
        "spots": torch.rand(3, 5, 6, generator=torch.Generator().manual_seed(2)) < 0.4,
        "all": torch.ones(5, 6, dtype=torch.bool),
        "nothing": torch.zeros(5, 6, dtype=torch.bool),
    }[part]
    progress: list[int] = []
    partial = PartialCodes(given["codes"], keep)
    found = sample_level(
        prior, Noise(0, range(3), 0), LevelSamplingParams(), given["coarser"], progress=progress.append, partial=partial
    )
    assert sum(progress) == 3 * 30
    uniform, codes = Noise(0, range(3), 0).draw(5, 6), torch.zeros(3, 5, 6, dtype=torch.int64)
    for row in range(5):
        for column in range(6):
            with torch.no_grad():
                logits = prior(codes, given["coarser"])[:, :, row, column]
            sampled = sample_codes(logits, uniform[:, row, column], LevelSamplingParams())
            codes[:, row, column] = torch.where(keep[:, row, column], given["codes"][:, row, column], sampled)
    assert torch.equal(found, codes)
    assert torch.equal(found[keep], given["codes"][keep])
    assert torch.equal(found, sample_level(prior, Noise(0, range(3), 0), LevelSamplingParams(), given["coarser"])) == (
        part == "nothing"
    )


def test_code_is_kept_only_if_all_its_pixels_are_kept() -> None:
    maps = (MapSpec(codebook_size=9, height=4, width=6), MapSpec(codebook_size=9, height=2, width=3))
    codes = tuple(torch.zeros(2, *level.shape, dtype=torch.int64) for level in maps)
    mask = torch.ones(8, 12, dtype=torch.bool)
    mask[3, 5] = False
    for shaped in (mask, mask.expand(2, -1, -1)):
        fine, coarse = (level.keep for level in keep_masked(codes, shaped, maps))
        assert (~fine[1]).nonzero().tolist() == [[1, 2]]
        assert (~coarse[0]).nonzero().tolist() == [[0, 1]]
    halves = {name: read_mask(name, (4, 5)) for name in HALVES}
    assert halves["top-half"].sum() == halves["bottom-half"].sum() == 10
    assert halves["left-half"].nonzero()[:, 1].max() == 1
    assert halves["right-half"].nonzero()[:, 1].min() == 3


def test_variants_keep_codes_on_every_level_and_differ_elsewhere(pipeline: VQVAE2Pipeline) -> None:
    images, mask = random_images(), read_mask("left-half", (32, 32))
    codes = pipeline.autoencoder.encode(images)
    partial = keep_masked(codes, mask, pipeline.autoencoder.map_specs)
    found = sample_variants(pipeline, partial, [3, 7], 4, 5, SamplingParams())
    for level, maps in enumerate(found):
        width = maps.shape[2] // 2
        kept = maps.unflatten(0, (2, 4))[..., :width]
        assert torch.equal(kept, codes[level][:, None, :, :width].expand_as(kept))
    sampled = found[0][:, :, 4:].unflatten(0, (2, 4))
    assert len({variant.numpy().tobytes() for image in sampled for variant in image}) == 8
    # Fewer images and variants in other batches: noise depends only on (seed, image, variant).
    alone = sample_variants(pipeline, [PartialCodes(c[:1], k[:1]) for c, k in partial], [3], 2, 5, SamplingParams())
    for level, maps in zip(alone, found, strict=True):
        assert torch.equal(level, maps[:2])
    other = sample_variants(pipeline, partial, [3, 7], 4, 6, SamplingParams())
    assert not torch.equal(other[0], found[0])


def test_batches_of_variants_have_one_size(pipeline: VQVAE2Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    sample_codes = VQVAE2Pipeline.sample_codes

    def recording(self: VQVAE2Pipeline, images: Any, *rest: Any) -> Any:
        sizes.append(len(images))
        return sample_codes(self, images, *rest)

    monkeypatch.setattr(VQVAE2Pipeline, "sample_codes", recording)
    partial, progress = keep_coarsest(pipeline.autoencoder.encode(random_images(1)), 1), []
    for variants, expected in ((2, [2]), (4, [3, 3])):
        found = sample_variants(pipeline, partial, [3], variants, 5, SamplingParams(), progress.append)
        assert (len(found[0]), sizes) == (variants, expected)
        assert sum(progress) == variants * pipeline.num_codes
        sizes.clear(), progress.clear()


def test_inpaint_and_variations(pipeline: VQVAE2Pipeline) -> None:
    images, mask = random_images(), read_mask("top-half", (32, 32))
    completed = inpaint(pipeline, images, mask, class_labels=[1], variants=3, seed=2)
    assert completed.shape == (2, 3, 3, 32, 32)
    assert -1 <= completed.min() < completed.max() <= 1
    torch.testing.assert_close(inpaint(pipeline, images, mask.expand(2, -1, -1), [1], 3, 2), completed)
    varied = variations(pipeline, images, class_labels=[1], variants=2)
    codes = pipeline.autoencoder.encode(images)
    partial = keep_coarsest(codes, 1)
    bottom, top = sample_variants(pipeline, partial, [1], 2, 0, SamplingParams())
    assert torch.equal(top.unflatten(0, (2, 2))[:, 1], codes[1])
    assert not torch.equal(bottom.unflatten(0, (2, 2))[:, 1], codes[0])
    torch.testing.assert_close(varied.flatten(0, 1), pipeline.autoencoder.decode((bottom, top)))


def test_invalid_editing_arguments_raise(pipeline: VQVAE2Pipeline) -> None:
    images = random_images()
    with pytest.raises(UserError, match=r"mask: its size is \(16, 32\), but the model's images are 32 × 32"):
        inpaint(pipeline, images, torch.ones(16, 32, dtype=torch.bool), [0])
    with pytest.raises(UserError, match="this model is class-conditional"):
        inpaint(pipeline, images, read_mask("top-half", (32, 32)))
    with pytest.raises(UserError, match="no class 10"):
        variations(pipeline, images, class_labels=[10])
    for count in (0, 2):
        with pytest.raises(UserError, match=f"must be 1 for a model of 2 levels, not {count}"):
            variations(pipeline, images, count, class_labels=[0])
    with pytest.raises(UserError, match="one level"):
        keep_coarsest(pipeline.autoencoder.encode(images)[1:], 1)


def test_commands_write_a_grid_and_overwrite_nothing(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(finished_run, tmp_path / "run")
    paths = [str(path) for path in sorted(image_files(tmp_path / "images", 2).iterdir())]
    command = ["inpaint", str(run), *paths, "--keep", "top-half", "--variants", "3", "--classes", "2"]
    assert main(command) == 0
    folder = run / "inpaintings"
    printed = capsys.readouterr().out.splitlines()
    assert printed[:2] == [str(folder / "grid.png"), str(folder / "images")]
    assert printed[3] == "kept codes: bottom 32 of 64, top 8 of 16"
    with Image.open(folder / "grid.png") as grid:  # five columns of 32 px tiles scaled by 3, with 2 px borders
        assert grid.size == (5 * 98 + 2, 2 * 98 + 2)
        masked = np.array(grid)[2:98, 100:196]
    assert (masked[48:] == 127).all()
    assert masked[:48].std() > 20
    assert len(list((folder / "images").iterdir())) == 6
    manifest = json.loads((folder / "manifest.json").read_text())
    assert (manifest["keep"], manifest["labels"], manifest["images"][0]["name"]) == ("top-half", [2], "0.png")
    before = contents(run)
    assert main(command) == 0
    assert contents(run) == before
    fails(capsys, [*command, "--seed", "1", "--out", str(folder)], "other settings", "--out")
    fails(capsys, [*command, "--out", str(run / "codes")], "codes", "not empty", "--out")
    assert contents(run) == before
    assert main([*command, "--seed", "1"]) == 0
    assert contents(run).items() > before.items()
    assert (run / "inpaintings-2" / "images" / "000001-02.png").is_file()
    assert (
        main(["variations", str(run), paths[0], "--variants", "1", "--classes", "2", "--temperature", "bottom=0.5"])
        == 0
    )
    assert contents(run / "variations").keys() == {"grid.png", "manifest.json", "images/000000-00.png"}


def test_mask_is_read_from_an_image_file(finished_run: Path, tmp_path: Path) -> None:
    pixels = np.zeros((32, 32), np.uint8)
    pixels[:, 8:24] = 255
    Image.fromarray(pixels).save(tmp_path / "mask.png")
    assert torch.equal(read_mask(str(tmp_path / "mask.png"), (32, 32)), torch.from_numpy(pixels > 0))
    paths = [str(path) for path in image_files(tmp_path / "images", 1).iterdir()]
    command = ["inpaint", str(finished_run), *paths, "--keep", str(tmp_path / "mask.png"), "--variants", "1"]
    assert main([*command, "--classes", "0", "--out", str(tmp_path / "out")]) == 0
    assert len(json.loads((tmp_path / "out" / "manifest.json").read_text())["keep"]["digest"]) == 64


def test_mask_of_a_photograph_is_cropped_with_it(finished_run: Path, tmp_path: Path) -> None:
    """The upper half of a tall photograph is kept, of which the crop to a square shows the lower part."""
    photograph, mask = tmp_path / "photograph.png", Image.new("RGBA", (64, 128), "white")
    Image.new("RGB", (64, 128)).save(photograph)
    mask.paste((255, 255, 255, 0), (0, 64, 64, 128))  # transparent, although the color is white everywhere
    mask.save(tmp_path / "mask.png")
    found = read_mask(str(tmp_path / "mask.png"), (32, 32), [photograph])
    assert torch.equal(found, read_mask("top-half", (32, 32)))
    command = ["inpaint", str(finished_run), str(photograph), "--keep", str(tmp_path / "mask.png"), "--variants", "1"]
    assert main([*command, "--classes", "0", "--out", str(tmp_path / "out")]) == 0


def test_invalid_options_give_one_line_errors(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = contents(finished_run)
    (image,) = image_files(tmp_path / "images", 1).iterdir()
    command = ["inpaint", str(finished_run), str(image)]
    fails(capsys, [*command, "--keep", "upper-half"], "--keep upper-half", "top-half", "or a picture")
    fails(capsys, [*command, "--keep", "top-half"], "class-conditional", "--classes", "0 to 9")
    fails(capsys, [*command, "--keep", "top-half", "--classes", "10"], "no class 10")
    Image.new("L", (31, 32)).save(tmp_path / "small.png")
    fails(capsys, [*command, "--keep", str(tmp_path / "small.png")], "small.png", "32 × 31", "32 × 32")
    Image.new("L", (32, 32), 255).save(tmp_path / "white.png")
    fails(capsys, [*command, "--keep", str(tmp_path / "white.png")], "white.png", "nothing is left to sample")
    (tmp_path / "text.png").write_text("not an image")
    fails(capsys, [*command, "--keep", str(tmp_path / "text.png")], "text.png", "cannot be read as an image")
    (tmp_path / "large.pgm").write_bytes(b"P5 65536 65536 255 ")
    fails(capsys, [*command, "--keep", str(tmp_path / "large.pgm")], "large.pgm", "cannot be read as an image")
    fails(
        capsys,
        ["variations", str(finished_run), str(image), "--classes", "0", "--keep-levels", "2"],
        "keep_levels: must be 1 for a model of 2 levels, not 2",
    )
    command = ["variations", str(finished_run), "--classes", "0"]
    fails(capsys, [*command, str(tmp_path / "gone.png")], "gone.png: no such file or folder. Check the path.")
    fails(capsys, [*command, str(image), str(tmp_path)], f"{tmp_path}: is a folder. Give image files")
    fails(capsys, [*command, str(image), "--temperature", "bot=1"], "temperature: no level is named 'bot'")
    assert contents(finished_run) == before
