"""The images of a run: opened, and compared with the images that the run was made from."""

import hashlib

from vqvae2 import files
from vqvae2.config import Config
from vqvae2.data.images import DataConfig, ImageDataset, open_datasets
from vqvae2.distributed import get_rank
from vqvae2.errors import UserError
from vqvae2.run_folder import RunFolder


class DataIdentity(Config):
    """Contents of data-identity.json."""

    path: str  # where the images were found, for messages
    digest: str  # SHA-256 of the names and labels of both splits


def open_run_datasets(
    config: DataConfig, folder: RunFolder, use_cache: bool = True
) -> tuple[ImageDataset, ImageDataset]:
    """Open the training and validation images of a run. The first call records their identity in the run folder.

    Images with the same names and labels are the same data, wherever they are stored.

    Args:
        use_cache: Whether to use and update the index of the data set that the run folder caches.

    Raises:
        UserError: If the images are not those that the run was made from.
    """
    datasets = open_datasets(config, folder.data_index if use_cache else None)
    digest = hashlib.sha256("".join(dataset.digest() for dataset in datasets).encode()).hexdigest()
    if folder.data_identity.is_file():
        recorded = DataIdentity.from_dict(files.read_json(folder.data_identity), str(folder.data_identity))
        if recorded.digest != digest:
            raise UserError(
                f"data.path: {config.path} does not hold the images that {folder.path} was made from "
                f"({recorded.path}): names, labels or number differ. Restore them, or choose another folder with --run."
            )
    elif get_rank() == 0:
        files.write_json(folder.data_identity, DataIdentity(path=config.path, digest=digest).to_dict())
    return datasets
