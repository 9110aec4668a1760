"""The pieces of an HTML page that needs no other file: sections, tables, pictures. Each escapes what it is given."""

import base64
import html
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from string import Template
from typing import Any

from PIL import Image

from vqvae2.errors import UserError

_COLUMN = 1042  # pixels across the page's column; a picture no wider is shown pixel by pixel
_PHONE_COLUMNS = 5  # that a phone shows side by side; of a table with more, a row becomes a list
_WIDEST = 2112  # pixels; a wider picture is shrunk, or a page of large images would take hundreds of megabytes


def page(title: str, body: Iterable[str]) -> str:
    """A whole page, from the template beside this file."""
    template = Template(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    return template.substitute(title=escape(title), body="\n".join(body))


def escape(value: Any) -> str:
    """Text that stands for itself, in an element or in a quoted attribute."""
    return html.escape(str(value))


def section(title: str, *parts: str) -> str:
    """A part of the page with a heading."""
    return f"<section>\n<h2>{escape(title)}</h2>\n" + "\n".join(filter(None, parts)) + "\n</section>"


def heading(text: str) -> str:
    """A heading inside a section."""
    return f"<h3>{escape(text)}</h3>"


def note(text: str, kind: str = "quiet") -> str:
    """A paragraph: `quiet` explains, `warn` warns, `missing` stands where something will be."""
    return f'<p class="{kind}">{escape(text)}</p>'


def missing(text: str) -> str:
    """What stands in the place of a thing that is not there yet."""
    return note(text, "missing")


def stages(states: Iterable[tuple[str, str, str]]) -> str:
    """A strip of (name, state, detail)."""
    items = (
        f'<li class="{escape(state.replace(" ", "-"))}"><b>{escape(name)}</b>'
        f"<span>{escape(state)}</span><span>{escape(detail)}</span></li>"
        for name, state, detail in states
    )
    return f'<ol class="stages">{"".join(items)}</ol>'


def figures(values: Iterable[tuple[str, str, str]]) -> str:
    """A strip of (name, value, unit) in large type; nothing where there are none."""
    items = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)} <small>{escape(unit)}</small></dd></div>"
        for name, value, unit in values
    )
    return f'<dl class="figures">{items}</dl>' if items else ""


def table(header: Sequence[str], rows: Sequence[Sequence[str]], words: Sequence[str] = (), total: bool = False) -> str:
    """A table whose first column names the row. Columns are of numbers, but for the ones named in `words`; the last row
    may be a total."""
    kinds = ["" if index == 0 or name in words else ' class="number"' for index, name in enumerate(header)]
    head = "".join(f'<th scope="col"{kind}>{escape(name)}</th>' for name, kind in zip(header, kinds, strict=True))
    lines = []
    for number, (name, *cells) in enumerate(rows):
        shown = "".join(
            f'<td{kind} data-name="{escape(column)}">{escape(cell)}</td>'
            for cell, kind, column in zip(cells, kinds[1:], header[1:], strict=True)
        )
        last = ' class="total"' if total and number == len(rows) - 1 else ""
        lines.append(f'<tr{last}><th scope="row">{escape(name)}</th>{shown}</tr>')
    body = "\n".join(lines)
    kind = "notes" if words else "wide" if len(header) > _PHONE_COLUMNS else "narrow"
    inside = f"<thead><tr>{head}</tr></thead>\n<tbody>\n{body}\n</tbody>"
    return f'<div class="scroll"><table class="{kind}">{inside}</table></div>'


def facts(rows: Iterable[tuple[str, Any]], kind: str = "") -> str:
    """Names with what belongs to each, as two columns; lists, mappings and truth values are spelled out."""
    lines = "\n".join(
        f'<tr><th scope="row">{escape(name.replace("_", " "))}</th><td class="{kind}">{escape(spell(value))}</td></tr>'
        for name, value in rows
    )
    return f'<table class="facts"><tbody>\n{lines}\n</tbody></table>'


def picture(path: Path | None, alt: str, caption: str = "", crisp: bool = True) -> str:
    """A picture with all its bytes in the page, pixel by pixel where it is `crisp` and there is room; words in its
    place where it is not there."""
    if path is None or not path.is_file():
        return missing(f"No picture yet: {alt}.")
    try:
        with Image.open(path) as image:
            width, height = image.size
            content = path.read_bytes()
            if width > _WIDEST:
                width, height = _WIDEST, round(height * _WIDEST / width)
                content = _resized(image, (width, height))
    except OSError as error:
        raise UserError(f"{path}: not a readable picture ({error}); delete it and make it again") from None
    kind = ' class="crisp"' if crisp and width <= _COLUMN else ""
    source = f"data:image/png;base64,{base64.b64encode(content).decode()}"
    below = f"\n<figcaption>{escape(caption)}</figcaption>" if caption else ""
    image = f'<img{kind} alt="{escape(alt)}" width="{width}" height="{height}" src="{source}">'
    return f'<figure><div class="scroll">{image}</div>{below}</figure>'


def folded(title: str, text: str) -> str:
    """Text as it stands in a file, behind its title."""
    return f"<details><summary>{escape(title)}</summary><pre>{escape(text)}</pre></details>"


def duration(seconds: float) -> str:
    """A time for people, in two units at most."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def spell(value: Any) -> str:
    """A JSON value in words; a mapping inside a mapping stands in brackets."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, dict):
        items = ((name.replace("_", "-"), item) for name, item in value.items())
        return ", ".join(f"{name} {f'({spell(item)})' if isinstance(item, dict) else item}" for name, item in items)
    if isinstance(value, list):
        return " × ".join(map(str, value))
    return str(value)


def _resized(image: Image.Image, size: tuple[int, int]) -> bytes:
    buffer = io.BytesIO()
    image.resize(size, Image.Resampling.LANCZOS).save(buffer, "PNG")
    return buffer.getvalue()
