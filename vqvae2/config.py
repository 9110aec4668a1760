"""Experiments as YAML: a typed base class for every setting, loading, command-line overrides, comparison.

Nothing else in the project reads YAML. A section of settings is a frozen `Config` that stands beside the class it
builds.
"""

import contextlib
import io
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import tyro
import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from vqvae2.errors import UserError

_END = "# complete"


class Config(BaseModel):
    """Settings: immutable, unknown keys refused, values validated."""

    model_config = ConfigDict(extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False)

    @classmethod
    def load(cls, path: Path, section: str | None = None) -> Self:
        """The settings in the YAML file `path`, or in one top-level `section` of a resolved one."""
        if section is None:
            return cls.parse(read_yaml(path), str(path))
        return cls.parse(read_resolved(path).get(section), str(path), section)

    @classmethod
    def parse(cls, data: Any, source: str, section: str | None = None) -> Self:
        """Validate plain `data`; UserError names `source`, the full key path of the first problem, and its mend."""
        try:
            return cls.model_validate(data)
        except ValidationError as error:
            raise UserError(f"{source}: {_explain(error, data, section)}") from None

    def override(self, arguments: Sequence[str]) -> Self:
        """A copy with `--section.field value` arguments applied, list elements (`levels.0.`) included."""
        with _one_line_errors():
            return tyro.cli(
                type(self), default=self, args=list(arguments), config=(tyro.conf.AvoidSubcommands,), prog="vqvae2"
            )

    def plain(self) -> dict[str, Any]:
        """The settings as JSON-like values."""
        return self.model_dump(mode="json")

    def yaml(self) -> str:
        """The settings as YAML text, every default spelled out, and a last line without which it was cut short."""
        return yaml.safe_dump(self.plain(), sort_keys=False, allow_unicode=True) + f"{_END}\n"


def read_yaml(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; UserError where there is none."""
    try:
        data = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such config file") from None
    except IsADirectoryError:
        raise UserError(f"{path}: a folder; give a YAML config file") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file; give a YAML config file") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise UserError(f"{path}: expected `section: …` keys at the top level, found {type(data).__name__}")
    return data


def read_resolved(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file that `Config.yaml` wrote; UserError where its end is missing."""
    data = read_yaml(path)
    if not path.read_bytes().rstrip().endswith(_END.encode()):
        raise UserError(
            f"{path}: cut short (its last line is not `{_END}`); restore the file, or mend it and add the line"
        )
    return data


def differences(first: Any, second: Any, path: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Each (key path, value in first, value in second) at which two plain settings differ."""
    if isinstance(first, dict) and isinstance(second, dict):
        for key in {**first, **second}:
            yield from differences(first.get(key), second.get(key), f"{path}.{key}" if path else str(key))
    elif isinstance(first, list) and isinstance(second, list) and len(first) == len(second):
        for index, (one, other) in enumerate(zip(first, second, strict=True)):
            yield from differences(one, other, f"{path}.{index}")
    elif first != second:
        yield path, first, second


def _explain(error: ValidationError, data: Any, section: str | None) -> str:
    """One line for the first error, with the key path as it stands in the file."""
    problem = error.errors(include_url=False)[0]
    keys = [section] if section else []
    for position, key in enumerate(problem["loc"]):
        if isinstance(data, dict) and key not in data and position < len(problem["loc"]) - 1:
            continue  # pydantic puts the tag of a union into the path; the file has no such key
        keys.append(str(key))
        data = _child(data, key)
    name, total = ".".join(keys), len(error.errors())
    more = f" (and {total - 1} more)" if total > 1 else ""
    if problem["type"] == "extra_forbidden":
        return f"{name}: unknown key; check its spelling and indentation{more}"
    if problem["type"] == "missing":
        return f"{name}: required, but missing{more}"
    message = problem["msg"].removeprefix("Value error, ")
    shown = "" if isinstance(problem["input"], dict | list | BaseModel) else f", not {problem['input']!r}"
    return f"{name}: {message}{shown}{more}" if name else f"{message}{more}"


def _child(data: Any, key: int | str) -> Any:
    """The value under a key or index; None where there is none."""
    if isinstance(data, dict):
        return data.get(key)
    return data[key] if isinstance(data, list) and isinstance(key, int) and key < len(data) else None


@contextlib.contextmanager
def _one_line_errors() -> Iterator[None]:
    """Turn the box that tyro draws around a problem, and its exit, into a UserError of one line."""
    box = io.StringIO()
    try:
        with contextlib.redirect_stderr(box):
            yield
    except SystemExit as exit_:
        if not exit_.code:
            raise  # --help
        text = re.sub(r"\x1b\[[0-9;]*m|[╭╮╰╯│─]+", " ", box.getvalue())
        text = re.sub(r"For full helptext.*|For further information visit \S+|\[type=[^\]]*\]", "", text, flags=re.S)
        text = re.sub(r"^\s*(Unrecognized options|Value error|Invalid choice|Parsing error|Error)\s+", "", text)
        raise UserError(" ".join(text.split())) from None
    except ValidationError as error:
        raise UserError(_explain(error, None, None)) from None
