"""The built-in walks through mazes: rays, pictures and motion against brute force; determinism; the source."""

import sys

import numpy as np
import pytest

from vqvae2.data.images import DataConfig
from vqvae2.data.mazes import raycaster, walks
from vqvae2.data.mazes.raycaster import Maze, cast, render
from vqvae2.data.mazes.walks import ACTIONS, make_walk, move, render_clip
from vqvae2.data.sources import open_source
from vqvae2.data.splits import open_datasets
from vqvae2.errors import UserError

STEP = 1e-3  # of the brute-force search
RED, GREEN, BLUE = np.diag([200, 200, 200]).astype(np.uint8)


def make_grid(generator: np.random.Generator, size: int = 7) -> np.ndarray:
    """Return random walls of two textures, with a free cell in the middle."""
    walls = np.where(generator.random((size, size)) < 0.3, generator.integers(1, 3, (size, size)), 0)
    walls[[0, -1]], walls[:, [0, -1]] = 1, 1
    walls[size // 2, size // 2] = 0
    return walls


def test_rays_end_at_the_walls_that_small_steps_find() -> None:
    generator = np.random.default_rng(0)
    for _ in range(20):
        walls = make_grid(generator)
        free = np.argwhere(walls == 0)
        origins = free[generator.integers(len(free), size=30)] + generator.uniform(0.05, 0.95, (30, 2))
        directions = generator.standard_normal((30, 2))
        directions[:4] = [(1, 0), (0, 1), (-1, 0), (0, -2)]  # along the axes
        hits = cast(walls, origins, directions)
        for origin, direction, *hit in zip(origins, directions, *hits, strict=True):
            distance, wall, side, offset = hit
            points = origin + np.arange(0, 12 / np.linalg.norm(direction), STEP)[:, None] * direction
            cells = np.clip(np.floor(points).astype(int), 0, 6)
            first = np.flatnonzero(walls[cells[:, 0], cells[:, 1]])[0]
            assert abs(first * STEP - distance) <= 2 * STEP
            assert walls[tuple(cells[first])] == wall
            assert abs(points[first][side] - np.round(points[first][side])) <= 2 * STEP * abs(direction[side]) + 1e-6
            assert abs((points[first][1 - side] - offset + 0.5) % 1 - 0.5) <= 3 * STEP * abs(direction[1 - side]) + 1e-6


def test_pictures_show_what_light_rays_meet(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(raycaster, "_SUPERSAMPLING", 1)
    generator = np.random.default_rng(1)
    textures = np.stack([np.tile(color, (4, 4, 1)) for color in (RED, GREEN)])
    for _ in range(3):
        maze = Maze(make_grid(generator), textures, np.tile(BLUE, (4, 4, 1)), np.full((2, 3), 255, np.uint8))
        x, y, angle = 3.4, 3.6, generator.uniform(0, 6)
        (picture,) = render(maze, np.array([[x, y, angle]]), (16, 16))
        right = (np.arange(16) + 0.5) / 8 - 1  # the field of view is 90 degrees
        for row, column in np.ndindex(16, 16):
            direction = np.array([np.cos(angle), np.sin(angle)]) + right[column] * np.array(
                [-np.sin(angle), np.cos(angle)]
            )
            fall = (row + 0.5) / 8 - 1
            times = np.arange(0, 12, STEP)
            heights, cells = (
                0.5 - fall * times,
                np.clip((np.array([x, y]) + times[:, None] * direction).astype(int), 0, 6),
            )
            wall = maze.walls[cells[:, 0], cells[:, 1]]
            met = np.flatnonzero((heights < 0) | (heights > 1) | (wall > 0))[0]
            if heights[met] > 1:
                assert picture[row, column].tolist() == [255, 255, 255]
                continue
            assert picture[row, column].argmax() == (2 if heights[met] < 0 else wall[met] - 1)
            brightness = picture[row, column].max() / 200 * (1 + raycaster._FADING * times[met])
            assert min(abs(brightness - 1), abs(brightness - raycaster._SIDE_BRIGHTNESS)) < 0.01


def test_actions_move_the_walker_and_walls_stop_it() -> None:
    walls = np.ones((5, 5), int)
    walls[1:4, 2] = 0  # a corridor along the first axis
    pose = np.array([1.5, 2.5, 0.0])
    ahead = move(walls, pose, ACTIONS.index("forward"))
    np.testing.assert_allclose(ahead, [2.0, 2.5, 0.0])
    for _ in range(9):
        ahead = move(walls, ahead, ACTIONS.index("forward"))
    assert 3.5 <= ahead[0] <= 4 - walks._RADIUS
    left, right = (move(walls, pose, ACTIONS.index(name)) for name in ("left", "right"))
    np.testing.assert_allclose(move(walls, left, ACTIONS.index("right")) % (2 * np.pi), pose)
    assert right[2] == pytest.approx(np.pi / 8)  # toward the second axis, which is right of the first one in pictures
    slid = move(walls, np.array([1.5, 2.74, 0.5]), ACTIONS.index("forward"))
    np.testing.assert_allclose(slid, [1.5 + 0.5 * np.cos(0.5), 2.74, 0.5])


def test_turning_right_moves_the_picture_left() -> None:
    walls = np.ones((9, 9), int)
    walls[1:8, 1:8] = 0
    walls[1:8, 8] = 2  # a green wall to the right of a walker that looks along the first axis
    textures = np.stack([np.tile(color, (4, 4, 1)) for color in (RED, GREEN)])
    maze = Maze(walls, textures, np.tile(BLUE, (4, 4, 1)), np.zeros((2, 3), np.uint8))
    pose = np.array([4.5, 6.5, 0.0])
    before, after = render(maze, np.stack([pose, move(walls, pose, ACTIONS.index("right"))]), (16, 16))
    green = [np.flatnonzero(frame[8].argmax(-1) == 1) for frame in (before, after)]
    assert green[0].min() > green[1].min() >= 8


def test_walks_depend_on_their_number_only() -> None:
    first, again, longer = make_walk(3, 6), make_walk(3, 6), make_walk(3, 9)
    np.testing.assert_array_equal(first.maze.walls, again.maze.walls)
    np.testing.assert_array_equal(first.poses, again.poses)
    np.testing.assert_array_equal(first.poses, longer.poses[:6])
    frames = render_clip(3, 6, (16, 24))
    render_clip.cache_clear()
    np.testing.assert_array_equal(frames, render_clip(3, 6, (16, 24)))
    assert frames.shape == (6, 16, 24, 3)
    assert not np.array_equal(frames, render_clip(4, 6, (16, 24)))
    for walk in (first, make_walk(7, 20)):
        x, y = np.floor(walk.poses[:, :2]).astype(int).T
        assert not walk.maze.walls[x, y].any()


def test_source_names_frames_by_clip_and_labels_them_with_actions() -> None:
    source = open_source("mazes:4:5")
    assert len(source.index) == 20
    assert list(source.index.names)[4:6] == ["000000/0004", "000001/0000"]
    assert source.index.classes == ACTIONS
    assert source.index.labels.tolist() == [action for clip in range(4) for action in make_walk(clip, 5).actions]
    config = DataConfig(path="mazes:4:5", size=16, labels="folder", split_by="folder", num_workers=0)
    assert config.with_absolute_paths() == config
    train, val = open_datasets(config)
    assert (len(train), len(val)) == (15, 5)
    assert len({name.partition("/")[0] for name in val.names}) == 1
    assert len(open_source("mazes:1").index) == 24


@pytest.mark.parametrize("path", ["mazes:", "mazes:0", "mazes:x", "mazes:2:0", "mazes:2:3:4"])
def test_wrong_paths_give_one_line_errors(path: str) -> None:
    with pytest.raises(UserError, match="expected mazes:CLIPS"):
        open_source(path)


def test_missing_package_gives_a_one_line_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "labmaze", None)  # makes the import fail
    with pytest.raises(UserError, match=r"needs the package labmaze .*\[video\]"):
        open_source("mazes:2")
