"""Test quantizers against vector-quantize-pytorch, and properties for any shape, dtype and codebook size.

The conventions differ: the reference takes features (B, N, D), has a default commitment weight of 1, and updates its
codebook in the forward pass, while ours updates in `update()`.
"""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from vector_quantize_pytorch import FSQ, VectorQuantize

from vqvae2.quantizers import EMAConfig, FSQConfig, GradientConfig, Quantizer
from vqvae2.quantizers.ema import EMAQuantizer

CODES, DIM = 12, 5
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


def features(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pair(cosine: bool = False, rotation: bool = False, decay: float = 0.9) -> tuple[EMAQuantizer, VectorQuantize]:
    """Return our quantizer and the reference with the same codebook, without restarts, which draw different rows."""
    torch.manual_seed(0)
    ours = EMAConfig(
        codebook_size=CODES,
        code_dim=DIM,
        ema_decay=decay,
        epsilon=1e-5,
        kmeans_init=False,
        dead_code_threshold=0,
        cosine=cosine,
        gradient_estimator="rotation" if rotation else "straight-through",
    ).build()
    theirs = VectorQuantize(
        dim=DIM,
        codebook_size=CODES,
        decay=decay,
        eps=1e-5,
        use_cosine_sim=cosine,
        rotation_trick=rotation,
        commitment_weight=0.25,
        threshold_ema_dead_code=0,
    )
    with torch.no_grad():
        for name in ("embed", "embed_avg"):
            getattr(theirs._codebook, name).copy_(ours.embedding[None])
    return ours, theirs


@pytest.mark.parametrize("rotation", [False, True], ids=["straight-through", "rotation"])
@pytest.mark.parametrize("cosine", [False, True], ids=["euclidean", "cosine"])
def test_codes_values_loss_and_gradients_match_reference(cosine: bool, rotation: bool) -> None:
    ours, theirs = pair(cosine, rotation)
    x = features(3, 40, DIM).requires_grad_()
    upstream = features(3, 40, DIM, seed=1)
    found = ours(x.movedim(-1, 1))
    (gradient,) = torch.autograd.grad((found.quantized.movedim(1, -1) * upstream).sum() + found.loss, x)
    values, codes, loss = theirs(x)
    (expected,) = torch.autograd.grad((values * upstream).sum() + loss.sum(), x)
    assert torch.equal(found.codes, codes)
    assert len(codes.unique()) > CODES // 2
    torch.testing.assert_close(found.quantized.movedim(1, -1), values, **CLOSE)
    torch.testing.assert_close(found.loss, loss.reshape(()), **CLOSE)
    torch.testing.assert_close(gradient, expected, **CLOSE)


@pytest.mark.parametrize("cosine", [False, True], ids=["euclidean", "cosine"])
def test_ema_codebook_update_matches_reference(cosine: bool) -> None:
    ours, theirs = pair(cosine)
    for step in range(6):
        x = features(2, 30, DIM, seed=step) + 0.3 * step
        found = ours(x.movedim(-1, 1))
        _, codes, _ = theirs(x)
        ours.update()
        assert torch.equal(found.codes, codes)
        codebook = theirs._codebook
        torch.testing.assert_close(ours.ema_cluster_size, codebook.cluster_size[0], **CLOSE)
        torch.testing.assert_close(ours.ema_embedding_sum, codebook.embed_avg[0], **CLOSE)
        torch.testing.assert_close(ours.embedding, codebook.embed[0], **CLOSE)
    assert (ours.embedding - pair(cosine)[0].embedding).abs().max() > 0.1


def test_gradient_codebook_loss_matches_reference() -> None:
    """Compare losses and gradients.

    The reference trains its codebook with the gradient of the commitment term, which has one weight for both sides.
    With β = 1 the sum of our two terms has the same gradients and twice the value.
    """
    ours = GradientConfig(codebook_size=CODES, code_dim=DIM, kmeans_init=False, commitment_weight=1).build()
    theirs = VectorQuantize(
        dim=DIM,
        codebook_size=CODES,
        learnable_codebook=True,
        ema_update=False,
        rotation_trick=False,
        commitment_weight=1,
        threshold_ema_dead_code=0,
    )
    with torch.no_grad():
        ours.embedding.copy_(features(CODES, DIM, seed=2))
        theirs._codebook.embed.copy_(ours.embedding[None])
    x = features(3, 40, DIM).requires_grad_()
    found = ours(x.movedim(-1, 1))
    mine = torch.autograd.grad(found.loss, [x, ours.embedding])
    _, codes, loss = theirs(x)
    other = torch.autograd.grad(loss.sum(), [x, theirs._codebook.embed])
    assert torch.equal(found.codes, codes)
    torch.testing.assert_close(found.loss, 2 * loss.reshape(()), **CLOSE)
    torch.testing.assert_close(mine[0], other[0], **CLOSE)
    torch.testing.assert_close(mine[1], other[1][0], **CLOSE)


@pytest.mark.parametrize("grid", [(8, 8, 8), (5, 4, 3), (7, 5, 5, 5)])
def test_fsq_codes_values_and_gradients_match_reference(grid: tuple[int, ...]) -> None:
    ours = FSQConfig(grid=grid, code_dim=DIM + 4).build()
    theirs = FSQ(levels=list(grid), dim=DIM + 4)
    for name in ("project_in", "project_out"):
        getattr(theirs, name).load_state_dict(getattr(ours, name).state_dict())
    x = (3 * features(4, 50, DIM + 4)).requires_grad_()
    found = ours(x.movedim(-1, 1))
    values, codes = theirs(x)
    assert torch.equal(found.codes, codes.long())
    assert len(codes.unique()) > 20
    torch.testing.assert_close(found.quantized.movedim(1, -1), values, **CLOSE)
    mine, other = (torch.autograd.grad(value.sum(), x)[0] for value in (found.quantized, values))
    torch.testing.assert_close(mine, other, **CLOSE)
    all_codes = torch.arange(ours.codebook_size)[None]
    torch.testing.assert_close(ours.lookup(all_codes).movedim(1, -1), theirs.indices_to_codes(all_codes), **CLOSE)


# Properties

CONFIGS = st.one_of(
    st.builds(
        EMAConfig, codebook_size=st.integers(1, 9), code_dim=st.just(3), kmeans_init=st.booleans(),
        cosine=st.booleans(), codebook_dim=st.sampled_from([None, 2]),
        gradient_estimator=st.sampled_from(["straight-through", "rotation"]),
    ),
    st.builds(
        GradientConfig, codebook_size=st.integers(1, 9), code_dim=st.just(3), kmeans_init=st.booleans(),
        cosine=st.booleans(), codebook_dim=st.sampled_from([None, 2]),
    ),
    st.builds(FSQConfig, grid=st.lists(st.integers(2, 5), min_size=1, max_size=3).map(tuple), code_dim=st.just(3)),
)  # fmt: skip
SHAPES = st.lists(st.integers(1, 4), min_size=1, max_size=3)  # with batch and width: ranks 3 to 5
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float64])


def state(quantizer: Quantizer) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in quantizer.state_dict().items()}


@given(config=CONFIGS, batch=st.integers(0, 3), spatial=SHAPES, dtype=DTYPES, seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_training_supports_any_shape_and_dtype(
    config: EMAConfig | GradientConfig | FSQConfig, batch: int, spatial: list[int], dtype: torch.dtype, seed: int
) -> None:
    torch.manual_seed(seed)
    quantizer = config.build().train()
    x = features(batch, 3, *spatial, seed=seed).to(dtype).requires_grad_()
    result = quantizer(x)
    assert result.quantized.shape == x.shape
    assert result.quantized.dtype == result.loss.dtype == torch.float32
    assert result.codes.shape == (batch, *spatial)
    assert result.codes.dtype == torch.int64
    assert bool(((result.codes >= 0) & (result.codes < quantizer.codebook_size)).all())
    assert result.loss.isfinite()
    torch.testing.assert_close(quantizer.lookup(result.codes), result.quantized, atol=1e-4, rtol=1e-4)
    (result.quantized.sum() + result.loss).backward()
    assert x.grad is not None
    assert x.grad.dtype == dtype
    assert x.grad.isfinite().all()
    quantizer.update()
    assert all(tensor.isfinite().all() for tensor in quantizer.state_dict().values())


@given(config=CONFIGS, batch=st.integers(0, 3), spatial=SHAPES, dtype=DTYPES, trained=st.booleans())
@settings(max_examples=40, deadline=None)
def test_evaluation_changes_no_state_and_is_deterministic(
    config: EMAConfig | GradientConfig | FSQConfig, batch: int, spatial: list[int], dtype: torch.dtype, trained: bool
) -> None:
    torch.manual_seed(0)
    quantizer = config.build()
    if trained:
        quantizer.train()(features(4, 3, 5))
        quantizer.update()
    quantizer.eval()
    before = state(quantizer)
    x = features(batch, 3, *spatial).to(dtype)
    original = x.clone()
    first = quantizer(x)
    quantizer.update()
    second = quantizer(x)
    assert torch.equal(x, original)
    assert torch.equal(first.codes, second.codes)
    assert torch.equal(first.quantized, second.quantized)
    for name, tensor in state(quantizer).items():
        assert torch.equal(tensor, before[name]), name


@given(config=CONFIGS, seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_codes_are_independent_of_position_order(config: EMAConfig | GradientConfig | FSQConfig, seed: int) -> None:
    """Quantization commutes with a permutation of the positions, because each vector is quantized independently."""
    torch.manual_seed(seed)
    quantizer = config.build().eval()
    x, order = features(2, 3, 7, seed=seed), torch.randperm(7)
    assert torch.equal(quantizer(x[:, :, order]).codes, quantizer(x).codes[:, order])
