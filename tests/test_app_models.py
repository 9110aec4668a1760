"""The page of `vqvae2 app` with other models: unconditional, gray, transparent, not square, one to three levels."""

import asyncio
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("gradio", reason="gradio is not installed")

import gradio as gr

from sampling.app.page import build_page
from sampling.app.worker import ServedModel
from sampling.params import SamplingConfig
from sampling.pipeline import VQVAE2Pipeline
from vqvae2 import AutoencoderConfig, EMAConfig, PixelSNAILConfig, PriorSpec
from vqvae2.models.autoencoder import LevelConfig

SMALL = PixelSNAILConfig(channels=8, residual_channels=8, blocks=1, layers=1, heads=2, kernel=3)


def make_pipeline(levels: int, size: tuple[int, int], channels: int, classes: int = 0) -> VQVAE2Pipeline:
    """Return a pipeline with random weights."""
    torch.manual_seed(0)
    quantizer = EMAConfig(codebook_size=16, code_dim=4)
    config = AutoencoderConfig(
        levels=tuple(LevelConfig(stride=2, quantizer=quantizer) for _ in range(levels)), channels=8, residual_channels=4
    )
    autoencoder = config.build(size, channels).eval()
    maps = autoencoder.map_specs
    specs = [PriorSpec(level=maps[k], coarser=maps[k + 1 :], num_classes=classes) for k in range(levels)]
    priors = tuple(SMALL.build(spec).eval() for spec in specs)
    return VQVAE2Pipeline(autoencoder, priors, tuple(f"class {number}" for number in range(classes)))


class Visitor:
    """The page without a browser: the values of its components, and the events that change them.

    Create it in an event loop: gradio creates one otherwise, and never closes it.
    """

    def __init__(self, pipeline: VQVAE2Pipeline, **settings: Any) -> None:
        self.model = ServedModel("a model", pipeline, SamplingConfig(**settings))
        self.page = build_page(self.model)
        self.values = {block: getattr(block, "value", None) for block in self.page.blocks.values()}

    async def cause(self, name: str, index: Any = None) -> list[Any]:
        """Cause the event with a name, and return the new values of the components that it changes."""
        (event,) = [each for each in self.page.fns.values() if each.api_name == name]
        values = {component: self.values[component] for component in event.inputs}
        session = SimpleNamespace(session_hash="visitor")
        results = await event.fn(values, SimpleNamespace(index=index), session)
        results = [results] if len(event.outputs) == 1 else list(results)
        self.values.update(zip(event.outputs, results, strict=True))
        return results

    def labels(self, kind: type) -> list[str]:
        """Return the labels of the visible components of a kind."""
        return [str(block.label) for block in self.page.blocks.values() if isinstance(block, kind) and block.visible]


@pytest.mark.parametrize(
    ("levels", "size", "channels", "classes"), [(3, (16, 32), 1, 0), (2, (16, 16), 4, 0), (2, (24, 16), 3, 2)]
)
def test_every_tab_works_with_other_models(levels: int, size: tuple[int, int], channels: int, classes: int) -> None:
    async def visit() -> None:
        visitor = Visitor(make_pipeline(levels, size, channels, classes), count=2)
        assert ("Class of the image" in visitor.labels(gr.Dropdown)) == bool(classes)
        assert not any("Guidance" in label for label in visitor.labels(gr.Slider))  # no training with label dropout
        (samples,) = await visitor.cause("sample")
        assert np.array(samples).std() > 0
        assert (await visitor.cause("sample_variations"))[0].shape == (channels, *size)
        (variants,) = await visitor.cause("variations")
        assert abs(variants.width / variants.height - size[1] / size[0]) < 0.1
        pictures = (await visitor.cause("sample_levels"))[2]
        assert len(pictures) == levels
        assert {picture.width * size[0] for picture in pictures} == {pictures[0].height * size[1]}
        coded, gallery, number, *shown = await visitor.cause("sample_codes")
        assert (len(coded.codes), len(gallery), number, len(shown)) == (levels, 16, 0, levels + 3)
        assert (await visitor.cause("select_image", 3))[0] == 3
        _, text, patches = await visitor.cause("select_code_bottom", (0, 0))
        code = int(coded.codes[0][3, 0, 0])
        assert text.startswith(f"Code {code} of 16, bottom level: {int((coded.codes[0] == code).sum()):,} times")
        assert np.array(patches).std() > 0
        visitor.model.worker.close()

    asyncio.run(visit())


def test_model_with_one_level_has_nothing_to_vary() -> None:
    async def visit() -> None:
        visitor = Visitor(make_pipeline(1, (16, 16), 3))
        await visitor.cause("sample_variations")
        with pytest.raises(gr.Error, match="this model has one level"):
            await visitor.cause("variations")
        assert len((await visitor.cause("sample_levels"))[2]) == 1
        visitor.model.worker.close()

    asyncio.run(visit())
