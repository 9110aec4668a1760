"""Where weights come from: a file, a run's folder, or a repository on the Hugging Face hub."""

import re
from pathlib import Path

from vqvae2.errors import UserError

WEIGHTS = "model.safetensors"


def weights_file(source: str | Path) -> Path:
    """The safetensors file that `source` names: itself, the one in a folder, or that of a hub repository `owner/name`.

    Raises UserError where there is none, or the repository cannot be had.
    """
    path = Path(source)
    if path.is_dir():
        path = path / WEIGHTS
    if path.is_file():
        return path
    if path.suffix or not re.fullmatch(r"[\w.-]+/[\w.-]+", str(source)):
        raise UserError(f"{source}: no such weights file; give a .safetensors file, its folder, or a hub id owner/name")
    from huggingface_hub import hf_hub_download  # slow to import, and needed for this alone
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(hf_hub_download(str(source), WEIGHTS))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(f"{source}: no such file, and the hub does not give {WEIGHTS} of it ({reason})") from None
