"""Packages that only speech experiments need."""

import importlib
from types import ModuleType

from vqvae2.errors import UserError


def import_package(name: str) -> ModuleType:
    """Return a module of an optional package.

    Raises:
        UserError: If the package is missing.
    """
    try:
        return importlib.import_module(name)
    except (ImportError, OSError) as error:  # OSError: soundfile without its C library
        package = "scikit-learn" if name.startswith("sklearn") else name
        raise UserError(f"speech: needs the package {package} ({error}); pip install 'vqvae2[speech]'.") from None
