"""Test weights files: round trip, and detection of every changed byte."""

import random
from pathlib import Path

import pytest
import torch

from vqvae2 import checkpoint
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
