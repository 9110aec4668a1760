"""Two processes with batch N end with what one process with batch 2N ends with."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from tests.conftest import TINY
from tests.inception_fixture import two_processes
from train.stages.autoencoder import AutoencoderObjective
from vqvae2 import distributed
from vqvae2.__main__ import main
from vqvae2.data.code_store import CodeStore
from vqvae2.data.images import ImageSample
from vqvae2.models import AutoencoderConfig, LevelConfig
from vqvae2.quantizers import EMAConfig, GradientConfig

STEPS, BATCH = 20, 8


def trained(dead_code_threshold: float) -> dict[str, Tensor]:
    """The quantizers' state after 20 steps of an autoencoder on this process's share of every batch."""
    torch.manual_seed(0)
    levels = (
        LevelConfig(
            stride=4,
            quantizer=EMAConfig(codebook_size=24, code_dim=6, ema_decay=0.8, dead_code_threshold=dead_code_threshold),
        ),
        LevelConfig(
            stride=2,
            quantizer=GradientConfig(
                codebook_size=24, code_dim=6, ema_decay=0.8, dead_code_threshold=dead_code_threshold
            ),
        ),
    )
    network = AutoencoderConfig(levels=levels, channels=16, residual_channels=8).build((32, 32))
    for (
        join
    ) in network.pre_quant_convs:  # features spread out about as far as a trained network's, not a hundredth of it
        torch.nn.init.normal_(join.weight)
    objective = AutoencoderObjective(network)
    wrapped = DistributedDataParallel(objective) if distributed.is_distributed() else objective
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-4)
    share = BATCH // distributed.get_world_size()
    mine = slice(distributed.get_rank() * share, (distributed.get_rank() + 1) * share)
    for step in range(STEPS):
        images = torch.randint(0, 256, (BATCH, 3, 4, 4), generator=torch.Generator().manual_seed(step))
        images = images.repeat_interleave(8, 2).repeat_interleave(8, 3).to(torch.uint8)
        loss, _ = wrapped(ImageSample(images[mine], torch.zeros(share)))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        network.update_codebooks()
    return network.quantizers.state_dict()


def test_codebooks_sums_and_restarts_are_those_of_one_process() -> None:
    expected = trained(0.4)  # so high that there are restarts in many steps
    for name in ("0.embedding", "1.embedding"):
        assert not torch.allclose(expected[name], trained(0.0)[name], atol=0.1), "restarts have changed the codebook"
    for state in two_processes(trained, 0.4):
        for name, tensor in expected.items():
            torch.testing.assert_close(state[name], tensor, atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The run folders of the training stages on one process and on two, launched as a person would."""
    folder = tmp_path_factory.mktemp("launched")
    settings = ["--priors.top.model.dropout", "0", "--priors.bottom.model.dropout", "0"]
    for processes in (1, 2):
        config = folder / f"{processes}.yaml"
        config.write_text(f"{TINY}run: {folder / str(processes)}\n")
        common = [str(config), *settings]
        for command in (["train-autoencoder"], ["extract-codes"], ["train-prior", "--level", "bottom"]):
            if processes == 1:
                assert main([command[0], *common, *command[1:]]) == 0
                continue
            # `accelerate launch --cpu` starts one process whatever it is told; this is what it runs for GPUs.
            launch = ["torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "vqvae2"]
            environment = os.environ | {"OMP_NUM_THREADS": "1"}
            arguments = [sys.executable, "-m", *launch, command[0], *common, *command[1:]]
            done = subprocess.run(arguments, env=environment, capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stderr
    return folder / "1", folder / "2"


@pytest.mark.parametrize("stage", ["autoencoder", "prior-bottom"])
def test_a_launched_stage_ends_with_the_weights_of_one_process(launched: tuple[Path, Path], stage: str) -> None:
    one, two = (load_file(run / stage / "model.safetensors") for run in launched)
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, atol=1e-4, rtol=1e-4, msg=lambda text, n=name: f"{n}: {text}")


def test_launched_extraction_writes_the_same_store(launched: tuple[Path, Path]) -> None:
    one, two = (CodeStore.open(run / "codes" / "train") for run in launched)
    assert len(one) == len(two)
    ours, theirs = one.read(range(len(one))), two.read(range(len(two)))
    assert torch.equal(ours.label, theirs.label)
    for first, second in zip(ours.codes, theirs.codes, strict=True):
        assert (first == second).float().mean() > 0.99
