"""Test code extraction: mirrored copies, image names, skipped unreadable images, and a moved data folder."""

import copy
from pathlib import Path

import lmdb
import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from sampling.run_config import ExtractCodesConfig, RunConfig
from tests.conftest import TINY
from train.run import Run
from train.stages.extract_codes import extract_codes
from vqvae2.config import read_yaml
from vqvae2.data import lmdb_environment
from vqvae2.data.code_store import RECORDS_PER_VALUE, CodeStore, CodeWriter
from vqvae2.data.images import to_float
from vqvae2.data.splits import open_datasets
from vqvae2.errors import UserError
from vqvae2.models import Autoencoder, AutoencoderConfig
from vqvae2.run_folder import RunFolder


@pytest.fixture
def run(tmp_path: Path, finished_run: Path) -> Run:
    """Return a run with a trained autoencoder on a folder of 120 files, one of which is not an image."""
    for number in range(120):
        path = tmp_path / "images" / f"{number:03d}.png"
        path.parent.mkdir(exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
        Image.fromarray(pixels).resize((32, 32)).save(path)
    (tmp_path / "images" / "070.png").write_text("not an image")
    (tmp_path / "tiny.yaml").write_text(TINY)
    settings = copy.deepcopy(read_yaml(tmp_path / "tiny.yaml"))
    settings["data"] = {"path": str(tmp_path / "images"), "size": 32, "num_workers": 0, "val_fraction": 0.05}
    folder = RunFolder(tmp_path / "run")
    folder.autoencoder.path.mkdir(parents=True)
    folder.autoencoder_weights.write_bytes((finished_run / "autoencoder" / "model.safetensors").read_bytes())
    return Run(RunConfig.from_dict(settings, "test"), folder)


def test_processes_share_the_values_before_any_of_them_writes(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def record(target: object, name: str) -> None:
        original = getattr(target, name)
        monkeypatch.setattr(target, name, lambda *args: (calls.append(name), original(*args))[1])

    record(CodeWriter, "missing_values")
    record(CodeWriter, "write")
    record(Accelerator, "wait_for_everyone")
    extract_codes(run)
    first = calls.index("missing_values")
    assert calls[first + 1 : first + 3] == ["wait_for_everyone", "write"]


@pytest.mark.parametrize("flip", [False, True])
def test_records_match_the_codes_of_the_named_images(run: Run, flip: bool) -> None:
    if flip:
        run = Run(run.config.model_copy(update={"extract_codes": ExtractCodesConfig(flip=True)}), run.folder)
    extract_codes(run)
    training, validation = open_datasets(run.config.data)
    network = Autoencoder.load(run.folder.autoencoder_weights)
    store, other = (CodeStore.open(run.folder.code_store(split)) for split in ("train", "val"))
    copies = 2 if flip else 1
    bad = list(training.names).index("070.png")
    assert store.header.unreadable == tuple(range(bad * copies, (bad + 1) * copies))
    assert (store.header.flip, other.header.flip) == (flip, False)
    assert len(store) == (len(training) - 1) * copies
    assert len(other) == len(validation)
    assert [store.image_name(index) for index in range(0, len(store), copies)] == [
        n for n in training.names if n != "070.png"
    ]
    everything = store.read(range(len(store)))
    assert (everything.label == -1).all()
    images = [training[list(training.names).index(store.image_name(index))].image for index in range(len(store))]
    assert [store.is_mirrored(index) for index in range(len(store))] == [flip and i % 2 == 1 for i in range(len(store))]
    images = torch.stack([image.flip(2) if store.is_mirrored(i) else image for i, image in enumerate(images)])
    assert bad * copies >= RECORDS_PER_VALUE
    with torch.inference_mode():
        first, all_codes = (network.encode(to_float(part)) for part in (images[:RECORDS_PER_VALUE], images))
    for level, exact, expected in zip(everything.codes, first, all_codes, strict=True):
        assert torch.equal(level[:RECORDS_PER_VALUE], exact)
        assert (level == expected).float().mean(dim=(1, 2)).min() > 0.5  # rounding differs between batch sizes


def test_extraction_resumes_after_moving_the_data_folder_but_not_with_other_images(run: Run, tmp_path: Path) -> None:
    extract_codes(run)
    digest = CodeStore.open(run.folder.code_store("train")).header.digest
    for part in ("train", "val"):
        (run.folder.code_store(part) / "data.mdb").rename(tmp_path / f"{part}.mdb")
    (tmp_path / "images").rename(tmp_path / "moved")
    data = run.config.data.model_copy(update={"path": str(tmp_path / "moved")})
    moved = Run(run.config.model_copy(update={"data": data}), run.folder)
    mark_unfinished(tmp_path / "train.mdb", run.folder.code_store("train"))
    extract_codes(moved)
    assert CodeStore.open(run.folder.code_store("train")).header.digest == digest

    (tmp_path / "moved" / "000.png").rename(tmp_path / "moved" / "new.png")
    mark_unfinished(run.folder.code_store("train") / "data.mdb", run.folder.code_store("train"))
    with pytest.raises(UserError, match="does not hold the images that"):
        extract_codes(moved)


def mark_unfinished(database: Path, store: Path) -> None:
    """Replace the database of a store and mark the store as incomplete."""
    database.rename(store / "data.mdb")
    (store / "seal.json").unlink()
    lmdb_environment.close_reader(store)
    with lmdb.open(str(store)) as environment, environment.begin(write=True) as transaction:
        header = transaction.get(b"header")
        assert header is not None
        transaction.put(b"header", header.replace(b'"complete":true', b'"complete":false'))
        transaction.delete((0).to_bytes(8, "big"))


def test_too_many_unreadable_images_raise_and_leave_the_store_incomplete(run: Run) -> None:
    data = run.config.data.model_copy(update={"max_unreadable_fraction": 0.0})
    with pytest.raises(UserError, match=r"1 of \d+ images .*070\.png"):
        extract_codes(Run(run.config.model_copy(update={"data": data}), run.folder))
    assert not CodeStore.read_header(run.folder.code_store("train")).complete
    extract_codes(run)
    assert CodeStore.open(run.folder.code_store("train")).header.complete


def test_autoencoder_of_another_codebook_size_is_refused(run: Run) -> None:
    network = Autoencoder.load(run.folder.autoencoder_weights)
    changed = network.config.model_dump()
    changed["levels"][0]["quantizer"]["codebook_size"] = 20
    AutoencoderConfig(**changed).build((32, 32)).save(run.folder.autoencoder_weights)
    with pytest.raises(UserError, match=r"an autoencoder of code maps 8×8 of 20 codes, .* describes 8×8 of 16 codes"):
        extract_codes(run)
    assert not run.folder.codes.exists()
