"""Optional packages, which only some features need."""

import importlib
from types import ModuleType

from vqvae2.errors import UserError


def import_package(name: str, extra: str) -> ModuleType:
    """Return a module of an optional package, which the extra `extra` installs.

    Raises:
        UserError: If the package is missing.
    """
    try:
        return importlib.import_module(name)
    except (ImportError, OSError) as error:  # OSError: soundfile without its C library
        package = "scikit-learn" if name.startswith("sklearn") else name.partition(".")[0]
        raise UserError(f"{extra}: needs the package {package} ({error}); pip install 'vqvae2[{extra}]'.") from None
