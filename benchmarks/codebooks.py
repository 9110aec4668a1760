"""Quantizers compared on the same images with the same number of training steps.

    python -m benchmarks.codebooks FOLDER [--steps 1000] [--size 128] [--out runs/codebooks] [--only EMA …]

The autoencoder has two levels with 512 codes each, 32 channels, and batches of 8. Every variant starts from the same
seed and sees the same images in the same order. Usage, perplexity and PSNR are measured on the whole validation split.
Rerun an interrupted benchmark to resume it; finished variants are skipped.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from sampling.run_config import RunConfig
from train.run import Run
from train.stages.autoencoder import train_autoencoder
from vqvae2.run_folder import RunFolder

EMA: dict[str, Any] = {"kind": "ema", "codebook_size": 512, "code_dim": 64}
VARIANTS: dict[str, dict[str, Any]] = {
    "EMA": EMA,
    "EMA, random initialization, no restarts": EMA | {"kmeans_init": False, "dead_code_threshold": 0.0},
    "EMA, cosine": EMA | {"cosine": True},
    "EMA, rotation trick": EMA | {"gradient_estimator": "rotation"},
    "EMA, codebook dimension 8": EMA | {"codebook_dim": 8},
    "FSQ 8 × 8 × 8": {"kind": "fsq", "grid": (8, 8, 8), "code_dim": 64},
    "gradient": EMA | {"kind": "gradient"},
}


def make_config(folder: Path, quantizer: dict[str, Any], size: int, steps: int) -> RunConfig:
    """Return the config of one variant. Its priors are placeholders and are not trained."""
    training = {
        "steps": steps,
        "batch_size": 8,
        "learning_rate": 1e-3,
        "schedule": "cosine",
        "warmup_steps": 50,
        "validate_every": max(1, steps // 4),
        "preview_every": steps,
        "checkpoint_every": max(1, steps // 4),
    }
    prior = {"model": {"kind": "pixelsnail", "channels": 8, "heads": 1}, "training": {"steps": 1}}
    settings = {
        "data": {"path": str(folder), "size": size, "val_fraction": 0.05, "num_workers": 0},
        "autoencoder": {
            "model": {
                "channels": 32,
                "residual_channels": 32,
                "levels": [{"stride": 4, "quantizer": quantizer}, {"stride": 2, "quantizer": quantizer}],
            },
            "training": training,
        },
        "priors": {"top": prior, "bottom": prior},
    }
    return RunConfig.from_dict(settings, "benchmarks.codebooks")


def main() -> None:
    """Train the variants and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="photographs")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--size", type=int, default=128)
    parser.add_argument("--out", type=Path, default=Path("runs/codebooks"))
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    options = parser.parse_args()
    print(
        "| quantizer | usage bottom / top | perplexity bottom / top | PSNR | seconds |\n|---|---|---|---|---|",
        flush=True,
    )
    for name in options.only:
        run = RunFolder(options.out / name.lower().replace(",", "").replace(" ", "-"))
        train_autoencoder(Run(make_config(options.folder, VARIANTS[name], options.size, options.steps), run))
        summary = json.loads(run.autoencoder.summary.read_text(encoding="utf-8"))
        value = summary["validation"]
        print(
            f"| {name} | {value['usage_bottom']:.1%} / {value['usage_top']:.1%} "
            f"| {value['perplexity_bottom']:.0f} / {value['perplexity_top']:.0f} "
            f"| {value['psnr']:.2f} | {summary['seconds']:.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
