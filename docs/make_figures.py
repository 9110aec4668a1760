"""Write the figures of docs/architecture.md as SVG files: `python docs/make_figures.py`.

Boxes are light with dark text, and lines are a medium gray, so the figures are readable on a light and on a dark page.
"""

from dataclasses import dataclass, field
from html import escape
from pathlib import Path

FOLDER = Path(__file__).parent

TEXT, LINE = "#1f2328", "#7d8590"
COLORS = {
    "data": ("#fff3d6", "#c69026"),  # images and other artifacts: (fill, border)
    "network": ("#dcebff", "#4a86d4"),
    "quantizer": ("#dff5e3", "#3d9a50"),
    "command": ("#efe4fd", "#8a63c9"),
}
FONT_SIZE, SMALL_FONT_SIZE, LINE_HEIGHT = 13, 12, 18

Point = tuple[float, float]


@dataclass(frozen=True)
class Box:
    """A box with centered lines of text. The first line is the name, the others are smaller."""

    x: float  # of the left edge
    y: float  # of the upper edge
    width: float
    lines: tuple[str, ...]
    kind: str
    height: float = 56

    @property
    def left(self) -> Point:
        return self.x, self.y + self.height / 2

    @property
    def right(self) -> Point:
        return self.x + self.width, self.y + self.height / 2

    @property
    def top(self) -> Point:
        return self.x + self.width / 2, self.y

    @property
    def bottom(self) -> Point:
        return self.x + self.width / 2, self.y + self.height

    def svg(self) -> str:
        """Return the box as SVG elements."""
        fill, border = COLORS[self.kind]
        x, middle = self.x + self.width / 2, self.y + self.height / 2
        first = middle - (len(self.lines) - 1) * LINE_HEIGHT / 2
        rounded = 18 if self.kind == "command" else 6
        texts = [
            f'<text x="{x:g}" y="{first + index * LINE_HEIGHT:g}" font-size="{SMALL_FONT_SIZE if index else FONT_SIZE}"'
            f' font-weight="{"normal" if index else "600"}">{escape(line)}</text>'
            for index, line in enumerate(self.lines)
        ]
        return (
            f'<rect x="{self.x:g}" y="{self.y:g}" width="{self.width:g}" height="{self.height:g}" rx="{rounded}" '
            f'fill="{fill}" stroke="{border}" stroke-width="1.5"/>' + "".join(texts)
        )


@dataclass
class Figure:
    """A figure of boxes, arrows and labels."""

    width: int
    height: int
    title: str
    elements: list[str] = field(default_factory=list)

    def add(self, *boxes: Box) -> None:
        """Draw boxes."""
        self.elements += [box.svg() for box in boxes]

    def arrow(self, *points: Point, label: str = "", at: Point | None = None, dashed: bool = False) -> None:
        """Draw a line through `points` that ends in an arrowhead, with a label centered at `at`."""
        path = " ".join(f"{x:g},{y:g}" for x, y in points)
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        self.elements.append(
            f'<polyline points="{path}" fill="none" stroke="{LINE}" stroke-width="1.8"{dash} marker-end="url(#arrow)"/>'
        )
        if label and at:
            self.label(label, *at)

    def label(self, text: str, x: float, y: float) -> None:
        """Draw small text on the page itself."""
        self.elements.append(
            f'<text x="{x:g}" y="{y:g}" font-size="{SMALL_FONT_SIZE}" fill="{LINE}">{escape(text)}</text>'
        )

    def concatenation(self, x: float, y: float) -> None:
        """Draw a circle for the concatenation of channels."""
        fill, border = COLORS["network"]
        self.elements.append(
            f'<circle cx="{x:g}" cy="{y:g}" r="13" fill="{fill}" stroke="{border}" stroke-width="1.5"/>'
            f'<text x="{x:g}" y="{y:g}" font-size="{FONT_SIZE}">⊕</text>'
        )

    def write(self, path: Path) -> None:
        """Write the figure."""
        path.write_text(
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {self.width} {self.height}" width="{self.width}" '
            f'height="{self.height}" role="img" font-family="system-ui, Helvetica, Arial, sans-serif" fill="{TEXT}" '
            f'text-anchor="middle" dominant-baseline="central">\n<title>{escape(self.title)}</title>\n'
            f'<defs><marker id="arrow" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" '
            f'orient="auto"><path d="M0,0 L8,4 L0,8 z" fill="{LINE}"/></marker></defs>\n'
            + "\n".join(self.elements)
            + "\n</svg>\n",
            encoding="utf-8",
        )


def network() -> Figure:
    """Draw the two-level autoencoder at 256 px with the channels of the ImageNet model."""
    figure = Figure(1180, 500, "Two-level autoencoder of VQ-VAE-2 at 256 px")
    y, top_y, middle_y = 330, 130, 232
    center = y + 28
    image = Box(14, y, 100, ("image", "256×256×3"), "data")
    encoder = Box(160, y, 120, ("encoders[0]", "downsample ×4"), "network")
    top_encoder = Box(160, top_y, 120, ("encoders[1]", "downsample ×2"), "network")
    top_conv = Box(374, top_y, 162, ("pre_quant_convs[1]", "1×1 to 64 channels"), "network")
    top_quantizer = Box(580, top_y, 130, ("quantizers[1]", "nearest of 512"), "quantizer")
    top_codes = Box(580, 24, 130, ("top codes", "32×32"), "data")
    top_decoder = Box(330, middle_y, 120, ("decoders[0]", "upsample ×2"), "network")
    conv = Box(434, y, 162, ("pre_quant_convs[0]", "1×1 to 64 channels"), "network")
    quantizer = Box(624, y, 130, ("quantizers[0]", "nearest of 512"), "quantizer")
    codes = Box(624, 430, 130, ("bottom codes", "64×64"), "data")
    upsampler = Box(801, top_y, 120, ("upsamplers[0]", "upsample ×2"), "network")
    decoder = Box(915, y, 110, ("decoder", "upsample ×4"), "network")
    output = Box(1052, y, 122, ("reconstruction", "256×256×3"), "data")
    figure.add(image, encoder, top_encoder, top_conv, top_quantizer, top_codes, top_decoder, conv, quantizer, codes)
    figure.add(upsampler, decoder, output)
    join, final_join = (390, center), (861, center)

    figure.arrow(image.right, encoder.left)
    figure.arrow(encoder.top, top_encoder.bottom, label="64×64×128", at=(262, 258))
    figure.arrow(encoder.right, (join[0] - 13, center), label="64×64×128", at=(328, center + 16))
    figure.arrow(top_encoder.right, top_conv.left, label="32×32×128", at=(327, top_y + 12))
    figure.arrow(top_conv.right, top_quantizer.left)
    figure.arrow(top_quantizer.top, top_codes.bottom)
    figure.arrow(top_quantizer.right, upsampler.left, label="32×32×64", at=(755, top_y + 12))
    figure.arrow(
        top_quantizer.bottom, (645, middle_y + 28), top_decoder.right, label="32×32×64", at=(548, middle_y + 14)
    )
    figure.arrow(top_decoder.bottom, (join[0], center - 13), label="64×64×64", at=(432, 308))
    figure.arrow((join[0] + 13, center), conv.left)
    figure.arrow(conv.right, quantizer.left)
    figure.arrow(quantizer.bottom, codes.top)
    figure.arrow(quantizer.right, (final_join[0] - 13, center), label="64×64×64", at=(800, center + 16))
    figure.arrow(upsampler.bottom, (final_join[0], center - 13), label="64×64×64", at=(903, 262))
    figure.arrow((final_join[0] + 13, center), decoder.left)
    figure.arrow(decoder.right, output.left)
    figure.concatenation(*join)
    figure.concatenation(*final_join)
    figure.label("⊕ concatenates channels", 110, 478)
    return figure


def data_flow() -> Figure:
    """Draw what each command reads and writes."""
    figure = Figure(1180, 350, "Artifacts of a run and the commands that make them")
    pitch, width, y, command_y = 167, 136, 100, 236
    artifacts = [
        Box(14 + index * pitch, y, width, lines, "data", height=64)
        for index, lines in enumerate(
            [
                ("images", "data.path"),
                ("autoencoder", "autoencoder/", "model.safetensors"),
                ("codes", "codes/{train,val}/", "LMDB"),
                ("priors", "prior-LEVEL/", "model.safetensors"),
                ("samples", "samples/images/", "*.png"),
                ("metrics", "evaluation/", "metrics.json"),
                ("report", "report.html"),
            ]
        )
    ]
    names = ["train-autoencoder", "extract-codes", "train-prior", "sample", "evaluate", "report"]
    commands = [
        Box(14 + width / 2 + index * pitch + 8, command_y, pitch - 16, (name,), "command", height=40)
        for index, name in enumerate(names)
    ]
    figure.add(*artifacts, *commands)
    for source, command, target in zip(artifacts, commands, artifacts[1:], strict=False):
        figure.arrow((source.bottom[0] + 20, source.bottom[1]), (command.x + 22, command_y))
        figure.arrow((command.x + command.width - 22, command_y), (target.bottom[0] - 20, target.bottom[1]))

    def skip(source: Box, command: Box, line_y: float, start: float) -> None:
        """Draw an artifact that is also read by a later command, along a line above or below all boxes."""
        above = line_y < y
        gap = command.top[0]
        begin = (source.top[0] + start, source.y if above else source.y + source.height)
        end = (gap, command_y if above else command_y + command.height)
        figure.arrow(begin, (begin[0], line_y), (gap, line_y), end, dashed=True)

    images, autoencoder = artifacts[:2]
    skip(images, commands[1], 318, -40)
    skip(autoencoder, commands[3], 66, 0)
    skip(images, commands[4], 40, 0)
    figure.label("images to encode", 190, 332)
    figure.label("decoder", autoencoder.top[0] + 150, 55)
    figure.label("held-out images", images.top[0] + 70, 29)
    figure.label("reads the whole run folder", commands[5].top[0], command_y + 58)
    return figure


if __name__ == "__main__":
    network().write(FOLDER / "network.svg")
    data_flow().write(FOLDER / "data-flow.svg")
