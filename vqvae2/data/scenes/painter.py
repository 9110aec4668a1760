"""Painting primitives of scenes: colors, noise, antialiased shapes, lighting and landscape elements."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

Array = NDArray[np.float64]


def rgb(code: int) -> Array:
    """Convert 0xRRGGBB to three numbers in [0, 1]."""
    return np.array([code >> 16, code >> 8 & 255, code & 255]) / 255.0


def mix(a: Array, b: Array, t: Array | float) -> Array:
    """Interpolate linearly from a (t = 0) to b (t = 1). A field t of shape (H, W) gives a field of colors."""
    return a + (b - a) * (t[..., None] if isinstance(t, np.ndarray) else t)


def smooth(low: float, high: float, value: Array) -> Array:
    """Smoothstep: 0 for value <= low, 1 for value >= high, smooth in between."""
    t = np.clip((value - low) / (high - low), 0.0, 1.0)
    return t * t * (3.0 - 2.0 * t)


def overlap(center: Array, size: Array | float, low: Array | float, high: Array | float) -> Array:
    """Return the fraction of a pixel of `size` at `center` inside [low, high], for exact antialiasing."""
    return np.maximum((np.minimum(center + size / 2, high) - np.maximum(center - size / 2, low)) / size, 0.0)


def pixel_difference(field: Array | float, axis: int) -> Array | float:
    """Return the absolute difference of a field between neighboring pixels along an axis."""
    varies = isinstance(field, np.ndarray) and field.shape[axis] > 1
    return np.abs(np.gradient(field, axis=axis)) if varies else 0.0


def noise(rng: Generator, u: Array, v: Array, octaves: int = 1) -> Array:
    """Return value noise in about [-1, 1], with one random value at every integer (u, v).

    Octaves finer than the pixels are faded out to avoid aliasing. Large images therefore have more detail than small
    ones of the same scene.
    """
    grid = rng.uniform(-1.0, 1.0, (32, 32))
    footprint = np.maximum(pixel_difference(u, 1), pixel_difference(v, 0))
    total, scale = np.zeros(()), 1.0
    for _ in range(octaves):
        i, j = np.floor(v * scale), np.floor(u * scale)
        t, s = v * scale - i, u * scale - j
        t, s = t * t * (3.0 - 2.0 * t), s * s * (3.0 - 2.0 * s)
        i0, j0 = i.astype(np.intp) & 31, j.astype(np.intp) & 31
        i1, j1 = i0 + 1 & 31, j0 + 1 & 31
        top = grid[i0, j0] * (1.0 - s) + grid[i0, j1] * s
        bottom = grid[i1, j0] * (1.0 - s) + grid[i1, j1] * s
        fade = np.clip(1.5 - 2.0 * scale * footprint, 0.0, 1.0)
        total = total + (top + (bottom - top) * t) * fade / scale
        scale *= 2.0
    return total


class Canvas(NamedTuple):
    """A rectangle of the image: pixel centers x (1, W) and y (H, 1), pixel sizes dx and dy, RGB pixels (H, W, 3)."""

    x: Array
    y: Array
    dx: float
    dy: float
    pixels: Array

    @classmethod
    def blank(cls, height: int, width: int) -> Canvas:
        x, y = (np.arange(width)[None, :] + 0.5) / width, (np.arange(height)[:, None] + 0.5) / height
        return cls(x, y, 1.0 / width, 1.0 / height, np.zeros((height, width, 3)))

    def crop(self, x0: float, y0: float, x1: float, y1: float) -> Canvas:
        """Return a view of the pixels that overlap [x0, x1] × [y0, y1]. Painting on it paints on this canvas."""
        cols = slice(max(0, int(x0 / self.dx)), max(0, int(x1 / self.dx) + 1))
        rows = slice(max(0, int(y0 / self.dy)), max(0, int(y1 / self.dy) + 1))
        return Canvas(self.x[:, cols], self.y[rows], self.dx, self.dy, self.pixels[rows, cols])

    def paint(self, cover: Array, color: Array) -> None:
        """Blend a color or a field of colors over the pixels, with opacity `cover` (H, W) in [0, 1]."""
        self.pixels[...] += cover[..., None] * (color - self.pixels)

    def below(self, line: Array | float) -> Array:
        """Return the coverage of the area below a line y(x), antialiased along the line."""
        return overlap(self.y + 0.0 * self.x, self.dy + pixel_difference(line, 1), line, np.inf)

    def box(self, x0: float, y0: float, x1: float, y1: float, color: Array) -> None:
        """Paint an antialiased rectangle."""
        part = self.crop(x0, y0, x1, y1)
        part.paint(overlap(part.x, self.dx, x0, x1) * overlap(part.y, self.dy, y0, y1), color)

    def distance(self, x: float, y: float) -> Array:
        """Return the distance of every pixel to a point, in units of the shorter side, so that circles stay round."""
        pitch = max(self.dx, self.dy)
        return np.hypot((self.x - x) * (pitch / self.dx), (self.y - y) * (pitch / self.dy))

    def disc(self, x: float, y: float, radius: float, color: Array, opacity: float = 1.0) -> None:
        """Paint a disc. A disc smaller than a pixel is painted with the size of a pixel and lower opacity."""
        pitch = max(self.dx, self.dy)
        drawn = max(radius, 0.7 * pitch)
        reach_x, reach_y = (drawn / pitch + 1.0) * self.dx, (drawn / pitch + 1.0) * self.dy
        part = self.crop(x - reach_x, y - reach_y, x + reach_x, y + reach_y)
        part.paint(overlap(part.distance(x, y), pitch, -np.inf, drawn) * (opacity * (radius / drawn) ** 2), color)

    def glow(self, x: float, y: float, reach: float, color: Array, opacity: float) -> None:
        """Paint light that fades with the distance to a point."""
        self.paint(opacity / (1.0 + (self.distance(x, y) / reach) ** 2) ** 1.5, color)


class Light(NamedTuple):
    """Colors of a time of day: the sky at zenith and horizon, the sun, and the tint of the ground."""

    zenith: Array
    horizon: Array
    sun: Array
    tint: Array


MORNING = Light(rgb(0x6FA6DC), rgb(0xFBDDB6), rgb(0xFFF9E0), rgb(0xFFF0DC))
NOON = Light(rgb(0x2E7BCB), rgb(0xC4E4F5), rgb(0xFFFDEB), rgb(0xFFFFFF))
SUNSET = Light(rgb(0x54519A), rgb(0xFF9C58), rgb(0xFFE79A), rgb(0xF6C4A4))
DUSK = Light(rgb(0x232C66), rgb(0xDD7F92), rgb(0xFFC9A0), rgb(0x8C80AC))
NIGHT = Light(rgb(0x081030), rgb(0x2E4478), rgb(0xF4F0DA), rgb(0x3A4A78))


def daylight(rng: Generator, *choices: Light) -> Light:
    """Choose one of the times of day at random, mixed with another."""
    first, second = (choices[int(k)] for k in rng.integers(len(choices), size=2))
    t = rng.uniform(0.0, 0.4)
    return Light(*(mix(a, b, t) for a, b in zip(first, second, strict=True)))


def sky(canvas: Canvas, rng: Generator, light: Light, horizon: float, clouds: float) -> None:
    """Paint the sky down to the horizon, with cloud cover `clouds` in [0, 1]."""
    height = np.clip(canvas.y / horizon, 0.0, 1.0)
    canvas.pixels[...] = mix(light.zenith, light.horizon, height**1.3)
    u, v = canvas.x * rng.uniform(2.5, 4.0) + rng.uniform(0, 32), canvas.y * rng.uniform(7.0, 9.0)
    billow = noise(rng, u, v, 4)
    white = mix(light.horizon, light.sun, smooth(-0.1, 0.9, billow))
    canvas.paint(smooth(0.8 - clouds, 1.4 - clouds, billow) * min(1.0, 8.0 * clouds) * (1.0 - height**3) * 0.85, white)


def sun(canvas: Canvas, x: float, y: float, radius: float, light: Light) -> None:
    """Paint the sun, or the moon at night, with a halo."""
    canvas.glow(x, y, 4.0 * radius, light.sun, 0.65)
    canvas.disc(x, y, radius, light.sun)


def hills(canvas: Canvas, rng: Generator, level: float, height: float, bumps: float) -> Array:
    """Return a rolling line y(x) around a level, of shape (1, W)."""
    return level - height * noise(rng, canvas.x * bumps + rng.uniform(0, 32), np.full((1, 1), 0.5), 3)


def treeline(canvas: Canvas, rng: Generator, ground: Array, height: float, count: int) -> Array:
    """Return the outline y(x) of a row of conifers on a ground line."""
    tips, tall = rng.uniform(-0.02, 1.02, (count, 1)), rng.uniform(0.4, 1.0, (count, 1)) * height
    tops: Array = np.min(3.2 * np.abs(canvas.x - tips) - tall, axis=0, keepdims=True)
    return ground + np.minimum(0.0, tops)


def depth_below(canvas: Canvas, horizon: float) -> Array:
    """Return 0 at and above the horizon, increasing to 1 at the bottom of the image."""
    return np.clip((canvas.y - horizon) / (1.0 - horizon), 0.0, 1.0)


def ground_noise(canvas: Canvas, rng: Generator, depth: Array, across: float, along: float, octaves: int = 2) -> Array:
    """Return noise on the ground plane, in perspective."""
    return noise(rng, (canvas.x - 0.5) * across / (depth + 0.15), along * np.log(depth + 0.1), octaves)


def water(canvas: Canvas, rng: Generator, horizon: float, far: Array, near: Array) -> None:
    """Paint water below the horizon, with waves in perspective."""
    depth = depth_below(canvas, horizon)
    waves = ground_noise(canvas, rng, depth, 2.5, 6.0, 3)
    canvas.paint(canvas.below(horizon), mix(far, near, depth**0.7) * (1.0 + 0.18 * waves)[..., None])


def mirror(canvas: Canvas, rng: Generator, shore: float, tint: Array) -> None:
    """Paint still water below the shore that reflects the image above it, with ripples."""
    depth = depth_below(canvas, shore)
    ripples = ground_noise(canvas, rng, depth, 1.6, 4.0)
    rows = np.clip(((2 * shore - canvas.y) / canvas.dy).astype(np.intp)[:, 0], 0, canvas.y.size - 1)
    image = mix(canvas.pixels[rows], tint, 0.35) * (0.95 + 0.12 * ripples)[..., None]
    canvas.paint(canvas.below(shore), image)


def conifer(canvas: Canvas, x: float, foot: float, height: float, color: Array, snow: float) -> None:
    """Paint a fir of four tiers, with `snow` in [0, 1] on its left side."""
    part = canvas.crop(x - 0.3 * height, foot - height, x + 0.3 * height, foot)
    t = np.clip((part.y - foot + height) / height, 0.0, 1.0)
    half = 0.3 * height * (0.55 * t + 0.45 * (t * 4.0 % 1.0) * (0.3 + 0.7 * t))
    white = snow * smooth(0.1, -0.25, (part.x - x) / height + 0.3 * (t * 4.0 % 1.0) - 0.12)
    cover = overlap(part.x, canvas.dx, x - half, x + half) * overlap(part.y, canvas.dy, foot - height, foot)
    part.paint(cover, mix(color, rgb(0xF2F6FF), white))
