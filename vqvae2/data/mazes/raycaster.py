"""First-person views of a maze of square cells, by casting one ray per column."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8
from numpy import ndarray

FIELD_OF_VIEW = np.pi / 2  # horizontal
_EYE = 0.5  # height of the camera; walls have the height 1
_SUPERSAMPLING = 2  # rays per column and row of the image
_SIDE_BRIGHTNESS = 0.75  # of walls that face along the second axis, so that corners are visible
_FADING = 0.12  # brightness is 1 / (1 + _FADING · distance)


class Maze(NamedTuple):
    """A grid of cells and what they look like. The border must be walls."""

    walls: Int[ndarray, "x y"]  # 0 for free cells, otherwise 1 + index of the texture
    textures: UInt8[ndarray, "n s s 3"]  # of walls
    floor: UInt8[ndarray, "s s 3"]
    sky: UInt8[ndarray, "2 3"]  # colors at the top and at the horizon


class Hits(NamedTuple):
    """Where rays hit walls."""

    distance: Float[ndarray, "*n"]  # in lengths of the ray's direction
    wall: Int[ndarray, "*n"]  # value of `Maze.walls`
    side: Int[ndarray, "*n"]  # axis that the wall faces
    offset: Float[ndarray, "*n"]  # position along the wall, in [0, 1)


def cast(walls: Int[ndarray, "x y"], origins: Float[ndarray, "*n 2"], directions: Float[ndarray, "*n 2"]) -> Hits:
    """Follow rays from free cells through the grid to the first wall (Amanatides and Woo 1987)."""
    step = np.where(directions < 0, -1, 1)
    directions = np.where(np.abs(directions) < 1e-9, 1e-9, directions)
    cell = np.floor(origins).astype(np.int64)
    to_next = (cell + (step > 0) - origins) / directions  # distance to the next border of each axis
    between = np.abs(1 / directions)
    distance, side = np.zeros(cell.shape[:-1]), np.zeros(cell.shape[:-1], np.int64)
    flying = walls[cell[..., 0], cell[..., 1]] == 0
    while flying.any():
        nearest = to_next.argmin(-1)
        chosen = flying[..., None] & (np.arange(2) == nearest[..., None])
        distance = np.where(flying, to_next.min(-1), distance)
        side = np.where(flying, nearest, side)
        cell, to_next = cell + step * chosen, to_next + between * chosen
        flying &= walls[cell[..., 0], cell[..., 1]] == 0
    points = origins + distance[..., None] * directions
    along = np.where(side == 0, points[..., 1], points[..., 0])
    return Hits(distance, walls[cell[..., 0], cell[..., 1]], side, along - np.floor(along))


def render(maze: Maze, poses: Float[ndarray, "t 3"], size: tuple[int, int]) -> UInt8[ndarray, "t h w 3"]:
    """Return the views of a camera at poses (x, y, angle), in pictures of (height, width) pixels."""
    height, width = size[0] * _SUPERSAMPLING, size[1] * _SUPERSAMPLING
    slope = np.tan(FIELD_OF_VIEW / 2)
    columns = ((np.arange(width) + 0.5) / width * 2 - 1) * slope
    rows = ((np.arange(height) + 0.5) - height / 2) / (width / 2) * slope  # below the horizon, at distance 1
    forward = np.stack([np.cos(poses[:, 2]), np.sin(poses[:, 2])], -1)[:, None]
    right = np.stack([-forward[..., 1], forward[..., 0]], -1)
    origins = np.broadcast_to(poses[:, None, :2], (len(poses), width, 2))
    directions = forward + columns[:, None] * right  # lengths along `forward` are 1
    hits = cast(maze.walls, origins, directions)

    down = rows[None, :, None] * np.ones((len(poses), 1, width))  # (T, H, W)
    is_wall = np.abs(down) * hits.distance[:, None] < _EYE
    distance = np.where(is_wall, hits.distance[:, None], _EYE / np.abs(down))
    ground = (origins[:, None] + distance[..., None] * directions[:, None]) % 1
    texels = maze.textures.shape[1]
    vertical = np.clip((_EYE + down * distance) * texels, 0, texels - 1).astype(np.int64)
    horizontal = (hits.offset[:, None] * texels).astype(np.int64)
    at = (ground * texels).astype(np.int64)
    brightness = 1 / (1 + _FADING * distance) * np.where(is_wall & (hits.side[:, None] == 1), _SIDE_BRIGHTNESS, 1)
    walls = maze.textures[hits.wall[:, None] - 1, vertical, horizontal]
    shade = np.clip(-down / rows[-1], 0, 1)[..., None]
    sky = maze.sky[0] * shade + maze.sky[1] * (1 - shade)
    solid = np.where(is_wall[..., None], walls, maze.floor[at[..., 0], at[..., 1]]) * brightness[..., None]
    image = np.where((is_wall | (down > 0))[..., None], solid, sky)
    blocks = image.reshape(len(poses), size[0], _SUPERSAMPLING, size[1], _SUPERSAMPLING, 3)
    return blocks.mean((2, 4)).round().astype(np.uint8)
