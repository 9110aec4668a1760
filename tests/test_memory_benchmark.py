"""The memory that `benchmarks.memory` computes, against sizes counted by hand."""

import re
from pathlib import Path

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from benchmarks.memory import LiveBytes, gpus_in_header, measure
from sampling.run_config import RunConfig
from tests.conftest import TINY

CONFIGS = Path(__file__).parents[1] / "configs"
SIDE = 1024
MATRIX = 4 * SIDE * SIDE  # bytes


def test_live_and_peak_bytes_of_a_small_network() -> None:
    with FakeTensorMode(), LiveBytes() as live:
        layers = [nn.Linear(SIDE, SIDE, bias=False) for _ in range(3)]
        x = torch.zeros(SIDE, SIDE)
        assert live.now == 4 * MATRIX
        for layer in layers:
            x = layer(x).relu()
        # Saved for the backward pass: the input of each layer and the last output. Results of `layer(x)` are freed.
        assert live.now == (3 + 4) * MATRIX
        assert live.peak == (3 + 5) * MATRIX, "a layer's output beside that of its activation"
        x.sum().backward()
        del x
        assert live.now == (3 + 3) * MATRIX, "weights and gradients; the input is no longer referenced"


def test_larger_batches_and_networks_take_more(tmp_path: Path) -> None:
    path = tmp_path / "tiny.yaml"
    path.write_text(TINY)
    config = RunConfig.from_yaml(path)
    one = {row.network: row for row in measure(config, gpus=1, checkpointing=True)}
    two = {row.network: row for row in measure(config, gpus=2, checkpointing=True)}
    assert one.keys() == {"autoencoder", "prior-bottom", "prior-top"}
    for name, row in one.items():
        assert row.micro_batch == 2 * two[name].micro_batch
        assert row.peak > two[name].peak
        assert row.peak > row.fixed > 0


@pytest.mark.parametrize(("header", "gpus"), [("# Hardware: 8 GPUs of 80 GB.\ndata: {}\n", 8), ("data: {}\n", 1)])
def test_number_of_gpus_in_the_header(tmp_path: Path, header: str, gpus: int) -> None:
    (tmp_path / "a.yaml").write_text(header)
    assert gpus_in_header(tmp_path / "a.yaml") == gpus


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_fits_and_states_its_peak(path: Path) -> None:
    peak = max(row.peak for row in measure(RunConfig.from_yaml(path), gpus_in_header(path), checkpointing=True))
    assert peak < 72
    stated = re.search(r"computed peak ([0-9.]+) GiB", path.read_text(encoding="utf-8"))
    assert (stated is None) == ("CPU" in path.read_text(encoding="utf-8").split("\ndata:")[0])
    if stated:
        assert peak == pytest.approx(float(stated[1]), abs=0.051)
