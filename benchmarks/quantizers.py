"""Compare quantizers: PSNR, codebook usage, perplexity and time of a one-level autoencoder on images at 64 px.

    python -m benchmarks.quantizers IMAGES --steps 1500

Every quantizer is trained with the same data order, batch size 16 and learning rate, with codebooks of 512 and 8,192
codes. Residual quantizers have 8³ and 20³ codes. Results are printed as rows of a Markdown table. Runs are kept in
`--out`, and the same command continues after an interruption.
"""

import json
import time
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field
from tyro.conf import Positional

from vqvae2.__main__ import main as vqvae2
from vqvae2.command_line import Options, run_command
from vqvae2.run_folder import RunFolder

QUANTIZERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # settings for 512 and for 8,192 codes
    "ema": ({"kind": "ema", "codebook_size": 512}, {"kind": "ema", "codebook_size": 8192}),
    "ema, cosine, 8 dimensions": (
        {"kind": "ema", "codebook_size": 512, "cosine": True, "codebook_dim": 8},
        {"kind": "ema", "codebook_size": 8192, "cosine": True, "codebook_dim": 8},
    ),
    "gradient": ({"kind": "gradient", "codebook_size": 512}, {"kind": "gradient", "codebook_size": 8192}),
    "gradient, no restarts": (
        {"kind": "gradient", "codebook_size": 512, "dead_code_threshold": 0, "kmeans_init": False},
        {"kind": "gradient", "codebook_size": 8192, "dead_code_threshold": 0, "kmeans_init": False},
    ),
    "simvq": ({"kind": "simvq", "codebook_size": 512}, {"kind": "simvq", "codebook_size": 8192}),
    "simvq, rotation": (
        {"kind": "simvq", "codebook_size": 512, "gradient_estimator": "rotation"},
        {"kind": "simvq", "codebook_size": 8192, "gradient_estimator": "rotation"},
    ),
    "fsq": ({"kind": "fsq", "grid": [8, 8, 8]}, {"kind": "fsq", "grid": [8, 8, 8, 16]}),
    "external: LFQ": (
        {"kind": "external", "name": "LFQ", "arguments": {"codebook_size": 512}},
        {"kind": "external", "name": "LFQ", "arguments": {"codebook_size": 8192}},
    ),
    "external: ResidualVQ, 3 × 8 or 20": (
        {"kind": "external", "name": "ResidualVQ", "arguments": {"num_quantizers": 3, "codebook_size": 8}},
        {"kind": "external", "name": "ResidualVQ", "arguments": {"num_quantizers": 3, "codebook_size": 20}},
    ),
}


class QuantizerBenchmarkOptions(Options):
    """Train the same autoencoder with every quantizer."""

    images: Positional[Path] = Field(description="images, as in data.path")
    out: Path = Field(default=Path("runs/quantizers"), description="folder of the runs")
    steps: int = Field(default=1500, ge=10, description="training steps of each autoencoder")
    channels: int = Field(default=64, ge=4, description="hidden channels of the autoencoder")


def config(quantizer: dict[str, Any], options: QuantizerBenchmarkOptions) -> dict[str, Any]:
    """Return the settings of a run with one level."""
    every = dict.fromkeys(("validate_every", "preview_every", "checkpoint_every"), options.steps)
    training = {"steps": options.steps, "batch_size": 16, "learning_rate": 0.002, "schedule": "cosine", **every}
    model = {
        "channels": options.channels,
        "residual_channels": options.channels // 2,
        "levels": [{"stride": 4, "quantizer": quantizer}],
    }
    prior = {"model": {"kind": "pixelcnn"}, "training": {"steps": 1}}
    return {
        "data": {"path": str(options.images), "size": 64, "val_fraction": 0.125, "num_workers": 0},
        "autoencoder": {"model": model, "training": {**training, "warmup_steps": options.steps // 15}},
        "priors": {"top": prior},
    }


def measure(name: str, quantizer: dict[str, Any], options: QuantizerBenchmarkOptions) -> str:
    """Train one autoencoder, or read its results, and return its row of the table."""
    folder = RunFolder(options.out / "".join(c if c.isalnum() else "-" for c in name))
    path = folder.path.with_suffix(".yaml")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(config(quantizer, options)))
    time_file = folder.path.with_suffix(".seconds")
    if not time_file.is_file():
        started = time.process_time()
        if vqvae2(["train-autoencoder", str(path), "--run", str(folder.path), "--tracker", "none"]):
            raise SystemExit(f"{name}: training failed")
        time_file.write_text(str(time.process_time() - started))
    found = json.loads(folder.autoencoder.summary.read_text())["validation"]
    step_ms = 1000 * float(time_file.read_text()) / options.steps
    values = f"{found['psnr']:.2f} | {found['usage_top']:.1%} | {found['perplexity_top']:.0f} | {step_ms:.0f}"
    return f"| {name} | {values} |"


def main(options: QuantizerBenchmarkOptions) -> None:
    """Print one row per quantizer and codebook size."""
    print("| quantizer | PSNR (dB) | usage | perplexity | ms of processor time per step |\n|---|---|---|---|---|")
    for size in (0, 1):
        for name, settings in QUANTIZERS.items():
            print(measure(f"{name}, {('512', '8,192')[size]} codes", settings[size], options), flush=True)


if __name__ == "__main__":
    import sys

    run_command(main, sys.argv[1:], "python -m benchmarks.quantizers")
