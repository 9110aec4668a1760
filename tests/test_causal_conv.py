"""Test causal convolutions that recompute their inputs, against autograd of the plain convolution in float64."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.utils.parametrize import remove_parametrizations

from vqvae2.priors import toom_cook
from vqvae2.priors.layers import CausalConv2d


def plain(conv: CausalConv2d, x: Tensor, elu: bool) -> Tensor:
    """Compute the convolution with a masked square kernel and the weight norm written out."""
    direction, length = conv.parametrizations.weight.original1, conv.parametrizations.weight.original0
    weight = length * direction / direction.flatten(1).norm(dim=1)[:, None, None]
    rows, size = conv.rows_above + 1, conv.kernel_size
    weight = F.pad(weight, (0, rows * size - weight.shape[2])).unflatten(2, (rows, size))
    x = F.elu(x) if elu else x
    return F.conv2d(F.pad(x, (size // 2, size // 2, conv.rows_above, 0)), weight, conv.bias)


@given(
    kernel=st.sampled_from([1, 3, 5, 7]), include_current=st.booleans(), whole_rows=st.booleans(), elu=st.booleans(),
    height=st.integers(1, 7), width=st.integers(1, 9), tiles=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
@settings(deadline=None, max_examples=60)
def test_output_and_gradients_match_autograd(
    kernel: int, include_current: bool, whole_rows: bool, elu: bool, height: int, width: int, tiles: bool, seed: int
) -> None:
    if kernel == 1 and not include_current:
        return
    torch.manual_seed(seed)
    conv = CausalConv2d(3, 4, kernel, include_current, rows_above=None if whole_rows else 0)
    conv = conv if tiles else conv.double()  # tiles are computed in float32
    tolerance = {"atol": 1e-4, "rtol": 1e-4} if tiles else {}
    x = torch.randn(2, 3, height, width, dtype=conv.bias.dtype, requires_grad=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toom_cook, "_MIN_CHANNEL_PRODUCT", 1)
        found = conv(x, elu=elu)
        upstream = torch.randn_like(found)
        inputs = [x, *conv.parameters()]
        gradients = torch.autograd.grad(found, inputs, upstream)
    expected = plain(conv, x, elu)
    torch.testing.assert_close(found, expected, **tolerance)
    for gradient, reference in zip(gradients, torch.autograd.grad(expected, inputs, upstream), strict=True):
        torch.testing.assert_close(gradient, reference, **tolerance)


def test_dropout_zeroes_the_same_values_in_both_passes() -> None:
    torch.manual_seed(0)
    conv = CausalConv2d(4, 1, 1).double()
    x = torch.randn(1, 4, 20, 30, dtype=torch.float64, requires_grad=True)
    output = conv(x, elu=True, dropout=0.4)
    (gradient,) = torch.autograd.grad(output.sum(), x)
    weight = conv.weight.detach().flatten()
    kept = gradient[0] != 0
    assert abs(float(kept.double().mean()) - 0.6) < 0.03
    expected = (F.elu(x[0].detach()) / 0.6 * kept * weight[:, None, None]).sum(0) + conv.bias.detach()
    torch.testing.assert_close(output[0, 0].detach(), expected)


def test_without_weight_norm_the_output_is_the_same() -> None:
    conv = CausalConv2d(3, 4, 5)
    x = torch.randn(2, 3, 6, 7)
    expected = conv(x, elu=True).detach()
    remove_parametrizations(conv, "weight")
    torch.testing.assert_close(conv(x, elu=True).detach(), expected)
