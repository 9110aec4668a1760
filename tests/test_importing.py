"""Test importing checkpoints of the widely used PyTorch VQ-VAE-2, against a reimplementation of its network."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.test_commands import fails
from vqvae2 import Autoencoder
from vqvae2.__main__ import main
from vqvae2.errors import UserError
from vqvae2.models.importing import import_autoencoder

C, R, D, K = 16, 6, 8, 12  # channel, residual channel, embed_dim, n_embed


def stack(*layers: nn.Module) -> nn.Module:
    holder = nn.Module()
    holder.blocks = nn.Sequential(*layers)
    return holder


def down(inputs: int, outputs: int) -> nn.Module:
    return nn.Conv2d(inputs, outputs, 4, 2, 1)


def up(inputs: int, outputs: int) -> nn.Module:
    return nn.ConvTranspose2d(inputs, outputs, 4, 2, 1)


def same(inputs: int, outputs: int) -> nn.Module:
    return nn.Conv2d(inputs, outputs, 3, padding=1)


def residual() -> nn.Module:
    holder = nn.Module()
    holder.conv = nn.Sequential(nn.ReLU(), nn.Conv2d(C, R, 3, padding=1), nn.ReLU(), nn.Conv2d(R, C, 1))
    holder.forward = lambda x: x + holder.conv(x)
    return holder


class ReferenceVQVAE(nn.Module):
    """The other implementation's network, rebuilt from the keys and shapes of its state dict."""

    def __init__(self) -> None:
        super().__init__()
        relu = nn.ReLU
        self.enc_b = stack(down(3, C // 2), relu(), down(C // 2, C), relu(), same(C, C), residual(), residual(), relu())
        self.enc_t = stack(down(C, C // 2), relu(), same(C // 2, C), residual(), residual(), relu())
        self.quantize_conv_t, self.quantize_conv_b = nn.Conv2d(C, D, 1), nn.Conv2d(D + C, D, 1)
        self.dec_t = stack(same(D, C), residual(), residual(), relu(), up(C, D))
        self.upsample_t = up(D, D)
        self.dec = stack(same(2 * D, C), residual(), residual(), relu(), up(C, C // 2), relu(), up(C // 2, 3))
        for name in ("quantize_t", "quantize_b"):
            holder = nn.Module()
            embed = torch.randn(D, K)
            for key, value in (("embed", embed), ("cluster_size", torch.rand(K)), ("embed_avg", embed.clone())):
                holder.register_buffer(key, value)
            setattr(self, name, holder)

    def quantize(self, x: Tensor, embed: Tensor) -> tuple[Tensor, Tensor]:
        flat = x.permute(0, 2, 3, 1).reshape(-1, D)
        distance = flat.pow(2).sum(1, keepdim=True) - 2 * flat @ embed + embed.pow(2).sum(0, keepdim=True)
        codes = distance.argmin(1).view(x.shape[0], *x.shape[2:])
        return F.embedding(codes, embed.T).permute(0, 3, 1, 2), codes

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        bottom = self.enc_b.blocks(x)
        top = self.enc_t.blocks(bottom)
        top, top_codes = self.quantize(self.quantize_conv_t(top), self.quantize_t.embed)
        joined = torch.cat([self.dec_t.blocks(top), bottom], 1)
        bottom, bottom_codes = self.quantize(self.quantize_conv_b(joined), self.quantize_b.embed)
        return self.dec.blocks(torch.cat([self.upsample_t(top), bottom], 1)), bottom_codes, top_codes


@pytest.fixture
def reference() -> ReferenceVQVAE:
    torch.manual_seed(0)
    reference = ReferenceVQVAE().eval()
    with torch.no_grad():  # codebooks made of features, so that many codes are used
        bottom = reference.enc_b.blocks(torch.rand(8, 3, 32, 32) * 2 - 1)
        features = reference.quantize_conv_t(reference.enc_t.blocks(bottom))
        reference.quantize_t.embed.copy_(random_rows(features))
        top, _ = reference.quantize(features, reference.quantize_t.embed)
        reference.quantize_b.embed.copy_(
            random_rows(reference.quantize_conv_b(torch.cat([reference.dec_t.blocks(top), bottom], 1)))
        )
    return reference


def random_rows(features: Tensor) -> Tensor:
    rows = features.permute(0, 2, 3, 1).reshape(-1, D)
    return rows[torch.randperm(len(rows))[:K]].T


@pytest.mark.parametrize("form", ["bare", "model", "module"])
def test_codes_and_reconstructions_match_the_reference(
    reference: ReferenceVQVAE, tmp_path: Path, form: str, capsys: pytest.CaptureFixture[str]
) -> None:
    state = reference.state_dict()
    if form == "module":
        state = {f"module.{name}": tensor for name, tensor in state.items()}
    torch.save({"model": state, "step": 7} if form == "model" else state, tmp_path / "reference.pt")
    out = tmp_path / "ours.safetensors"
    assert main(["import-vqvae", str(tmp_path / "reference.pt"), str(out), "--size", "32", "48"]) == 0
    before = out.read_bytes()
    arguments = ["import-vqvae", str(tmp_path / "reference.pt"), str(out)]
    fails(capsys, arguments, f"{out}: already exists. Choose another name or delete it.")
    assert out.read_bytes() == before
    ours = Autoencoder.from_pretrained(out)
    assert (ours.config.channels, ours.config.residual_channels, ours.config.residual_layers) == (C, R, 2)
    images = torch.rand(3, 3, 32, 48) * 2 - 1
    with torch.no_grad():
        expected, bottom, top = reference(images)
    codes = ours.encode(images)
    assert torch.equal(codes[0], bottom)
    assert torch.equal(codes[1], top)
    assert min(len(bottom.unique()), len(top.unique())) > K // 2, "most codes are used"
    torch.testing.assert_close(ours(images).images, expected, atol=1e-5, rtol=0)


def test_other_layouts_raise_and_name_the_first_mismatched_key(reference: ReferenceVQVAE, tmp_path: Path) -> None:
    path = tmp_path / "reference.pt"
    state = reference.state_dict()
    for change, message in (
        ({"decoder.weight": torch.zeros(1)}, "unexpected key `decoder.weight`"),
        (state | {"dec.blocks.9.weight": torch.zeros(1)}, "unexpected key `dec.blocks.9.weight`"),
        ({k: v for k, v in state.items() if k != "upsample_t.bias"}, "missing key `upsample_t.bias`"),
        (state | {"enc_t.blocks.2.bias": torch.zeros(3)}, r"`enc_t.blocks.2.bias` has shape \(3,\), expected \(16,\)"),
        ({"model": [1, 2]}, "not a state dict"),
    ):
        torch.save(change, path)
        with pytest.raises(UserError, match=message) as error:
            import_autoencoder(path)
        assert "\n" not in str(error.value)


class PickledCode:
    def __reduce__(self) -> tuple[object, tuple[str]]:
        return print, ("pickled code was executed",)


def test_pickled_code_is_not_executed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"model": PickledCode()}, tmp_path / "bad.pt")
    (tmp_path / "text.pt").write_text("not weights")
    for name in ("bad.pt", "text.pt"):
        with pytest.raises(UserError, match=f"{name}: corrupted, or not a weights-only file"):
            import_autoencoder(tmp_path / name)
    with pytest.raises(UserError, match="no such file"):
        import_autoencoder(tmp_path / "missing.pt")
    assert "pickled code was executed" not in capsys.readouterr().out
