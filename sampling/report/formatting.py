"""Format durations and JSON values for the report."""

from typing import Any


def format_duration(seconds: float) -> str:
    """Return a duration in at most two units, such as `3 min 26 s`."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def format_value(value: Any) -> str:
    """Return a JSON value as text: `yes`, `32 × 32`, `top-k 0, temperature (top 1.0, bottom 0.9)`."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        items = ((name.replace("_", "-"), item) for name, item in value.items())
        return ", ".join(
            f"{name} {f'({format_value(item)})' if isinstance(item, dict) else item}" for name, item in items
        )
    if isinstance(value, list):
        return " × ".join(map(str, value))
    return str(value)


def format_sentence(text: str) -> str:
    """Return a message as a sentence: with a capital first letter and a period."""
    return f"{text[:1].upper()}{text[1:]}."
