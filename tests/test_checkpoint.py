"""Weights files: what is written comes back, and no changed byte goes unseen."""

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


def test_tensors_of_every_kind_come_back(tmp_path: Path) -> None:
    checkpoint.save(tmp_path / "file", TENSORS, {"network": "none", "of": [1, 2]})
    tensors, metadata = checkpoint.load(tmp_path / "file")
    assert metadata == {"network": "none", "of": [1, 2]}
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor)


def test_every_changed_byte_is_found(tmp_path: Path) -> None:
    path = tmp_path / "file"
    checkpoint.save(path, TENSORS, {"network": "none"})
    content = path.read_bytes()
    chance = random.Random(0)
    for place in range(len(content)):
        changed = bytearray(content)
        changed[place] ^= 1 << chance.randrange(8)
        path.write_bytes(bytes(changed))
        try:
            tensors, metadata = checkpoint.load(path)
        except UserError:
            continue
        # White space and the like: what the file says is still the same.
        assert metadata == {"network": "none"}
        assert all(torch.equal(tensors[name], tensor) for name, tensor in TENSORS.items())


@pytest.mark.parametrize("length", [0, 7, 8, 100, -1])
def test_a_file_cut_short_is_named(tmp_path: Path, length: int) -> None:
    path = tmp_path / "file"
    checkpoint.save(path, TENSORS, {})
    path.write_bytes(path.read_bytes()[:length])
    with pytest.raises(UserError, match=r"file: corrupted weights file \(.*\). Delete it and rerun the stage"):
        checkpoint.load(path)
