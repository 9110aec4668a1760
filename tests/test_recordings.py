"""Test the data set of recordings: split, crops, padding, errors."""

from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from vqvae2.data.recordings import RecordingsConfig, open_recordings, read_values
from vqvae2.errors import UserError


def test_one_in_ten_recordings_of_each_speaker_is_held_out(tones: Path) -> None:
    config = RecordingsConfig(path=str(tones), pattern=r"(?P<content>\w+)_(?P<speaker>\w+)_\d+", length=512, crop=256)
    train, val = open_recordings(config)
    assert not set(train.names) & set(val.names)
    assert [val.labels(index)[0] for index in range(4)].count(0) == 2
    assert open_recordings(config)[1].names == val.names
    assert train.digest() != val.digest()


def test_crops_are_a_function_of_the_seed(tones: Path) -> None:
    config = RecordingsConfig(path=str(tones), pattern=r"(?P<content>\w+)_(?P<speaker>\w+)_\d+", length=512, crop=128)
    data, _ = open_recordings(config)
    whole = data[0].values
    starts = set()
    for seed in range(20):
        clip = data[0, seed]
        assert torch.equal(clip.values, data[0, seed].values)
        found = [k for k in range(512 - 128 + 1) if torch.equal(whole[k : k + 128], clip.values)]
        assert found
        assert 64 <= int(clip.length) <= 128
        starts.add(found[0])
    assert len(starts) > 10


def test_unusable_data_gives_one_line_errors(tmp_path: Path) -> None:
    def error(**settings: object) -> str:
        with pytest.raises(UserError) as raised:
            open_recordings(RecordingsConfig(path=str(tmp_path), **settings))[0][0]
        assert "\n" not in str(raised.value)
        return str(raised.value)

    assert "no WAV or FLAC files" in error()
    soundfile.write(tmp_path / "a.wav", np.zeros(10), 8000)
    assert "a.wav: not in the folder of a speaker" in error()
    assert "a.wav: does not match data.pattern" in error(pattern="(?P<speaker>b)")
    assert "single recording" in error(pattern="(?P<speaker>.)")
    for name in ("high_ben_0", "ben_1"):
        soundfile.write(tmp_path / f"{name}.wav", np.zeros(10), 8000)
    (tmp_path / "a.wav").rename(tmp_path / "low_ben_0.wav")
    message = error(pattern=r"^(?:(?P<content>high|low)_)?(?P<speaker>ben)_\d")
    assert "/ben_1.wav: data.pattern finds no content in this name" in message
    for path in tmp_path.glob("*.wav"):
        path.unlink()
    for name, content in {"anna/1.wav": b"", "anna/2.wav": b"RIFF" + b"\0" * 60, "anna/3.wav": b"hello"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    assert "2.wav: not a readable recording" in error()
    soundfile.write(tmp_path / "anna/2.wav", np.zeros(0), 8000)
    assert "2.wav: has no samples" in error()
    with pytest.raises(UserError, match="no such directory"):
        open_recordings(RecordingsConfig(path=str(tmp_path / "missing")))


def test_hidden_folders_and_folders_with_an_extension_are_no_recordings(tmp_path: Path) -> None:
    for name in ("anna/0.wav", "anna/1.wav", ".trash/0.wav", ".trash/1.wav", "anna/.old/2.wav"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        soundfile.write(tmp_path / name, np.zeros(10), 8000)
    (tmp_path / "anna" / "x.wav").mkdir()
    train, val = open_recordings(RecordingsConfig(path=str(tmp_path)))
    assert (train.names, val.names, train.speakers) == (("anna/1.wav",), ("anna/0.wav",), ("anna",))


def test_recordings_are_padded_with_silence(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "x.wav", 0.1 * np.sin(np.arange(4000) / 3), 8000)
    values, recorded = read_values(tmp_path / "x.wav", RecordingsConfig(length=5000, crop=64))
    assert (recorded, values[4000:].unique().tolist()) == (4000, [128])
