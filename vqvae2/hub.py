"""Local paths of pretrained models: a file, a folder, or a repository on the Hugging Face hub."""

import re
from collections.abc import Callable
from pathlib import Path

from vqvae2.errors import UserError
from vqvae2.run_folder import WEIGHTS, RunFolder

SOURCE_HELP = "run folder, folder that save_pretrained wrote, packaged model, or hub id"
_PACKAGED = Path(__file__).with_name("pretrained")  # one folder per model


def weights_file(source: str | Path) -> Path:
    """Return the weights of the autoencoder that `source` names: a file, its folder, a run, a packaged model, a hub id.

    Raises:
        UserError: If there is none, or the repository cannot be reached.
    """
    path = Path(source).expanduser()
    for candidate in (path, path / WEIGHTS, RunFolder(path).autoencoder_weights):
        if candidate.is_file():
            return candidate
    if path.is_dir():
        raise UserError(f"{source}: neither {WEIGHTS} nor autoencoder/{WEIGHTS} is in this folder.")
    if packaged := _packaged_model(source):
        return RunFolder(packaged).autoencoder_weights
    _check_hub_id(source, "a .safetensors file, its folder, a run folder")
    return _fetch(source, lambda: _download_weights(str(source)))


def pipeline_folder(source: str | Path) -> Path:
    """Return the folder with the networks of a pipeline: a run, another folder, a packaged model, or a hub id.

    Raises:
        UserError: If there is none, or the repository cannot be reached.
    """
    path = Path(source)
    if path.is_dir():
        return path
    if packaged := _packaged_model(source):
        return packaged
    _check_hub_id(source, "a run folder, a folder that save_pretrained wrote")
    from huggingface_hub import snapshot_download  # imported here because it is slow

    patterns = ["model_index.json", "*/model.safetensors"]
    return _fetch(source, lambda: snapshot_download(str(source), allow_patterns=patterns))


def download_file(hub_id: str, name: str) -> Path:
    """Return a file of a repository on the hub, from the local cache or downloaded into it.

    Raises:
        UserError: If the repository cannot be reached, or does not have the file.
    """
    from huggingface_hub import hf_hub_download  # imported here because it is slow

    return _fetch(hub_id, lambda: hf_hub_download(hub_id, name))


def _download_weights(hub_id: str) -> str:
    """Download the weights of a repository of an autoencoder, or of a pipeline."""
    from huggingface_hub import hf_hub_download  # imported here because it is slow
    from huggingface_hub.errors import EntryNotFoundError

    try:
        return hf_hub_download(hub_id, WEIGHTS)
    except EntryNotFoundError:
        return hf_hub_download(hub_id, f"autoencoder/{WEIGHTS}")


def packaged_models() -> tuple[str, ...]:
    """Return the names of the models that are part of the package."""
    return tuple(sorted(path.name for path in _PACKAGED.iterdir())) if _PACKAGED.is_dir() else ()


def _packaged_model(source: str | Path) -> Path | None:
    return _PACKAGED / source if str(source) in packaged_models() else None


def _check_hub_id(source: str | Path, expected: str) -> None:
    if Path(source).suffix or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        names = ", ".join(packaged_models())
        packaged = f", a packaged model ({names})" if names else ""
        raise UserError(f"{source}: no such file or folder. Give {expected}{packaged}, or a hub id OWNER/NAME.")


def _fetch(source: str | Path, download: Callable[[], str]) -> Path:
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(download())
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{source}: no such folder, and downloading it from the hub failed: {reason}") from None
