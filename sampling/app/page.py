"""The page: a line about the model, and the tabs."""

from typing import Any

import gradio as gr
from gradio.themes import Default
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from sampling.app.codes_tab import CodesTab
from sampling.app.events import cancel_on_unload
from sampling.app.tabs import InpaintTab, LevelsTab, SampleTab, VariationsTab
from sampling.app.worker import ServedModel

_CACHE_SECONDS = 3600  # for which uploads and pictures are kept
_CLIENT_CLOSED_REQUEST = 499  # nobody receives it

# Labels and buttons stand above pictures instead of covering them, and all tabs fit on a telephone.
_CSS = """
.gradio-container { max-width: 1280px !important; }
img { image-rendering: pixelated; }
label[data-testid="block-label"] { position: static; width: fit-content; }
#editor label[data-testid="block-label"] { position: absolute; }
.image-container { position: static !important; }
.grid-container { grid-template-columns: repeat(auto-fill, minmax(100px, 1fr)) !important; }
.grid-wrap { min-height: 0 !important; max-height: none !important; height: auto !important; }
@media (max-width: 500px) { .tab-container button { padding: 0 7px !important; } }
"""


async def _ignore_disconnect(_request: Request, _error: Exception) -> Response:
    """Answer a browser that has closed the connection during an upload, so that the server does not log an error."""
    return Response(status_code=_CLIENT_CLOSED_REQUEST)


# Arguments of gr.Blocks.launch. The fonts are those of the system: gradio's own themes load fonts.
LAUNCH_OPTIONS: dict[str, Any] = {
    "theme": Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
    "css": _CSS,
    "app_kwargs": {"exception_handlers": {ClientDisconnect: _ignore_disconnect}},
}


def build_page(model: ServedModel) -> gr.Blocks:
    """Return the page for a model. Building it runs nothing."""
    tabs = {
        "Sample": SampleTab,
        "Inpaint": InpaintTab,
        "Variations": VariationsTab,
        "Levels": LevelsTab,
        "Codes": CodesTab,
    }
    with gr.Blocks(title="vqvae2", analytics_enabled=False, delete_cache=(_CACHE_SECONDS, _CACHE_SECONDS)) as page:
        gr.Markdown(_describe(model))
        for name, tab in tabs.items():
            with gr.Tab(name, id=name.lower()):
                tab(model)
        cancel_on_unload(model, page)
    page.queue(api_open=False)
    return page


def _describe(model: ServedModel) -> str:
    autoencoder = model.pipeline.autoencoder
    height, width = autoencoder.size
    levels = (
        f"{name} {spec.height} × {spec.width} of {spec.codebook_size} codes"
        for name, spec in zip(reversed(model.pipeline.levels), reversed(autoencoder.map_specs), strict=True)
    )
    return f"## {model.name}\nImages of {height} × {width} pixels. Levels: {', '.join(levels)}."
