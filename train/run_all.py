"""The commands `vqvae2 run` and `vqvae2 demo`: all stages in order, then a table and the pictures to look at."""

from pathlib import Path

from sampling.evaluation.diagnose import diagnose_run
from sampling.evaluation.evaluate import evaluate_run
from sampling.evaluation.format_metrics import format_metrics
from sampling.processes import processes
from sampling.report.report import write_report
from sampling.sample import sample_run
from train.run import Run, open_run, print_main
from train.stages.autoencoder import train_autoencoder
from train.stages.extract_codes import extract_codes
from train.stages.prior import train_prior
from vqvae2 import files


def run_all(run: Run) -> None:
    """Train, extract, train the priors from coarse to fine, sample, diagnose, evaluate; finished stages are skipped."""
    folder = run.folder
    train_autoencoder(run)
    extract_codes(run)
    for level in reversed(run.experiment.levels):
        train_prior(run, level)
    samples = sample_run(folder.path, run.experiment.sampling)
    diagnosis = diagnose_run(folder.path)
    metrics = evaluate_run(folder.path, run.experiment.evaluation, samples)
    if processes().is_main_process:
        report = write_report(folder.path, samples)
        print_main(f"\n{format_metrics(metrics)}\nseconds          {_seconds(run, samples)}\n\nPictures to open:")
        print_main(
            "\n".join(f"  {path}" for path in [report, *_pictures(run, samples, diagnosis)] if path and path.is_file())
        )


def _seconds(run: Run, samples: Path) -> str:
    """How long each stage took."""
    stages = {
        "autoencoder": run.folder.autoencoder,
        "codes": run.folder.codes,
        **{f"prior-{level}": run.folder.prior(level) for level in reversed(run.experiment.levels)},
        "samples": samples,
    }
    known = {name: path / "summary.json" for name, path in stages.items() if (path / "summary.json").is_file()}
    return ", ".join(f"{name} {files.read_json(path)['seconds']:.0f}" for name, path in known.items())


def _pictures(run: Run, samples: Path, diagnosis: Path) -> list[Path | None]:
    stages = [run.folder.autoencoder, *(run.folder.prior(level) for level in reversed(run.experiment.levels))]
    newest = [max((stage / "previews").glob("*.png"), default=None) for stage in stages]
    return [samples / "grid.png", diagnosis / "diagnosis.png", *newest, *(stage / "curves.png" for stage in stages)]


def main(arguments: list[str]) -> None:
    """The command `vqvae2 run`."""
    run, _ = open_run("run", arguments, "Run all stages of an experiment; the same command goes on where it stopped.")
    run_all(run)


def demo(arguments: list[str]) -> None:
    """The command `vqvae2 demo`: `run` with the config that comes with the package."""
    main([str(_demo_config()), *arguments])


def _demo_config() -> Path:
    """configs/demo.yaml, which a wheel carries beside this module and a checkout in its own place."""
    packaged = Path(__file__).with_name("demo.yaml")
    return packaged if packaged.is_file() else Path(__file__).parents[1] / "configs" / "demo.yaml"
