"""What the fuzzer changes: for each kind of input, a random change, a command that reads it, and its result."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load_file

from tests.harness import mutations
from vqvae2.data.code_store import CodeStore

CONFIG = """
data: {path: PHOTOGRAPHS, size: 32, labels: folder, val_fraction: 0.2, max_unreadable_fraction: 0.1, num_workers: 0}
autoencoder:
  model:
    channels: 8
    residual_channels: 4
    residual_layers: 1
    levels:
      - {stride: 4, quantizer: {kind: ema, codebook_size: 16, code_dim: 4}}
      - {stride: 2, quantizer: {kind: ema, codebook_size: 300, code_dim: 4}}
  training: {steps: 9, batch_size: 4, log_every: 2, validate_every: 3, preview_every: 9, checkpoint_every: 3}
priors:
  top: &prior
    model: {kind: pixelcnn, channels: 8, kernel: 3, layers: 1, output_channels: 8}
    training: {steps: 9, batch_size: 4, log_every: 2, validate_every: 3, preview_every: 9, checkpoint_every: 3}
  bottom: *prior
sampling: {count: 2}
evaluation: {inception_weights: INCEPTION}
"""
Change = Callable[[Path, random.Random], str]


class Target(NamedTuple):
    """A kind of file, a command that reads it, and a function that returns the result of the command.

    The result is compared with that of an unchanged folder. It leaves out what a valid change may change.
    """

    files: str  # glob pattern in the work folder of the files to change
    removed: list[str]  # outputs to remove first, so that the command has work to do
    command: list[str]
    result: Callable[[Path], Any]
    change: Change = mutations.corrupt
    changes_environment: bool = False  # instead of a file


def weights(stage: str) -> Callable[[Path], dict[str, Any]]:
    """Return a function that reads the weights of a stage, the result of training."""
    return lambda work: {
        name: tensor.tolist() for name, tensor in load_file(work / "run" / stage / "model.safetensors").items()
    }


def records(work: Path) -> dict[str, bytes]:
    """Return the codes of every image by name, the result of extraction."""
    found = {}
    for split in ("train", "val"):
        store = CodeStore.open(work / "run" / "codes" / split)
        codes, _ = store.read(range(len(store)))
        found |= {
            store.image_name(i): b"".join(level[i].numpy().tobytes() for level in codes) for i in range(len(store))
        }
    return found


def images(work: Path) -> list[bytes]:
    """Return the contents of all sampled images, the result of sampling."""
    return [path.read_bytes() for path in sorted((work / "out" / "images").iterdir())]


def complete(name: str) -> Callable[[Path], bool]:
    """Return a function that tells whether an output exists; its contents depend on the changed values."""
    return lambda work: (work / name).exists()


_AUTOENCODER = ["train-autoencoder", "config.yaml", "--run", "run"]
_PRIOR = ["train-prior", "config.yaml", "--run", "run", "--level", "top"]
_FINAL = ["run/{}/model.safetensors", "run/{}/checkpoints/00000009"]  # without these, training resumes from step 6
_FINAL_AUTOENCODER = [path.format("autoencoder") for path in _FINAL]
_FINAL_PRIOR = [path.format("prior-top") for path in _FINAL]
_EXTRACT = ["extract-codes", "config.yaml", "--run", "run"]
_INSPECT = ["inspect", "prepared", "--out", "grid.png"]
_SAMPLE = ["sample", "run", "--out", "out"]
_PREPARE = ["prepare", "photographs", "fresh", "--size", "24", "--max-unreadable-fraction", "0.1"]
_REPORT = ["report", "run", "--samples", "out"]
_EVALUATE = ["evaluate", "run", "--samples", "out"]
# A valid change of the config may ask for a long training.
_SMALL = ["--data.size", "32", "--data.num-scenes", "40", "--autoencoder.training.steps", "2"]
_METRICS = "run/evaluation/metrics.json"
_CHECKPOINTS = "run/autoencoder/checkpoints/*/*"
_json, _log = mutations.mutate_json_file, mutations.mutate_log

TARGETS = {
    # Corrupted bytes
    "config": Target("config.yaml", [], _AUTOENCODER, weights("autoencoder")),
    "run config": Target("run/config.yaml", ["out"], _SAMPLE, images),
    "store": Target("run/codes/*/data.mdb", _FINAL_PRIOR, _PRIOR, weights("prior-top")),
    "seal": Target("run/codes/*/seal.json", _FINAL_PRIOR, _PRIOR, weights("prior-top")),
    "checkpoint": Target(_CHECKPOINTS, _FINAL_AUTOENCODER, _AUTOENCODER, weights("autoencoder")),
    "log": Target("run/autoencoder/metrics.jsonl", _FINAL_AUTOENCODER, _AUTOENCODER, weights("autoencoder")),
    "index": Target("run/data-index.safetensors", _FINAL_AUTOENCODER, _AUTOENCODER, weights("autoencoder")),
    "weights": Target("run/*/model.safetensors", ["out"], _SAMPLE, images),
    "prepared": Target("prepared/*", ["grid.png"], _INSPECT, lambda work: (work / "grid.png").read_bytes()),
    "image": Target("photographs/*/*", ["run/codes"], _EXTRACT, records),
    # Hostile values in valid files
    "manifest": Target("out/manifest.json", [], _SAMPLE, images, _json),
    "manifest in report": Target("out/manifest.json", ["run/report.html"], _REPORT, complete("run/report.html"), _json),
    "manifest in evaluate": Target("out/manifest.json", [_METRICS], _EVALUATE, complete(_METRICS), _json),
    "metrics": Target(_METRICS, ["run/report.html"], _REPORT, complete("run/report.html"), _json),
    "metrics in evaluate": Target(_METRICS, [], _EVALUATE, complete(_METRICS), _json),
    "summary": Target("run/*/summary.json", ["run/report.html"], _REPORT, complete("run/report.html"), _json),
    "summary in evaluate": Target("run/*/summary.json", [_METRICS], _EVALUATE, complete(_METRICS), _json),
    "diagnosis": Target("run/diagnosis/*.json", ["run/report.html"], _REPORT, complete("run/report.html"), _json),
    "data identity": Target("run/data-identity.json", ["run/codes"], _EXTRACT, records, _json),
    "seal values": Target("run/codes/*/seal.json", _FINAL_PRIOR, _PRIOR, weights("prior-top"), _json),
    "log values": Target("run/*/metrics.jsonl", _FINAL_AUTOENCODER, _AUTOENCODER, weights("autoencoder"), _log),
    "log in report": Target("run/*/metrics.jsonl", ["run/report.html"], _REPORT, complete("run/report.html"), _log),
    "state": Target(
        "run/autoencoder/checkpoints/00000006/*",
        _FINAL_AUTOENCODER,
        _AUTOENCODER,
        weights("autoencoder"),
        mutations.mutate_checkpoint,
    ),
    "weights metadata": Target("run/*/model.safetensors", ["out"], _SAMPLE, images, mutations.mutate_checkpoint),
    "autoencoder metadata": Target(
        "run/autoencoder/model.safetensors", ["run/codes"], _EXTRACT, records, mutations.mutate_checkpoint
    ),
    "store header": Target(
        "run/codes/*/data.mdb",
        _FINAL_PRIOR,
        _PRIOR,
        complete("run/prior-top/model.safetensors"),
        mutations.mutate_store,
    ),
    "store in inspect": Target(
        "run/codes/train/data.mdb",
        ["grid.png"],
        ["inspect", "run/codes/train", "--out", "grid.png"],
        complete("grid.png"),
        mutations.mutate_store,
    ),
    "prepared header": Target(
        "prepared/data.mdb", ["grid.png"], _INSPECT, complete("grid.png"), mutations.mutate_store
    ),
    "yaml": Target("config.yaml", [], _AUTOENCODER, weights("autoencoder"), mutations.mutate_yaml),
    "yaml of a new run": Target(
        "config.yaml",
        [],
        ["train-autoencoder", "config.yaml", "--run", "fresh", *_SMALL],
        complete("fresh/autoencoder/model.safetensors"),
        mutations.mutate_yaml,
    ),
    # Names, archives and the environment
    "name": Target("photographs/*/*", [], _PREPARE, complete("fresh/seal.json"), mutations.rename),
    "name in extract": Target(
        "photographs/*/*",
        ["run/codes", "run/data-identity.json", "run/data-index.safetensors"],
        _EXTRACT,
        complete("run/codes/val/seal.json"),
        mutations.rename,
    ),
    "archive": Target(
        "photographs.*", [], ["prepare", "ARCHIVE", *_PREPARE[2:]], complete("fresh/seal.json"), mutations.write_archive
    ),
    "environment": Target("", _FINAL_AUTOENCODER, _AUTOENCODER, weights("autoencoder"), changes_environment=True),
    "environment in report": Target(
        "", ["run/report.html"], _REPORT, complete("run/report.html"), changes_environment=True
    ),
}
