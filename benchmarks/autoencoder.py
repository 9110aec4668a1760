"""A training step of the autoencoder, against a plain one of the same network, in one run.

    python -m benchmarks.autoencoder [--size 256] [--batch 8] [--steps 7] [--threads 2] [--device cuda --precision bf16]

The plain step is what common implementations do: tensors in the order (B, C, H, W), an EMA quantizer that holds all
distances and one-hot matrices at once, Adam updating one tensor after the other. Each step lives in a process of its
own, so that peak memory is its own; they take turns, so that a busy machine slows both. Times are medians.
"""

import argparse
import resource
import time
from multiprocessing.connection import Connection

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.interleaved import run_interleaved
from train.stages.autoencoder import AutoencoderObjective
from vqvae2.data.images import ImageSample
from vqvae2.models import Autoencoder, AutoencoderConfig
from vqvae2.quantizers import Quantizer, QuantizerOutput


class OneHotQuantizer(Quantizer):
    """An EMA codebook as it is usually written: the full distance matrix, and one-hot codes multiplied with it."""

    embedding: Tensor
    sums: Tensor
    usage: Tensor

    def __init__(self, codes: int, dim: int) -> None:
        super().__init__()
        self.codes, self.dim = codes, dim
        vectors = torch.randn(dim, codes)
        for name, value in (("embedding", vectors), ("sums", vectors.clone()), ("usage", torch.zeros(codes))):
            self.register_buffer(name, value)

    def forward(self, features: Tensor) -> QuantizerOutput:
        features = features.float().permute(0, 2, 3, 1)
        flat = features.reshape(-1, self.dim)
        distances = (
            flat.pow(2).sum(1, keepdim=True) - 2 * flat @ self.embedding + self.embedding.pow(2).sum(0, keepdim=True)
        )
        codes = (-distances).max(1).indices
        one_hot = F.one_hot(codes, self.codes).type(flat.dtype)
        quantized = F.embedding(codes.view(features.shape[:-1]), self.embedding.t())
        with torch.no_grad():
            self.usage.mul_(0.99).add_(one_hot.sum(0), alpha=0.01)
            self.sums.mul_(0.99).add_(flat.t() @ one_hot, alpha=0.01)
            total = self.usage.sum()
            smoothed = (self.usage + 1e-5) / (total + self.codes * 1e-5) * total
            self.embedding.copy_(self.sums / smoothed)
        loss = (quantized.detach() - features).pow(2).mean()
        values = (features + (quantized - features).detach()).permute(0, 3, 1, 2)
        return QuantizerOutput(values, codes.view(features.shape[:-1]), 0.25 * loss, {"commitment": loss.detach()})

    def lookup(self, codes: Tensor) -> Tensor:
        return F.embedding(codes, self.embedding.t()).permute(0, 3, 1, 2)


def build(plain: bool, size: int) -> Autoencoder:
    """The ImageNet network of the paper; `plain` with the usual quantizer and memory format."""
    torch.manual_seed(0)
    network = AutoencoderConfig().build((size, size)).train()
    if plain:
        for index, level in enumerate(network.map_specs):
            network.quantizers[index] = OneHotQuantizer(level.codebook_size, 64)
        network = network.to(memory_format=torch.contiguous_format)
    return network


def serve(pipe: Connection, plain: bool, options: argparse.Namespace) -> None:
    """One step for each request; the answer is its seconds, or at the end the peak memory in bytes."""
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    objective = AutoencoderObjective(build(plain, options.size)).to(device)
    optimizer = torch.optim.AdamW(objective.parameters(), lr=3e-4, fused=not plain, foreach=False)
    images = torch.randint(0, 256, (options.batch, 3, options.size, options.size), dtype=torch.uint8, device=device)
    batch = ImageSample(images, torch.zeros(options.batch, dtype=torch.int64))
    before = _memory(device)
    while pipe.recv():
        started = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=options.precision == "bf16"):
            loss, _ = objective(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        objective.network.update_codebooks()
        if device.type == "cuda":
            torch.cuda.synchronize()
        pipe.send(time.perf_counter() - started)
    pipe.send(_memory(device) - before)


def _memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """Print time, images a second and memory of both steps, and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=7, help="measured steps of each, after two that are not")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=["no", "bf16"], default="no")
    options = parser.parse_args()
    taken = run_interleaved(
        serve, {name: (name == "plain", options) for name in ("ours", "plain")}, options.steps, warm=2
    )
    for name, each in taken.items():
        print(f"{name}: {each}, {options.batch / each.median:.1f} images/s")
    ours, plain = taken["ours"], taken["plain"]
    print(f"time {ours.median / plain.median:.2f} ×, memory {ours.memory / plain.memory:.2f} × the plain step's")


if __name__ == "__main__":
    main()
