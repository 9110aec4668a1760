"""The command line: `vqvae2 COMMAND …` finds COMMAND in the entry-point group "vqvae2.commands" and calls it.

Every user error becomes one line on standard error and exit status 2; set VQVAE2_TRACEBACK=1 to see where it arose.
"""

import os
import signal
import sys
from importlib.metadata import entry_points, version
from types import FrameType

from vqvae2.errors import Stopped, UserError

# Read by OpenMP when torch is loaded: threads that wait spin for microseconds, then sleep. With OpenMP's own, longer
# spinning a training step took many times as long beside another busy process; see docs/results.md.
os.environ.setdefault("GOMP_SPINCOUNT", "10000")

_GOES_ON = "what is finished is kept, and the same command goes on with the rest"
USAGE = """usage: vqvae2 COMMAND [ARGUMENTS]   (vqvae2 COMMAND --help explains one)

{commands}

vqvae2 {version}: hierarchical VQ-VAE-2 image generation."""


def main(arguments: list[str] | None = None) -> int:
    """Run one command; the exit status is 0, 2 for a user error, or 128 + the signal that stopped it."""
    arguments = sys.argv[1:] if arguments is None else arguments
    commands = {point.name: point for point in entry_points(group="vqvae2.commands")}
    if not arguments or arguments[0] in ("-h", "--help", "help"):
        listing = "\n".join(f"  vqvae2 {name}" for name in sorted(commands))
        print(USAGE.format(commands=listing, version=version("vqvae2")))
        return 0
    if arguments[0] == "--version":
        print(version("vqvae2"))
        return 0
    name, *rest = arguments
    if name not in commands:
        return _fail(f"{name!r} is not a command; the commands are {', '.join(sorted(commands))}")
    before = signal.signal(signal.SIGTERM, _stop)
    try:
        commands[name].load()(rest)
    except (UserError, OSError) as error:
        if os.environ.get("VQVAE2_TRACEBACK"):
            raise
        return _fail(str(error) if isinstance(error, UserError) else _describe(error))
    except Stopped as stopped:
        print(f"vqvae2: {stopped}", file=sys.stderr)
        return stopped.status
    except KeyboardInterrupt:
        print(f"vqvae2: stopped by Ctrl-C; {_GOES_ON}", file=sys.stderr)
        return 130
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


def _stop(number: int, _: FrameType | None) -> None:
    """What SIGTERM does outside training, which saves a checkpoint first.

    It leaves at once: what is on the disk is whole at any moment, and an exception that passes through foreign code
    may come out as another.
    """
    message = f"\nvqvae2: stopped by {signal.Signals(number).name}; {_GOES_ON}\n"
    os.write(sys.stderr.fileno(), message.encode())
    os._exit(128 + number)


def _fail(message: str) -> int:
    print(f"vqvae2: {' '.join(message.split())}", file=sys.stderr)
    return 2


def _describe(error: OSError) -> str:
    """What the operating system refused, and to which file."""
    place = f"{error.filename}: " if error.filename else ""
    return f"{place}{error.strerror or error}; make room or permission for it and run the same command again"


if __name__ == "__main__":
    sys.exit(main())
