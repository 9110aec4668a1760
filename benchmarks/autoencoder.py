"""Training step of the autoencoder, compared with a plain implementation of the same network.

    python -m benchmarks.autoencoder [--size 256] [--batch 8] [--steps 7] [--threads 2] [--device cuda --precision bf16]

The plain implementation follows common ones: contiguous (B, C, H, W) tensors, an EMA quantizer that materializes all
distances and one-hot matrices, and an optimizer that updates one tensor at a time. Both run alternately in separate
processes. Times are medians.
"""

import argparse
from multiprocessing.connection import Connection

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.interleaved import peak_memory, run_interleaved, serve_steps
from train.stages.autoencoder import AutoencoderObjective
from vqvae2.data.images import ImageSample
from vqvae2.models import Autoencoder, AutoencoderConfig
from vqvae2.quantizers import Quantizer, QuantizerOutput


class OneHotQuantizer(Quantizer):
    """The usual implementation of an EMA codebook: a full distance matrix, and a product with one-hot codes."""

    embedding: Tensor
    ema_embedding_sum: Tensor
    ema_cluster_size: Tensor

    def __init__(self, codebook_size: int, code_dim: int) -> None:
        super().__init__()
        self.codebook_size, self.code_dim = codebook_size, code_dim
        vectors = torch.randn(code_dim, codebook_size)
        self.register_buffer("embedding", vectors)
        self.register_buffer("ema_embedding_sum", vectors.clone())
        self.register_buffer("ema_cluster_size", torch.zeros(codebook_size))

    def forward(self, features: Tensor) -> QuantizerOutput:
        features = features.float().permute(0, 2, 3, 1)
        flat = features.reshape(-1, self.code_dim)
        distances = (
            flat.pow(2).sum(1, keepdim=True) - 2 * flat @ self.embedding + self.embedding.pow(2).sum(0, keepdim=True)
        )
        codes = (-distances).max(1).indices
        one_hot = F.one_hot(codes, self.codebook_size).type(flat.dtype)
        quantized = F.embedding(codes.view(features.shape[:-1]), self.embedding.t())
        with torch.no_grad():
            self.ema_cluster_size.mul_(0.99).add_(one_hot.sum(0), alpha=0.01)
            self.ema_embedding_sum.mul_(0.99).add_(flat.t() @ one_hot, alpha=0.01)
            total = self.ema_cluster_size.sum()
            smoothed = (self.ema_cluster_size + 1e-5) / (total + self.codebook_size * 1e-5) * total
            self.embedding.copy_(self.ema_embedding_sum / smoothed)
        loss = (quantized.detach() - features).pow(2).mean()
        values = (features + (quantized - features).detach()).permute(0, 3, 1, 2)
        return QuantizerOutput(values, codes.view(features.shape[:-1]), 0.25 * loss, {"commitment": loss.detach()})

    def lookup(self, codes: Tensor) -> Tensor:
        return F.embedding(codes, self.embedding.t()).permute(0, 3, 1, 2)


def build(plain: bool, size: int) -> Autoencoder:
    """Build the ImageNet network of the paper; if `plain`, with `OneHotQuantizer` and contiguous tensors."""
    torch.manual_seed(0)
    network = AutoencoderConfig().build((size, size)).train()
    if plain:
        for index, level in enumerate(network.map_specs):
            network.quantizers[index] = OneHotQuantizer(level.codebook_size, 64)
        network = network.to(memory_format=torch.contiguous_format)
    return network


def train_steps(pipe: Connection, plain: bool, options: argparse.Namespace) -> None:
    """Run the training steps of one variant; a worker of `run_interleaved`."""
    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    objective = AutoencoderObjective(build(plain, options.size)).to(device)
    optimizer = torch.optim.AdamW(objective.parameters(), lr=3e-4, fused=not plain, foreach=False)
    images = torch.randint(0, 256, (options.batch, 3, options.size, options.size), dtype=torch.uint8, device=device)
    batch = ImageSample(images, -1)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=options.precision == "bf16"):
            loss, _ = objective(batch)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        objective.network.update_codebooks()

    serve_steps(pipe, step, device, baseline=peak_memory(device))


def main() -> None:
    """Print time, images a second and memory of both steps, and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--steps", type=int, default=7, help="measured steps of each, after two that are not")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    options = parser.parse_args()
    taken = run_interleaved(
        train_steps, {name: (name == "plain", options) for name in ("ours", "plain")}, options.steps, warmup=2
    )
    for name, each in taken.items():
        print(f"{name}: {each}, {options.batch / each.median:.1f} images/s")
    ours, plain = taken["ours"], taken["plain"]
    print(f"time {ours.median / plain.median:.2f} ×, memory {ours.memory / plain.memory:.2f} × the plain step's")


if __name__ == "__main__":
    main()
