"""Test the patch discriminator: receptive field, batch independence, and minimum image size."""

import pytest
import torch
from torch import nn

from vqvae2.errors import UserError
from vqvae2.models.discriminator import DiscriminatorConfig


def test_receptive_field_is_70_pixels_of_one_image() -> None:
    torch.manual_seed(0)
    discriminator = DiscriminatorConfig(channels=4).build((128, 128))
    for index, module in enumerate(discriminator.body):  # normalization makes every score depend on the whole image
        if isinstance(module, nn.GroupNorm):
            discriminator.body[index] = nn.Identity()
    x = torch.randn(2, 3, 128, 128, requires_grad=True)
    scores = discriminator(x)
    (found,) = torch.autograd.grad(scores[0, 0, 7, 7], x)
    rows = found[0].abs().sum((0, 2)).nonzero()
    assert int(rows.max() - rows.min()) + 1 == 70
    assert not found[1].any()


def test_scores_are_independent_of_the_batch() -> None:
    discriminator = DiscriminatorConfig(channels=8, layers=2).build((32, 32)).train()
    images = torch.rand(3, 3, 32, 32) * 2 - 1
    together = discriminator(images)
    torch.testing.assert_close(together[:1], discriminator(images[:1]), atol=1e-5, rtol=1e-4)


def test_too_small_images_raise() -> None:
    config = DiscriminatorConfig(channels=4, layers=3)
    assert config.build((24, 24), 1)(torch.zeros(1, 1, 24, 24)).numel() == 1
    with pytest.raises(
        UserError, match=r"3 layers need images of at least 24 pixels, got 40 × 16\. Use at most 2 layers"
    ):
        config.build((40, 16))
