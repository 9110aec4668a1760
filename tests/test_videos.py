"""Video files and folders of frames as sources of images."""

import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from vqvae2.data.images import DataConfig
from vqvae2.data.sources import absolute_source, open_source
from vqvae2.data.splits import open_datasets
from vqvae2.errors import UserError


def write_video(path: Path, frames: int) -> None:
    """Write a video of gray frames, each brighter than the one before."""
    av = pytest.importorskip("av", reason="av is not installed")
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 32, 16, "yuv420p"
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(np.full((16, 32, 3), 40 + 30 * number, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def test_frames_of_video_files_are_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_video(tmp_path / "a.mp4", 5)
    write_video(tmp_path / "sub" / "b.avi", 3)
    (tmp_path / "notes.txt").write_text("not a video")
    source = open_source(f"videos:{tmp_path}")
    names = [f"a.mp4/{frame:06d}" for frame in range(5)] + [f"sub/b.avi/{frame:06d}" for frame in range(3)]
    assert list(source.index.names) == names
    for number in (4, 0, 6):
        image = source.open(number, (8, 8))
        assert isinstance(image, Image.Image)
        assert abs(np.array(image).mean() - (40 + 30 * (number % 5))) < 8
    monkeypatch.chdir(tmp_path)
    assert absolute_source("videos:sub") == f"videos:{tmp_path / 'sub'}"
    config = DataConfig(path=f"videos:{tmp_path}", size=8, split_by="folder", num_workers=0)
    assert sorted(map(len, open_datasets(config))) == [3, 5]


def test_unusable_videos_give_one_line_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="no such folder"):
        open_source(f"videos:{tmp_path / 'missing'}")
    with pytest.raises(UserError, match="no images in"):
        open_source(f"videos:{tmp_path}")
    (tmp_path / "damaged.mp4").write_bytes(b"\0" * 100)
    with pytest.raises(UserError, match=r"damaged.mp4: not a readable video .* Remove"):
        open_source(f"videos:{tmp_path}")
    monkeypatch.setitem(sys.modules, "av", None)  # makes the import fail
    with pytest.raises(UserError, match=r"needs the package av .*\[video\]"):
        open_source(f"videos:{tmp_path}")


def write_frames(folder: Path, clips: int, frames: int, size: int = 16) -> Path:
    """Write a folder of random frames per clip, and return the root."""
    generator = np.random.default_rng(0)
    for clip in range(clips):
        (folder / f"clip{clip}").mkdir(parents=True)
        for frame in range(frames):
            pixels = generator.integers(256, size=(size, size, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / f"clip{clip}" / f"{frame:02d}.png")
    return folder


def test_frames_of_a_folder_stay_in_one_split(tmp_path: Path) -> None:
    root = write_frames(tmp_path / "frames", clips=8, frames=3)
    config = DataConfig(path=str(root), size=16, split_by="folder", val_fraction=0.3, num_workers=0)
    train, val = open_datasets(config)
    folders = [{name.partition("/")[0] for name in split.names} for split in (train, val)]
    assert not folders[0] & folders[1]
    assert len(train) == 3 * len(folders[0])
    assert len(val) == 3 * len(folders[1])
    write_frames(tmp_path / "more", clips=12, frames=3)
    _, more = open_datasets(config.model_copy(update={"path": str(tmp_path / "more")}))
    assert folders[1] <= {name.partition("/")[0] for name in more.names}  # new clips do not move others
    mixed = open_datasets(config.model_copy(update={"split_by": "image"}))
    assert set.intersection(*({name.partition("/")[0] for name in split.names} for split in mixed))


def test_frames_in_one_folder_cannot_be_split_by_folder(tmp_path: Path) -> None:
    root = write_frames(tmp_path, clips=1, frames=4)
    with pytest.raises(UserError, match=r"data.split_by: all images of .* are in one folder"):
        open_datasets(DataConfig(path=str(root), size=16, split_by="folder", num_workers=0))
