"""Pretrained models: a file, a folder, a packaged model, or a repository on the Hugging Face hub; uploading to the hub.

The environment variables of `huggingface_hub` apply: HF_TOKEN, HF_HOME, HF_HUB_OFFLINE, HF_ENDPOINT.
"""

import difflib
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypedDict, TypeVar, Unpack

from vqvae2.errors import UserError
from vqvae2.run_folder import WEIGHTS, RunFolder

SOURCE_HELP = "run folder, folder that save_pretrained wrote, packaged model, or hub id OWNER/NAME[@REVISION]"
_PACKAGED = Path(__file__).with_name("pretrained")  # one folder per model
_Result = TypeVar("_Result")


class HubOptions(TypedDict, total=False):
    """How a repository on the hub is accessed, in the words of `huggingface_hub`."""

    revision: str | None  # branch, tag or commit
    token: str | None  # of the account; the one that `hf auth login` stored, if not given
    cache_dir: Path | str | None
    local_files_only: bool  # whether only the cache is used


def weights_file(source: str | Path, **options: Unpack[HubOptions]) -> Path:
    """Return the weights of the autoencoder that `source` names: a file, its folder, a run, a packaged model, a hub id.

    Raises:
        UserError: If there is none, the repository cannot be reached, or an option is unknown.
    """
    path = Path(source).expanduser()
    _check_options(source, path, options)
    for candidate in (path, path / WEIGHTS, RunFolder(path).autoencoder_weights):
        if candidate.is_file():
            return candidate
    if path.is_dir():
        raise UserError(f"{source}: neither {WEIGHTS} nor autoencoder/{WEIGHTS} is in this folder.")
    if packaged := _packaged_model(source):
        return RunFolder(packaged).autoencoder_weights
    repo = _parse_hub_id(source, "a .safetensors file, its folder, a run folder", options)
    return Path(_hub_errors(source, lambda: _download_weights(**repo)))


def pipeline_folder(source: str | Path, **options: Unpack[HubOptions]) -> Path:
    """Return the folder with the networks of a pipeline: a run, another folder, a packaged model, or a hub id.

    Raises:
        UserError: If there is none, the repository cannot be reached or holds no pipeline, or an option is unknown.
    """
    path = Path(source).expanduser()
    _check_options(source, path, options)
    if path.is_dir():
        return path
    if packaged := _packaged_model(source):
        return packaged
    repo = _parse_hub_id(source, "a run folder, a folder that save_pretrained wrote", options)
    from huggingface_hub import snapshot_download  # imported here because it is slow

    names = (RunFolder(path).pipeline_config.name, RunFolder(path).card.name)
    patterns = [*names, f"*/{WEIGHTS}"]
    folder = RunFolder(Path(_hub_errors(source, lambda: snapshot_download(allow_patterns=patterns, **repo))))
    if not (folder.pipeline_config.is_file() and folder.autoencoder_weights.is_file()):
        raise UserError(f"{source}: no pipeline of vqvae2 in this repository (no autoencoder/{WEIGHTS}). Check the id.")
    return folder.path


def download_file(hub_id: str, name: str) -> Path:
    """Return a file of a repository on the hub, from the local cache or downloaded into it.

    Raises:
        UserError: If the repository cannot be reached, or does not have the file.
    """
    from huggingface_hub import hf_hub_download  # imported here because it is slow

    return Path(_hub_errors(hub_id, lambda: hf_hub_download(hub_id, name), f"downloading {name} from"))


class PushOptions(TypedDict, total=False):
    """How a model is uploaded to the hub, in the words of `huggingface_hub`."""

    revision: str | None  # branch, created if it does not exist
    token: str | None
    private: bool | None  # whether a new repository is private; the default of the account if not given
    commit_message: str


def push(write: Callable[[Path], None], repo_id: str, **options: Unpack[PushOptions]) -> str:
    """Upload the folder that `write` fills to a repository on the hub, which is created if it does not exist.

    Returns:
        The address of the commit.

    Raises:
        UserError: If the hub cannot be reached, or refuses the token or the id.
    """
    from huggingface_hub import HfApi  # imported here because it is slow

    api, revision = HfApi(token=options.get("token")), options.get("revision")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary, repo_id.rpartition("/")[2] or "model")  # the name is the title of the model card
        write(folder)

        def upload() -> str:
            api.create_repo(repo_id, private=options.get("private"), exist_ok=True)
            if revision is not None:
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            message = options.get("commit_message", "Upload a model of vqvae2")
            return str(
                api.upload_folder(repo_id=repo_id, folder_path=folder, revision=revision, commit_message=message)
            )

        return _hub_errors(repo_id, upload, "uploading to")


def _check_options(source: str | Path, path: Path, options: HubOptions) -> None:
    """Raise UserError if an option is unknown, or has no effect on a model that is on this machine."""
    known = HubOptions.__annotations__
    for name in options.keys() - known.keys():
        close = difflib.get_close_matches(name, ["device", *known], 1)
        hint = f"Did you mean {close[0]}?" if close else f"The arguments are device, {', '.join(known)}."
        if name in ("torch_dtype", "dtype"):
            hint = 'The weights are loaded in float32; give dtype="bf16" when you call the pipeline.'
        raise UserError(f"from_pretrained: unknown argument {name}. {hint}")
    if options.get("revision") is not None and (path.exists() or _packaged_model(source)):
        raise UserError(f"{source}: not a hub id, so it has no revision. Leave out revision.")


def packaged_models() -> tuple[str, ...]:
    """Return the names of the models that are part of the package."""
    return tuple(sorted(path.name for path in _PACKAGED.iterdir())) if _PACKAGED.is_dir() else ()


def _packaged_model(source: str | Path) -> Path | None:
    return _PACKAGED / source if str(source) in packaged_models() else None


def _download_weights(**repo: Any) -> str:
    """Download the weights of a repository of an autoencoder, or of a pipeline."""
    from huggingface_hub import hf_hub_download  # imported here because it is slow
    from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

    try:
        return hf_hub_download(filename=WEIGHTS, **repo)
    except EntryNotFoundError as error:
        if isinstance(error, LocalEntryNotFoundError) and not repo.get("local_files_only"):
            raise  # the hub cannot be reached
        return hf_hub_download(filename=f"autoencoder/{WEIGHTS}", **repo)


def _parse_hub_id(source: str | Path, expected: str, options: HubOptions) -> dict[str, Any]:
    """Return the arguments of `huggingface_hub` for a hub id with or without a revision.

    Raises:
        UserError: If `source` is not a hub id.
    """
    hub_id, _, revision = str(source).partition("@")
    if Path(hub_id).suffix in (".safetensors", ".pt") or not re.fullmatch(r"[\w.-]+/[\w.-]+", hub_id):
        names = ", ".join(packaged_models())
        packaged = f", a packaged model ({names})" if names else ""
        raise UserError(f"{source}: no such file or folder. Give {expected}{packaged}, or a hub id OWNER/NAME.")
    return {"repo_id": hub_id, **options} | ({"revision": revision} if revision else {})


def _hub_errors(source: str | Path, access: Callable[[], _Result], action: str = "downloading from") -> _Result:
    """Call `access`, and convert the errors of `huggingface_hub` to UserError."""
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return access()
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0].removeprefix("Got: ")
        if action == "downloading from":
            action, reason = f"no such folder, and {action}", f"{reason.rstrip('.')}. Check the path."
        raise UserError(f"{source}: {action} the hub failed: {reason}") from None
