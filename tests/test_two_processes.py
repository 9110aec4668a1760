"""Test that two processes with batch size N match one process with batch size 2N."""

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
NO_DROPOUT = ["--priors.top.model.dropout", "0", "--priors.bottom.model.dropout", "0"]
# Runs several commands with one launch, because starting the processes takes longer than the commands.
RUN_COMMANDS = """
import sys
from vqvae2.__main__ import main
for command in sys.argv[1:]:
    if status := main(command.split()):
        sys.exit(status)
"""


def run_on_two_processes(folder: Path, *commands: str) -> str:
    """Run commands with torchrun on two processes, and return what they printed. A script is written to `folder`."""
    script = folder / "commands.py"
    script.write_text(RUN_COMMANDS)
    # `accelerate launch --cpu` always starts one process. For GPUs it runs torchrun, as here.
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([*launch, *commands], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def train_quantizers(dead_code_threshold: float) -> dict[str, Tensor]:
    """Train an autoencoder for 20 steps on this rank's part of every batch and return the state of its quantizers."""
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
    for conv in network.pre_quant_convs:  # scales features to about the variance of a trained network
        torch.nn.init.normal_(conv.weight)
    objective = AutoencoderObjective(network)
    wrapped = DistributedDataParallel(objective) if distributed.is_distributed() else objective
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-4)
    batch_size = BATCH // distributed.get_world_size()
    mine = slice(distributed.get_rank() * batch_size, (distributed.get_rank() + 1) * batch_size)
    for step in range(STEPS):
        images = torch.randint(0, 256, (BATCH, 3, 4, 4), generator=torch.Generator().manual_seed(step))
        images = images.repeat_interleave(8, 2).repeat_interleave(8, 3).to(torch.uint8)
        loss, _ = wrapped(ImageSample(images[mine], torch.zeros(batch_size)))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        network.update_codebooks()
    return network.quantizers.state_dict()


def test_codebook_statistics_and_restarts_match_one_process() -> None:
    expected = train_quantizers(0.4)  # high, so that many steps restart codes
    for name in ("0.embedding", "1.embedding"):
        assert not torch.allclose(expected[name], train_quantizers(0.0)[name], atol=0.1), "restarts change the codebook"
    for state in two_processes(train_quantizers, 0.4):
        for name, tensor in expected.items():
            torch.testing.assert_close(state[name], tensor, atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def launched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Train on one process and, with torchrun, on two, and return both run folders."""
    folder = tmp_path_factory.mktemp("launched")
    commands = ["train-autoencoder", "extract-codes", "train-prior --level bottom"]
    for processes in (1, 2):
        (folder / f"{processes}.yaml").write_text(f"{TINY}run: {folder / str(processes)}\n")
    for command in commands:
        name, *options = command.split()
        assert main([name, str(folder / "1.yaml"), *options, *NO_DROPOUT]) == 0
    named = [command.partition(" ") for command in commands]
    run_on_two_processes(
        folder, *(" ".join([name, str(folder / "2.yaml"), options, *NO_DROPOUT]) for name, _, options in named)
    )
    return folder / "1", folder / "2"


@pytest.mark.parametrize("stage", ["autoencoder", "prior-bottom"])
def test_launched_stage_matches_one_process(launched: tuple[Path, Path], stage: str) -> None:
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
