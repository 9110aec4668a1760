"""Sampling time of the priors of a 256 px model, compared with naive sampling by full forward passes.

    python -m benchmarks.sampling [--batches 1 16] [--levels top bottom] [--threads 2] [--no-naive]

The top level is 32×32 with attention, the bottom level 64×64 conditioned on the top; 512 codes, 256 channels, 5×5
kernels, 4 blocks of 4 residual blocks, random weights. Naive sampling runs the whole network, with the convolutions of
torch, over all finished rows for every code. Its time is estimated from measured passes at several heights in the same
run; the conditioning stack is counted once, as in this project. The lower bound is the time to read the weights that
each position and each row needs from memory once. Networks without attention are sampled in wavefront order, and in
the same run once more in raster order.
"""

import argparse
from unittest import mock

import torch
from torch import Tensor

from benchmarks.interleaved import time_calls
from sampling.sample_level import LevelSamplingParams, Noise, sample_level
from vqvae2.code_maps import CodeMaps, MapSpec
from vqvae2.priors import PixelSNAIL, PixelSNAILConfig, PriorSpec, toom_cook
from vqvae2.priors.layers import CausalConv2d, PointwiseConv2d, coordinate_map

TOP = MapSpec(codebook_size=512, height=32, width=32)
BOTTOM = MapSpec(codebook_size=512, height=64, width=64)


def build(level: str) -> PixelSNAIL:
    """Build the prior of one level with random weights."""
    torch.manual_seed(0)
    if level == "top":
        return PixelSNAILConfig().build(PriorSpec(level=TOP)).eval()
    return PixelSNAILConfig(attention=False, condition_layers=3).build(PriorSpec(level=BOTTOM, coarser=(TOP,))).eval()


@torch.inference_mode()
def naive_pass(prior: PixelSNAIL, codes: Tensor, condition: Tensor | None) -> None:
    """Run the network over the first rows (B, h, W) of the codes, as naive sampling does for every position."""
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
    """Estimate the time of naive sampling by linear interpolation between measured heights, summed over positions."""
    height, width = prior.spec.level.shape
    condition = prior.conditioner(batch, coarser, None) if prior.conditioner else None
    fractions = (8, 4, 2) if batch > 4 else (8, 4, 2, 1)
    measured = []
    for fraction in fractions:
        codes = torch.zeros(batch, height // fraction, width, dtype=torch.int64)
        with mock.patch.object(toom_cook, "should_tile", return_value=False):
            seconds = time_calls(lambda c=codes: naive_pass(prior, c, condition), 2).median
        measured.append((height // fraction, seconds))
        print(f"    naive pass over {height // fraction} rows: {seconds:.3f} s", flush=True)
    total = 0.0
    for rows in range(1, height + 1):
        after = next((index for index, (height, _) in enumerate(measured) if height >= rows), len(measured) - 1)
        (low, t_low), (high, t_high) = measured[max(after, 1) - 1], measured[max(after, 1)]
        total += width * max(t_low + (t_high - t_low) * (rows - low) / (high - low), 0.0)
    return total


def lower_bound_seconds(prior: PixelSNAIL) -> float:
    """Return the bytes of weights to read for one batch, divided by the memory bandwidth of a copy."""
    height, width = prior.spec.level.shape
    per_position = per_row = 0
    conditions = [getattr(module, "condition", None) for module in prior.modules()]
    for module in prior.modules():
        if isinstance(module, CausalConv2d):
            outputs, inputs, _ = module.weight.shape
            per_row += 4 * outputs * inputs * module.taps_above
            per_position += 4 * outputs * inputs * module.taps_current
        elif isinstance(module, PointwiseConv2d) and module not in conditions:
            per_position += 4 * module.conv.weight.numel()
    source = torch.ones(64 * 2**20)
    target = torch.empty_like(source)
    copied = time_calls(lambda: target.copy_(source), 7).median
    bandwidth = 4 * source.numel() / copied  # bytes read per second, while as many are written
    return (per_position * height * width + per_row * height) / bandwidth


def main() -> None:
    """Print a line for every batch size and level, and their sum."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--levels", nargs="+", default=["top", "bottom"], choices=["top", "bottom"])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--naive", action=argparse.BooleanOptionalAction, default=True)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    priors = {level: build(level) for level in options.levels}
    for level, prior in priors.items():
        print(f"{level}: {sum(p.numel() for p in prior.parameters()) / 1e6:.1f} M weights")
    for batch in options.batches:
        ours = raster = naive = floor = 0.0
        for level, prior in priors.items():
            coarser = tuple(torch.randint(512, (batch, 32, 32)) for _ in prior.spec.coarser)
            taken = sampling_seconds(prior, batch, coarser)
            with mock.patch.object(PixelSNAIL, "_wavefront_shape", return_value=None):
                in_raster_order = sampling_seconds(prior, batch, coarser)
            estimated = naive_seconds(prior, batch, coarser) if options.naive else float("nan")
            lowest = lower_bound_seconds(prior)
            ours, raster, naive, floor = ours + taken, raster + in_raster_order, naive + estimated, floor + lowest
            print_times(f"  batch {batch} {level}", taken, in_raster_order, estimated, lowest)
        print_times(f"batch {batch}", ours, raster, naive, floor)


def sampling_seconds(prior: PixelSNAIL, batch: int, coarser: CodeMaps) -> float:
    """Return the median time to sample one batch of maps."""
    return time_calls(lambda: sample_level(prior, Noise(0, range(batch), 0), LevelSamplingParams(), coarser)).median


def print_times(name: str, ours: float, raster: float, naive: float, floor: float) -> None:
    """Print one line of times in seconds."""
    print(
        f"{name}: {ours:.1f} s; raster order {raster:.1f} s, {raster / ours:.2f} × as long; naive {naive:.0f} s, "
        f"{naive / ours:.0f} × as long; lower bound of raster order {floor:.1f} s",
        flush=True,
    )


if __name__ == "__main__":
    main()
