"""Test atomic writes, JSON errors, checksums, and cleanup of temporary files."""

import fcntl
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vqvae2 import files
from vqvae2.errors import UserError


def test_failed_write_keeps_the_old_file_and_leaves_no_temporary_file(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    files.write_json(path, {"a": 1})

    def interrupted_write() -> None:
        with files.atomic_write(path) as partial:
            partial.write_text("half")
            raise RuntimeError("power failure")

    with pytest.raises(RuntimeError, match="power"):
        interrupted_write()
    assert files.read_json(path) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_folder_replaces_a_folder(tmp_path: Path) -> None:
    path = tmp_path / "folder"
    for text in ("one", "two"):
        with files.atomic_write(path) as partial:
            partial.mkdir()
            (partial / "file").write_text(text)
    assert (path / "file").read_text() == "two"


def test_file_does_not_replace_a_folder(tmp_path: Path) -> None:
    (tmp_path / "value.json").mkdir()
    with pytest.raises(UserError, match=r"value.json: is a folder, .*Move or delete it"):
        files.write_json(tmp_path / "value.json", {"a": 1})
    assert [path.name for path in tmp_path.iterdir()] == ["value.json"]


@pytest.mark.parametrize(
    "content", [b'{"a": ', b"", b"\xff{}", b"9" * 5000, b"[" * 5000, b'{"a":' * 5000, b'{"a": 1, "a": 2}']
)
def test_invalid_json_error_names_the_file_and_the_fix(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "value.json"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"value\.json: not valid JSON .*\. Make it again\.$"):
        files.read_json(path, "Make it again.")


def test_log_lines_that_are_not_entries_are_skipped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    good = b'{"step": 3, "train/loss": NaN}'
    bad = [b"[" * 5000, b"9" * 5000, b"null", b"{}", b'{"step": -1}', b'{"step": true}', b'{"step": 1, "a": "x"}']
    bad += [b'{"step": 1, "a": ' + b"9" * 400 + b"}", b'{"step": 1.5}', b'{"step": 1, "step": 2}', b'{"step": 4, "tr']
    path.write_bytes(b"\n".join([*bad[:5], good, *bad[5:]]))
    assert [entry["step"] for entry in files.read_log(path)] == [3]


def test_digest_is_sha256(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    assert files.digest(path) == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_temporary_files_of_killed_but_not_of_running_processes_are_removed(tmp_path: Path) -> None:
    code = (
        "import os, signal, sys; from pathlib import Path; from vqvae2 import files\n"
        "with files.atomic_write(Path(sys.argv[1])) as partial:\n"
        "    partial.write_text('half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "killed.json")], check=False)
    assert [path.name.split(".")[1] for path in tmp_path.iterdir()] == ["killed"]
    with files.atomic_write(tmp_path / "living.json") as partial:
        partial.write_text("half")
        files.write_json(tmp_path / "other.json", 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["living.json", "other.json"]


def test_only_locks_and_temporary_files_are_leftovers() -> None:
    assert all(files.is_leftover(name) for name in (".lock", ".config.yaml.host-1.123.partial"))
    assert not any(files.is_leftover(name) for name in (".git", ".DS_Store", "lock", "config.yaml.host.1.partial"))


def test_a_lock_file_that_its_owner_removes_in_between_does_not_count(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, lockf = tmp_path / ".lock", fcntl.lockf

    def lock_after_the_owner_released(*arguments: Any) -> None:
        monkeypatch.setattr(fcntl, "lockf", lockf)
        path.unlink()
        lockf(*arguments)

    monkeypatch.setattr(fcntl, "lockf", lock_after_the_owner_released)
    files.lock_folder(tmp_path)
    assert path.exists()
    files.release_locks()
    assert not path.exists()
