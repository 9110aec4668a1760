"""What the prior of a frame sees, the sampling of next frames, and the model of three codes."""

from pathlib import Path

import pytest
import torch

from experiments.video.three_codes import ThreeCodes, ThreeCodesConfig
from sampling.next_frames import sample_next_frames
from sampling.params import LevelSamplingParams
from sampling.sample_level import Noise, sample_level
from tests.decoders import incremental_logits
from tests.test_videos import write_frames
from vqvae2.code_maps import MapSpec
from vqvae2.data.clips import FrameHistories, check_clips, find_clips
from vqvae2.data.code_store import CodeHeader, CodeStore, CodeWriter
from vqvae2.data.images import DataConfig
from vqvae2.data.splits import open_datasets
from vqvae2.errors import UserError
from vqvae2.priors import PixelCNNConfig, PixelSNAILConfig, Prior, PriorConfig, PriorSpec, TransformerConfig
from vqvae2.quantizers import EMAConfig

BOTTOM, TOP = (MapSpec(codebook_size=9, height=side, width=side) for side in (4, 2))
ACTION = MapSpec(codebook_size=3, height=1, width=1)
PRIORS: dict[str, PriorConfig] = {
    "pixelsnail": PixelSNAILConfig(channels=8, residual_channels=8, kernel=3, blocks=1, layers=1, heads=2, dropout=0),
    "pixelcnn": PixelCNNConfig(channels=8, kernel=3, layers=2, output_channels=8, dropout=0),
    "transformer": TransformerConfig(channels=8, layers=1, heads=2, dropout=0),
}


def write_store(folder: Path, names: list[str], classes: tuple[str, ...] = ("a", "b", "c")) -> CodeStore:
    """Write a store of two levels with random codes and actions."""
    generator = torch.Generator().manual_seed(0)
    header = CodeHeader(
        levels=(BOTTOM, TOP), count=len(names), classes=classes, split="train", source="x", autoencoder="0" * 64
    )
    writer = CodeWriter(folder, header)
    codes = [torch.randint(9, (len(names), *level.shape), generator=generator) for level in (BOTTOM, TOP)]
    labels = torch.randint(3, (len(names),), generator=generator) if classes else torch.full((len(names),), -1)
    writer.write(0, codes, labels, names)
    writer.finish()
    return CodeStore.open(folder)


def test_clips_are_the_frames_of_one_folder(tmp_path: Path) -> None:
    store = write_store(tmp_path, ["a/0", "a/1", "a/2", "b/x/0", "b/x/1", "c/0"])
    assert find_clips(store) == [range(3), range(3, 5), range(5, 6)]


def test_clips_with_missing_or_other_frames_between_are_refused(tmp_path: Path) -> None:
    store = write_store(tmp_path / "codes", ["a/000", "a/001", "a/extra/0", "a/x02"])
    with pytest.raises(UserError, match="the folder a/extra is between the frames of the clip a"):
        find_clips(store)
    store.header = store.header.model_copy(update={"unreadable": (1,)})
    with pytest.raises(UserError, match=r"codes: unreadable frames: 1\..*delete this folder and run"):
        find_clips(store)


def test_labels_that_never_change_within_a_clip_are_refused(tmp_path: Path) -> None:
    root = write_frames(tmp_path / "frames", clips=8, frames=3)
    config = DataConfig(path=str(root), size=16, labels="folder", split_by="folder", num_workers=0)
    with pytest.raises(UserError, match="the label never changes within a clip"):
        check_clips(open_datasets(config))
    check_clips(open_datasets(config.model_copy(update={"labels": "none"})))
    table = tmp_path / "actions.csv"
    names = [path.relative_to(root).as_posix() for path in sorted(root.rglob("*.png"))]
    rows = [f"{name},{'left' if number % 2 else 'right'}" for number, name in enumerate(names)]
    table.write_text("\n".join(["file_name,label", *rows]))
    check_clips(open_datasets(config.model_copy(update={"labels": str(table)})))


def test_histories_hold_what_a_prior_sees(tmp_path: Path) -> None:
    store = write_store(tmp_path, [f"a/{k}" for k in range(5)] + ["b/0", "b/1"] + [f"c/{k}" for k in range(3)])
    data = FrameHistories(store, level=0, context_frames=2, with_actions=True)
    assert data.targets.tolist() == [2, 3, 4, 9]  # the clip b is too short
    assert data.header.levels == (BOTTOM, BOTTOM, BOTTOM, TOP, ACTION)
    frame, last, before, top, action = data.read([1, 3]).codes
    records = store.read(range(10))
    for found, level, numbers in ((frame, 0, [3, 9]), (last, 0, [2, 8]), (before, 0, [1, 7]), (top, 1, [3, 9])):
        assert torch.equal(found, records.codes[level][numbers])
    assert action.flatten().tolist() == records.label[[3, 9]].tolist()
    coarse = FrameHistories(store, level=1, context_frames=1, with_actions=False)
    assert coarse.header.levels == (TOP, TOP)
    assert len(coarse) == len(coarse.targets) == 7
    assert torch.equal(coarse[(6, 123)].codes[1], records.codes[1][8])  # as training reads it


def test_clips_that_are_too_short_give_a_one_line_error(tmp_path: Path) -> None:
    store = write_store(tmp_path, ["a/0", "a/1", "b/0"])
    with pytest.raises(UserError, match="context_frames: no clip of train has more than 2 frames"):
        FrameHistories(store, level=0, context_frames=2, with_actions=True)


def make_prior(name: str, level: MapSpec, *coarser: MapSpec) -> Prior:
    torch.manual_seed(0)
    prior = PRIORS[name].build(PriorSpec(level=level, coarser=coarser)).eval()
    for parameter in prior.parameters():  # so that every input has a visible effect
        torch.nn.init.normal_(parameter)
    return prior


@pytest.mark.parametrize("name", PRIORS)
def test_logits_depend_on_the_action_and_on_every_given_frame(name: str) -> None:
    prior = make_prior(name, TOP, TOP, TOP, ACTION)
    generator = torch.Generator().manual_seed(1)
    codes, *coarser = (torch.randint(9, (2, 2, 2), generator=generator) for _ in range(3))
    coarser.append(torch.zeros(2, 1, 1, dtype=torch.int64))
    logits = prior(codes, tuple(coarser))
    for index in range(3):
        changed = list(coarser)
        changed[index] = (coarser[index] + 1) % 3
        assert not torch.allclose(prior(codes, tuple(changed)), logits)
    later = codes.clone()
    later[:, 1, 1] = (later[:, 1, 1] + 1) % 9
    torch.testing.assert_close(prior(later, tuple(coarser)), logits)  # the last code is seen by no position
    torch.testing.assert_close(incremental_logits(prior, codes, tuple(coarser)), logits)


def test_next_frames_are_sampled_from_those_before() -> None:
    bottom, top = make_prior("pixelsnail", BOTTOM, BOTTOM, BOTTOM, TOP, ACTION), make_prior("pixelcnn", TOP, TOP, TOP)
    given = tuple(torch.randint(9, (3, 2, *level.shape)) for level in (BOTTOM, TOP))
    actions, params = torch.tensor([[0, 1], [1, 1], [2, 0]]), LevelSamplingParams(temperature=0.9)
    clips = [(0, 0), (1, 0), (7, 1)]
    codes = sample_next_frames([bottom, top], given, actions, 5, clips, params)
    assert [tuple(level.shape) for level in codes] == [(3, 2, 4, 4), (3, 2, 2, 2)]
    frames = given
    for step in range(2):
        numbers = [(*clip, step) for clip in clips]
        last = [(level[:, -1], level[:, -2]) for level in frames]
        coarse = sample_level(top, Noise(5, numbers, 1), params, last[1])
        seen = (*last[0], coarse, actions[:, step, None, None])
        fine = sample_level(bottom, Noise(5, numbers, 0), params, seen)
        assert torch.equal(codes[0][:, step], fine)
        assert torch.equal(codes[1][:, step], coarse)
        frames = tuple(torch.cat([level, new[:, None]], 1) for level, new in zip(frames, (fine, coarse), strict=True))
    alone = sample_next_frames([bottom, top], tuple(level[2:] for level in given), actions[2:], 5, clips[2:], params)
    assert all(torch.equal(one[0], level[2]) for one, level in zip(alone, codes, strict=True))
    others = sample_next_frames([bottom, top], given, (actions + 1) % 3, 5, clips, params)
    assert not torch.equal(others[0][:, 0], codes[0][:, 0])
    assert torch.equal(others[1], codes[1])  # this prior does not see the action


@pytest.mark.parametrize("name", PRIORS)
def test_three_codes_reach_the_decoder_and_gradients_the_encoder(name: str) -> None:
    torch.manual_seed(0)
    quantizer = EMAConfig(codebook_size=5, code_dim=4, kmeans_init=False)
    network = ThreeCodes(ThreeCodesConfig(channels=8, quantizer=quantizer, decoder=PRIORS[name]), BOTTOM)
    codes = torch.randint(9, (6, 4, 4))
    logits, quantization = network(codes)
    assert quantization.codes.shape == (6, 1, 3)
    torch.nn.functional.cross_entropy(logits, codes).backward()
    for parameter in (network.embedding.weight, network.conditioner.expand.weight):
        assert parameter.grad is not None
        assert parameter.grad.abs().sum() > 0
    network.eval()
    logits, _ = network(codes)
    latents = network.encode(codes)
    torch.testing.assert_close(network.decoder(codes, (latents,)), logits)
    torch.testing.assert_close(incremental_logits(network.decoder, codes, (latents,)), logits)
    params = LevelSamplingParams(temperature=0), LevelSamplingParams(temperature=0, dtype="bf16")
    exact, rounded = (sample_level(network.decoder, Noise(0, range(6), 0), each, (latents,)) for each in params)
    assert (exact == rounded).double().mean() > 0.8
    torch.testing.assert_close(network.decoder(codes, (latents,)), logits)  # the decoder itself is unchanged
    assert not torch.allclose(network.decoder(codes, ((latents + 1) % 5,)), logits)
    unquantized, output = network(codes, quantized=False)
    torch.testing.assert_close(output.quantized, network.features(codes))
    assert unquantized.shape == logits.shape
