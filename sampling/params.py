"""How codes are chosen on every level: each setting is one value for all levels, or values by level."""

import argparse
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from pydantic import Field, ValidationError, model_validator

from sampling.sample_level import LevelSamplingParams
from vqvae2.config import Config
from vqvae2.errors import UserError

_Number = TypeVar("_Number", int, float)


class SamplingParams(Config):
    """A `LevelSamplingParams` and a guidance scale for each level: `temperature: 0.9`, or `temperature: {top: 1.0, bottom: 0.9}`.

    A level that a mapping does not name keeps the default.
    """

    temperature: float | dict[str, float] = Field(
        default=1.0, description="below 1 plays safe, 0 always takes the likeliest code; one value, or values by level"
    )
    top_k: int | dict[str, int] = Field(default=0, description="choose among the k likeliest codes; 0 for all")
    top_p: float | dict[str, float] = Field(
        default=1.0, description="choose among the likeliest codes that make up this probability"
    )
    guidance_scale: float | dict[str, float] = Field(
        default=1.0, description="how far to go from what any label would give to what this label gives; 1 is off"
    )

    @model_validator(mode="after")
    def _check(self) -> "SamplingParams":
        for level in (None, *self.named()):
            try:
                self.of(level)
            except ValidationError as error:
                problem = error.errors(include_url=False)[0]
                name = ".".join(filter(None, (str(problem["loc"][0]), level)))
                raise ValueError(f"{name}: {problem['msg']}, not {problem['input']!r}") from None
            if (scale := self.guidance_scale_of(level)) < 0:
                raise ValueError(f"guidance_scale must not be negative, not {scale!r}")
        return self

    def of(self, level: str | None) -> LevelSamplingParams:
        """How the codes of one level are chosen."""
        names = LevelSamplingParams.model_fields
        return LevelSamplingParams(**{name: self._value(name, level) for name in names})

    def guidance_scale_of(self, level: str | None) -> float:
        """The guidance scale of one level; 1 where there is none."""
        return self._value("guidance_scale", level)

    def named(self) -> list[str]:
        """The levels that any of the settings names."""
        values = [getattr(self, name) for name in type(self).model_fields]
        return list(dict.fromkeys(level for value in values if isinstance(value, Mapping) for level in value))

    def check_levels(self, levels: Sequence[str]) -> None:
        """UserError where a setting names a level that there is not."""
        for level in self.named():
            if level not in levels:
                raise UserError(f"choice: there is no level {level!r}; the levels are {', '.join(levels)}")

    def record(self, levels: Sequence[str]) -> dict[str, Any]:
        """What a manifest says of them: guidance only where some level has it."""
        guided = any(self.guidance_scale_of(level) != 1 for level in levels)
        return self.model_dump(mode="json", exclude=None if guided else {"guidance_scale"})

    def _value(self, name: str, level: str | None) -> Any:
        value = getattr(self, name)
        if isinstance(value, Mapping):
            return value.get(level, type(self).model_fields[name].default)
        return value


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that set `SamplingParams` on a command line."""
    for name, kind, about in (
        ("temperature", float, "below 1 plays safe; 0 always takes the likeliest code"),
        ("top-k", int, "choose among the k likeliest codes; 0 for all"),
        ("top-p", float, "choose among the likeliest codes of this total probability"),
        ("guidance_scale", float, "above 1 is truer to the label, for priors trained with label dropout; 1 is off"),
    ):
        parser.add_argument(
            f"--{name}", dest=name.replace("-", "_"), type=by_level(kind), help=f"{about}; by level: top=…,bottom=…"
        )


def by_level(kind: Callable[[str], _Number]) -> Callable[[str], _Number | dict[str, _Number]]:
    """Reads `0.9`, or values by level: `top=1.0,bottom=0.9`."""

    def parse(text: str) -> _Number | dict[str, _Number]:
        try:
            if "=" not in text:
                return kind(text)
            pairs = (part.split("=") for part in text.split(","))
            return {level.strip(): kind(value) for level, value in pairs}
        except ValueError:
            message = f"expected a number, or numbers by level such as top=1,bottom=2, not {text!r}"
            raise argparse.ArgumentTypeError(message) from None

    return parse
