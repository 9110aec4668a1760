"""Random changes of files and values: corrupted bytes, hostile JSON and YAML, names, archives and environments."""

import io
import json
import os
import random
import tarfile
import zipfile
from itertools import pairwise
from pathlib import Path
from typing import Any

import lmdb
import torch
import yaml
from torch import Tensor

from vqvae2 import checkpoint
from vqvae2.data import lmdb_environment

_SCALARS = (
    *(None, True, False, 0, 1, -1, 2**31, -(2**31), 2**63, 10**12, 10**400, 0.5, -0.5, 1e300),
    *(float("nan"), float("inf"), float("-inf"), "", "x", "0", "-1", "1e9", "../x", "a" * 5000, "\0", "\x1b[31m"),
    *("caf\udce9", "\u202e", [], {}, [[]], [None], {"": None}, {"x": {"x": []}}),
)
_TEXTS = (b"", b"{}", b"[]", b"null", b'"text"', b"5", b"NaN", b"[" * 5000, b'{"a":' * 5000, b"9" * 5000, b"\xff\xfe{}")
_YAML_TEXTS = (
    *("", "[]", "text", "data: " + "[" * 5000, "? [a]\n: b", "a: &a [*a]", "data: !!python/object:os.system {}"),
    *("data: 2020-01-01", "run: !!binary aGk=", "data: {size: 32, size: 32}", "data: {size: " + "9" * 5000 + "}"),
    "a: &a [1, 1, 1, 1]\n" + "".join(f"{b}: &{b} [*{a}, *{a}, *{a}, *{a}]\n" for a, b in pairwise("abcdefg")),
    *("\tdata: 1", "data: {path: \0}", "%YAML 9.9\n---\n{}", "a: 1\n---\nb: 2", "data: !!timestamp 2020-99-99"),
)
_VARIABLES = {
    **dict.fromkeys(
        [
            *("ACCELERATE_MIXED_PRECISION", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "ACCELERATE_USE_CPU"),
            *("ACCELERATE_DYNAMO_BACKEND", "ACCELERATE_LOG_LEVEL", "ACCELERATE_DOWNCAST_BF16", "OMP_NUM_THREADS"),
            *("ACCELERATE_USE_DEEPSPEED", "ACCELERATE_USE_FSDP", "ACCELERATE_TORCH_DEVICE", "COLUMNS", "LINES"),
            *("PYTHONIOENCODING", "LANG", "LC_ALL", "TERM", "TMPDIR", "HOME", "XDG_CACHE_HOME", "TORCH_HOME"),
            *("MPLBACKEND", "MPLCONFIGDIR", "CUDA_VISIBLE_DEVICES", "TQDM_MININTERVAL", "NO_COLOR"),
        ],
        ("", "0", "-1", "x", "true", "garbage garbage", "9" * 400, "/missing/folder", "\udcff", "no", "bf16", "cpu"),
    )
}


def corrupt(path: Path, rng: random.Random) -> str:
    """Corrupt the bytes of a file in one of several ways and return a description."""
    content = bytearray(path.read_bytes())
    kind = rng.choice(["bit", "bit", "bytes", "zeros", "truncated", "extended", "moved", "empty"])
    offset = rng.randrange(max(len(content), 1))
    length = min(rng.choice([1, 8, 512, 4096]), len(content) - offset)
    if kind == "bit" and content:
        content[offset] ^= 1 << rng.randrange(8)
    elif kind == "bytes":
        content[offset : offset + length] = rng.randbytes(length)
    elif kind == "zeros":
        content[offset : offset + length] = bytes(length)
    elif kind == "truncated":
        del content[offset:]
    elif kind == "extended":
        content += rng.randbytes(rng.randrange(1, 5000))
    elif kind == "moved":
        content[offset : offset + length] = content[:length]
    else:
        content.clear()
    replace(path, bytes(content))
    return f"{kind} at {offset}"


def replace(path: Path, content: bytes) -> None:
    """Write a new file in place of `path`, which may be a hard link to a file that must not change."""
    path.unlink()
    path.write_bytes(content)


def mutate_json(value: Any, rng: random.Random) -> Any:
    """Return a JSON value with one random change: of a scalar or a type, or a removed, added or renamed element."""
    if isinstance(value, dict | list) and value and rng.random() < 0.85:
        key = rng.choice(list(value) if isinstance(value, dict) else range(len(value)))
        changed: Any = dict(value) if isinstance(value, dict) else list(value)
        kind = rng.choice(["inside", "inside", "inside", "inside", "removed", "added"])
        if kind == "inside":
            changed[key] = mutate_json(value[key], rng)
        elif kind == "removed":
            del changed[key]
        elif isinstance(changed, dict):
            changed[f"{key}{rng.choice('xyz_')}"] = changed.pop(key) if rng.random() < 0.5 else rng.choice(_SCALARS)
        else:
            changed.insert(key, rng.choice([value[key], rng.choice(_SCALARS)]))
        return changed
    return rng.choice(_SCALARS)


def mutate_json_file(path: Path, rng: random.Random) -> str:
    """Replace a JSON file by one with a changed value, a duplicate key, or by hostile text."""
    value = json.loads(path.read_bytes())
    kind = rng.choice(["text", "duplicate", *["value"] * 6])
    if kind == "text":
        content = rng.choice(_TEXTS)
    elif kind == "duplicate" and isinstance(value, dict):
        content = f"{json.dumps(value)[:-1]}, {json.dumps(rng.choice(list(value)))}: 1}}".encode()
    else:
        content = json.dumps(mutate_json(value, rng)).encode()
    replace(path, content)
    return f"{kind}: {content[:2000]!r}"


def mutate_log(path: Path, rng: random.Random) -> str:
    """Change a line of a JSON Lines file, remove lines, or empty it."""
    lines = path.read_bytes().splitlines()
    kind = rng.choice(["empty", "truncated", "text", "value", "value"])
    number = rng.randrange(len(lines))
    if kind == "empty":
        lines = []
    elif kind == "truncated":
        lines = lines[number:]
    elif kind == "text":
        lines[number] = rng.choice(_TEXTS)
    else:
        lines[number] = json.dumps(mutate_json(json.loads(lines[number]), rng)).encode()
    replace(path, b"".join(line + b"\n" for line in lines))
    return f"{kind} at line {number}: {lines[number : number + 1]!r}"[:2000]


def mutate_checkpoint(path: Path, rng: random.Random) -> str:
    """Rewrite a weights file with changed metadata or tensors of another kind, and a valid checksum."""
    tensors, metadata = checkpoint.load(path)
    if rng.random() < 0.7:
        changed = mutate_json(metadata, rng)
        metadata = changed if isinstance(changed, dict) else {}
        description = json.dumps(metadata)[:2000]
    else:
        name = rng.choice(sorted(tensors))
        description = _mutate_tensor(tensors, name, rng)
    path.unlink()
    checkpoint.save(path, tensors, metadata)
    return description


def _mutate_tensor(tensors: dict[str, Tensor], name: str, rng: random.Random) -> str:
    tensor = tensors.pop(name)
    kind = rng.choice(["removed", "renamed", "shape", "empty", "type", "not finite"])
    if kind == "renamed":
        tensors[rng.choice([f"{name}x", name.replace("/", "", 1), name.replace("0", "99"), "x"])] = tensor
    elif kind == "shape":
        tensors[name] = tensor[None].repeat(2, *[1] * tensor.ndim)
    elif kind == "empty":
        tensors[name] = torch.zeros(0, dtype=tensor.dtype)
    elif kind == "type":
        tensors[name] = tensor.to(rng.choice([torch.int64, torch.float64, torch.bfloat16, torch.uint8, torch.bool]))
    elif kind == "not finite":
        tensors[name] = torch.full(tensor.shape, float("nan"))
    return f"{kind}: {name}"


def mutate_store(path: Path, rng: random.Random) -> str:
    """Rewrite the header or a record of an LMDB database, and seal it again."""
    lmdb_environment.close_reader(path.parent)
    with (
        lmdb.open(str(path.parent), map_size=2**26, lock=False) as environment,
        environment.begin(write=True) as change,
    ):
        header = bytes(change.get(b"header"))
        numbered = [bytes(key) for key, _ in change.cursor() if len(key) == lmdb_environment.KEY_BYTES]
        key = rng.choice(numbered)
        value = bytes(change.get(key))
        kind = rng.choice(["header", "header", "header", "header text", "removed", "short", "long", "filled", "empty"])
        if kind == "header":
            header = json.dumps(mutate_json(json.loads(header), rng)).encode()
            change.put(b"header", header)
        elif kind == "header text":
            header = rng.choice(_TEXTS)
            change.put(b"header", header)
        elif kind == "removed":
            change.delete(key)
        else:
            offset = rng.randrange(len(value))
            changes = {"short": value[:offset], "long": value + value, "filled": b"\xff" * len(value), "empty": b""}
            change.put(key, changes[kind])
    lmdb_environment.seal(path.parent)
    return f"{kind}: {header[:2000]!r}"


def mutate_yaml(path: Path, rng: random.Random) -> str:
    """Change a value or a key of a YAML file, or replace or extend the file by hostile text."""
    text = path.read_text()
    kind = rng.choice(["text", "appended", *["value"] * 5])
    if kind == "text":
        text = rng.choice(_YAML_TEXTS)
    elif kind == "appended":
        text += "\n" + rng.choice(_YAML_TEXTS)
    else:
        value = mutate_json(yaml.safe_load(text), rng)
        text = json.dumps(value)  # JSON is YAML
    replace(path, text.encode("utf-8", "surrogatepass"))
    return f"{kind}: {text[:2000]}"


def rename(path: Path, rng: random.Random) -> str:
    """Rename an image or its folder to a hostile name."""
    target = rng.choice([path, path.parent])
    letters = {
        "bytes": bytes(rng.choice(range(1, 256)) for _ in range(rng.randrange(1, 40))),
        "control": b"a\x1b[31m\r\n\tb",
        "dots": b"..." + b"a",
        "dash": b"--help",
        "long": b"l" * 240,
        "invalid": b"caf\xe9\xff",
        "spaces": b"  a  ",
        "quotes": b"'\"`$(x)\\{0..9}*?[a]",
    }
    kind = rng.choice(sorted(letters))
    name = letters[kind].replace(b"/", b"_")
    suffix = path.suffix.encode() if target == path else b""
    os.rename(target, os.path.join(os.fsencode(target.parent), name + suffix))  # noqa: PTH104, PTH118
    return f"{kind}: {name!r}"


def mutate_environment(rng: random.Random) -> dict[str, str | None]:
    """Return a few environment variables with hostile values; None removes one."""
    names = rng.sample(sorted(_VARIABLES), rng.randrange(1, 4))
    return {name: rng.choice([None, *_VARIABLES[name]]) for name in names}


def write_archive(path: Path, rng: random.Random) -> str:
    """Write a .zip or .tar of the folder of the same name with hostile members, and perhaps corrupt it."""
    folder = path.with_suffix("")
    images = sorted(file for file in folder.rglob("*") if file.is_file())
    names = [
        "../../x.png",
        "/x.png",
        "a/../b.png",
        "C:\\x.png",
        f"{'a' * 200}.png",
        "a//b.png",
        ".hidden/x.png",
        "x.png",
    ]
    contents = [b"", rng.randbytes(100), images[0].read_bytes()]
    hostile = [(name, rng.choice(contents)) for name in rng.sample(names, 2)]
    members = [(str(file.relative_to(folder)), file.read_bytes()) for file in images] + hostile
    buffer = io.BytesIO()
    if path.suffix == ".zip":
        with zipfile.ZipFile(buffer, "w", rng.choice([zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])) as archive:
            for name, content in members:
                archive.writestr(zipfile.ZipInfo(name), content)
    else:
        with tarfile.open(fileobj=buffer, mode="w") as archive:
            for name, content in members:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
            link = tarfile.TarInfo("link.png")
            link.type = rng.choice([tarfile.SYMTYPE, tarfile.LNKTYPE])
            link.linkname = rng.choice(["/etc/passwd", "link.png", "../x.png"])
            archive.addfile(link)
    replace(path, buffer.getvalue())
    description = ", ".join(name for name, _ in hostile)
    return f"{description}; {corrupt(path, rng)}" if rng.random() < 0.7 else description
