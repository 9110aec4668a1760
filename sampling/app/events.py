"""Bind events of the page to calls of the model: arguments, progress, cancellation and errors."""

from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import gradio as gr
from gradio.components import Component

from sampling.app.worker import Canceled, Job, ServedModel
from vqvae2.errors import UserError

_MESSAGE_SECONDS = 30


@dataclass(frozen=True)
class Call:
    """One call of the model: the values of the inputs, the job that runs it, and the event that caused it."""

    values: dict[Component, Any]
    job: Job
    event: gr.EventData

    def __getitem__(self, component: Component) -> Any:
        """Return the value of an input."""
        return self.values[component]


def bind(
    model: ServedModel,
    listener: Callable[..., Any],
    work: Callable[[Call], Any],
    inputs: Iterable[Component],
    outputs: Sequence[Component],
    name: str,
    progress_on: Component | None = None,
) -> None:
    """Run `work` in the worker of the model when an event occurs, and show what it returns in `outputs`.

    Progress is shown on `progress_on`. An error becomes a message in the page; only a UserError is not also printed.

    Args:
        listener: Method of a component, such as `button.click`.
        name: Name of the event for programs that call the page.
        progress_on: One of the outputs; the last if not given.
    """

    async def handle(
        values: dict[Component, Any],
        event: gr.EventData,
        request: gr.Request,
        progress: gr.Progress = gr.Progress(),  # noqa: B008 # how gradio finds out that progress is reported
    ) -> Any:
        job = Job(lambda done, total: progress((done, total), unit="codes") if total else None)
        try:
            return await model.worker.run(str(request.session_hash), job, lambda job: work(Call(values, job, event)))
        except Canceled:
            gr.Info("Canceled.")
            return gr.skip()
        except UserError as error:
            raise gr.Error(str(error), duration=_MESSAGE_SECONDS, print_exception=False) from None
        except Exception as error:
            message = f"{type(error).__name__}: {error}. This is a bug; the terminal of the server shows where."
            raise gr.Error(message, duration=_MESSAGE_SECONDS) from error

    shown_on = [progress_on or outputs[-1]]
    listener(
        handle,
        set(inputs),
        list(outputs),
        api_name=name,
        api_visibility="undocumented",
        concurrency_limit=None,
        show_progress_on=shown_on,
    )


def bind_cancel(model: ServedModel, button: gr.Button) -> None:
    """Cancel all jobs of the session when a button is clicked."""
    button.click(_cancel_handler(model), queue=False, show_progress="hidden", api_visibility="private")


def cancel_on_unload(model: ServedModel, page: gr.Blocks) -> None:
    """Cancel all jobs of a session when its browser tab is closed."""
    page.unload(_cancel_handler(model))


def _cancel_handler(model: ServedModel) -> Callable[[gr.Request], Coroutine[Any, Any, None]]:
    async def cancel(request: gr.Request) -> None:
        model.worker.cancel(str(request.session_hash))

    return cancel
