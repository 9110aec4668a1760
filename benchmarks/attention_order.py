"""Sampling time of priors with attention, in raster order and in wavefront order, in one run.

    python -m benchmarks.attention_order [--batches 1 16] [--kinds pixelsnail transformer] [--threads 2]

One level of 32×32 codes of 512, random weights: the PixelSNAIL of `benchmarks.sampling`, and a transformer of 8 blocks
with 512 channels.
"""

import argparse
from typing import Literal

import torch

from benchmarks.interleaved import time_calls
from sampling.sample_level import LevelSamplingParams, Noise, sample_level
from vqvae2.code_maps import MapSpec
from vqvae2.priors import PixelSNAILConfig, Prior, PriorSpec, TransformerConfig

ORDERS: tuple[Literal["raster", "wavefront"], ...] = ("raster", "wavefront")
LEVEL = MapSpec(codebook_size=512, height=32, width=32)


def build(kind: str, order: Literal["raster", "wavefront"]) -> Prior:
    """Build a prior with random weights."""
    torch.manual_seed(0)
    if kind == "pixelsnail":
        return PixelSNAILConfig(attention_order=order).build(PriorSpec(level=LEVEL)).eval()
    config = TransformerConfig(channels=512, layers=8, heads=8, attention_order=order)
    return config.build(PriorSpec(level=LEVEL)).eval()


def main() -> None:
    """Print the median time of three calls for each kind, batch size and order."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 16])
    parser.add_argument("--kinds", nargs="+", default=["pixelsnail", "transformer"])
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    for kind in options.kinds:
        priors = {order: build(kind, order) for order in ORDERS}
        for batch in options.batches:
            seconds: dict[str, list[float]] = {order: [] for order in ORDERS}
            for _ in range(3):
                for order, prior in priors.items():
                    timing = time_calls(
                        lambda p=prior, b=batch: sample_level(p, Noise(0, range(b), 0), LevelSamplingParams())
                    )
                    seconds[order] += timing.seconds
            raster, wavefront = (sorted(seconds[order])[1] for order in ORDERS)
            times = f"raster {raster:.2f} s, wavefront {wavefront:.2f} s, {wavefront / raster:.2f} ×"
            print(f"{kind}, batch {batch}: {times}", flush=True)


if __name__ == "__main__":
    main()
