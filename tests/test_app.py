"""The pictures and the worker of `vqvae2 app`, and its errors. test_app_page.py uses the page in a browser."""

import asyncio
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from sampling.app.code_pictures import CodedImages, code_colors, color_map, dim_others, encode_images, find_code
from sampling.app.pictures import EditSettings, encode, inpaint, reconstruct, sample, vary
from sampling.app.uploads import editor_canvas, painted_mask, read_upload, require_image
from sampling.app.worker import Canceled, Job, ModelWorker
from sampling.editing import inpaint as library_inpaint
from sampling.editing import variations as library_variations
from sampling.params import SamplingConfig
from sampling.pipeline import VQVAE2Pipeline
from tests.test_commands import fails
from vqvae2.__main__ import main
from vqvae2.code_maps import MapSpec
from vqvae2.data.images import to_float, to_uint8
from vqvae2.errors import UserError
from vqvae2.quantizers import Quantizer

PARAMS = {"temperature": {"top": 0.9, "bottom": 0.8}, "top_p": 0.9}


@pytest.fixture(scope="module")
def pipeline() -> VQVAE2Pipeline:
    return VQVAE2Pipeline.from_pretrained("scenes64")


@pytest.fixture(scope="module")
def images(pipeline: VQVAE2Pipeline) -> torch.Tensor:
    return to_uint8(pipeline(num_images=5, seed=3))


def ignore(_: int) -> None:
    """Ignore progress."""


def test_samples_are_those_of_the_library_with_progress_per_step(pipeline: VQVAE2Pipeline) -> None:
    progress: list[int] = []
    config = SamplingConfig.from_dict({**PARAMS, "count": 5, "seed": 2, "classes": (4, 1), "batch_size": 3}, "test")
    found = sample(pipeline, config, progress.append)
    expected = pipeline(num_images=5, seed=2, class_labels=(4, 1), **PARAMS)
    assert torch.equal(found, to_uint8(expected))
    assert sum(progress) == 5 * pipeline.num_codes
    assert max(progress) == 3 * 8  # one step of the bottom level: eight rows of each image of a batch


def test_canceled_job_stops_at_the_next_row(pipeline: VQVAE2Pipeline) -> None:
    reported: list[int] = []

    def report(done: int, total: int) -> None:
        reported.append(done)
        if done >= 2 * 8 * 2:  # two rows of the top level of two images
            job.canceled.set()

    job = Job(report)
    with pytest.raises(Canceled):
        sample(pipeline, SamplingConfig(count=2), job.advance)
    assert reported == [16, 32]


def test_inpainting_keeps_what_is_not_painted(pipeline: VQVAE2Pipeline, images: torch.Tensor) -> None:
    painted = torch.zeros(64, 64, dtype=torch.bool)
    painted[:20, 40:] = True
    settings = EditSettings.from_dict({**PARAMS, "variants": 3, "seed": 4, "classes": (7,)}, "test")
    found = inpaint(pipeline, images[1], painted, settings, ignore)
    expected = library_inpaint(pipeline, to_float(images[1:2]), ~painted, [7], 3, 4, settings.params)
    assert torch.equal(found, to_uint8(expected)[0])
    reconstruction = to_uint8(pipeline.autoencoder.reconstruct(to_float(images[1:2])))[0]
    difference = (found.int() - reconstruction.int()).abs()
    assert difference[:, :, 40:].max() <= 1  # below the reach of the decoder
    assert difference[:, :, :20, 44:].float().mean() > 5
    assert len({variant.numpy().tobytes() for variant in found}) == 3


def test_variations_keep_the_top_level(pipeline: VQVAE2Pipeline, images: torch.Tensor) -> None:
    settings = EditSettings(variants=2, seed=1, classes=(3,))
    found = vary(pipeline, images[0], 1, settings, ignore)
    assert torch.equal(found, to_uint8(library_variations(pipeline, to_float(images[:1]), 1, [3], 2, 1))[0])
    with pytest.raises(UserError, match="keep_levels: must be 1 for a model of 2 levels, not 2"):
        vary(pipeline, images[0], 2, settings, ignore)


def test_reconstructions_have_one_more_level_each(pipeline: VQVAE2Pipeline, images: torch.Tensor) -> None:
    top, both = reconstruct(pipeline, images[0])
    codes = encode(pipeline, images[:1])
    assert torch.equal(top, to_uint8(pipeline.autoencoder.decode(codes, ["top"]))[0])
    assert torch.equal(both, to_uint8(pipeline.autoencoder.decode(codes))[0])
    errors = [(each.float() - images[0].float()).square().mean() for each in (top, both)]
    assert errors[0] > 2 * errors[1]


def test_codes_with_similar_features_have_similar_colors(pipeline: VQVAE2Pipeline) -> None:
    quantizer = pipeline.autoencoder.quantizers[0]
    assert isinstance(quantizer, Quantizer)
    size = quantizer.codebook_size
    features = quantizer.lookup(torch.arange(size)[None])[0].T.numpy().astype(np.float64)
    centered = features - features.mean(0)
    directions = np.linalg.eigh(centered.T @ centered)[1][:, ::-1][:, :3]
    ranks = (centered @ directions).argsort(0).argsort(0)
    colors = code_colors(pipeline.autoencoder, 0).numpy()
    assert colors.shape == (size, 3)
    for channel in range(3):  # the sign of a principal component is arbitrary
        expected = [values * 255 // (size - 1) for values in (ranks[:, channel], size - 1 - ranks[:, channel])]
        assert min(np.abs(colors[:, channel] - each).max() for each in expected) <= 2
    codes = torch.tensor([[5, 9], [5, 0]])
    assert (color_map(codes, torch.from_numpy(colors)).permute(1, 2, 0).numpy() == colors[codes.numpy()]).all()


def test_patches_surround_each_occurrence_of_a_code() -> None:
    generator = torch.Generator().manual_seed(0)
    pictures = torch.randint(0, 256, (2, 3, 8, 12), generator=generator).to(torch.uint8)
    codes = torch.randint(0, 3, (2, 4, 4), generator=generator)
    use = find_code(CodedImages(pictures, (codes,)), MapSpec(codebook_size=3, height=4, width=4), 0, 2, 100)
    padded = np.pad(pictures.numpy(), ((0, 0), (0, 0), (2, 2), (3, 3)), mode="edge")
    places = np.argwhere(codes.numpy() == 2)
    assert (use.occurrences, use.images) == (len(places), len(set(places[:, 0])))
    expected = [padded[image, :, 2 * row : 2 * row + 6, 3 * column : 3 * column + 9] for image, row, column in places]
    assert (use.patches.numpy() == np.stack(expected)).all()
    assert len(find_code(CodedImages(pictures, (codes,)), MapSpec(codebook_size=9, height=4, width=4), 0, 8, 9)[2]) == 0
    shown = dim_others(pictures[0], codes[0] == 2)
    kept = np.repeat(np.repeat(codes[0].numpy() == 2, 2, 0), 3, 1)
    assert (shown.numpy()[:, kept] == pictures[0].numpy()[:, kept]).all()
    assert (shown.numpy()[:, ~kept] == pictures[0].numpy()[:, ~kept].astype(int) * 3 // 8).all()


def test_images_are_shown_with_their_own_codes(pipeline: VQVAE2Pipeline, images: torch.Tensor) -> None:
    coded = encode_images(pipeline, images)
    assert all(torch.equal(a, b) for a, b in zip(coded.codes, encode(pipeline, images), strict=True))


def test_pixel_is_painted_if_any_part_of_its_enlargement_is() -> None:
    canvas = editor_canvas(torch.zeros(3, 4, 6, dtype=torch.uint8), 24)
    assert canvas["background"].size == (24, 16)
    layer = np.zeros((16, 24, 4), np.uint8)
    layer[5, 9, 3] = 255
    layer[15, 23, 3] = 200
    mask = painted_mask({"layers": [layer]}, (4, 6))
    assert mask.nonzero().tolist() == [[1, 2], [3, 5]]
    for nothing in (None, {"layers": []}, {"layers": [np.zeros((16, 24, 4), np.uint8)]}):
        with pytest.raises(UserError, match="mask: nothing is painted"):
            painted_mask(nothing, (4, 6))


@pytest.fixture
def uploads(tmp_path: Path) -> Path:
    """Return a folder with a good PNG, a truncated one, one with too many pixels, and a text file."""
    (tmp_path / "note.txt").write_text("not an image")
    pixels = np.random.default_rng(0).integers(0, 256, (100, 80, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "good.png")
    content = (tmp_path / "good.png").read_bytes()
    (tmp_path / "cut.png").write_bytes(content[: len(content) // 2])
    Image.new("L", (11000, 9000)).save(tmp_path / "huge.png")
    return tmp_path


def test_uploads_that_are_not_images_give_one_line_errors(pipeline: VQVAE2Pipeline, uploads: Path) -> None:
    assert read_upload(str(uploads / "good.png"), pipeline.autoencoder).shape == (3, 64, 64)
    expected = {"note.txt": "unknown image format", "cut.png": "truncated", "huge.png": "decompression bomb"}
    for name, reason in expected.items():
        with pytest.raises(UserError, match=f"^{name}: cannot be read as an image .*{reason}"):
            read_upload(str(uploads / name), pipeline.autoencoder)
    with pytest.raises(UserError, match="Choose an image file"):
        read_upload(None, pipeline.autoencoder)
    with pytest.raises(UserError, match="Upload an image, or sample one"):
        require_image(None)


@pytest.fixture
def worker() -> Iterator[ModelWorker]:
    worker = ModelWorker()
    yield worker
    worker.close()


def test_jobs_of_all_sessions_run_one_at_a_time_in_order(worker: ModelWorker) -> None:
    running, order = [], []

    def work(number: int) -> Callable[[Job], int]:
        def run(_: Job) -> int:
            running.append(number)
            order.append(number)
            assert running == [number]
            time.sleep(0.02)
            running.remove(number)
            return number

        return run

    async def run_all() -> list[int]:
        return await asyncio.gather(*(worker.run(f"user {number % 2}", Job(), work(number)) for number in range(6)))

    assert asyncio.run(run_all()) == order == list(range(6))


def test_cancel_stops_the_jobs_of_one_session_only(worker: ModelWorker) -> None:
    started = threading.Event()

    def endless(job: Job) -> None:
        while True:
            started.set()
            job.advance(1)
            time.sleep(0.001)

    async def use() -> list[object]:
        running = asyncio.create_task(worker.run("a", Job(), endless))
        waiting = asyncio.create_task(worker.run("a", Job(), endless))
        other = asyncio.create_task(worker.run("b", Job(), lambda job: "done"))
        while not started.is_set():
            await asyncio.sleep(0.001)
        worker.cancel("nobody")
        worker.cancel("a")
        return await asyncio.gather(running, waiting, other, return_exceptions=True)

    first, second, third = asyncio.run(asyncio.wait_for(use(), 10))
    assert isinstance(first, Canceled)
    assert isinstance(second, Canceled)
    assert third == "done"


def test_job_stops_if_its_caller_is_canceled_or_the_worker_is_closed(worker: ModelWorker) -> None:
    jobs = [Job(), Job()]

    def endless(job: Job) -> None:
        while True:
            job.advance(1)
            time.sleep(0.001)

    async def use() -> list[object]:
        abandoned = asyncio.create_task(worker.run("a", jobs[0], endless))
        await asyncio.sleep(0.05)
        abandoned.cancel()
        closed = asyncio.create_task(worker.run("a", jobs[1], endless))
        await asyncio.sleep(0.05)
        assert jobs[1].done > 0  # the first has left the thread
        worker.close()
        return await asyncio.gather(abandoned, closed, return_exceptions=True)

    abandoned, closed = asyncio.run(asyncio.wait_for(use(), 10))
    assert isinstance(abandoned, asyncio.CancelledError)
    assert isinstance(closed, Canceled)


def test_errors_of_jobs_reach_the_caller(worker: ModelWorker) -> None:
    def fail(_: Job) -> None:
        raise UserError("top_p: too low")

    for _ in range(2):  # the worker survives
        with pytest.raises(UserError, match="top_p: too low"):
            asyncio.run(worker.run("a", Job(), fail))


def test_command_without_gradio_says_what_to_install(tmp_path: Path) -> None:
    code = """
import sys
sys.modules["gradio"] = None  # as if it were not installed
from vqvae2.__main__ import main
sys.exit(main(["app", "scenes64"]))
"""
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert result.stderr == "vqvae2: app: needs the package gradio; pip install 'vqvae2[app]'.\n"


def test_command_has_the_errors_of_sample(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fails(capsys, ["app", str(tmp_path / "gone")], "gone: no such file or folder", "scenes64")
    run = shutil.copytree(finished_run, tmp_path / "run")
    (run / "prior-top" / "model.safetensors").unlink()
    messages = []
    for command in ("sample", "app"):
        assert main([command, str(run)]) == 2
        messages.append(capsys.readouterr().err)
    assert messages[0] == messages[1]
    assert "prior-top" in messages[0]


def test_address_that_is_not_free_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        fails(capsys, ["app", "scenes64", "--port", port], f"--port {port}: Address already in use", "another port")
    fails(capsys, ["app", "scenes64", "--host", "256.0.0.1"], "--host 256.0.0.1", "another port or host")


@pytest.mark.parametrize(
    ("error", "message", "is_printed"),
    [(UserError("no such class: fish"), "no such class: fish", False), (KeyError("fish"), "KeyError: 'fish'.", True)],
)
def test_errors_become_messages(error: Exception, message: str, is_printed: bool) -> None:
    gr = pytest.importorskip("gradio")
    from sampling.app import events

    class Worker:
        async def run(self, *_: Any) -> None:
            raise error

    handlers: list[Any] = []
    output: Any = object()
    model: Any = SimpleNamespace(worker=Worker())
    events.bind(model, lambda handle, *_, **__: handlers.append(handle), lambda call: None, [], [output], "sample")
    with pytest.raises(gr.Error) as raised:
        asyncio.run(handlers[0]({}, None, SimpleNamespace(session_hash="1")))
    assert raised.value.message.startswith(message)
    assert raised.value.print_exception == is_printed
