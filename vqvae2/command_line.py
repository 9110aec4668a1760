"""Command-line options generated from Config classes by tyro, with one-line errors.

A command is a function `main(options)` whose parameter is annotated with a subclass of `Options`. Every field of that
class is an option, with the same name and the same syntax as in YAML and in Python.
"""

import difflib
import re
import sys
import typing
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

import tyro
from pydantic import BaseModel, ValidationError
from tyro import _errors as tyro_errors  # private, but the only structured access to errors; see pyproject.toml

from vqvae2.config import Config, explain
from vqvae2.errors import UserError

_Config = TypeVar("_Config", bound=Config)


class Options(Config):
    """Options of one command. The class docstring becomes the help text."""

    @classmethod
    def from_arguments(cls, arguments: Sequence[str], prog: str) -> Self:
        """Return the options in `arguments`.

        Subclasses override this if defaults come from a file that an argument names.

        Raises:
            UserError: If an option is unknown, missing or invalid.
        """
        return parse(cls, arguments, prog)


def run_command(main: Callable[[Any], None], arguments: Sequence[str], prog: str) -> None:
    """Parse `arguments` into the Options class that annotates the parameter of `main`, and call it."""
    main(options_class(main).from_arguments(arguments, prog))


def options_class(main: Callable[[Any], None]) -> type[Options]:
    """Return the Options class that annotates the only parameter of a command's function."""
    hints = typing.get_type_hints(main)
    hints.pop("return", None)
    return next(iter(hints.values()))


def parse(cls: type[_Config], arguments: Sequence[str], prog: str, default: _Config | None = None) -> _Config:
    """Return `default`, or the defaults of `cls`, with command-line `arguments` applied.

    Nested fields are `--section.field VALUE`, list elements `--levels.0.stride VALUE`. A Boolean is `--flag`,
    `--no-flag`, `--flag true` or `--flag false`.

    Raises:
        UserError: If an option is unknown, missing or invalid.
    """
    arguments = list(_expand_booleans(cls if default is None else default, arguments))

    def raise_user_error(event: tyro_errors.ParseErrorEvent) -> None:
        raise UserError(_describe(event, cls if default is None else default, arguments))

    with tyro_errors.on_parse_error(raise_user_error):
        try:
            defaults: dict[str, Any] = {} if default is None else {"default": default}
            return tyro.cli(cls, args=arguments, prog=prog, config=(tyro.conf.AvoidSubcommands,), **defaults)
        except ValidationError as error:
            raise UserError(_describe_validation(error, cls if default is None else default, arguments)) from None
        except SystemExit as exit_:
            if exit_.code:
                raise UserError(f"invalid options. Run `{prog} --help` for a list.") from None
            raise


def split_config_path(arguments: Sequence[str], prog: str) -> tuple[Path | None, Sequence[str]]:
    """Return the config file that the first argument names, and the other arguments.

    The file is None if there is none and `--help` is given.

    Raises:
        UserError: If there is no config file.
    """
    if arguments and not arguments[0].startswith("-"):
        return Path(arguments[0]), arguments[1:]
    if not {"-h", "--help"} & set(arguments):
        raise UserError(f"CONFIG: missing. Give a YAML file first: {prog} CONFIG.yaml [--section.field VALUE]")
    return None, arguments


def option_names(config: Config | type[Config]) -> Iterator[tuple[str, Any]]:
    """Yield the dotted name of every option with its default value, or its type if there is no default."""
    for name, value, _ in _typed_options(config):
        yield name, value


def _typed_options(config: Config | type[Config], prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yield what `option_names` yields, with the annotation of each option."""
    for name, field in (config if isinstance(config, type) else type(config)).model_fields.items():
        value = field.get_default(call_default_factory=True) if isinstance(config, type) else getattr(config, name)
        if isinstance(config, type) and field.is_required():
            value = field.annotation
        yield from _options_below(f"{prefix}{name}", value, field.annotation)


def _options_below(name: str, value: Any, annotation: Any) -> Iterator[tuple[str, Any, Any]]:
    if isinstance(value, Config) or (isinstance(value, type) and issubclass(value, Config)):
        yield from _typed_options(value, f"{name}.")
    elif isinstance(value, dict) and any(isinstance(child, BaseModel) for child in value.values()):
        for key, child in value.items():
            yield from _options_below(f"{name}.{key}", child, annotation)
    elif isinstance(value, tuple) and any(isinstance(child, BaseModel) for child in value):
        for index, child in enumerate(value):
            yield from _options_below(f"{name}.{index}", child, annotation)
    else:
        yield name, value, annotation


def _expand_booleans(config: Config | type[Config], arguments: Sequence[str]) -> Iterator[str]:
    """Rewrite Booleans in the forms that tyro accepts.

    `--flag true` becomes `--flag`, and `--flag false` becomes `--no-flag`. If an option also accepts other types, tyro
    accepts `--option True` and `--option False` only.
    """
    annotations = {name: annotation for name, _, annotation in _typed_options(config) if _accepts_bool(annotation)}
    rest = iter(_split_equals(arguments, annotations))
    for argument in rest:
        option = _dotted(argument)
        if not argument.startswith("--") or option not in annotations:
            yield argument
            continue
        following = next(rest, None)
        value = following.lower() if following else ""
        if annotations[option] is not bool:
            yield from (argument, value.capitalize()) if value in ("true", "false") else (argument,)
        elif value == "false":
            parent, _, name = argument.removeprefix("--").rpartition(".")
            yield f"--{parent}.no-{name}" if parent else f"--no-{name}"
        else:
            yield argument
        if following is not None and value not in ("true", "false"):
            yield from _expand_booleans(config, [following, *rest])


def _accepts_bool(annotation: Any) -> bool:
    return annotation is bool or bool in typing.get_args(annotation)


def _split_equals(arguments: Sequence[str], booleans: Container[str]) -> Iterator[str]:
    """Split `--flag=true` into two arguments; leave other arguments alone."""
    for argument in arguments:
        name, equals, value = argument.partition("=")
        yield from (name, value) if equals and _dotted(name) in booleans else (argument,)


def _dotted(argument: str) -> str:
    """Return the field path that an option names: `--data.num-workers` → `data.num_workers`."""
    return argument.partition("=")[0].removeprefix("--").replace("-", "_")


def _describe(event: tyro_errors.ParseErrorEvent, config: Config | type[Config], arguments: Sequence[str]) -> str:
    """Return one line for an error that tyro found."""
    match event:
        case tyro_errors.UnrecognizedArgs():
            return _describe_unknown(event.tokens, config)
        case tyro_errors.MissingArgs():
            if event.unrecognized_tokens:
                return _describe_unknown(event.unrecognized_tokens, config)
            missing = event.missing_arguments[0].arg.display_name()
            return f"{missing}: required, but missing. Run `{event.prog} --help` for the options."
        case tyro_errors.InvalidChoice():
            name = event.argument.display_name()
            return f"{name}: must be one of {', '.join(event.choices)}, not {event.value!r}"
        case tyro_errors.BadValue():
            name = event.argument.display_name()
            if event.reason == "too_few_values":
                return f"{name}: the value is missing"
            return f"{name}: cannot be set to {event.offending_value!r}"
        case tyro_errors.InstantiationFailure():
            return _describe_instantiation(event, config, arguments)
        case _:
            return f"invalid options. Run `{event.prog} --help` for a list."


def _describe_instantiation(
    event: tyro_errors.InstantiationFailure, config: Config | type[Config], arguments: Sequence[str]
) -> str:
    error: BaseException | None = sys.exception()
    while error is not None:  # tyro wraps the errors of nested classes
        if isinstance(error, ValidationError):
            return _describe_validation(error, config, arguments)
        error = error.__cause__ or error.__context__
    name = event.argument.display_name() if event.argument else ""
    message = re.sub(r"\[/?bold\]", "", " ".join(event.message.split()))
    if "from []" in message:
        return f"{name}: the value is missing"
    return message if not name or name in message else f"{name}: {message}"


def _describe_unknown(tokens: Sequence[str], config: Config | type[Config]) -> str:
    token = next((token for token in tokens if token.startswith("-")), tokens[0])
    if not token.startswith("-"):
        return f"{token}: unexpected argument"
    known = {name: f"--{name.replace('_', '-')}" for name, _ in option_names(config)}
    close = [name for name in known if _dotted(token).endswith(f".{name}")]  # typed with another section before it
    close = close or difflib.get_close_matches(_dotted(token), known, 1, cutoff=0.5)
    hint = f" Did you mean {known[close[0]]}?" if close else " Run the command with --help for a list."
    return f"{token.partition('=')[0]}: unknown option.{hint}"


def _describe_validation(error: ValidationError, config: Config | type[Config], arguments: Sequence[str]) -> str:
    """Return one line for an invalid value, with the full path of the option that was given, if any."""
    text, value = explain(error, None), error.errors(include_url=False)[0]["input"]
    field = re.sub(r"(\.[0-9]+)+$", "", text.partition(":")[0])  # an option is given as a whole, with all its elements
    given = dict(_given_options(arguments))
    if re.fullmatch(r"[\w.]+", field):
        paths = [name for name in given if name == field or name.endswith(f".{field}")]
        if paths:
            path = next((name for name in paths if _is_text_of(given[name], value)), paths[0])
            return f"--{path.replace('_', '-')}{text.removeprefix(field)}"
    section = _find_section(value, config, given)
    if section is None:
        return text
    return f"{section}.{text}" if re.match(r"[\w.]+:", text) else f"{section}: {text}"


def _given_options(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield the field path of each option in `arguments`, with the text of its first value."""
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=True):
        if argument.startswith("--"):
            _, equals, value = argument.partition("=")
            yield _dotted(argument), value if equals else following


def _is_text_of(text: str, value: Any) -> bool:
    try:
        return float(text) == value
    except ValueError:
        return text == str(value)


def _find_section(values: Any, config: Config | type[Config], given: Mapping[str, str]) -> str | None:
    """Return the path of the section with these values: options that are not given have their defaults in it."""
    if not isinstance(values, dict):
        return None
    parts = [name.split(".") for name in given]
    scores: dict[str, int] = {}  # number of given values, by section
    for section in {".".join(each[:count]) for each in parts for count in range(1, len(each))}:
        start = f"{section}."
        defaults = {name.removeprefix(start): value for name, value in option_names(config) if name.startswith(start)}
        direct = {name: value for name, value in defaults.items() if "." not in name}
        texts = {name: given[start + name] for name in direct if start + name in given}
        has_fields = {name.partition(".")[0] for name in defaults} == set(values)
        if has_fields and all(name in texts or values[name] == value for name, value in direct.items()):
            scores[section] = sum(_is_text_of(text, values[name]) for name, text in texts.items())
    return max(scores, key=lambda section: scores[section], default=None)
