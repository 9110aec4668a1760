"""The tab that shows code maps in color, where a code occurs, and the patches that use it."""

import random
from collections.abc import Callable
from functools import partial
from typing import Any

import gradio as gr
import torch
from jaxtyping import UInt8
from torch import Tensor

from sampling.app.code_pictures import CodedImages, code_colors, color_map, dim_others, encode_images, find_code
from sampling.app.controls import MAX_SEED, SHOWN, picture, shown
from sampling.app.events import Call, bind, bind_cancel
from sampling.app.pictures import sample
from sampling.app.uploads import read_upload
from sampling.app.worker import ServedModel
from sampling.params import SamplingConfig
from vqvae2.errors import UserError
from vqvae2.pictures import enlarge, image_grid, to_pil

_SAMPLES = 16
_MAX_UPLOADS = 64
_MAX_PATCHES = 40
_PATCH_COLUMNS = 8


class CodesTab:
    """Shows the code maps of a set of images."""

    def __init__(self, model: ServedModel) -> None:
        self._model = model
        self._colors = [code_colors(model.pipeline.autoencoder, level) for level in range(len(model.pipeline.levels))]
        self._coded, self._selected = gr.State(), gr.State(0)
        with gr.Row():
            upload = gr.UploadButton("Upload images", file_types=["image"], file_count="multiple", min_width=140)
            start = gr.Button(f"Sample {_SAMPLES} images", min_width=140)
            bind_cancel(model, gr.Button("Cancel", min_width=120))
        self._gallery = gr.Gallery(
            label="Images: click one", format="png", interactive=False, allow_preview=False, buttons=[]
        )
        with gr.Row():
            self._shown = picture("Image")
            self._maps = [picture(f"Codes, {level} level: click one") for level in reversed(model.pipeline.levels)]
        self._use = gr.Markdown()
        self._patches = picture("Patches that use the code, in the middle")
        self._bind(upload, start)

    def _bind(self, upload: gr.UploadButton, start: gr.Button) -> None:
        names = self._model.pipeline.levels
        image = [self._selected, self._shown, *self._maps, self._use, self._patches]
        everything = [self._coded, self._gallery, *image]
        bind(self._model, upload.upload, self._upload(upload), [upload], everything, "upload_codes", self._gallery)
        bind(self._model, start.click, self.sample, [], everything, "sample_codes", self._gallery)
        bind(self._model, self._gallery.select, self.select_image, [self._coded], image, "select_image", self._shown)
        inputs, outputs = [self._coded, self._selected], [self._shown, self._use, self._patches]
        for level, shown_map in zip(reversed(range(len(names))), self._maps, strict=True):
            work = partial(self.select_code, level=level)
            bind(self._model, shown_map.select, work, inputs, outputs, f"select_code_{names[level]}")

    def sample(self, call: Call) -> tuple[Any, ...]:
        """Sample images, and show them with the codes of the first."""
        pipeline = self._model.pipeline
        settings = {"count": _SAMPLES, "seed": random.randrange(MAX_SEED), "classes": ()}
        config = SamplingConfig.from_dict(dict(self._model.defaults) | settings, "sampling")
        call.job.start(_SAMPLES * pipeline.num_codes)
        return self._show_set(sample(pipeline, config, call.job.advance))

    def select_image(self, call: Call) -> tuple[Any, ...]:
        """Show the codes of the image that was clicked."""
        return self._show_image(self._require_set(call), call.event.index)

    def select_code(self, call: Call, level: int) -> tuple[Any, ...]:
        """Show where the clicked code of a level occurs, and patches that use it."""
        coded, number = self._require_set(call), call[self._selected]
        spec, name = self._model.pipeline.autoencoder.map_specs[level], self._model.pipeline.levels[level]
        across, down = call.event.index
        factor = _factor(spec.height, spec.width)
        row, column = min(down // factor, spec.height - 1), min(across // factor, spec.width - 1)
        code = int(coded.codes[level][number, row, column])
        use = find_code(coded, spec, level, code, _MAX_PATCHES)
        text = (
            f"Code {code} of {spec.codebook_size}, {name} level: {use.occurrences:,} times in {use.images} of "
            f"{len(coded.images)} images. The image above shows where; the patches below have it in the middle."
        )
        occurrences = dim_others(coded.images[number], coded.codes[level][number] == code)
        return shown(occurrences), text, to_pil(image_grid(use.patches, _PATCH_COLUMNS, enlarge_to=96))

    def _upload(self, button: gr.UploadButton) -> Callable[[Call], tuple[Any, ...]]:
        def upload(call: Call) -> tuple[Any, ...]:
            paths = call[button] or [None]
            if len(paths) > _MAX_UPLOADS:
                raise UserError(f"images: {len(paths)} were uploaded; choose at most {_MAX_UPLOADS}.")
            autoencoder = self._model.pipeline.autoencoder
            return self._show_set(torch.stack([read_upload(path, autoencoder) for path in paths]))

        return upload

    def _show_set(self, images: UInt8[Tensor, "b c h w"]) -> tuple[Any, ...]:
        coded = encode_images(self._model.pipeline, images)
        return (coded, [to_pil(image) for image in enlarge(images, 128)], *self._show_image(coded, 0))

    def _show_image(self, coded: CodedImages, number: int) -> tuple[Any, ...]:
        """Return the values of the components from the number of the image to the patches, which are emptied."""
        maps = [
            shown(color_map(codes[number], colors)) for codes, colors in zip(coded.codes, self._colors, strict=True)
        ]
        return (number, shown(coded.images[number]), *reversed(maps), "Click a code.", None)

    def _require_set(self, call: Call) -> CodedImages:
        if call[self._coded] is None:
            raise UserError("images: none yet. Upload images, or sample some.")
        return call[self._coded]


def _factor(height: int, width: int) -> int:
    """Return by how much `enlarge` enlarges a picture of this size."""
    return enlarge(torch.zeros(1, 1, height, width, dtype=torch.uint8), SHOWN).shape[2] // height
