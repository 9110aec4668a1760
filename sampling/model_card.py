"""README.md of a saved pipeline: a model card as the Hugging Face hub shows it."""

import re
import shutil
from collections.abc import Sequence
from typing import TYPE_CHECKING

import yaml

from sampling.evaluation.format_metrics import format_metrics
from sampling.evaluation.metrics import read_metrics
from sampling.output_folder import SampleManifest, current_samples, read_manifest
from sampling.params import SamplingParams, format_per_level
from sampling.run_config import RunConfig
from sampling.summary import read_summary
from vqvae2 import files
from vqvae2.data.images import DataConfig
from vqvae2.run_folder import RunFolder, StageFolder

if TYPE_CHECKING:
    from sampling.pipeline import VQVAE2Pipeline

_GRID = "samples.png"


def write_model_card(folder: RunFolder, pipeline: "VQVAE2Pipeline", params: SamplingParams) -> None:
    """Write README.md to the folder of a saved pipeline, with what is known about its training.

    Pipelines of a run have its data set, and its metrics and a grid of its samples if they are of these networks. A
    pipeline that was loaded from a saved one keeps that one's card, with the sections on sampling parameters and files
    updated. A README.md in a run folder is the user's own, and is not published.

    Args:
        params: Default sampling parameters of the saved pipeline.
    """
    source = RunFolder(pipeline.source) if pipeline.source is not None else None
    is_run = source is not None and source.config.is_file()
    sampling, digests = _sampling(params), _digests(folder, pipeline)
    if source and not is_run and source.pipeline_config.is_file() and source.card.is_file():
        card = source.card.read_text(encoding="utf-8", errors="replace")
        files.write_text(folder.card, _replace_section(_replace_section(card, sampling), digests))
        if (source.path / _GRID).is_file() and source.path.resolve() != folder.path.resolve():
            shutil.copyfile(source.path / _GRID, folder.path / _GRID)
        return
    data = RunConfig.from_resolved_yaml(source.config).data if source and is_run else None
    title = f"# {folder.path.resolve().name}\n"
    parts = [_front_matter(pipeline, data), title, _usage(), _architecture(pipeline), sampling]
    if source and data:
        parts.append(_training(source, data, pipeline))
        samples = current_samples(source)
        manifest = read_manifest(samples, SampleManifest)
        has_samples = manifest is not None and _made_with(pipeline, manifest.autoencoder, manifest.priors)
        if has_samples and (samples / "grid.png").is_file():
            shutil.copyfile(samples / "grid.png", folder.path / _GRID)
            parts.append(f"## Samples\n\n![Samples]({_GRID})\n")
    files.write_text(folder.card, "\n".join([*parts, digests]))


def _replace_section(card: str, section: str) -> str:
    """Return a card with the section of the same heading replaced, or with the section appended."""
    heading = section.partition("\n")[0]
    found = re.search(rf"^{heading}\n.*?(?=^## |\Z)", card, re.MULTILINE | re.DOTALL)
    if not found:
        return f"{card.rstrip()}\n\n{section}"
    following = card[found.end() :]
    return card[: found.start()] + section + (f"\n{following}" if following else "")


def _front_matter(pipeline: "VQVAE2Pipeline", data: DataConfig | None) -> str:
    """Return the metadata that the hub searches, as YAML."""
    tags = ["vqvae2", "vq-vae-2", "image-generation", "class-conditional" if pipeline.class_names else "unconditional"]
    metadata: dict[str, object] = {"library_name": "vqvae2", "tags": tags}
    if not pipeline.class_names:
        metadata["pipeline_tag"] = "unconditional-image-generation"
    if data and data.path.startswith("huggingface:"):
        metadata["datasets"] = [files.without_folders(data.path).split(":")[1]]
    return f"---\n{yaml.safe_dump(metadata, sort_keys=False)}---\n"


def _usage() -> str:
    return """\
A VQ-VAE-2: an autoencoder with one map of discrete codes per level, and an autoregressive prior of each level.

```python
from sampling import VQVAE2Pipeline

pipeline = VQVAE2Pipeline.from_pretrained("THIS_REPOSITORY")
images = pipeline(num_images=16, seed=0)  # in [-1, 1]
```

    vqvae2 sample THIS_REPOSITORY --count 16
"""


def _architecture(pipeline: "VQVAE2Pipeline") -> str:
    height, width = pipeline.autoencoder.size
    rows = [
        f"| {level} | {spec.height}×{spec.width} | {spec.codebook_size:,} | {prior.config.kind}, "
        f"{sum(each.numel() for each in prior.parameters()) / 1e6:.2f} M weights |"
        for level, spec, prior in zip(pipeline.levels, pipeline.autoencoder.map_specs, pipeline.priors, strict=True)
    ]
    weights = sum(each.numel() for each in pipeline.autoencoder.parameters()) / 1e6
    lines = [
        f"Images of {height}×{width} pixels with {pipeline.autoencoder.image_channels} channels; autoencoder with "
        f"{weights:.2f} M weights.\n",
        "| level | code map | codebook size | prior |",
        "|---|---|---|---|",
        *rows,
        "",
    ]
    if pipeline.class_names:
        lines.append(f"Classes: {', '.join(pipeline.class_names)}.\n")
    return "## Model\n\n" + "\n".join(lines)


def _sampling(params: SamplingParams) -> str:
    rows = [f"| {name} | {format_per_level(value)} |" for name, value in params.to_dict().items()]
    return "## Default sampling parameters\n\n| parameter | value |\n|---|---|\n" + "\n".join(rows) + "\n"


def _made_with(pipeline: "VQVAE2Pipeline", autoencoder: str | None, priors: Sequence[str]) -> bool:
    """Return whether these are the digests of a pipeline's networks. A network may have been trained further since."""
    return autoencoder == pipeline.autoencoder.digest and list(priors) == [prior.digest for prior in pipeline.priors]


def _training(source: RunFolder, data: DataConfig, pipeline: "VQVAE2Pipeline") -> str:
    """Return the data set and the measurements of a run."""
    name, labels = files.without_folders(data.path), files.without_folders(data.labels)
    held_out = files.without_folders(data.val_path) if data.val_path else f"{data.val_fraction:g} of it held out"
    text = f"## Training\n\nData set `{name}` ({held_out}), labels: {labels}.\n"
    metrics = read_metrics(source.metrics) or {}
    samples = metrics.get("protocol", {}).get("samples", {})
    if _made_with(pipeline, samples.get("autoencoder"), samples.get("priors", ())):
        return f"{text}\nMeasured by `vqvae2 evaluate`:\n\n```\n{format_metrics(metrics)}\n```\n"
    stages = [source.autoencoder, *(source.prior(level) for level in pipeline.levels)]
    rows = [row for stage in stages for row in _validation(stage)]
    return f"{text}\nOn held-out images, at the end of training:\n\n| | |\n|---|---|\n" + "\n".join(rows) + "\n"


def _validation(stage: StageFolder) -> list[str]:
    summary = read_summary(stage.summary)
    return (
        [f"| {stage.path.name} {name} | {value:.4g} |" for name, value in summary.validation.items()] if summary else []
    )


def _digests(folder: RunFolder, pipeline: "VQVAE2Pipeline") -> str:
    paths = [folder.autoencoder_weights, *(folder.prior_weights(level) for level in pipeline.levels)]
    rows = [f"| {path.relative_to(folder.path).as_posix()} | `{files.digest(path)}` |" for path in paths]
    return "## Files\n\n| file | SHA-256 |\n|---|---|\n" + "\n".join(rows) + "\n"
