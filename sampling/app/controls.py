"""Components that several tabs share: sampling settings, the source of an image, buttons and pictures."""

import random
from collections.abc import Callable, Sequence
from typing import Any

import gradio as gr
from gradio.components import Component
from jaxtyping import UInt8
from PIL import Image
from torch import Tensor

from sampling.app.events import Call, bind, bind_cancel
from sampling.app.pictures import MAX_VARIANTS, EditSettings, sample
from sampling.app.uploads import read_upload
from sampling.app.worker import ServedModel
from sampling.params import SamplingConfig
from vqvae2.pictures import enlarge, to_pil

_PICTURE_WIDTH = 240  # pixels; on a narrower screen, pictures stand below each other
SHOWN = 384  # pixels of the longer side of a single image, about
MAX_SEED = 2**53 - 1  # largest integer that a browser represents exactly


def shown(image: UInt8[Tensor, "c h w"]) -> Image.Image:
    """Return an image as a picture of about `SHOWN` pixels."""
    return to_pil(enlarge(image[None], SHOWN)[0])


def picture(label: str) -> gr.Image:
    """Return a component that shows a picture."""
    return gr.Image(
        label=label, type="pil", format="png", interactive=False, buttons=["download"], min_width=_PICTURE_WIDTH
    )


def _action_buttons(model: ServedModel, label: str) -> gr.Button:
    """Return a button that starts a job, with a button beside it that cancels the jobs of the session."""
    with gr.Row():
        start = gr.Button(label, variant="primary", min_width=120)
        bind_cancel(model, gr.Button("Cancel", min_width=120))
    return start


class LevelControls:
    """The seed, a button that starts the job, and temperature, top-p and guidance scale of each level."""

    def __init__(self, model: ServedModel, button: str, is_open: bool) -> None:
        self._defaults, self._levels = model.defaults.params, model.pipeline.levels
        self.seed = gr.Number(
            min(model.defaults.seed, MAX_SEED), label="Seed", precision=0, minimum=0, maximum=MAX_SEED
        )
        self.start = _action_buttons(model, button)
        self._sliders: dict[tuple[str, str], gr.Slider] = {}  # by parameter and level
        with gr.Accordion("Temperature, top-p, guidance", open=is_open):
            for index, level in reversed(list(enumerate(self._levels))):
                self._add_level(level, model.supports_guidance(index))

    def _add_level(self, level: str, guidance: bool) -> None:
        params = self._defaults.for_level(level)
        ranges = {
            "temperature": (0, max(2.0, params.temperature), f"Temperature, {level}"),
            "top_p": (0.01, 1, f"Top-p, {level}"),
            "guidance_scale": (0, max(5.0, params.guidance_scale), f"Guidance scale, {level}"),
        }
        if not guidance:
            del ranges["guidance_scale"]
        for name, (low, high, label) in ranges.items():
            self._sliders[name, level] = gr.Slider(low, high, getattr(params, name), step=0.01, label=label)

    @property
    def inputs(self) -> list[Component]:
        """The components whose values `settings` needs."""
        return [self.seed, *self._sliders.values()]

    def settings(self, call: Call) -> dict[str, Any]:
        """Return the seed and the sampling parameters per level, as keys of a config."""
        settings: dict[str, Any] = {"seed": call[self.seed]} | dict(self._defaults)
        for name in {name for name, _ in self._sliders}:
            defaults = {level: getattr(self._defaults.for_level(level), name) for level in self._levels}
            chosen = {level: call[slider] for (key, level), slider in self._sliders.items() if key == name}
            settings[name] = defaults | chosen
        return settings


class EditControls:
    """Settings of edits, and the button that starts the job. The class is that of the image."""

    def __init__(self, model: ServedModel, label: gr.Dropdown, button: str) -> None:
        self._label = label
        self._variants = gr.Slider(1, MAX_VARIANTS, 4, step=1, label="Variants")
        self._levels = LevelControls(model, button, is_open=False)
        self.start = self._levels.start

    @property
    def inputs(self) -> list[Component]:
        """The components whose values `settings` needs."""
        return [self._label, self._variants, *self._levels.inputs]

    def settings(self, call: Call) -> EditSettings:
        """Return the settings.

        Raises:
            UserError: If one is out of range.
        """
        label = call[self._label]
        values = {"variants": call[self._variants], "classes": () if label is None else (label,)}
        return EditSettings.from_dict(values | self._levels.settings(call), "settings")


class ImageSource:
    """The image of a tab: uploaded, or sampled by the model.

    Attributes:
        image: The state that holds it, uint8 (C, H, W), or None.
        label: Its class, hidden for an unconditional model. Sampled images have the selected class.
    """

    def __init__(self, model: ServedModel) -> None:
        self._model = model
        choices = model.class_choices
        self.image = gr.State()
        with gr.Row():
            self._upload = gr.UploadButton("Upload an image", file_types=["image"], type="filepath", min_width=140)
            self._sample = gr.Button("Sample an image", min_width=140)
        self.label = gr.Dropdown(
            choices, value=0 if choices else None, label="Class of the image", visible=bool(choices)
        )

    def show_in(self, outputs: Sequence[Component], show: Callable[[UInt8[Tensor, "c h w"]], Any], tab: str) -> None:
        """Show each new image in `outputs`: the values that `show` returns for it."""

        def upload(call: Call) -> tuple[Any, ...]:
            image = read_upload(call[self._upload], self._model.pipeline.autoencoder)
            return (image, *show(image))

        def sample_one(call: Call) -> tuple[Any, ...]:
            image = self._sample_image(call)
            return (image, *show(image))

        targets = [self.image, *outputs]
        bind(self._model, self._upload.upload, upload, [self._upload], targets, f"upload_{tab}")
        bind(self._model, self._sample.click, sample_one, [self.label], targets, f"sample_{tab}")

    def _sample_image(self, call: Call) -> UInt8[Tensor, "c h w"]:
        label, pipeline = call[self.label], self._model.pipeline
        seed = random.randrange(MAX_SEED)
        settings = {"count": 1, "seed": seed, "classes": () if label is None else (label,)}
        config = SamplingConfig.from_dict(dict(self._model.defaults) | settings, "sampling")
        call.job.start(pipeline.num_codes)
        return sample(pipeline, config, call.job.advance)[0]
