"""Test weights files: round trip, and detection of every changed byte."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from vqvae2 import Autoencoder, AutoencoderConfig, checkpoint
from vqvae2.errors import UserError

TENSORS = {
    "weight": torch.randn(3, 4, generator=torch.Generator().manual_seed(0)),
    "half": torch.ones(5, dtype=torch.bfloat16),
    "count": torch.tensor(7),
    "ready": torch.tensor(True),
    "empty": torch.zeros(0, 2),
}


def test_round_trip_of_every_dtype(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "file", TENSORS, {"network": "none", "of": [1, 2]})
    tensors, metadata = checkpoint.load(tmp_path / "file")
    assert metadata == {"network": "none", "of": [1, 2]}
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor)


def test_every_flipped_bit_is_detected(tmp_path: Path) -> None:
    path = tmp_path / "file"
    checkpoint.save(path, TENSORS, {"network": "none"})
    content = path.read_bytes()
    rng = random.Random(0)
    for position in range(len(content)):
        changed = bytearray(content)
        changed[position] ^= 1 << rng.randrange(8)
        path.write_bytes(bytes(changed))
        try:
            tensors, metadata = checkpoint.load(path)
        except UserError:
            continue
        # Changes without effect, for example in whitespace: the contents must be unchanged.
        assert metadata == {"network": "none"}
        assert all(torch.equal(tensors[name], tensor) for name, tensor in TENSORS.items())


@pytest.mark.parametrize("length", [0, 7, 8, 100, -1])
def test_truncated_file_error_names_the_file(tmp_path: Path, length: int) -> None:
    path = tmp_path / "file"
    checkpoint.save(path, TENSORS, {})
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(UserError, match=r"file: corrupted weights file \(.*\). Delete it and rerun the stage"):
        checkpoint.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda weights: weights.fill_(float("nan")), "is not finite"),
        (lambda weights: weights.double(), r"has dtype torch\.float64, expected torch\.float32"),
        (lambda weights: weights.to(torch.int64), r"has dtype torch\.int64"),
        (lambda weights: weights.to(torch.complex64), r"has dtype torch\.complex64"),
        (lambda weights: weights[:1], "has shape"),
    ],
)
def test_invalid_weights_are_refused(tmp_path: Path, change: Callable[[Tensor], Tensor], message: str) -> None:
    tensors = dict(torch.nn.Linear(2, 3).state_dict())
    tensors["weight"] = change(tensors["weight"].clone())
    with pytest.raises(UserError, match=f"file: weight `weight` {message}"):
        checkpoint.build_module(lambda: torch.nn.Linear(2, 3), tensors, Path("file"))


def test_impossible_sizes_are_refused_before_allocation(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    small = AutoencoderConfig(channels=4, residual_channels=2, residual_layers=1).build((32, 32))
    small.save(path)
    tensors, metadata = checkpoint.load(path)
    changes: list[tuple[str, Any]] = [
        ("channels", 10**9),
        ("channels", 2**14),  # within the bounds: 40 GB, if it were allocated
        ("residual_layers", 10**6),
        ("levels", [{"stride": 4, "quantizer": {"kind": "ema", "codebook_size": 10**10}}]),
    ]
    for key, value in changes:
        checkpoint.save(path, tensors, metadata | {"config": metadata["config"] | {key: value}})
        with pytest.raises(UserError, match=r"model\.safetensors: "):
            Autoencoder.from_pretrained(path)
    for size in ("big", [32], None, [10**12, 32], [-32, 32]):
        checkpoint.save(path, tensors, metadata | {"size": size})
        with pytest.raises(UserError, match=r"model\.safetensors: .*"):
            Autoencoder.from_pretrained(path)


def test_older_format_is_refused_by_its_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint, "_FORMAT", 1)
    checkpoint.save(tmp_path / "old.safetensors", {"a": torch.zeros(1)}, {})
    monkeypatch.undo()
    with pytest.raises(UserError, match="weights file of format 1; this version reads 2"):
        checkpoint.load(tmp_path / "old.safetensors")


@pytest.mark.parametrize("text", ["[]", "null", "[" * 5000, "9" * 5000, '[["format", 2]]', '{"format": [1]}'])
def test_metadata_of_another_shape_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.zeros(1)}, path, {"vqvae2": text})
    with pytest.raises(UserError, match=r"model\.safetensors: .*(corrupted|not valid JSON|of format)"):
        checkpoint.load(path)


def test_files_have_the_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "usual").touch()
    checkpoint.save(tmp_path / "weights.safetensors", {"x": torch.zeros(1)}, {})
    assert (tmp_path / "weights.safetensors").stat().st_mode == (tmp_path / "usual").stat().st_mode
