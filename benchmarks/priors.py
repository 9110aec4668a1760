"""Training step of the priors of a 256 px model, compared with a plain implementation of the same networks.

    python -m benchmarks.priors [--levels top bottom] [--batch 2] [--steps 3] [--threads 2]

The networks are those of benchmarks/sampling.py. The plain implementation follows common ones: one-hot code maps as the
input of convolutions, masked square kernels, attention with a masked N × N matrix, weight normalization as separate
operations, and an optimizer that updates one tensor at a time. Both run alternately in separate processes. Times are
medians.
"""

import argparse
from multiprocessing.connection import Connection

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.interleaved import run_interleaved, serve_steps
from benchmarks.sampling import BOTTOM, TOP, build
from train.stages.prior import PriorObjective
from vqvae2.data.code_store import CodeBatch
from vqvae2.priors.layers import coordinate_map

CHANNELS, KERNEL, HEADS, DROPOUT = 256, 5, 8, 0.1


class PlainConv(nn.Module):
    """A weight-normalized convolution; if causal, the kernel is square, and later positions are masked with zeros."""

    def __init__(self, inputs: int, outputs: int, kernel: int = 1, causal: str = "") -> None:
        super().__init__()
        self.direction = nn.Parameter(torch.empty(outputs, inputs, kernel, kernel))
        nn.init.kaiming_uniform_(self.direction, a=5**0.5)
        self.size = nn.Parameter(self.direction.detach().flatten(1).norm(dim=1)[:, None, None, None])
        self.bias = nn.Parameter(torch.zeros(outputs))
        side = kernel // 2
        self.padding = (side, side, kernel - 1, 0) if causal else (side, side, side, side)
        self.taps: Tensor
        taps = torch.ones(kernel, kernel)
        if causal:
            taps[-1, side + (causal != "strict") :] = 0
        self.register_buffer("taps", taps)

    def forward(self, x: Tensor) -> Tensor:
        norm = self.direction.pow(2).sum((1, 2, 3), keepdim=True).sqrt()
        return F.conv2d(F.pad(x, self.padding), self.size * self.direction / norm * self.taps, self.bias)


class PlainResidual(nn.Module):
    """The gated residual block of PixelSNAIL."""

    def __init__(
        self, channels: int, hidden: int, kernel: int = 1, causal: str = "", extra: int = 0, condition: bool = False
    ) -> None:
        super().__init__()
        self.first = PlainConv(channels, hidden, kernel, causal)
        self.second = PlainConv(hidden, 2 * channels, kernel, causal)
        self.extra = PlainConv(extra, hidden) if extra else None
        self.condition = PlainConv(CHANNELS, 2 * channels) if condition else None
        self.dropout = nn.Dropout(DROPOUT)

    def forward(self, x: Tensor, condition: Tensor | None = None, extra: Tensor | None = None) -> Tensor:
        hidden = self.first(F.elu(x))
        if self.extra is not None and extra is not None:
            hidden = hidden + self.extra(F.elu(extra))
        hidden = self.second(self.dropout(F.elu(hidden)))
        if self.condition is not None:
            hidden = hidden + self.condition(condition)
        value, gate = hidden.chunk(2, 1)
        return x + value * torch.sigmoid(gate)


class PlainAttention(nn.Module):
    """Causal attention that materializes the weights of all pairs of positions."""

    def __init__(self, positions: int) -> None:
        super().__init__()
        wide, narrow, self.width = 2 * CHANNELS + 2, CHANNELS + 2, CHANNELS // 2
        self.key_block, self.query_block = PlainResidual(wide, CHANNELS), PlainResidual(narrow, CHANNELS)
        self.key, self.value = PlainConv(wide, self.width), PlainConv(wide, self.width)
        self.query = PlainConv(narrow, self.width)
        self.mask: Tensor
        self.register_buffer("mask", torch.tril(torch.ones(positions, positions)).bool())

    def forward(self, inputs: Tensor, features: Tensor, coordinates: Tensor) -> Tensor:
        wide = self.key_block(torch.cat([inputs, features, coordinates], 1))
        narrow = self.query_block(torch.cat([features, coordinates], 1))
        query, key, value = (
            x.flatten(2).unflatten(1, (HEADS, -1)).transpose(2, 3)
            for x in (self.query(narrow), self.key(wide), self.value(wide))
        )
        weights = query @ key.transpose(2, 3) / (self.width // HEADS) ** 0.5
        weights = weights.masked_fill(~self.mask, -1e4).softmax(3)
        return (weights @ value).transpose(2, 3).reshape(len(inputs), self.width, *inputs.shape[2:])


class PlainPixelSNAIL(nn.Module):
    """The prior of one level: 4 blocks of 4 residual blocks; see `benchmarks.sampling.build`."""

    def __init__(self, level: str) -> None:
        super().__init__()
        self.spec, self.attends = (TOP, True) if level == "top" else (BOTTOM, False)
        self.first = PlainConv(self.spec.codebook_size, CHANNELS, KERNEL, "strict")
        self.coordinates = PlainConv(2, CHANNELS)
        self.blocks = nn.ModuleList(
            nn.ModuleList(
                PlainResidual(CHANNELS, CHANNELS, KERNEL, "causal", condition=not self.attends) for _ in range(4)
            )
            for _ in range(4)
        )
        self.attention = nn.ModuleList(PlainAttention(self.spec.num_codes) for _ in range(4 * self.attends))
        self.merge = nn.ModuleList(
            PlainResidual(CHANNELS, CHANNELS, extra=CHANNELS // 2) for _ in range(4 * self.attends)
        )
        stack = [PlainConv(TOP.codebook_size, CHANNELS, KERNEL)] + [
            PlainResidual(CHANNELS, CHANNELS, KERNEL) for _ in range(3)
        ]
        self.stack = None if self.attends else nn.Sequential(*stack)
        self.logits = PlainConv(CHANNELS, self.spec.codebook_size)

    def forward(self, codes: Tensor, coarser: tuple[Tensor, ...]) -> Tensor:
        condition = None
        if self.stack is not None:
            condition = self.stack(_one_hot(coarser[0], TOP.codebook_size))
            condition = F.interpolate(condition, size=self.spec.shape, mode="nearest")
        coordinates = coordinate_map(*self.spec.shape, codes.device).expand(len(codes), -1, -1, -1)
        x = self.first(_one_hot(codes, self.spec.codebook_size)) + self.coordinates(coordinates)
        for index, block in enumerate(self.blocks):
            before = x
            assert isinstance(block, nn.ModuleList)
            for layer in block:
                x = layer(x, condition)
            if self.attends:
                x = self.merge[index](x, extra=self.attention[index](before, x, coordinates))
        return self.logits(F.elu(x))


def _one_hot(codes: Tensor, count: int) -> Tensor:
    return F.one_hot(codes, count).permute(0, 3, 1, 2).float()


def train_steps(pipe: Connection, plain: bool, level: str, options: argparse.Namespace) -> None:
    """Run the training steps of one variant; a worker of `run_interleaved`."""
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)
    prior = (PlainPixelSNAIL(level) if plain else build(level)).train()
    optimizer = torch.optim.AdamW(prior.parameters(), lr=3e-4, fused=not plain, foreach=False)
    spec = TOP if level == "top" else BOTTOM
    codes = torch.randint(spec.codebook_size, (options.batch, *spec.shape))
    coarser = () if level == "top" else (torch.randint(TOP.codebook_size, (options.batch, *TOP.shape)),)

    objective = None if isinstance(prior, PlainPixelSNAIL) else PriorObjective(prior, 0)
    batch = CodeBatch((codes, *coarser), torch.full((options.batch,), -1))

    def step() -> None:
        loss = objective(batch)[0] if objective else F.cross_entropy(prior(codes, coarser), codes)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    serve_steps(pipe, step, torch.device("cpu"))


def main() -> None:
    """Print time and memory of both steps for each level, and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--levels", nargs="+", default=["top", "bottom"], choices=["top", "bottom"])
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--steps", type=int, default=3, help="measured steps of each, after one that is not")
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    sums = {"ours": 0.0, "plain": 0.0}
    for level in options.levels:
        taken = run_interleaved(
            train_steps, {name: (name == "plain", level, options) for name in sums}, options.steps, warmup=1
        )
        for name, each in taken.items():
            sums[name] += each.median
            print(f"{level}, {name}: {each}")
        ours, plain = taken["ours"], taken["plain"]
        ratios = ours.median / plain.median, ours.memory / plain.memory
        print(f"{level}: time {ratios[0]:.2f} ×, memory {ratios[1]:.2f} × the plain step's", flush=True)
    print(f"together: {sums['ours']:.1f} s and {sums['plain']:.1f} s, {sums['ours'] / sums['plain']:.2f} ×")


if __name__ == "__main__":
    main()
