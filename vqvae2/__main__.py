"""The `vqvae2` command: finds the command's module, runs it, and reports errors in one line.

Every user error is one line on standard error and exit status 2. Set VQVAE2_TRACEBACK=1 to see the traceback.
"""

import contextlib
import ctypes
import difflib
import importlib
import importlib.machinery
import importlib.util
import io
import os
import re
import signal
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from vqvae2 import files
from vqvae2.errors import Stopped, UserError, printable

# OpenMP reads this when torch is loaded. With its default, waiting threads spin for so long that a training step takes
# several times as long if another process is busy; see docs/results.md.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's mallopt
_RESUME = "completed work is kept; run the same command again to resume"
_SIBLINGS = ("experiments", "train", "sampling")  # packages installed beside this one that hold the commands


class Command(NamedTuple):
    """One command of the command line. Its name has one or two words."""

    group: str
    target: str  # module:function
    summary: str
    example: str


COMMANDS = {
    "demo": Command("Train", "train.run_all:demo", "Run all stages on the built-in images, small", "vqvae2 demo"),
    "run": Command(
        "Train",
        "train.run_all:main",
        "Run all stages of a config; rerun to resume",
        "vqvae2 run configs/ffhq256.yaml --data.path /data/ffhq",
    ),
    "train-autoencoder": Command(
        "Train",
        "train.stages.autoencoder:main",
        "Stage 1: train the autoencoder",
        "vqvae2 train-autoencoder configs/ffhq256.yaml --data.path /data/ffhq",
    ),
    "extract-codes": Command(
        "Train",
        "train.stages.extract_codes:main",
        "Stage 2: cache the codes of all images in LMDB",
        "vqvae2 extract-codes configs/ffhq256.yaml --data.path /data/ffhq",
    ),
    "train-prior": Command(
        "Train",
        "train.stages.prior:main",
        "Stage 3: train the prior of one level, or of all",
        "vqvae2 train-prior configs/ffhq256.yaml --data.path /data/ffhq --level top",
    ),
    "sample": Command(
        "Use",
        "sampling.sample:main",
        "Sample new images",
        "vqvae2 sample runs/demo --count 16 --temperature top=1.0,bottom=0.9",
    ),
    "reconstruct": Command(
        "Use",
        "sampling.reconstruct:main",
        "Encode and decode images",
        "vqvae2 reconstruct runs/demo photo.jpg --levels",
    ),
    "inpaint": Command(
        "Use",
        "sampling.edit_commands:inpaint",
        "Keep a part of images and sample the rest",
        "vqvae2 inpaint runs/demo photo.jpg --keep top-half --classes 3",
    ),
    "variations": Command(
        "Use",
        "sampling.edit_commands:variations",
        "Keep the coarse levels of images and sample the fine ones",
        "vqvae2 variations runs/demo photo.jpg --classes 3",
    ),
    "app": Command(
        "Use",
        "sampling.app.command:main",
        "Serve a page that samples, inpaints and shows codes",
        "vqvae2 app scenes64",
    ),
    "evaluate": Command(
        "Measure",
        "sampling.evaluation.evaluate:main",
        "Measure FID, KID, likelihood and more of a run",
        "vqvae2 evaluate runs/demo --reference /data/reference",
    ),
    "tune-sampling": Command(
        "Measure",
        "sampling.evaluation.tune_sampling:main",
        "Find the best temperature and top-p on held-out images",
        "vqvae2 tune-sampling runs/demo --features efficientnet-lite2 --temperature 0.8 0.9 1.0 --top-p 0.9 1.0",
    ),
    "fid": Command(
        "Measure",
        "sampling.evaluation.fid:main",
        "Compute the FID of two image folders, as pytorch-fid does",
        "vqvae2 fid FOLDER_OR_NPZ FOLDER_OR_NPZ",
    ),
    "diagnose": Command(
        "Measure",
        "sampling.evaluation.diagnose:main",
        "Show which stage limits the samples",
        "vqvae2 diagnose runs/demo",
    ),
    "report": Command(
        "Measure", "sampling.report.report:main", "Write a page that shows the whole run", "vqvae2 report runs/demo"
    ),
    "inspect": Command(
        "Data",
        "sampling.report.inspect_store:main",
        "Summarize a code store or a prepared data set",
        "vqvae2 inspect runs/demo/codes/train",
    ),
    "prepare": Command(
        "Data",
        "train.stages.prepare:main",
        "Resize a data set once and store it in LMDB",
        "vqvae2 prepare /data/photos.zip photos256 --size 256",
    ),
    "import-vqvae": Command(
        "Data",
        "sampling.import_vqvae:main",
        "Convert a checkpoint of rosinality/vq-vae-2-pytorch",
        "vqvae2 import-vqvae vqvae_560.pt autoencoder.safetensors",
    ),
    "speech train": Command(
        "Speech",
        "experiments.speech.stages:main",
        "Train a VQ-VAE of recordings and a prior of its codes",
        "vqvae2 speech train configs/speech-digits.yaml --data.path /data/digits",
    ),
    "speech convert": Command(
        "Speech",
        "experiments.speech.convert:main",
        "Reconstruct recordings, also with the voices of other speakers",
        "vqvae2 speech convert runs/speech-digits --count 6",
    ),
    "speech sample": Command(
        "Speech",
        "experiments.speech.sample:main",
        "Sample new utterances",
        "vqvae2 speech sample runs/speech-digits --count 16",
    ),
    "speech evaluate": Command(
        "Speech",
        "experiments.speech.evaluate:main",
        "Measure likelihood, recognition of contents and speakers, and codes",
        "vqvae2 speech evaluate runs/speech-digits",
    ),
    "video train": Command(
        "Video",
        "experiments.video.stages:main",
        "Train an autoencoder of frames, and priors of the next frame",
        "vqvae2 video train configs/video-mazes.yaml --data.path data/mazes64",
    ),
    "video predict": Command(
        "Video",
        "experiments.video.predict:main",
        "Predict frames of clips, also with other actions",
        "vqvae2 video predict runs/video-mazes --count 6",
    ),
    "video evaluate": Command(
        "Video",
        "experiments.video.evaluate:main",
        "Measure errors of predicted frames, and recognition of actions",
        "vqvae2 video evaluate runs/video-mazes",
    ),
    "video three-codes": Command(
        "Video",
        "experiments.video.compress:main",
        "Compress frames to three codes, and reconstruct them",
        "vqvae2 video three-codes runs/video-mazes",
    ),
    "likelihoods": Command(
        "Likelihoods",
        "experiments.likelihoods.compare:main",
        "Compare the bounds of a VAE, a VQ-VAE and VIMCO",
        "vqvae2 likelihoods configs/likelihoods-32.yaml --data.path /data/photos",
    ),
}


def main(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit status: 0, 2 for a user error, or 128 + the signal that stopped it."""
    arguments = sys.argv[1:] if arguments is None else arguments
    _prepare_streams()
    keep_freed_memory()
    previous = signal.signal(signal.SIGTERM, _on_sigterm)
    try:
        _dispatch(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader of a pipe has left
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except ModuleNotFoundError as error:
        if _is_installed():
            raise
        return _fail(f"not installed (no module named {error.name}). Run `pip install -e .` in the project's folder.")
    except (MemoryError, RuntimeError, ImportError) as error:
        shortage = _describe_shortage(error)
        if shortage is None or os.environ.get("VQVAE2_TRACEBACK"):
            raise
        return _fail(shortage)
    except (UserError, OSError) as error:
        if os.environ.get("VQVAE2_TRACEBACK"):
            raise
        return _fail(str(error) if isinstance(error, UserError) else _describe(error))
    except Stopped as stopped:
        print(f"vqvae2: {printable(str(stopped))}", file=sys.stderr)
        return stopped.status
    except KeyboardInterrupt:
        print(f"vqvae2: interrupted by Ctrl-C; {_RESUME}", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, previous)
        files.release_locks()
    return 0


def keep_freed_memory() -> None:
    """Make glibc reuse large freed blocks. Its default returns them to the system, and every step clears them again.

    That takes a tenth of a training step; see docs/results.md. Other C libraries are left alone.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):
            libc = ctypes.CDLL(None)
            libc.mallopt(_M_MMAP_THRESHOLD, 2**30)
            libc.mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def _prepare_streams() -> None:
    """Make sure that messages can be written: to a closed stream, or in an encoding without the characters."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, io.TextIOWrapper(io.BytesIO(), encoding="utf-8"))
        elif isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _dispatch(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        print(_help())
    elif arguments[0] == "--version":
        print(_version())
    elif arguments[0] in COMMANDS:
        _run(arguments[0], arguments[1:])
    elif " ".join(arguments[:2]) in COMMANDS:
        _run(" ".join(arguments[:2]), arguments[2:])
    else:
        is_group = any(name.startswith(f"{arguments[0]} ") for name in COMMANDS)
        given = " ".join(arguments[:2] if is_group else arguments[:1])
        close = difflib.get_close_matches(given, COMMANDS, 1)
        hint = f"Did you mean {close[0]}?" if close else "Run `vqvae2 --help` for a list."
        raise UserError(f"{given}: no such command. {hint}")


def _run(name: str, arguments: list[str]) -> None:
    from vqvae2.command_line import run_command  # imported here, so that --help is fast

    import_siblings()
    module, _, function = COMMANDS[name].target.partition(":")
    try:
        run_command(getattr(importlib.import_module(module), function), arguments, f"vqvae2 {name}")
    except SystemExit as exit_:
        if exit_.code:
            raise
        print(f"example:\n  {COMMANDS[name].example}")  # after --help


def import_siblings() -> None:
    """Import the packages installed beside this one, even if the working directory has others of the same names.

    `python -m` and `torchrun -m` put the working directory first on the path, where a user may have a `train.py`.
    """
    folder = str(Path(__file__).resolve().parents[1])
    for name in _SIBLINGS:
        spec = importlib.machinery.PathFinder.find_spec(name, [folder])
        if spec is None or spec.loader is None:
            raise UserError(f"{folder}: the package `{name}` is missing. Install the project again: pip install -e .")
        loaded = sys.modules.get(name)
        if loaded is not None and getattr(loaded, "__file__", None) == spec.origin:
            continue
        sys.modules[name] = module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = ["usage: vqvae2 COMMAND [OPTIONS]", "", "Hierarchical VQ-VAE-2 image generation."]
    for group in dict.fromkeys(command.group for command in COMMANDS.values()):
        lines += ["", f"{group}:"]
        lines += [
            f"  {name:<{width}}  {command.summary}" for name, command in COMMANDS.items() if command.group == group
        ]
    lines += ["", "Run `vqvae2 COMMAND --help` for the options of a command.", f"version: {_version()}"]
    return "\n".join(lines)


def _version() -> str:
    return version("vqvae2") if _is_installed() else "not installed; run `pip install -e .` in the project's folder"


def _is_installed() -> bool:
    try:
        version("vqvae2")
    except PackageNotFoundError:
        return False
    return True


def _on_sigterm(number: int, _: FrameType | None) -> None:
    """Exit at once on SIGTERM outside of training, which saves a checkpoint first.

    Files on disk are complete at any moment. An exception could be swallowed or replaced by other libraries' code.
    """
    message = f"\nvqvae2: stopped by {signal.Signals(number).name}; {_RESUME}\n"
    os.write(sys.stderr.fileno(), message.encode())
    os._exit(128 + number)


def _fail(message: str) -> int:
    print(f"vqvae2: {printable(' '.join(message.split()))}", file=sys.stderr)
    return 2


def _describe_shortage(error: Exception) -> str | None:
    """Return a message for an error that is caused by too little memory, or None for others."""
    first_line = (str(error).splitlines() or [type(error).__name__])[0]
    if isinstance(error, ImportError):  # a limit on memory also stops the loading of libraries
        return f"cannot load a library ({first_line}). Check the limit on memory." if ".so" in first_line else None
    # PyTorch's messages for GPUs and for the CPU
    if isinstance(error, MemoryError) or re.search("out of memory|can't allocate memory", first_line):
        return f"out of memory ({first_line}). Use a smaller batch size; docs/troubleshooting.md lists other settings."
    return None


def _describe(error: OSError) -> str:
    """Return what the operating system refused, and for which file."""
    place = f"{printable(str(error.filename))}: " if error.filename else ""
    if isinstance(error, FileNotFoundError) and error.filename:
        return f"{place}no such file or folder. Check the path."
    return f"{place}{error.strerror or error}. Check free space and permissions, then run the same command again."


if __name__ == "__main__":
    sys.exit(main())
