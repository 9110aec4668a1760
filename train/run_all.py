"""The commands `vqvae2 run` and `vqvae2 demo`: all stages in order, then a summary and the pictures to open."""

from collections.abc import Sequence
from pathlib import Path
from typing import Self

from sampling.evaluation.diagnose import diagnose_run
from sampling.evaluation.evaluate import evaluate_run
from sampling.evaluation.format_metrics import format_metrics
from sampling.processes import processes
from sampling.report.report import write_report
from sampling.sample import sample_run
from sampling.summary import read_summary
from train.run import Run, RunOptions, demo_config, open_run, print_main
from train.stages.autoencoder import train_autoencoder
from train.stages.extract_codes import extract_codes
from train.stages.prior import train_prior


class DemoOptions(RunOptions):
    """Run all stages of the demo: two levels on the built-in images at 64 px, in minutes on two CPU cores."""

    @classmethod
    def from_arguments(cls, arguments: Sequence[str], prog: str) -> Self:
        return cls.from_config(demo_config(), arguments, prog)


class RunAllOptions(RunOptions):
    """Run all stages of a config in order. Completed stages are skipped; the same command resumes a stopped run."""


def run_all(run: Run) -> None:
    """Train the autoencoder, extract codes, train the priors coarse to fine, sample, diagnose, evaluate and report."""
    folder = run.folder
    train_autoencoder(run)
    extract_codes(run)
    for level in reversed(run.config.levels):
        train_prior(run, level)
    samples = sample_run(folder.path, run.config.sampling)
    diagnosis = diagnose_run(folder.path)
    metrics = evaluate_run(folder.path, run.config.evaluation, samples)
    if processes().is_main_process:
        report = write_report(folder.path, samples)
        pictures = [report, *_pictures(run, samples, diagnosis)]
        print_main(f"\n{format_metrics(metrics)}\nseconds          {_seconds(run, samples)}\n\nPictures to open:")
        print_main("\n".join(f"  {path}" for path in pictures if path and path.is_file()))


def _seconds(run: Run, samples: Path) -> str:
    """Return how long each stage took."""
    summaries = {
        "autoencoder": run.folder.autoencoder.summary,
        "codes": run.folder.codes_summary,
        **{f"prior-{level}": run.folder.prior(level).summary for level in reversed(run.config.levels)},
        "samples": samples / "summary.json",
    }
    found = {name: read_summary(path) for name, path in summaries.items()}
    return ", ".join(f"{name} {summary.seconds:.0f}" for name, summary in found.items() if summary)


def _pictures(run: Run, samples: Path, diagnosis: Path) -> list[Path | None]:
    stages = [run.folder.autoencoder, *(run.folder.prior(level) for level in reversed(run.config.levels))]
    previews = [stage.newest_preview() for stage in stages]
    return [samples / "grid.png", diagnosis / "diagnosis.png", *previews, *(stage.curves for stage in stages)]


def main(options: RunAllOptions) -> None:
    """Run the command `vqvae2 run`."""
    run_all(open_run(options))


def demo(options: DemoOptions) -> None:
    """Run the command `vqvae2 demo`."""
    run_all(open_run(options))
