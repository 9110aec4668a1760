"""Typed settings: the Config base class, reading and writing YAML, and comparing two configs.

No other module reads YAML. A section of settings is a frozen `Config` beside the class it builds.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from vqvae2.errors import UserError

_END = "# complete"


class Config(BaseModel):
    """Base class of all settings: immutable, typed, validated; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    @classmethod
    def from_yaml(cls, path: Path) -> Self:
        """Return the settings in the YAML file `path`.

        Raises:
            UserError: If the file is missing, not YAML, or invalid.
        """
        return cls.from_dict(read_yaml(path), str(path))

    @classmethod
    def from_resolved_yaml(cls, path: Path) -> Self:
        """Return the settings in a YAML file that `to_yaml` wrote.

        Raises:
            UserError: If the file is missing, truncated or invalid.
        """
        return cls.from_dict(_read_resolved(path), str(path))

    @classmethod
    def from_dict(cls, data: Any, source: str, section: str | None = None) -> Self:
        """Return the settings in `data`, plain dictionaries and lists.

        Raises:
            UserError: If a value is invalid. The message names `source` and the key path of the first problem.
        """
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise UserError(f"{source}: {explain(error, data, section)}") from None

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON-compatible values."""
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        """Return the settings as YAML, with all defaults, and a last line that proves the text is complete."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True) + f"{_END}\n"


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file.

    Raises:
        UserError: If the file is missing, not YAML, or not a mapping.
    """
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such config file. Check the path.") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a directory. Give a YAML config file.") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file. Give a YAML config file.") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected `section: …` keys at the top level, found {type(data).__name__}")
    return data


def _read_resolved(path: Path) -> dict[str, Any]:
    data = read_yaml(path)
    if not path.read_bytes().rstrip().endswith(_END.encode()):
        raise UserError(f"{path}: truncated (the last line is not `{_END}`). Restore the file from a backup.")
    return data


def differences(first: Any, second: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield (key path, value in `first`, value in `second`) for each difference between two plain settings."""
    if isinstance(first, dict) and isinstance(second, dict):
        for key in {**first, **second}:
            yield from differences(first.get(key), second.get(key), f"{path}.{key}" if path else str(key))
    elif isinstance(first, list) and isinstance(second, list) and len(first) == len(second):
        for index, (one, other) in enumerate(zip(first, second, strict=True)):
            yield from differences(one, other, f"{path}.{index}")
    elif first != second:
        yield path, first, second


def explain(error: ValidationError, data: Any, section: str | None = None) -> str:
    """Return one line for the first error, with its key path as in `data`."""
    problem = error.errors(include_url=False)[0]
    keys = [section] if section else []
    for position, key in enumerate(problem["loc"]):
        if isinstance(data, dict) and key not in data and position < len(problem["loc"]) - 1:
            continue  # the tag of a union, which pydantic adds to the path
        keys.append(str(key))
        data = _child(data, key)
    name, total = ".".join(keys), len(error.errors())
    more = f" (and {total - 1} more)" if total > 1 else ""
    if problem["type"] == "extra_forbidden":
        return f"{name}: unknown key. Check its spelling and indentation.{more}"
    if problem["type"] == "missing":
        return f"{name}: required, but missing{more}"
    message = problem["msg"].removeprefix("Value error, ")
    shown = "" if isinstance(problem["input"], dict | list | BaseModel) else f", not {problem['input']!r}"
    return f"{name}: {message}{shown}{more}" if name else f"{message}{more}"


def _child(data: Any, key: int | str) -> Any:
    """Return the value at a key or index, or None if there is none."""
    if isinstance(data, dict):
        return data.get(key)
    return data[key] if isinstance(data, list) and isinstance(key, int) and key < len(data) else None
