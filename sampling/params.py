"""Sampling parameters of one level and of all levels: temperature, top-k, top-p and guidance scale."""

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

import tyro
from pydantic import BeforeValidator, Field, ValidationError, model_validator

from vqvae2.config import Config
from vqvae2.errors import UserError


class CodeSamplingParams(Config):
    """Sampling parameters of a prior without labels. The defaults sample from the prior's own distribution."""

    temperature: float = Field(default=1.0, ge=0, description="divides the logits; 0 selects the most likely code")
    top_k: int = Field(default=0, ge=0, description="sample from the k most likely codes only; 0 for all")
    top_p: float = Field(
        default=1.0, gt=0, le=1, description="sample from the most likely codes with this total probability only"
    )
    dtype: Literal["fp32", "bf16"] = Field(
        default="fp32",
        description="data type of the priors; bf16 is faster if the hardware supports it, and gives other images",
    )


class LevelSamplingParams(CodeSamplingParams):
    """Sampling parameters of one level, whose prior may have labels."""

    guidance_scale: float = Field(
        default=1.0, ge=0, description="classifier-free guidance; 1 disables it, above 1 follows the label more closely"
    )


def _parse_per_level(value: Any) -> Any:
    """Parse `0.9`, or values per level such as `top=1.0,bottom=0.9`; return anything but a string unchanged."""
    if not isinstance(value, str):
        return value
    try:
        if "=" not in value:
            return float(value)
        pairs = [(level.strip(), float(number)) for level, number in (part.split("=") for part in value.split(","))]
    except ValueError:
        raise ValueError(f"expected a number, or numbers per level such as top=1,bottom=2, not {value!r}") from None
    levels = [level for level, _ in pairs]
    for level in levels:
        if levels.count(level) > 1:
            raise ValueError(f"the level {level!r} occurs twice")
    return dict(pairs)


def format_per_level(value: float | str | Mapping[str, float]) -> str:
    """Return a parameter as it is written on the command line.

    >>> format_per_level({"top": 1.0, "bottom": 0.9})
    'top=1,bottom=0.9'
    """
    if isinstance(value, Mapping):
        return ",".join(f"{level}={number:g}" for level, number in value.items())
    return value if isinstance(value, str) else f"{value:g}"


def _is_per_level(value: Any) -> bool:
    return isinstance(value, int | float | dict)


_PER_LEVEL = (
    BeforeValidator(_parse_per_level),
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="VALUE|LEVEL=VALUE,...",
        instance_from_str=lambda arguments: _parse_per_level(arguments[0]),
        is_instance=_is_per_level,
        str_from_instance=lambda value: [format_per_level(value)],
    ),
)
FloatPerLevel = Annotated[float | dict[str, float], *_PER_LEVEL]
IntPerLevel = Annotated[int | dict[str, int], *_PER_LEVEL]


def _parse_classes(value: Any) -> Any:
    """Split `207,goldfish`; return anything but a string unchanged. A number may be the name of a class."""
    if not isinstance(value, str):
        return value
    return tuple(filter(None, (part.strip() for part in value.split(","))))


ClassLabels = Annotated[
    tuple[int | str, ...],
    BeforeValidator(_parse_classes),
    tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar="CLASS,...",
        instance_from_str=lambda arguments: _parse_classes(arguments[0]),
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda value: [",".join(map(str, value))],
    ),
]


class SamplingParams(Config):
    """Sampling parameters of all levels: each is one value, or values per level.

    In YAML, on the command line and in Python: `0.9`, or `top=1.0,bottom=0.9`; in YAML and Python also a mapping. A
    level without a value uses the default; `complete` sets it to that of a model.
    """

    temperature: FloatPerLevel = Field(
        default=1.0, description="divides the logits; 0 selects the most likely code; one value, or LEVEL=VALUE,..."
    )
    top_k: IntPerLevel = Field(default=0, description="sample from the k most likely codes only; 0 for all")
    top_p: FloatPerLevel = Field(
        default=1.0, description="sample from the most likely codes with this total probability only"
    )
    guidance_scale: FloatPerLevel = Field(
        default=1.0, description="classifier-free guidance; 1 disables it, above 1 follows the label more closely"
    )
    dtype: Literal["fp32", "bf16"] = Field(
        default="fp32",
        description="data type of the priors; bf16 is faster if the hardware supports it, and gives other images",
    )

    @model_validator(mode="after")
    def _check(self) -> "SamplingParams":
        for level in (None, *self._named_levels()):
            try:
                self.for_level(level)
            except ValidationError as error:
                problem = error.errors(include_url=False)[0]
                name = ".".join(filter(None, (str(problem["loc"][0]), level)))
                raise ValueError(f"{name}: {problem['msg']}, not {problem['input']!r}") from None
        return self

    @property
    def params(self) -> "SamplingParams":
        """The sampling parameters alone, without the settings that a subclass adds."""
        return SamplingParams(**{name: getattr(self, name) for name in SamplingParams.model_fields})

    def for_level(self, level: str | None) -> LevelSamplingParams:
        """Return the parameters of one level."""
        return LevelSamplingParams(**{name: self._value(name, level) for name in LevelSamplingParams.model_fields})

    def complete(self, defaults: "SamplingParams", levels: Sequence[str]) -> Self:
        """Return a copy in which a level that a parameter does not name has the value of `defaults`.

        >>> SamplingParams(top_p={"top": 0.5}).complete(SamplingParams(top_p=0.9), ["bottom", "top"]).top_p
        {'top': 0.5, 'bottom': 0.9}
        """
        values = {name: getattr(self, name) for name in LevelSamplingParams.model_fields}
        completed = {
            name: dict(value) | {level: defaults._value(name, level) for level in levels if level not in value}
            for name, value in values.items()
            if isinstance(value, Mapping) and value != getattr(defaults, name)
        }
        return self.model_copy(update=completed)

    def check_levels(self, levels: Sequence[str]) -> None:
        """Raise UserError if a parameter names a level that is not in `levels`."""
        for name in LevelSamplingParams.model_fields:
            value = getattr(self, name)
            for level in value if isinstance(value, Mapping) else ():
                if level not in levels:
                    raise UserError(f"{name}: no level is named {level!r}. The levels are {', '.join(levels)}.")

    def recorded(self, levels: Sequence[str]) -> "SamplingParams":
        """Return the parameters for a manifest, with `guidance_scale` and `dtype` unset if they have no effect."""
        recorded = {name: getattr(self, name) for name in SamplingParams.model_fields}
        if all(self.for_level(level).guidance_scale == 1 for level in levels):
            del recorded["guidance_scale"]
        if self.dtype == "fp32":
            del recorded["dtype"]
        return SamplingParams(**recorded)

    def _named_levels(self) -> list[str]:
        values = [getattr(self, name) for name in SamplingParams.model_fields]
        return list(dict.fromkeys(level for value in values if isinstance(value, Mapping) for level in value))

    def _value(self, name: str, level: str | None) -> Any:
        value = getattr(self, name)
        if isinstance(value, Mapping):
            return value.get(level, SamplingParams.model_fields[name].default)
        return value


class SamplingConfig(SamplingParams):
    """What to sample, and how."""

    count: int = Field(default=64, ge=1, le=10**7, description="number of images")
    seed: int = Field(
        default=0,
        ge=0,
        le=2**63 - 1,
        description="image k depends on the seed and k, and by rounding on the batch size",
    )
    classes: ClassLabels = Field(
        default=(),
        description="names or numbers of the classes to cycle through; all classes if not given; `1` is the class of "
        "this name if there is one",
    )
    batch_size: int = Field(
        default=16,
        ge=1,
        le=2**16,
        description="images sampled at once, per process, if memory allows; a resumed command uses the same",
    )
    format: Literal["png", "webp", "npz"] = Field(
        default="png",
        description="file format of the images, both lossless; npz writes PNGs and, for other evaluators, samples.npz: "
        "all images as `arr_0`, uint8 (N, H, W, C)",
    )
    memory: float | None = Field(
        default=None, gt=0, description="memory in GiB that sampling may use; half of the free memory if not given"
    )
