"""Test the feature extractor against pytorch-fid's network, and errors for invalid weights."""

import socket
from pathlib import Path
from unittest import mock

import pytest
import torch
from pytorch_fid.inception import InceptionV3, fid_inception_v3
from safetensors.torch import save_file

from tests.inception_fixture import extractor, weights
from vqvae2.errors import UserError
from vqvae2.files import digest
from vqvae2.metrics import inception
from vqvae2.metrics.feature_extractor import WeightsUnavailableError
from vqvae2.metrics.inception import InceptionFeatures, build_network, load_inception


def images(n: int = 2, height: int = 33, width: int = 50) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (n, 3, height, width), dtype=torch.uint8, generator=generator)


@pytest.fixture
def peer_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "pytorch_fid.inception.load_state_dict_from_url", lambda *_, **__: torch.load(weights(), weights_only=True)
    )


@pytest.mark.usefixtures("peer_weights")
def test_features_of_every_depth_match_pytorch_fid() -> None:
    peer = InceptionV3(list(range(4))).eval()
    with torch.no_grad():
        maps = peer(images() / 255)
    for dims, expected in zip(inception.FEATURE_DIMS, maps, strict=True):
        features, logits = extractor(dims)(images())
        assert features.shape == (2, dims)
        assert features.dtype == torch.float32
        assert logits is None
        expected = expected.mean((2, 3))
        assert (features - expected).abs().max() < 2e-5 * expected.abs().max()
        assert expected.std(0).mean() > 1e-3 * expected.abs().mean()  # otherwise equality would prove little


@pytest.mark.usefixtures("peer_weights")
def test_logits_are_available_at_any_feature_depth() -> None:
    network = fid_inception_v3().eval()
    deep = extractor(2048)(images(), logits=True)
    assert deep.logits is not None
    with torch.no_grad():
        torch.testing.assert_close(deep.logits, network.fc(deep.features) - network.fc.bias, rtol=1e-4, atol=1e-3)
    shallow = extractor(64)(images(), logits=True)
    torch.testing.assert_close(shallow.logits, deep.logits)
    torch.testing.assert_close(shallow.features, extractor(64)(images()).features)


def test_features_are_independent_of_the_batch() -> None:
    together = extractor(192)(images(3)).features
    alone = torch.cat([extractor(192)(image[None]).features for image in images(3)])
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "bad",
    [torch.zeros(1, 1, 8, 8, dtype=torch.uint8), torch.zeros(1, 3, 8, 8), torch.zeros(3, 8, 8, dtype=torch.uint8)],
    ids=["gray", "float", "no batch"],
)
def test_non_uint8_rgb_raises(bad: torch.Tensor) -> None:
    with pytest.raises(UserError, match="expected uint8 RGB"):
        extractor(64)(bad)


def test_digest_is_recorded_and_identifies_the_standard_weights() -> None:
    own = extractor(64)
    assert own.weights_digest == digest(weights())
    assert not own.is_standard
    assert InceptionFeatures(build_network(), 64, "6726825d" + "0" * 56).is_standard
    assert not any(parameter.requires_grad for parameter in own.parameters())


def test_safetensors_and_files_without_batch_counters_load(tmp_path: Path) -> None:
    state = torch.load(weights(), weights_only=True)
    state = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    save_file(state, tmp_path / "w.safetensors")
    torch.testing.assert_close(
        load_inception(tmp_path / "w.safetensors", 64)(images()).features, extractor(64)(images()).features
    )


def test_weights_of_another_network_raise_and_name_the_first_mismatched_key(tmp_path: Path) -> None:
    state = torch.load(weights(), weights_only=True)
    incomplete = dict(state)
    first = next(iter(incomplete))
    del incomplete[first]
    for modified, message in (
        (incomplete, f"missing key `{first}`"),
        (state | {"AuxLogits.x": torch.zeros(1)}, "unexpected key `AuxLogits.x`"),
        (state | {"fc.bias": torch.zeros(1000)}, r"`fc.bias` has shape \(1000,\), expected \(1008,\)"),
    ):
        save_file(modified, tmp_path / "w.safetensors")
        with pytest.raises(UserError, match=message) as caught:
            load_inception(tmp_path / "w.safetensors")
        assert "\n" not in str(caught.value)


class PickledCode:
    def __reduce__(self):
        return (pytest.fail, ("pickled code was executed",))


def test_corrupted_files_and_pickled_code_give_one_line_errors(tmp_path: Path) -> None:
    (tmp_path / "cut.pth").write_bytes(weights().read_bytes()[:100_000])
    (tmp_path / "empty.pth").write_bytes(b"")
    (tmp_path / "text.pth").write_text("not weights")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{}")
    torch.save({"x": PickledCode()}, tmp_path / "pickled.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    for path in tmp_path.iterdir():
        with pytest.raises(UserError, match=r"corrupted|not a state dict") as caught:
            load_inception(path)
        assert path.name in str(caught.value)
        assert "\n" not in str(caught.value)


def test_invalid_paths_and_dimensions_raise(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        load_inception(tmp_path / "none.pth")
    with pytest.raises(UserError, match="is a folder"):
        load_inception(tmp_path)
    with pytest.raises(UserError, match="64, 192, 768, 2048"):
        InceptionFeatures(build_network(), 100, "")


@pytest.mark.parametrize("error", [OSError("no route"), RuntimeError("invalid hash value"), TimeoutError("timed out")])
def test_failed_download_gives_one_line_error_with_instructions(error: Exception, tmp_path: Path) -> None:
    timeouts = []

    def download(*_, **__) -> None:
        timeouts.append(socket.getdefaulttimeout())
        raise error

    with (
        mock.patch("torch.hub.get_dir", return_value=str(tmp_path)),
        mock.patch("torch.hub.download_url_to_file", download),
        pytest.raises(WeightsUnavailableError) as caught,
    ):
        load_inception()
    message = str(caught.value)
    for part in (inception.WEIGHTS_NAME, "91 MB", "6726825d", "--inception-weights", str(tmp_path)):
        assert part in message
    assert "\n" not in message
    assert timeouts[0] <= 10
    assert socket.getdefaulttimeout() is None


def test_weights_in_the_torch_hub_cache_are_used(tmp_path: Path) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / inception.WEIGHTS_NAME).symlink_to(weights())
    with mock.patch("torch.hub.get_dir", return_value=str(tmp_path)):
        assert load_inception(dims=64).weights_digest == digest(weights())
