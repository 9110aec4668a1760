"""The images, the autoencoder and the codes of a run: opened, and compared with what the run was made from."""

import hashlib
from collections.abc import Mapping

import torch

from sampling.run_config import RunConfig
from vqvae2 import files
from vqvae2.config import Config
from vqvae2.data import lmdb_environment
from vqvae2.data.code_store import CodeStore
from vqvae2.data.images import DataConfig, ImageDataset
from vqvae2.data.splits import open_datasets
from vqvae2.distributed import get_rank
from vqvae2.errors import UserError
from vqvae2.models import Autoencoder
from vqvae2.run_folder import RunFolder

_IDENTITY_FIX = "Delete it; the next command records it again."


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
        recorded = DataIdentity.from_json(folder.data_identity, _IDENTITY_FIX)
        if recorded.digest != digest:
            raise UserError(
                f"data.path: {config.path} does not hold the images that {folder.path} was made from "
                f"({recorded.path}): names, labels or number differ. Restore them, or choose another folder with --run."
            )
    elif get_rank() == 0:
        files.write_json(folder.data_identity, DataIdentity(path=config.path, digest=digest).to_dict())
    return datasets


def load_run_autoencoder(config: RunConfig, folder: RunFolder, device: torch.device | str = "cpu") -> Autoencoder:
    """Load the autoencoder of a run.

    Raises:
        UserError: If it is missing or damaged, or has other images or code maps than the run's config describes.
    """
    path = folder.autoencoder_weights
    network = Autoencoder.load(path, device)
    with torch.device("meta"):
        expected = config.autoencoder.model.build(config.data.shape, config.data.channels)
    for name, found, wanted in (
        ("images", _describe_images(network), _describe_images(expected)),
        ("code maps", _describe_maps(network), _describe_maps(expected)),
    ):
        if found != wanted:
            raise UserError(
                f"{path}: an autoencoder of {name} {found}, but {folder.config} describes {wanted}. "
                "Use the autoencoder of this run, or another run folder with the config of this autoencoder."
            )
    return network


def open_run_codes(folder: RunFolder, split: str, command: str = "vqvae2 extract-codes") -> CodeStore:
    """Open the finished code store of a split of a run. `command` writes it.

    Raises:
        UserError: If it is unfinished or damaged, or was made with another autoencoder than that of the run.
    """
    store = CodeStore.open(folder.code_store(split))
    store.header.check_autoencoder(files.digest(folder.autoencoder_weights), store.path, command)
    return store


def check_run_codes(folder: RunFolder, digests: Mapping[str, str], command: str = "vqvae2 extract-codes") -> None:
    """Check that the code stores of a run, if they exist, are of the data of each split with these digests.

    Raises:
        UserError: If one is of other data.
    """
    for split, digest in digests.items():
        path = folder.code_store(split)
        if lmdb_environment.exists(path):
            CodeStore.read_header(path).check_data(digest, path, command)


def _describe_images(network: Autoencoder) -> str:
    height, width = network.size
    return f"{height}×{width} with {network.image_channels} channels"


def _describe_maps(network: Autoencoder) -> str:
    return ", ".join(f"{spec.height}×{spec.width} of {spec.codebook_size} codes" for spec in network.map_specs)
