"""The patch discriminator: what a score sees, and which images are too small."""

import pytest
import torch
from torch import nn

from vqvae2.errors import UserError
from vqvae2.models.discriminator import DiscriminatorConfig


def test_a_score_sees_a_patch_of_70_pixels_of_its_own_image() -> None:
    torch.manual_seed(0)
    judge = DiscriminatorConfig(channels=4).build((128, 128))
    for place, module in enumerate(judge.body):  # normalising would tie every score to the whole image
        if isinstance(module, nn.GroupNorm):
            judge.body[place] = nn.Identity()
    x = torch.randn(2, 3, 128, 128, requires_grad=True)
    scores = judge(x)
    (found,) = torch.autograd.grad(scores[0, 0, 7, 7], x)
    rows = found[0].abs().sum((0, 2)).nonzero()
    assert int(rows.max() - rows.min()) + 1 == 70
    assert not found[1].any()


def test_a_score_does_not_depend_on_the_batch() -> None:
    judge = DiscriminatorConfig(channels=8, layers=2).build((32, 32)).train()
    images = torch.rand(3, 3, 32, 32) * 2 - 1
    together = judge(images)
    torch.testing.assert_close(together[:1], judge(images[:1]), atol=1e-5, rtol=1e-4)


def test_images_too_small_for_the_discriminator_are_refused() -> None:
    config = DiscriminatorConfig(channels=4, layers=3)
    assert config.build((24, 24), 1)(torch.zeros(1, 1, 24, 24)).numel() == 1
    with pytest.raises(
        UserError, match=r"3 layers need images of at least 24 pixels, got 40 × 16\. Use at most 2 layers"
    ):
        config.build((40, 16))
