"""Training of a prior of the next frame, given the preceding frames and the action that leads to it."""

from pathlib import Path

from sampling.params import LevelSamplingParams
from sampling.run_config import PriorStageConfig
from sampling.sample_level import Noise, sample_level
from train.accelerator import to_device
from train.stages.prior import PriorStage
from vqvae2.data.clips import FrameHistories
from vqvae2.data.code_store import CodeStore
from vqvae2.data.images import to_uint8
from vqvae2.data.samplers import evenly_spaced
from vqvae2.models import Autoencoder
from vqvae2.pictures import interleave_rows, save_grid
from vqvae2.run_folder import level_names

_PREVIEW_FRAMES = 8


class FramePriorStage(PriorStage):
    """Training of the prior of one level of the next frame.

    Args:
        level: Name of the level.
        stores: Codes of the frames for training and for validation.
        context_frames: Number of preceding frames that the prior sees.
        with_actions: Whether the prior sees the action, if the frames have actions.
    """

    def __init__(
        self,
        level: str,
        autoencoder: Autoencoder,
        stores: tuple[CodeStore, CodeStore],
        config: PriorStageConfig,
        context_frames: int,
        with_actions: bool,
    ) -> None:
        names = level_names(len(autoencoder.map_specs))
        self.autoencoder, self.context_frames, self.index = autoencoder, context_frames, names.index(level)
        self.shown = names[self.index :]
        shown = bool(stores[0].header.classes) and with_actions
        training, held_out = (FrameHistories(store, self.index, context_frames, shown) for store in stores)
        name = level if with_actions else f"{level}-without-actions"
        super().__init__((name, 0), training, held_out, config, {"autoencoder": autoencoder.digest})

    def preview(self, path: Path) -> None:
        """Write held-out frames, each above the same frame sampled given what the prior sees."""
        chosen = evenly_spaced(len(self.validation_data), _PREVIEW_FRAMES)
        frame, *coarser = self.validation_data.read(chosen).codes
        device = next(self.network.parameters()).device
        noise = Noise(0, chosen, self.index)
        sampled = sample_level(self.network, noise, LevelSamplingParams(), to_device(tuple(coarser), device)).cpu()
        finer = [frame.new_zeros(len(frame), *spec.shape) for spec in self.autoencoder.map_specs[: self.index]]
        above = coarser[self.context_frames :][: len(self.shown) - 1]
        rows = (to_uint8(self.autoencoder.decode((*finer, each, *above), self.shown)) for each in (frame, sampled))
        save_grid(path, *interleave_rows(*rows, columns=_PREVIEW_FRAMES))
