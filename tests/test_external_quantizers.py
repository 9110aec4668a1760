"""The adapter of vector-quantize-pytorch, and SimVQ beside the implementation of that package."""

import sys
from pathlib import Path

import pytest
import torch
import vector_quantize_pytorch as peer

from vqvae2 import Autoencoder, AutoencoderConfig, ExternalConfig, LevelConfig, SimVQConfig, UserError
from vqvae2.quantizers import ExternalQuantizer

DIM = 8
QUANTIZERS = {
    "VectorQuantize": ({"codebook_size": 32}, 32),
    "LFQ": ({"codebook_size": 32}, 32),
    "FSQ": ({"levels": [4, 4, 3]}, 48),
    "SimVQ": ({"codebook_size": 32}, 32),
    "LatentQuantize": ({"levels": [4, 4, 3]}, 48),
    "ResidualVQ": ({"num_quantizers": 3, "codebook_size": 5}, 125),
    "ResidualFSQ": ({"num_quantizers": 2, "levels": [4, 3]}, 144),
    "ResidualLFQ": ({"num_quantizers": 2, "codebook_size": 16}, 256),
    "ResidualSimVQ": ({"num_quantizers": 2, "codebook_size": 16}, 256),
}


def build(name: str) -> ExternalQuantizer:
    torch.manual_seed(0)
    return ExternalConfig(name=name, arguments=QUANTIZERS[name][0], code_dim=DIM).build()


def features(*shape: int) -> torch.Tensor:
    return torch.randn(2, DIM, *shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", QUANTIZERS)
def test_codes_equal_those_of_the_package(name: str) -> None:
    ours = build(name).eval()
    torch.manual_seed(0)
    theirs = getattr(peer, name)(**{"dim": DIM} | QUANTIZERS[name][0]).eval()
    x = features(6, 5)
    latents = x.flatten(2) if name == "LatentQuantize" else x.flatten(2).mT
    expected, indices, *_ = theirs(latents)
    found = ours(x)
    digits = indices.reshape(2, 30, -1).long()
    base = round(QUANTIZERS[name][1] ** (1 / digits.shape[-1]))
    assert torch.equal(found.codes.flatten(1), sum(digits[..., i] * base**i for i in range(digits.shape[-1])))
    expected = expected if name == "LatentQuantize" else expected.mT
    torch.testing.assert_close(found.quantized.flatten(2), expected)
    assert ours.codebook_size == QUANTIZERS[name][1]
    assert 0 <= int(found.codes.min()) <= int(found.codes.max()) < ours.codebook_size


@pytest.mark.parametrize("name", QUANTIZERS)
@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 2)])
def test_lookup_inverts_and_gradients_flow(name: str, shape: tuple[int, ...]) -> None:
    quantizer = build(name)
    x = features(*shape).requires_grad_()
    output = quantizer(x)
    (output.quantized.square().sum() + output.loss).backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    with torch.autocast("cpu", torch.bfloat16):
        assert quantizer(x.detach().bfloat16()).quantized.dtype == torch.float32
    quantizer.eval()
    output = quantizer(x.detach())
    assert output.codes.shape == (2, *shape)
    torch.testing.assert_close(quantizer.lookup(output.codes), output.quantized)


@pytest.mark.parametrize("name", QUANTIZERS)
def test_autoencoders_with_external_quantizers_round_trip(name: str, tmp_path: Path) -> None:
    quantizer = ExternalConfig(name=name, arguments=QUANTIZERS[name][0], code_dim=DIM)
    config = AutoencoderConfig(channels=8, residual_channels=4, levels=(LevelConfig(stride=4, quantizer=quantizer),))
    torch.manual_seed(0)
    model = config.build((16, 16)).eval()
    model.save_pretrained(tmp_path)
    loaded = Autoencoder.from_pretrained(tmp_path)
    images = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1
    assert torch.equal(loaded.encode(images)[0], model.encode(images)[0])
    with torch.device("meta"):
        config.build((16, 16))  # as the check of a config does
    torch.testing.assert_close(loaded.decode(loaded.encode(images)), model.reconstruct(images))
    assert loaded.map_specs[0].codebook_size == QUANTIZERS[name][1]


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("lfq", {}, "has no class 'lfq'"),
        ("rotate_to", {}, "has no class 'rotate_to'"),
        ("LFQ", {"codebok_size": 8}, r"quantizer.arguments: LFQ does not accept them \(.*codebok_size"),
        ("ResidualVQ", {"num_quantizers": 8, "codebook_size": 16}, "the codes must be 1 to 16,777,216"),
        (
            "ResidualVQ",
            {"num_quantizers": 2, "codebook_size": 16, "quantize_dropout": True},
            "quantize_dropout: .*Remove",
        ),
        ("RandomProjectionQuantizer", {"codebook_size": 8, "codebook_dim": 4}, "does not give one code per position"),
        ("LFQ", {"codebook_size": 8, "num_codebooks": 2}, "does not give one code per position"),
    ],
)
def test_invalid_settings_raise_one_line(name: str, arguments: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        ExternalConfig(name=name, arguments=arguments, code_dim=DIM).build()
    assert "\n" not in str(error.value)


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vector_quantize_pytorch", None)
    with pytest.raises(UserError, match=r"pip install 'vqvae2\[quantizers\]'"):
        ExternalConfig(name="LFQ", arguments={"codebook_size": 8}).build()


@pytest.mark.parametrize("rotation", [False, True])
def test_simvq_matches_the_package(rotation: bool) -> None:
    torch.manual_seed(0)
    estimator = "rotation" if rotation else "straight-through"
    ours = SimVQConfig(codebook_size=20, code_dim=DIM, gradient_estimator=estimator).build()
    theirs = peer.SimVQ(dim=DIM, codebook_size=20, rotation_trick=rotation)
    with torch.no_grad():
        theirs.frozen_codebook.copy_(ours.frozen)
        theirs.code_transform.weight.copy_(ours.map.weight)
    x, upstream = features(6).requires_grad_(), features(6)
    y = x.detach().clone().requires_grad_()
    found, (quantized, indices, loss) = ours(x), theirs(y.mT)
    assert torch.equal(found.codes, indices)
    torch.testing.assert_close(found.quantized, quantized.mT)
    torch.testing.assert_close(found.loss, loss)
    ((found.quantized * upstream).sum() + found.loss).backward()
    ((quantized.mT * upstream).sum() + loss).backward()
    torch.testing.assert_close(x.grad, y.grad)
    torch.testing.assert_close(ours.map.weight.grad, theirs.code_transform.weight.grad)
    assert [name for name, _ in ours.named_parameters()] == ["map.weight"], "the codebook is frozen"


def test_simvq_trains_all_codes_and_takes_no_restarts() -> None:
    quantizer = SimVQConfig(codebook_size=20, code_dim=DIM).build()
    before = quantizer.codebook.detach().clone()
    optimizer = torch.optim.SGD(quantizer.parameters(), 0.5)
    output = quantizer(features(4) + 3)
    output.loss.backward()
    optimizer.step()
    quantizer.update()
    moved = (quantizer.codebook.detach() - before).norm(dim=1)
    assert len(output.codes.unique()) < 20
    assert (moved > 0).all(), "codes that were not used move with the others"
    for setting in ({"kmeans_init": True}, {"dead_code_threshold": 0.1}):
        with pytest.raises(UserError, match=next(iter(setting))):
            SimVQConfig.from_dict({"kind": "simvq", **setting}, "test")
