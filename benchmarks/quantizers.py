"""Compare quantizers: PSNR, codebook usage, perplexity and time of the same autoencoder on the same images.

    python -m benchmarks.quantizers IMAGES --steps 1500

Every quantizer is trained with the same data order, with codebooks of 512 and 8,192 codes. Usage, perplexity and PSNR
are measured on held-out images. Results are printed as rows of a Markdown table. Runs are kept in `--out`, and the same
command continues after an interruption.
"""

import json
import time
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field
from tyro.conf import Positional

from vqvae2.__main__ import main as vqvae2
from vqvae2.command_line import Options, run_command
from vqvae2.run_folder import RunFolder, level_names


def _sizes(settings: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    return settings | {"codebook_size": 512}, settings | {"codebook_size": 8192}


EMA: dict[str, Any] = {"kind": "ema"}
GRADIENT: dict[str, Any] = {"kind": "gradient"}
RANDOM: dict[str, Any] = {"kmeans_init": False, "dead_code_threshold": 0}
LFQ: dict[str, Any] = {"kind": "external", "name": "LFQ"}
RESIDUAL: dict[str, Any] = {"kind": "external", "name": "ResidualVQ"}
# Settings for 512 and for 8,192 codes.
QUANTIZERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "ema": _sizes(EMA),
    "ema, cosine, 8 dimensions": _sizes(EMA | {"cosine": True, "codebook_dim": 8}),
    "ema, rotation": _sizes(EMA | {"gradient_estimator": "rotation"}),
    "ema, random initialization, no restarts": _sizes(EMA | RANDOM),
    "gradient": _sizes(GRADIENT),
    "gradient, random initialization, no restarts": _sizes(GRADIENT | RANDOM),
    "simvq": _sizes({"kind": "simvq"}),
    "simvq, rotation": _sizes({"kind": "simvq", "gradient_estimator": "rotation"}),
    "fsq": ({"kind": "fsq", "grid": [8, 8, 8]}, {"kind": "fsq", "grid": [8, 8, 8, 16]}),
    "LFQ": (LFQ | {"arguments": {"codebook_size": 512}}, LFQ | {"arguments": {"codebook_size": 8192}}),
    "LFQ, commitment 0.25": (
        LFQ | {"arguments": {"codebook_size": 512, "commitment_loss_weight": 0.25}},
        LFQ | {"arguments": {"codebook_size": 8192, "commitment_loss_weight": 0.25}},
    ),
    "ResidualVQ, 8³ or 20³ codes": (
        RESIDUAL | {"arguments": {"num_quantizers": 3, "codebook_size": 8}},
        RESIDUAL | {"arguments": {"num_quantizers": 3, "codebook_size": 20}},
    ),
}


class QuantizerBenchmarkOptions(Options):
    """Train the same autoencoder with every quantizer."""

    images: Positional[Path] = Field(description="images, as in data.path")
    out: Path = Field(default=Path("runs/quantizers"), description="folder of the runs")
    steps: int = Field(default=1500, ge=10, description="training steps of each autoencoder")
    size: int = Field(default=64, ge=16, description="height and width of the images")
    num_levels: Literal[1, 2] = Field(default=1, description="levels of the autoencoder")
    channels: int = Field(default=32, ge=4, description="hidden channels of the autoencoder")
    batch_size: int = Field(default=16, ge=1, description="images per step")
    learning_rate: float = Field(default=0.002, gt=0, description="peak learning rate")
    only: tuple[str, ...] = Field(default=(), description="names of quantizers; all if not given")


def config(quantizer: dict[str, Any], options: QuantizerBenchmarkOptions) -> dict[str, Any]:
    """Return the settings of a run. Its priors are not trained."""
    every = dict.fromkeys(("validate_every", "preview_every", "checkpoint_every"), options.steps)
    training = {"steps": options.steps, "schedule": "cosine", **every}
    model = {
        "channels": options.channels,
        "residual_channels": options.channels // 2,
        "levels": [{"stride": 4, "quantizer": quantizer}, {"stride": 2, "quantizer": quantizer}][: options.num_levels],
    }
    prior = {"model": {"kind": "pixelcnn"}, "training": {"steps": 1}}
    training |= {"batch_size": options.batch_size, "learning_rate": options.learning_rate}
    return {
        "data": {"path": str(options.images), "size": options.size, "val_fraction": 0.125, "num_workers": 0},
        "autoencoder": {"model": model, "training": {**training, "warmup_steps": options.steps // 15}},
        "priors": dict.fromkeys(level_names(options.num_levels), prior),
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
    levels = level_names(options.num_levels)
    usage = " / ".join(f"{found[f'usage_{level}']:.1%}" for level in levels)
    perplexity = " / ".join(f"{found[f'perplexity_{level}']:.0f}" for level in levels)
    return f"| {name} | {found['psnr']:.2f} | {usage} | {perplexity} | {step_ms:.0f} |"


def main(options: QuantizerBenchmarkOptions) -> None:
    """Print one row per quantizer and codebook size."""
    print("| quantizer | PSNR (dB) | usage | perplexity | ms of processor time per step |\n|---|---|---|---|---|")
    for size in (0, 1):
        for name, settings in QUANTIZERS.items():
            if options.only and name not in options.only:
                continue
            print(measure(f"{name}, {('512', '8,192')[size]} codes", settings[size], options), flush=True)


if __name__ == "__main__":
    import sys

    run_command(main, sys.argv[1:], "python -m benchmarks.quantizers")
