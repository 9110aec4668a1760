"""Typed settings and records: the Config base class, reading and writing YAML and JSON, and comparing two configs.

No other module reads YAML. A section of settings is a frozen `Config` beside the class it builds, and so are the
contents of a JSON file, beside the code that writes it.
"""

import difflib
import json
import re
import types
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Self, Union

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from vqvae2 import files
from vqvae2.errors import UserError

Measured = Annotated[float, Field(allow_inf_nan=True)]  # a measured value, such as an infinite PSNR
_END = "# complete"
_MAX_SHOWN = 80  # characters of an invalid value or key in an error message


class Config(BaseModel):
    """Base class of all settings: immutable, typed, validated; unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _refuse_booleans_as_numbers(cls, data: Any) -> Any:
        """Refuse `steps: true`, which pydantic would read as 1."""
        if isinstance(data, dict):
            for name, value in data.items():
                field = cls.model_fields.get(name)
                if isinstance(value, bool) and field is not None and bool not in _types(field.annotation):
                    raise ValueError(f"{name}: expected {_describe_types(field.annotation)}, not {str(value).lower()}")
        return data

    @model_validator(mode="before")
    @classmethod
    def _complete_sections(cls, data: Any) -> Any:
        """Complete the sections in `data` with the values that this class sets in their defaults."""
        if not isinstance(data, dict):
            return data
        defaults = {name: field.default for name, field in cls.model_fields.items()}
        return {name: _complete(value, defaults.get(name)) for name, value in data.items()}

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
            UserError: If the file is missing, truncated or invalid, or does not have the keys of this class.
        """
        data = _read_resolved(path)
        for key in (*data, *cls.model_fields):
            if (key in data) != (key in cls.model_fields):
                problem = "unknown" if key in data else "missing"
                raise UserError(
                    f"{path}: `{key}` is {problem}, so this is a run of another kind, or the file was edited. Use a "
                    "command for this kind of run, or restore the file."
                )
        return cls.from_dict(data, str(path))

    @classmethod
    def from_dict(cls, data: Any, source: str, section: str | None = None, fix: str = "") -> Self:
        """Return the settings in `data`, plain dictionaries and lists.

        Raises:
            UserError: If a value is invalid. The message names `source` and the key path of the first problem, and ends
                with `fix`.
        """
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            problem = explain(error, data, section, cls)
        separator = " " if problem.endswith((".", "?")) else ". "
        raise UserError(f"{source}: {problem}{separator if fix else ''}{fix}")

    @classmethod
    def from_json(cls, path: Path, fix: str) -> Self:
        """Return the record in the JSON file `path`.

        Raises:
            UserError: If the file is missing or invalid. The message names the file and ends with `fix`.
        """
        return cls.from_dict(files.read_json(path, fix), str(path), fix=fix)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as JSON-compatible values."""
        return self.model_dump(mode="json")

    def to_json(self) -> bytes:
        """Return the record as ASCII JSON, which can also hold file names that are not valid UTF-8."""
        return json.dumps(self.to_dict()).encode()

    def to_yaml(self) -> str:
        """Return the settings as YAML, with all defaults, and a last line that proves the text is complete."""
        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True) + f"{_END}\n"


def _complete(section: Any, default: Any) -> Any:
    """Return a section with the values that were set in its default, unless the two differ in `kind`."""
    if not isinstance(section, dict) or not isinstance(default, Config):
        return section
    if section.get("kind") != getattr(default, "kind", None):
        return section
    values = {name: getattr(default, name) for name in default.model_fields_set}
    return values | {name: _complete(value, values.get(name)) for name, value in section.items()}


class _UniqueKeyLoader(yaml.SafeLoader):
    """A safe loader that refuses a mapping with a duplicate key."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.constructor.ConstructorError(None, None, f"the key `{key}` occurs twice", node.start_mark)
        return super().construct_mapping(node, deep)


def read_yaml(path: Path) -> dict[str, Any]:
    """Return the mapping in a YAML file.

    Raises:
        UserError: If the file is missing, not YAML, or not a mapping.
    """
    if path.exists() and not (path.is_file() or path.is_dir()):  # reading a pipe or a device may never end
        raise UserError(f"{path}: not a regular file. Give a YAML config file.")
    try:
        data = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeyLoader)
    except FileNotFoundError:
        raise UserError(f"{path}: no such config file. Check the path.") from None
    except IsADirectoryError:
        found = path / "config.yaml"
        hint = f"Give its config: {found}." if found.is_file() else "Give a YAML config file."
        raise UserError(f"{path}: is a directory. {hint}") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file. Give a YAML config file.") from None
    except (yaml.YAMLError, ValueError, OverflowError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    except RecursionError:
        raise UserError(f"{path}: not valid YAML: nested too deeply") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected `section: …` keys at the top level, found {type(data).__name__}")
    return data


def is_resolved(path: Path) -> bool:
    """Return whether `Config.to_yaml` wrote a file, and completely."""
    return path.is_file() and path.read_bytes().rstrip().endswith(_END.encode())


def _read_resolved(path: Path) -> dict[str, Any]:
    data = read_yaml(path)
    if not is_resolved(path):
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


def explain(error: ValidationError, data: Any, section: str | None = None, cls: type[BaseModel] | None = None) -> str:
    """Return one line for the first error, with its key path as in `data`. An unknown key is reported first.

    Args:
        cls: The validated class, to suggest a known key in place of an unknown one.
    """
    problems = [each for each in error.errors(include_url=False) if not _lacks_invalid_item(each, error)]
    problem = next((each for each in problems if each["type"] == "extra_forbidden"), problems[0])
    keys = [*([section] if section else []), *_keys(problem, data)]
    name, total = ".".join(_shorten(key) for key in keys), len({_keys(each, data) for each in problems})
    more = f" (and {total - 1} more)" if total > 1 else ""
    if problem["type"] == "extra_forbidden":
        known = _known_keys(cls, problem["loc"][:-1]) if cls else []
        close = difflib.get_close_matches(keys[-1], known, 1)
        hint = f"Did you mean `{close[0]}`?" if close else "Check its spelling and indentation."
        return f"{name}: unknown key. {hint}{more}"
    if problem["type"] == "missing":
        return f"{name}: required, but missing{more}"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "model_type":
        message = f"expected keys and values, found {type(problem['input']).__name__}"
    if not name:
        return f"{message}{more}"
    nested = isinstance(problem["input"], dict | list | BaseModel)
    value = repr(problem["input"])
    repeated = problem["type"] == "model_type" or (isinstance(problem["input"], str) and value in message)
    shown = "" if nested or repeated else f", not {_shorten(value)}"
    separator = "." if re.match(r"[a-z_.]+: ", message) else ": "  # a validator may name a key of its section
    return f"{name}{separator}{message}{shown}{more}"


def _lacks_invalid_item(problem: ErrorDetails, error: ValidationError) -> bool:
    """Return whether a tuple is too short only because its items are invalid, which is reported by itself."""
    invalid = [each["loc"] for each in error.errors(include_url=False)]
    return problem["type"] == "too_short" and any(location[:-1] == problem["loc"] for location in invalid)


def _keys(problem: ErrorDetails, data: Any) -> tuple[str, ...]:
    """Return the keys of an error's location, without the tags of unions that pydantic adds to it."""
    location, keys = problem["loc"], []
    if data is None:  # options of the command line: values are not nested, so a name after the first is a tag
        return tuple(str(key) for position, key in enumerate(location) if not position or isinstance(key, int))
    for position, key in enumerate(location, 1):
        if _has_child(data, key):
            data = data[key]
        elif problem["type"] != "missing" or position < len(location):
            continue
        keys.append(str(key))
    return tuple(keys)


def _shorten(text: str) -> str:
    return text if len(text) <= _MAX_SHOWN else f"{text[: _MAX_SHOWN - 1]}…"


def _known_keys(cls: type[BaseModel], location: Sequence[int | str]) -> list[str]:
    """Return the keys that are allowed at a location, as far as the classes of its fields tell."""
    classes = [cls]
    for key in location:
        fields = [each.model_fields[key].annotation for each in classes if key in each.model_fields]
        classes = [each for field in fields for each in _types(field) if issubclass(each, BaseModel)] or classes
    return [name for each in classes for name in each.model_fields]


def _types(annotation: Any) -> list[type]:
    """Return the classes in an annotation: those of a union, and of the elements of tuples and dictionaries."""
    if typing.get_origin(annotation) in (Union, types.UnionType, Annotated, tuple, dict):
        return [each for part in typing.get_args(annotation) for each in _types(part)]
    if typing.get_origin(annotation) is typing.Literal:
        return [type(value) for value in typing.get_args(annotation)]
    return [annotation] if isinstance(annotation, type) else []


def _describe_types(annotation: Any) -> str:
    names = {int: "an integer", float: "a number", str: "a string", Path: "a path"}
    found = [names[each] for each in _types(annotation) if each in names]
    return " or ".join(dict.fromkeys(found)) or "another type"


def _has_child(data: Any, key: int | str) -> bool:
    """Return whether plain data has a value at a key or index."""
    return key in data if isinstance(data, dict) else isinstance(data, list | tuple) and key in range(len(data))
