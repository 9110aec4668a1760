"""Likelihood of different prior networks of one level, each trained for the same processor time on the codes of a run.

    python -m benchmarks.prior_networks RUN --level top --minutes 6

The learning rate rises for the first hundredth of the time, and then decays to 0 as a cosine. The loss is that of
`vqvae2 train-prior`, in nats per code of held-out images, with averaged weights. Each network has its own peak learning
rate. Results are printed as rows of a Markdown table.
"""

import argparse
import math
import time
from pathlib import Path

import torch

from train.accelerator import make_accelerator
from train.ema import ExponentialMovingAverage
from train.stages.prior import PriorObjective, mean_nll
from vqvae2.__main__ import keep_freed_memory
from vqvae2.data.code_store import CodeStore
from vqvae2.priors import PixelCNNConfig, PixelSNAILConfig, PriorConfig, PriorSpec, TransformerConfig
from vqvae2.run_folder import RunFolder, level_names

BATCH_SIZE = 16
TRANSFORMER = {"channels": 192, "layers": 6, "heads": 6, "dropout": 0.1}
NETWORKS: dict[str, tuple[PriorConfig, float]] = {  # with peak learning rates
    "pixelsnail": (PixelSNAILConfig(channels=96, residual_channels=96, kernel=3, blocks=2, layers=3, heads=4), 4e-3),
    "pixelsnail, no attention": (
        PixelSNAILConfig(channels=96, residual_channels=96, kernel=3, blocks=2, layers=3, attention=False),
        8e-3,
    ),
    "pixelcnn": (PixelCNNConfig(channels=96, kernel=3, layers=10, output_channels=256), 1e-3),
    "transformer": (TransformerConfig(**TRANSFORMER), 2e-3),
    "transformer, wavefront order": (TransformerConfig(**TRANSFORMER, attention_order="wavefront"), 2e-3),
}


def train(config: PriorConfig, peak: float, level: int, stores: list[CodeStore], seconds: float) -> tuple[int, float]:
    """Train a network for `seconds` of processor time, and return its number of steps and its NLL."""
    torch.manual_seed(0)
    training, held_out = stores
    maps = training.header.levels
    spec = PriorSpec(level=maps[level], coarser=maps[level + 1 :], num_classes=len(training.header.classes))
    network = config.build(spec).train()
    objective, ema = PriorObjective(network, level), ExponentialMovingAverage(network, 0.998)
    optimizer = torch.optim.AdamW(network.parameters(), peak, weight_decay=0, fused=True)
    generator = torch.Generator().manual_seed(0)
    started, step = time.process_time(), 0
    while (progress := (time.process_time() - started) / seconds) < 1:
        optimizer.param_groups[0]["lr"] = peak * min(100 * progress, 0.5 * (1 + math.cos(math.pi * progress))) + 1e-9
        batch = training.read(torch.randint(len(training), (BATCH_SIZE,), generator=generator).tolist())
        objective(batch)[0].backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step += 1
        ema.update(step)
    accelerator = make_accelerator()
    with ema.applied():
        return step, mean_nll(network, level, held_out, 32, accelerator)


def main() -> None:
    """Print one row for each network."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--level", default="top")
    parser.add_argument("--minutes", type=float, default=6)
    parser.add_argument("--networks", nargs="+", default=list(NETWORKS), choices=list(NETWORKS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    keep_freed_memory()
    folder = RunFolder.existing(options.run)
    stores = [CodeStore.open(folder.code_store(split)) for split in ("train", "val")]
    level = level_names(len(stores[0].header.levels)).index(options.level)
    print("| network | steps | NLL |\n|---|---|---|")
    for name in options.networks:
        steps, nll = train(*NETWORKS[name], level, stores, 60 * options.minutes)
        print(f"| {name} | {steps:,} | {nll:.3f} |", flush=True)


if __name__ == "__main__":
    main()
