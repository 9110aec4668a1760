"""The built-in data set: procedural landscapes in ten classes, each a function of its index.

Images have global structure (light, horizon, layout, objects) and fine texture (waves, windows, grass, stars), for the
levels of a hierarchical model to learn. A scene is defined on the unit square, with x to the right and y down, and is
stretched to any size. Random draws do not depend on the size, so image k shows the same scene at every size. Colors are
RGB in [0, 1] until `render` converts them to uint8.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from vqvae2.data.scenes.painter import (
    DUSK,
    MORNING,
    NIGHT,
    NOON,
    SUNSET,
    Canvas,
    conifer,
    daylight,
    depth_below,
    ground_noise,
    hills,
    mirror,
    mix,
    noise,
    overlap,
    rgb,
    sky,
    smooth,
    sun,
    treeline,
    water,
)
from vqvae2.errors import UserError

SEED = 20190602
MIN_SIZE = 8


def mountains(canvas: Canvas, rng: Generator) -> None:
    """Snowy peaks lit from one side, above dark firs and a lake or meadow."""
    light, shore = daylight(rng, MORNING, NOON, SUNSET), rng.uniform(0.68, 0.8)
    side, snow = rng.choice([-1.0, 1.0]), rng.uniform(0.3, 0.55)
    sky(canvas, rng, light, 0.75, rng.uniform(0.1, 0.5))
    rock = mix(rgb(0x7A7F94), rgb(0x8C7768), rng.uniform()) * light.tint
    rough = noise(rng, canvas.x * 7.0, canvas.y * 7.0, 4)
    count = int(rng.integers(3, 6))
    for top in np.sort(rng.uniform(0.12, 0.5, count)).tolist():
        x, slope = rng.uniform(0.0, 1.0), rng.uniform(0.9, 1.5)
        flank = top + slope * np.abs(canvas.x - x) - 0.035 * rough
        bright = smooth(-0.02, 0.02, side * (canvas.x - x) + 0.09 * rough)
        white = smooth(-0.04, 0.04, top + (0.9 - top) * snow - canvas.y + 0.1 * rough)
        face = mix(mix(rock * 0.62, rock * 1.15, bright), mix(rgb(0xA9BBDD), rgb(0xFFFFFF), bright) * light.tint, white)
        canvas.paint(canvas.below(flank), mix(face, light.horizon, 0.75 * smooth(top, 1.0, canvas.y)))
    firs = mix(rgb(0x1F4538), rgb(0x3A5030), rng.uniform()) * light.tint
    ground = hills(canvas, rng, shore - 0.03, 0.03, 3.0)
    canvas.paint(canvas.below(treeline(canvas, rng, ground, 0.11, 40)), firs)
    if rng.uniform() < 0.5:
        mirror(canvas, rng, shore, light.zenith * 0.8)
    else:
        grass = rgb(0x6E9A48) * light.tint
        meadow = 1.0 + 0.12 * ground_noise(canvas, rng, depth_below(canvas, shore), 4.0, 4.0)
        canvas.paint(canvas.below(hills(canvas, rng, shore, 0.03, 2.0)), grass * meadow[..., None])


def sea(canvas: Canvas, rng: Generator) -> None:
    """A low sun over open water with its reflection, sometimes with a sailboat."""
    light, horizon = daylight(rng, SUNSET, SUNSET, DUSK, MORNING), rng.uniform(0.42, 0.58)
    x, y, radius = rng.uniform(0.2, 0.8), horizon - rng.uniform(0.0, 0.2), rng.uniform(0.05, 0.09)
    sky(canvas, rng, light, horizon, rng.uniform(0.2, 0.6))
    sun(canvas, x, y, radius, light)
    water(canvas, rng, horizon, mix(light.zenith, light.horizon, 0.6), mix(light.zenith, rgb(0x0A2A4A), 0.6))
    depth = depth_below(canvas, horizon)
    beam = np.exp(-(((canvas.x - x) / (0.05 + 0.16 * depth)) ** 2)) * (depth > 0.0)
    sparkle = 0.45 + 1.1 * ground_noise(canvas, rng, depth, 3.0, 9.0)
    canvas.paint(np.clip(beam * sparkle, 0.0, 0.95) * (1.0 - 0.4 * depth), light.sun)
    boat, size = x + rng.choice([-1.0, 1.0]) * rng.uniform(0.14, 0.3), rng.uniform(0.1, 0.2)
    if rng.uniform() < 0.6:
        foot = horizon + 0.03 + 0.2 * size
        part = canvas.crop(boat - size, foot - size, boat + size, foot)
        lean = np.clip((part.y - foot + size) / size, 0.0, 1.0)
        sail = overlap(part.x, canvas.dx, boat - 0.38 * size * lean, boat + 0.22 * size * lean)
        part.paint(sail * overlap(part.y, canvas.dy, foot - size, foot - 0.16 * size), light.zenith * 0.35)
        canvas.box(boat - 0.35 * size, foot - 0.13 * size, boat + 0.35 * size, foot, light.zenith * 0.25)


def city(canvas: Canvas, rng: Generator) -> None:
    """Two rows of towers with windows, lit after dark, above a street or a river."""
    light, shore = daylight(rng, NOON, SUNSET, DUSK, NIGHT), rng.uniform(0.78, 0.9)
    dark = 1.0 - float(light.tint.mean())
    sky(canvas, rng, light, 0.9, rng.uniform(0.0, 0.4))
    sun(canvas, rng.uniform(0.1, 0.9), rng.uniform(0.1, 0.4), 0.05, light)
    lit = rng.uniform(size=(16, 16))
    for near in (False, True):
        left = rng.uniform(-0.1, 0.0)
        for width, gap in rng.uniform((0.09, 0.0), (0.2, 0.03), (12, 2)).tolist():
            top = rng.uniform(0.32, 0.72) if near else rng.uniform(0.12, 0.5)
            paint = rgb(int(rng.choice([0x7C8796, 0x9A8878, 0x6C7A90, 0xA0705C, 0x8C8C8C]))) * light.tint
            wall = mix(paint, light.horizon, 0.12 if near else 0.5)
            shift = rng.integers(16, size=2)
            part = canvas.crop(left, top, left + width, shore)
            cover = overlap(part.x, canvas.dx, left, left + width) * overlap(part.y, canvas.dy, top, shore)
            part.paint(cover, mix(wall * 1.1, wall * 0.8, smooth(0.4, 0.8, (part.x - left) / width)))
            u, v = (part.x - left) / width * round(width / 0.042), (part.y - top) / 0.05
            panes = overlap(u % 1.0, canvas.dx / 0.042, 0.25, 0.75) * overlap(v % 1.0, canvas.dy / 0.05, 0.3, 0.75)
            on = lit[(v.astype(np.intp) + shift[0]) & 15, (u.astype(np.intp) + shift[1]) & 15] < 0.15 + 0.6 * dark
            glass = mix(wall * 0.6, mix(light.horizon, rgb(0xFFD98A), 0.4 + 0.6 * dark), on.astype(np.float64))
            part.paint(cover * panes * (0.85 if near else 0.45), glass)
            left += width + gap
    if rng.uniform() < 0.6:
        mirror(canvas, rng, shore, light.zenith * 0.7)
    else:
        canvas.box(0.0, shore, 1.0, 1.0, rgb(0x50545C) * light.tint)
    canvas.box(0.0, shore - 0.012, 1.0, shore + 0.012, rgb(0xA8A8A4) * light.tint)


def forest(canvas: Canvas, rng: Generator) -> None:
    """Tall trunks, pale in the distance and dark nearby, below a canopy of leaves."""
    season = int(rng.integers(4))
    green = rgb((0x4F8A2E, 0x2F6E3A, 0xC9782A, 0x8A9A2C)[season])
    mist = rgb((0xDDEBB0, 0xC8E2CC, 0xF6E2B0, 0xF2ECC0)[season])
    bark = mix(rgb(0x4A3628), rgb(0x6C645C), rng.uniform())
    floor = rng.uniform(0.58, 0.74)
    canvas.pixels[...] = mix(mist, green, 0.25 + 0.35 * np.abs(canvas.y - 0.5))
    canvas.glow(rng.uniform(0.2, 0.8), 0.4, 0.3, mix(mist, rgb(0xFFFFFF), 0.5), 0.9)
    depth = depth_below(canvas, floor)
    litter = 0.75 + 0.35 * depth + 0.16 * ground_noise(canvas, rng, depth, 7.0, 6.0)
    earth = mix(mix(mist, green, 0.6), mix(green, bark, 0.45), np.sqrt(depth)) * litter[..., None]
    canvas.paint(canvas.below(hills(canvas, rng, floor, 0.02, 3.0)), earth)
    foliage = noise(rng, canvas.x * 11.0, canvas.y * 11.0, 3)
    for near, count in ((0.33, 9), (0.67, 6), (1.0, int(rng.integers(2, 5)))):
        for x in ((np.arange(count) + rng.uniform(0.1, 0.9, count)) / count).tolist():
            half, lean, foot = near * rng.uniform(0.018, 0.04), rng.uniform(-0.04, 0.04), floor + 0.28 * near**2
            part = canvas.crop(x - 0.15, 0.0, x + 0.15, foot)
            middle, root = x + lean * (part.y - 0.5), np.maximum(part.y - foot + 0.12, 0.0) / 0.12
            flare = half * (1.0 + 0.8 * root**3)
            cover = overlap(part.x, canvas.dx, middle - flare, middle + flare) * overlap(part.y, canvas.dy, 0, foot)
            shade = 1.2 - 0.5 * smooth(-1.0, 1.0, (part.x - middle) / half)
            part.paint(cover, mix(mist, bark, 0.2 + 0.75 * near) * shade[..., None])
        crown = smooth(-0.1, 0.2, 0.36 - 0.1 * near - canvas.y + 0.24 * foliage)
        leaves = mix(mix(mist, green, 0.5 + 0.5 * near), green * 0.4, near * smooth(-0.6, 0.6, -foliage))
        canvas.paint(0.7 * crown, leaves)
        foliage = foliage[:, ::-1]


def desert(canvas: Canvas, rng: Generator) -> None:
    """Dunes with bright and shaded sides and ripples, the sun, and one to three cacti."""
    light, horizon = daylight(rng, NOON, MORNING, SUNSET), rng.uniform(0.42, 0.55)
    sand = mix(rgb(0xE8BE7C), rgb(0xDB9455), rng.uniform()) * mix(light.tint, np.ones(3), 0.3)
    sky(canvas, rng, light, horizon, rng.uniform(0.0, 0.15))
    sun(canvas, rng.uniform(0.1, 0.9), rng.uniform(0.08, 0.3), rng.uniform(0.04, 0.07), light)
    for plane in range(4):
        level, height = horizon + 0.16 * plane + rng.uniform(0.0, 0.06), 0.05 + 0.03 * plane
        turns, start, lean = rng.uniform(4.0, 8.0), rng.uniform(0.0, 6.3), rng.uniform(0.4, 1.0)
        crest = level - height * np.abs(np.sin(canvas.x * turns / 2 + start)) ** 1.3
        under = np.maximum(canvas.y - crest, 0.0)
        slope = np.sin((canvas.x - lean * under) * turns + 2 * start)
        pitch = 0.035 + 0.01 * plane
        ripple = np.sin((canvas.y + 0.12 * np.sin(canvas.x * 5.0 + start)) * 6.28 / pitch) * (canvas.dy < 0.4 * pitch)
        bright = 0.74 + 0.3 * smooth(-0.25, 0.25, slope) - 0.5 * under + 0.03 * ripple
        canvas.paint(canvas.below(crest), mix(sand * bright[..., None], light.horizon, 0.36 - 0.12 * plane))
    count = int(rng.integers(1, 4))
    for x in ((np.arange(count) + rng.uniform(0.25, 0.75, count)) / count).tolist():
        foot, tall = rng.uniform(0.72, 0.94), rng.uniform(0.16, 0.36)
        green, half = rgb(0x3F7A42) * light.tint, 0.07 * tall
        for shift, low, high in ((0.0, 0.0, 1.0), (-0.28, 0.38, 0.75), (0.28, 0.3, 0.85)):
            arm, thick = x + shift * tall, half * (1.0 if shift == 0.0 else 0.75)
            canvas.box(min(arm, x), foot - (low + 0.1) * tall, max(arm, x), foot - low * tall, green * 0.85)
            canvas.box(arm - thick, foot - high * tall, arm, foot - low * tall, green * 1.2)
            canvas.box(arm, foot - high * tall, arm + thick, foot - low * tall, green * 0.8)


def night(canvas: Canvas, rng: Generator) -> None:
    """Stars and a full or crescent moon above dark hills and treetops."""
    light = NIGHT._replace(horizon=mix(NIGHT.horizon, rgb(0x5A4A8A), rng.uniform()))
    sky(canvas, rng, light, 0.85, 0.0)
    for x, y, size in rng.uniform((0, 0, 0.2), (1, 0.75, 1), (60, 3)).tolist():
        canvas.disc(x, y, 0.003 + 0.008 * size**4, rgb(0xFFF8E0), 0.9)
    x, y, radius = rng.uniform(0.15, 0.85), rng.uniform(0.14, 0.36), rng.uniform(0.07, 0.12)
    canvas.glow(x, y, 2.2 * radius, rgb(0x9FB4E8), 0.6)
    canvas.disc(x, y, radius, light.sun)
    for u, v, size in rng.uniform((-0.5, -0.5, 0.15), (0.5, 0.5, 0.35), (4, 3)).tolist():
        canvas.disc(x + u * radius, y + v * radius, size * radius, rgb(0xCFCBB8), 0.6)
    if rng.uniform() < 0.4:
        pitch, bite = max(canvas.dx, canvas.dy), x + rng.choice([-0.5, 0.5]) * radius
        dark = overlap(canvas.distance(x, y), pitch, -np.inf, radius + 0.5 * pitch)
        dark = dark * overlap(canvas.distance(bite, y - 0.2 * radius), pitch, -np.inf, radius)
        canvas.paint(dark, mix(light.zenith, rgb(0x9FB4E8), 0.3))
    for plane in range(3):
        line = hills(canvas, rng, 0.66 + 0.11 * plane, 0.07, rng.uniform(1.5, 3.0))
        color = mix(rgb(0x22386A), rgb(0x060B1C), plane / 2)
        canvas.paint(canvas.below(line), color * (1.0 + 0.8 * np.maximum(0.0, 0.15 - canvas.y + line))[..., None])
    canvas.paint(canvas.below(treeline(canvas, rng, np.full((1, 1), 1.0), 0.18, 14)), rgb(0x03060F))


def winter(canvas: Canvas, rng: Generator) -> None:
    """A cabin with a snow-covered roof and lit windows, snowy firs and falling snow."""
    light, level = daylight(rng, MORNING, NOON, DUSK), rng.uniform(0.56, 0.66)
    snow = mix(rgb(0xFFFFFF), light.tint, 0.7)
    sky(canvas, rng, light, level, rng.uniform(0.1, 0.4))
    canvas.paint(canvas.below(hills(canvas, rng, level - 0.1, 0.06, 2.0)), mix(light.horizon, snow, 0.5) * 0.85)
    canvas.paint(canvas.below(hills(canvas, rng, level, 0.03, 3.0)), snow * 0.96)
    firs = rgb(0x2A5446) * light.tint
    for x, y, tall in sorted(rng.uniform((0, 0.02, 0.2), (1, 0.1, 0.4), (9, 3)).tolist(), key=lambda fir: fir[1]):
        conifer(canvas, x, level + y, tall, firs, 0.9)
    x, wide, foot = rng.uniform(0.28, 0.72), rng.uniform(0.16, 0.22), level + rng.uniform(0.14, 0.18)
    wood, eaves = mix(rgb(0x7A4A2C), rgb(0x8C3A2C), rng.uniform()) * light.tint, foot - 0.9 * wide
    canvas.box(x + 0.4 * wide, eaves - 0.75 * wide, x + 0.62 * wide, eaves, wood * 0.7)
    canvas.box(x - wide, eaves, x + wide, foot, wood)
    for row in range(6):
        canvas.box(x - wide, eaves + row * 0.15 * wide, x + wide, eaves + (row * 0.15 + 0.05) * wide, wood * 0.7)
    for left in (-0.7, 0.25):
        canvas.box(x + left * wide, foot - 0.62 * wide, x + (left + 0.42) * wide, foot - 0.22 * wide, rgb(0xFFD27A))
    part = canvas.crop(x - 1.2 * wide, eaves - 0.8 * wide, x + 1.2 * wide, eaves + 0.08 * wide)
    roof = 1.25 * wide * np.clip((part.y - eaves + 0.75 * wide) / (0.8 * wide), 0.0, 1.0)
    part.paint(overlap(part.x, canvas.dx, x - roof, x + roof) * (roof > 0.0), snow)
    drifts = 0.94 + 0.07 * ground_noise(canvas, rng, depth_below(canvas, level), 2.0, 5.0)
    canvas.paint(canvas.below(hills(canvas, rng, foot, 0.015, 3.0)), snow * drifts[..., None])
    for u, v, size in rng.uniform((0, 0, 0.005), (1, 1, 0.012), (45, 3)).tolist():
        canvas.disc(u, v, size, rgb(0xFFFFFF), 0.8)


def island(canvas: Canvas, rng: Generator) -> None:
    """A sandy island with leaning palms in a turquoise sea."""
    light, horizon = daylight(rng, NOON, NOON, MORNING), rng.uniform(0.48, 0.58)
    sky(canvas, rng, light, horizon, rng.uniform(0.3, 0.6))
    water(canvas, rng, horizon, rgb(0x1F7FB8) * light.tint, rgb(0x4FD0C4) * light.tint)
    x, wide, foot = rng.uniform(0.3, 0.7), rng.uniform(0.28, 0.5), rng.uniform(0.74, 0.84)
    ragged = 0.25 * noise(rng, canvas.x * 4.0, canvas.y * 8.0, 3)
    for grow, color in ((1.25, rgb(0x8CE8D8)), (1.08, rgb(0xF4FFFA)), (1.0, rgb(0xF2DCA4))):
        mound = 1.0 - ((canvas.x - x) / (wide * grow)) ** 2 - ((canvas.y - foot) / (0.11 * grow)) ** 2
        canvas.paint(smooth(-0.12, 0.12, mound + ragged) * (0.6 if grow > 1.2 else 1.0), color * light.tint)
    for _ in range(int(rng.integers(1, 4))):
        root, lean, tall = x + rng.uniform(-0.5, 0.5) * wide, rng.uniform(-0.16, 0.16), rng.uniform(0.32, 0.52)
        top = foot - 0.03 - tall
        part = canvas.crop(0.0, top, 1.0, foot)
        t = np.clip((foot - part.y) / (foot - top), 0.0, 1.0)
        middle, half = root + lean * t**1.6, 0.018 - 0.008 * t
        cover = overlap(part.x, canvas.dx, middle - half, middle + half) * overlap(part.y, canvas.dy, top, foot)
        part.paint(cover, mix(rgb(0x6E4E30), rgb(0xA07A50), smooth(-1.0, 1.0, (middle - part.x) / half)) * light.tint)
        for frond, (reach, droop) in enumerate(rng.uniform((0.12, 0.05), (0.24, 0.3), (8, 2)).tolist()):
            way = 1.0 - 2.0 * (frond % 2)
            t = np.clip((canvas.x - root - lean) * way / reach, 0.0, 1.0)
            spine = top - (0.22 - 0.6 * droop) * t + droop * t**2
            half = 0.045 * np.sqrt(t * (1.0 - t)) * (t > 0.0)
            green = rgb(0x2E8A3E) * light.tint * rng.uniform(0.7, 1.15)
            canvas.paint(overlap(canvas.y, canvas.dy, spine - 0.4 * half, spine + half), green)


def meadow(canvas: Canvas, rng: Generator) -> None:
    """Flowers in perspective, in grass below rolling hills."""
    light, level = daylight(rng, NOON, MORNING, NOON, SUNSET), rng.uniform(0.4, 0.52)
    sky(canvas, rng, light, level, rng.uniform(0.2, 0.55))
    green = mix(rgb(0x5FA03A), rgb(0x8DB84A), rng.uniform()) * light.tint
    for plane in range(2):
        line = hills(canvas, rng, level - 0.06 + 0.06 * plane, 0.06, rng.uniform(1.5, 3.0))
        canvas.paint(canvas.below(line), mix(green * 0.8, light.horizon, 0.45 - 0.25 * plane))
    depth = depth_below(canvas, level)
    blades = noise(rng, canvas.x * 28.0, canvas.y * 7.0, 2) * (0.3 + 0.7 * depth)
    field = mix(green * 1.05, green * 0.75, depth) * (1.0 + 0.16 * blades)[..., None]
    canvas.paint(canvas.below(hills(canvas, rng, level + 0.04, 0.02, 2.0)), field)
    palette = rng.permutation(np.array([0xE8403A, 0xF6C92E, 0xFFFFFF, 0xB05CC8, 0xF48CB4]))[:3].tolist()
    for u, v, kind in sorted(rng.uniform((0, 0, 0), (1, 1, 3), (60, 3)).tolist(), key=lambda flower: flower[1]):
        near, petal = v**1.6, rgb(palette[int(kind)]) * light.tint
        y, size = level + 0.08 + (0.94 - level) * near, 0.007 + 0.025 * near
        canvas.disc(u, y, size, petal)
        if near > 0.15:
            canvas.disc(u, y, 0.35 * size, mix(petal, rgb(0x5A3A10), 0.6))


def road(canvas: Canvas, rng: Generator) -> None:
    """A road with a dashed line that curves to the vanishing point, with poles along one side."""
    light, horizon = daylight(rng, NOON, MORNING, SUNSET, DUSK), rng.uniform(0.42, 0.54)
    land = rgb(int(rng.choice([0x7FA048, 0xC8A860, 0xB08050, 0x5E8C4A]))) * light.tint
    x, bend, wide = rng.uniform(0.3, 0.7), rng.uniform(-0.25, 0.25), rng.uniform(0.28, 0.42)
    sky(canvas, rng, light, horizon, rng.uniform(0.15, 0.5))
    sun(canvas, rng.uniform(0.1, 0.9), horizon - rng.uniform(0.08, 0.3), 0.045, light)
    far = hills(canvas, rng, horizon - 0.04, 0.07, rng.uniform(2.0, 4.0))
    canvas.paint(canvas.below(far), mix(land * 0.6, mix(light.zenith, light.horizon, 0.5), 0.6))
    depth = depth_below(canvas, horizon)
    tufts = mix(mix(land, light.horizon, 0.3), land * 0.85, np.sqrt(depth))
    tufts = tufts * (1.0 + 0.14 * ground_noise(canvas, rng, depth, 5.0, 6.0))[..., None]
    ground = canvas.below(horizon)
    canvas.paint(ground, tufts)
    middle = x + (0.5 - x) * depth + bend * depth * (1.0 - depth)
    asphalt = mix(rgb(0x6A6C74), rgb(0x4C4E58), depth) * light.tint
    for half, color in ((1.0, rgb(0xE8E4DC) * light.tint), (0.93, asphalt)):
        edge = wide * half * (depth + 0.01)
        canvas.paint(ground * overlap(canvas.x, canvas.dx, middle - edge, middle + edge), color)
    dash = smooth(-0.2, 0.2, np.sin(9.0 / (depth + 0.15) + rng.uniform(0, 6.3)))
    thin = 0.035 * wide * depth + 1e-9
    stripe = ground * dash * overlap(canvas.x, canvas.dx, middle - thin, middle + thin)
    canvas.paint(stripe, rgb(0xFFE9A0) * light.tint)
    side = rng.choice([-1.0, 1.0])
    for near in (0.03, 0.06, 0.12, 0.24, 0.5):
        foot = horizon + (1.0 - horizon) * near
        pole = x + (0.5 - x) * near + bend * near * (1.0 - near) + side * wide * 1.5 * (near + 0.01)
        top, half = foot - 1.1 * near - 0.02, 0.014 * near + 0.001
        canvas.box(pole - half, top, pole + half, foot, rgb(0x3A2E28) * light.tint)
        canvas.box(pole - 7 * half, top + 3 * half, pole + 7 * half, top + 5 * half, rgb(0x3A2E28) * light.tint)


SCENES: tuple[Callable[[Canvas, Generator], None], ...] = (
    mountains, sea, city, forest, desert, night, winter, island, meadow, road,
)  # fmt: skip
CLASSES: tuple[str, ...] = tuple(scene.__name__ for scene in SCENES)


def label(index: int) -> int:
    """Return the label of image `index`, an index into `CLASSES`."""
    return index % len(CLASSES)


def render(index: int, height: int, width: int) -> NDArray[np.uint8]:
    """Render image `index` as uint8 RGB (height, width, 3). The same arguments always give the same image.

    >>> render(0, height=16, width=24).shape
    (16, 24, 3)

    Raises:
        UserError: If a side is shorter than `MIN_SIZE` pixels.
    """
    if min(height, width) < MIN_SIZE:
        raise UserError(f"data.size: scenes need at least {MIN_SIZE} × {MIN_SIZE} pixels, got {height} × {width}")
    canvas = Canvas.blank(height, width)
    SCENES[label(index)](canvas, np.random.default_rng((SEED, index)))
    return (np.clip(canvas.pixels, 0.0, 1.0) * 255.0 + 0.5).astype(np.uint8)
