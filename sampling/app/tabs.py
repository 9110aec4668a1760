"""The tabs that sample, inpaint, vary, and show levels. Each builds its components and binds them to the model."""

import math
from typing import Any

import gradio as gr
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from sampling.app.controls import SHOWN, EditControls, ImageSource, LevelControls, picture, shown
from sampling.app.events import Call, bind
from sampling.app.pictures import MAX_IMAGES, inpaint, reconstruct, sample, vary
from sampling.app.uploads import editor_canvas, painted_mask, require_image
from sampling.app.worker import ServedModel
from sampling.params import SamplingConfig
from sampling.reconstruct import progressive_levels
from vqvae2.pictures import image_grid, to_pil


class SampleTab:
    """Samples new images."""

    def __init__(self, model: ServedModel) -> None:
        self._pipeline, self._defaults = model.pipeline, model.defaults
        choices = model.class_choices
        with gr.Row():
            with gr.Column(scale=2, min_width=280):
                self._count = gr.Slider(1, MAX_IMAGES, min(model.defaults.count, 16), step=1, label="Images")
                self._classes = gr.Dropdown(
                    choices,
                    value=[],
                    multiselect=True,
                    label="Classes, in turn; all if none is selected",
                    visible=bool(choices),
                )
                self._levels = LevelControls(model, "Sample", is_open=True)
            with gr.Column(scale=3, min_width=280):
                result = picture("Samples")
        inputs = [self._count, self._classes, *self._levels.inputs]
        bind(model, self._levels.start.click, self.sample, inputs, [result], "sample")

    def sample(self, call: Call) -> Image.Image:
        """Return a grid of samples."""
        chosen = {
            "count": call[self._count],
            "classes": tuple(call[self._classes] or ()),
            **self._levels.settings(call),
        }
        config = SamplingConfig.from_dict(dict(self._defaults) | chosen, "sampling")
        call.job.start(config.count * self._pipeline.num_codes)
        images = sample(self._pipeline, config, call.job.advance)
        return to_pil(image_grid(images, max(1, round(config.count**0.5)), enlarge_to=128))


class InpaintTab:
    """Redraws the painted part of an image."""

    def __init__(self, model: ServedModel) -> None:
        self._pipeline = model.pipeline
        with gr.Row():
            with gr.Column(scale=2, min_width=280):
                self._source = ImageSource(model)
                self._editor = self._make_editor()
                self._controls = EditControls(model, self._source.label, "Redraw")
            with gr.Column(scale=3, min_width=280):
                result = picture("Variants")
        self._source.show_in([self._editor], lambda image: (editor_canvas(image, SHOWN),), "inpaint")
        inputs = [self._source.image, self._editor, *self._controls.inputs]
        bind(model, self._controls.start.click, self.inpaint, inputs, [result], "inpaint")

    def inpaint(self, call: Call) -> Image.Image:
        """Return a grid of variants."""
        image, settings = require_image(call[self._source.image]), self._controls.settings(call)
        painted = painted_mask(call[self._editor], self._pipeline.autoencoder.size)
        call.job.start(settings.variants * self._pipeline.num_codes)
        return _variant_grid(inpaint(self._pipeline, image, painted, settings, call.job.advance))

    def _make_editor(self) -> gr.ImageEditor:
        height, width = self._pipeline.autoencoder.size
        factor = max(1, round(SHOWN / max(height, width)))
        return gr.ImageEditor(
            label="Paint what to redraw",
            placeholder="Upload an image, or sample one.",
            elem_id="editor",
            type="numpy",
            image_mode="RGBA",
            format="png",
            sources=(),
            transforms=(),
            layers=False,
            buttons=[],
            height=SHOWN + 64,  # with its toolbars
            brush=gr.Brush(default_size=SHOWN // 12, colors=["#ff3b30"], color_mode="fixed"),
            canvas_size=(width * factor, height * factor),
        )


class VariationsTab:
    """Keeps the coarse levels of an image and samples the others."""

    def __init__(self, model: ServedModel) -> None:
        self._pipeline = model.pipeline
        names = progressive_levels(model.pipeline.autoencoder)[:-1]
        choices = [(" + ".join(reversed(kept)), len(kept)) for kept in names]
        with gr.Row():
            with gr.Column(scale=2, min_width=280):
                self._source = ImageSource(model)
                original = picture("Image")
                self._keep = gr.Radio(choices, value=1 if choices else None, label="Levels that stay fixed")
                self._controls = EditControls(model, self._source.label, "Sample variations")
            with gr.Column(scale=3, min_width=280):
                result = picture("Variations")
        self._source.show_in([original], lambda image: (shown(image),), "variations")
        inputs = [self._source.image, self._keep, *self._controls.inputs]
        bind(model, self._controls.start.click, self.vary, inputs, [result], "variations")

    def vary(self, call: Call) -> Image.Image:
        """Return a grid of variants."""
        image, settings = require_image(call[self._source.image]), self._controls.settings(call)
        call.job.start(settings.variants * self._pipeline.num_codes)
        return _variant_grid(vary(self._pipeline, image, call[self._keep], settings, call.job.advance))


class LevelsTab:
    """Shows what each level carries: reconstructions from the coarsest level alone to all levels."""

    def __init__(self, model: ServedModel) -> None:
        self._pipeline = model.pipeline
        self._names = progressive_levels(model.pipeline.autoencoder)
        count = len(self._names)
        self._source = ImageSource(model)
        slider = gr.Slider(
            1, max(count, 2), count, step=1, label="Levels: 1 is the top level only", interactive=count > 1
        )
        with gr.Row():
            original, result = picture("Image"), picture("Reconstruction")
        reconstructions = gr.State([])
        self._source.show_in([original, reconstructions, slider, result], self.show, "levels")
        slider.change(
            self.select, [reconstructions, slider], [result], show_progress="hidden", api_visibility="private"
        )

    def show(self, image: UInt8[Tensor, "c h w"]) -> tuple[Any, ...]:
        """Return the image, its reconstructions, the number of levels, and the reconstruction from all of them."""
        pictures = [shown(each) for each in reconstruct(self._pipeline, image)]
        return shown(image), pictures, len(pictures), self.select(pictures, len(pictures))

    def select(self, pictures: list[Image.Image], count: int) -> Any:
        """Return the reconstruction from the `count` coarsest levels, with their names."""
        if not pictures:
            return gr.skip()
        names = " + ".join(reversed(self._names[count - 1]))
        return gr.Image(pictures[count - 1], label=f"Reconstruction from {names}")


def _variant_grid(images: UInt8[Tensor, "v c h w"]) -> Image.Image:
    columns = math.ceil(len(images) ** 0.5)
    return to_pil(image_grid(images, columns, enlarge_to=256))
