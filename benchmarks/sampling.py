"""How long sampling takes at the size of the 256 px models, against one that runs the whole network for every code.

    python -m benchmarks.sampling [--batches 1 16] [--levels top bottom] [--threads 2]

Top 32×32 with attention, bottom 64×64 given the top, 512 codes, 256 channels, 5×5 kernels, 4 blocks of 4 residual
blocks, random weights. The naive time is estimated from measured passes over the finished rows at several heights, in
the same run, with convolutions as torch has them; its conditioning stack is counted once, as ours. The floor is the
time to read once the weights that a position, and a row, must read.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from unittest import mock

import torch
from torch import Tensor

from sampling.sample_level import LevelSamplingParams, Noise, sample_level
from vqvae2.code_maps import CodeMaps, MapSpec
from vqvae2.priors import PixelSNAIL, PixelSNAILConfig, PriorSpec, toom_cook
from vqvae2.priors.layers import CausalConv2d, PointwiseConv2d, coordinate_map

TOP = MapSpec(codebook_size=512, height=32, width=32)
BOTTOM = MapSpec(codebook_size=512, height=64, width=64)


def build(level: str) -> PixelSNAIL:
    """The prior of a level, with random weights."""
    torch.manual_seed(0)
    if level == "top":
        return PixelSNAILConfig().build(PriorSpec(level=TOP)).eval()
    return PixelSNAILConfig(attention=False, condition_layers=3).build(PriorSpec(level=BOTTOM, coarser=(TOP,))).eval()


def seconds(work: Callable[[], object], repeats: int = 1) -> float:
    """Median wall time of a call."""
    times = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


@torch.inference_mode()
def naive_pass(prior: PixelSNAIL, codes: Tensor, condition: Tensor | None) -> None:
    """One pass of the whole network over the first rows, as a sampler without caches needs for every position."""
    batch, height, width = codes.shape
    coordinates = coordinate_map(height, width, codes.device).expand(batch, -1, -1, -1)
    x = prior.first(prior.embedding(codes).movedim(-1, 1)) + prior.coordinates(coordinates)
    if condition is not None:
        condition = condition[:, :, : height * condition.shape[2] // prior.spec.level.height]
    for block in prior.blocks:
        x = block(x, coordinates, condition)
    prior.logits(torch.nn.functional.elu(x[:, :, -1:]))


@torch.inference_mode()
def naive_seconds(prior: PixelSNAIL, batch: int, coarser: CodeMaps) -> float:
    """Estimated time of the naive sampler: the measured heights joined by straight lines, summed over all positions."""
    height, width = prior.spec.level.shape
    condition = prior.conditioner(batch, coarser, None) if prior.conditioner else None
    fractions = (8, 4, 2) if batch > 4 else (8, 4, 2, 1)
    measured = []
    for fraction in fractions:
        codes = torch.zeros(batch, height // fraction, width, dtype=torch.int64)
        with mock.patch.object(toom_cook, "should_tile", return_value=False):
            taken = seconds(lambda c=codes: naive_pass(prior, c, condition), 2)
        measured.append((height // fraction, taken))
        print(f"    naive pass over {measured[-1][0]} rows: {measured[-1][1]:.3f} s", flush=True)
    total = 0.0
    for finished in range(1, height + 1):
        after = next((at for at, (there, _) in enumerate(measured) if there >= finished), len(measured) - 1)
        (low, t_low), (high, t_high) = measured[max(after, 1) - 1], measured[max(after, 1)]
        total += width * max(t_low + (t_high - t_low) * (finished - low) / (high - low), 0.0)
    return total


def floor_seconds(prior: PixelSNAIL) -> float:
    """Bytes of weights that must be read for one batch, over the bandwidth of a copy."""
    height, width = prior.spec.level.shape
    a_position = a_row = 0
    for part in prior.modules():
        if isinstance(part, CausalConv2d):
            outputs, inputs, _ = part.weight.shape
            a_row += 4 * outputs * inputs * part.taps_above
            a_position += 4 * outputs * inputs * part.taps_current
        elif isinstance(part, PointwiseConv2d) and part not in (getattr(b, "condition", None) for b in prior.modules()):
            a_position += 4 * part.conv.weight.numel()
    source = torch.ones(64 * 2**20)
    target = torch.empty_like(source)
    copied = seconds(lambda: target.copy_(source), 7)
    bandwidth = 4 * source.numel() / copied  # bytes read a second while as many are written
    return (a_position * height * width + a_row * height) / bandwidth


def main() -> None:
    """Print a line for every batch size and level, and their sum."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--levels", nargs="+", default=["top", "bottom"], choices=["top", "bottom"])
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    priors = {level: build(level) for level in options.levels}
    for level, prior in priors.items():
        print(f"{level}: {sum(p.numel() for p in prior.parameters()) / 1e6:.1f} M weights")
    for batch in options.batches:
        ours = naive = floor = 0.0
        for level, prior in priors.items():
            coarser = tuple(torch.randint(512, (batch, 32, 32)) for _ in prior.spec.coarser)
            taken = seconds(
                lambda p=prior, c=coarser, n=batch: sample_level(p, Noise(0, range(n), 0), LevelSamplingParams(), c)
            )
            estimated = naive_seconds(prior, batch, coarser)
            lowest = floor_seconds(prior)
            ours, naive, floor = ours + taken, naive + estimated, floor + lowest
            print(
                f"  batch {batch} {level}: {taken:.1f} s; naive {estimated:.0f} s, {estimated / taken:.0f} × as long; "
                f"floor {lowest:.1f} s",
                flush=True,
            )
        print(f"batch {batch}: {ours:.1f} s; naive {naive:.0f} s, {naive / ours:.0f} × as long; floor {floor:.1f} s")


if __name__ == "__main__":
    main()
