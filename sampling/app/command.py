"""The command `vqvae2 app`: serve a page for a model until a signal arrives.

The files of the page are in a temporary folder, and it sends no telemetry.
"""

import importlib.util
import os
import signal
import socket
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from pydantic import Field
from tyro.conf import Positional

from sampling.app.worker import ServedModel
from sampling.pipeline import VQVAE2Pipeline
from sampling.processes import processes
from sampling.sample import SampleOptions
from vqvae2.command_line import Options
from vqvae2.errors import Stopped, UserError
from vqvae2.hub import SOURCE_HELP

_MAX_UPLOAD = "256mb"
_MAX_SESSIONS = 200  # whose images are kept in memory


class AppOptions(Options):
    """Serve a page in the browser that samples and edits images, and shows what levels and codes carry.

    It needs the package gradio: pip install 'vqvae2[app]'. Uploads and pictures are deleted when it stops.
    """

    run: Positional[Path] = Field(description=SOURCE_HELP)
    host: str = Field(
        default="127.0.0.1",
        description="address to listen on; 0.0.0.0 lets other computers in, without a password",
    )
    port: int = Field(default=7860, ge=1, le=65535, description="port to listen on")


def main(options: AppOptions) -> None:
    """Run the command `vqvae2 app`."""
    if not processes().is_main_process:
        return
    check_gradio()
    check_address(options.host, options.port)
    defaults = SampleOptions.from_arguments([str(options.run)], "vqvae2 app").config
    pipeline = VQVAE2Pipeline.from_pretrained(options.run, processes().device or "cpu", defaults.batch_size)
    serve(ServedModel(str(options.run), pipeline, defaults), options.host, options.port)


def check_gradio() -> None:
    """Raise UserError if gradio is not installed."""
    if importlib.util.find_spec("gradio") is None:
        raise UserError("app: needs the package gradio; pip install 'vqvae2[app]'.")


def check_address(host: str, port: int) -> None:
    """Raise UserError if this process cannot listen on an address."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does
            probe.bind(address)
    except OSError as error:
        raise UserError(f"--host {host} --port {port}: {error.strerror}. Choose another port or host.") from None


def serve(model: ServedModel, host: str, port: int) -> None:
    """Serve the page of a model until SIGINT or SIGTERM.

    Raises:
        Stopped: When the signal arrives.
    """
    with (
        _signals_raise_stopped(),
        tempfile.TemporaryDirectory(prefix="vqvae2-app-", ignore_cleanup_errors=True) as folder,
    ):
        _set_environment(host, folder)
        # This imports gradio, which reads its environment variables.
        from sampling.app.page import LAUNCH_OPTIONS, build_page

        page = build_page(model)
        try:
            page.launch(
                server_name=host,
                server_port=port,
                max_file_size=_MAX_UPLOAD,
                state_session_capacity=_MAX_SESSIONS,
                prevent_thread_lock=True,
                quiet=True,
                share=False,
                ssr_mode=False,
                mcp_server=False,
                enable_monitoring=False,
                run_history=False,
                footer_links=[],
                **LAUNCH_OPTIONS,
            )
            print(f"{page.local_url}\nPress Ctrl-C to stop.", flush=True)
            threading.Event().wait()
        finally:
            model.worker.close()
            page.close(verbose=False)


def _set_environment(host: str, folder: str) -> None:
    """Set what gradio reads from the environment: where uploads go, no telemetry, no proxy for its own address."""
    tempfile.tempdir = folder  # also the temporary files of the libraries
    direct = [os.environ.get("NO_PROXY", ""), "127.0.0.1", "localhost", host]
    os.environ.update(
        GRADIO_TEMP_DIR=folder,
        GRADIO_ANALYTICS_ENABLED="False",
        HF_HUB_DISABLE_TELEMETRY="1",
        NO_PROXY=",".join(filter(None, direct)),
    )


@contextmanager
def _signals_raise_stopped() -> Iterator[None]:
    """Raise Stopped in the main thread on SIGINT and SIGTERM, so that the temporary folder is deleted."""

    def stop(number: int, _: FrameType | None) -> None:
        raise Stopped(f"stopped by {signal.Signals(number).name}", number)

    previous = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
