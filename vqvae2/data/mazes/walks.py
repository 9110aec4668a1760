"""Random walks through random mazes of DeepMind Lab."""

from functools import lru_cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int, UInt8
from numpy import ndarray
from PIL import Image

from vqvae2.data.mazes.raycaster import Maze, cast, render
from vqvae2.packages import import_package

ACTIONS = ("forward", "left", "right")
_SEED = 0
_TURN, _STEP = np.pi / 8, 0.5  # radians; cells
_RADIUS = 0.25  # distance that the walker keeps from walls, in cells
_CELLS, _STYLE, _TEXELS, _WALL_TEXTURES = 11, "style_01", 32, 3
_SKY = np.array([[60, 110, 190], [190, 215, 240]], np.uint8)


class Walk(NamedTuple):
    """A clip: a maze, the poses (x, y, angle) of all frames, and the action that led to each frame."""

    maze: Maze
    poses: Float[ndarray, "t 3"]
    actions: Int[ndarray, " t"]


@lru_cache(maxsize=4)
def render_clip(clip: int, frames: int, size: tuple[int, int]) -> UInt8[ndarray, "t h w 3"]:
    """Return the frames of a walk, of (height, width) pixels."""
    walk = make_walk(clip, frames)
    return render(walk.maze, walk.poses, size)


def make_walk(clip: int, frames: int) -> Walk:
    """Return a walk, which depends on its number only. A longer one begins with a shorter one."""
    generator = np.random.default_rng((_SEED, clip))
    maze = make_maze(generator)
    x, y = generator.permutation(np.argwhere(maze.walls == 0))[0]
    pose = np.array([x + 0.5, y + 0.5, generator.integers(16) * _TURN])
    poses, actions, turn = [], [], 1
    for _ in range(frames):
        room = float(cast(maze.walls, pose[:2], _heading(pose)).distance)
        turn = turn if generator.random() < 0.8 else 3 - turn  # mostly the direction of the last turn
        action = 0 if generator.random() < (0.65 if room > _STEP + _RADIUS else 0.05) else turn
        pose = move(maze.walls, pose, action)
        poses.append(pose)
        actions.append(action)
    return Walk(maze, np.array(poses), np.array(actions))


def move(walls: Int[ndarray, "x y"], pose: Float[ndarray, "3"], action: int) -> Float[ndarray, "3"]:
    """Return the pose after an action. Walls stop the motion across them; the motion along them continues."""
    pose = pose.copy()
    if action:
        pose[2] = (pose[2] + (_TURN if ACTIONS[action] == "right" else -_TURN)) % (2 * np.pi)
        return pose
    step = _STEP * _heading(pose)
    for axis in range(2):
        moved = pose[:2].copy()
        moved[axis] += step[axis]
        corners = moved + _RADIUS * np.array([(-1, -1), (-1, 1), (1, -1), (1, 1)])
        cells = np.floor(corners).astype(np.int64)
        if not walls[cells[:, 0], cells[:, 1]].any():
            pose[:2] = moved
    return pose


def make_maze(generator: np.random.Generator) -> Maze:
    """Return a random maze of DeepMind Lab's generator with three of its wall textures.

    Raises:
        UserError: If the package labmaze is missing.
    """
    maze = import_package("labmaze", "video").RandomMaze(
        height=_CELLS,
        width=_CELLS,
        max_rooms=4,
        room_min_size=3,
        room_max_size=5,
        extra_connection_probability=0.1,
        random_seed=int(generator.integers(2**31)),
    )
    walls, floors = _textures()
    chosen = generator.permutation(len(walls))[:_WALL_TEXTURES]
    is_wall = np.array([[cell == "*" for cell in row] for row in maze.entity_layer])
    grid = np.where(is_wall, 1 + generator.integers(_WALL_TEXTURES, size=is_wall.shape), 0)
    return Maze(grid, walls[chosen], floors[generator.integers(len(floors))], _SKY)


@lru_cache(maxsize=1)
def _textures() -> tuple[ndarray, ndarray]:
    """Return the textures of walls and of floors, each (N, S, S, 3)."""
    assets = import_package("labmaze.assets", "video")

    def load(paths: dict[str, str]) -> ndarray:
        images = [Image.open(path).convert("RGBA").convert("RGB") for path in paths.values()]
        return np.stack([np.array(image.resize((_TEXELS, _TEXELS), Image.Resampling.BOX)) for image in images])

    return load(assets.get_wall_texture_paths(_STYLE)), load(assets.get_floor_texture_paths(_STYLE))


def _heading(pose: Float[ndarray, "3"]) -> Float[ndarray, "2"]:
    return np.array([np.cos(pose[2]), np.sin(pose[2])])
