"""Quantizers beside the package vector-quantize-pytorch, and properties for any shape, type and number of codes.

Conventions in which the two differ, converted here: the peer takes features (B, N, D), weighs the commitment term by 1
by default, and updates its codebook within the forward pass, where ours waits for `update`.
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
    """Ours and the peer's with one codebook, without restarts, which draw other rows."""
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
def test_codes_values_loss_and_gradients_are_the_peers(cosine: bool, rotation: bool) -> None:
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
def test_the_codebook_moves_as_the_peers(cosine: bool) -> None:
    ours, theirs = pair(cosine)
    for step in range(6):
        x = features(2, 30, DIM, seed=step) + 0.3 * step
        found = ours(x.movedim(-1, 1))
        _, codes, _ = theirs(x)
        ours.update()
        assert torch.equal(found.codes, codes)
        book = theirs._codebook
        torch.testing.assert_close(ours.ema_cluster_size, book.cluster_size[0], **CLOSE)
        torch.testing.assert_close(ours.ema_embedding_sum, book.embed_avg[0], **CLOSE)
        torch.testing.assert_close(ours.embedding, book.embed[0], **CLOSE)
    assert (ours.embedding - pair(cosine)[0].embedding).abs().max() > 0.1


def test_the_loss_based_codebook_has_the_peers_losses() -> None:
    """The peer learns a codebook by the gradient of its commitment term, which then reaches both sides with one weight.

    With β = 1 our two terms have the same gradients together, and twice the value.
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
def test_fsq_codes_values_and_gradients_are_the_peers(grid: tuple[int, ...]) -> None:
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
    every = torch.arange(ours.codebook_size)[None]
    torch.testing.assert_close(ours.lookup(every).movedim(1, -1), theirs.indices_to_codes(every), **CLOSE)


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
TYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float64])


def state(quantizer: Quantizer) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in quantizer.state_dict().items()}


@given(config=CONFIGS, batch=st.integers(0, 3), spatial=SHAPES, kind=TYPES, seed=st.integers(0, 99))
@settings(max_examples=60, deadline=None)
def test_training_on_any_shape_and_type(
    config: EMAConfig | GradientConfig | FSQConfig, batch: int, spatial: list[int], kind: torch.dtype, seed: int
) -> None:
    torch.manual_seed(seed)
    quantizer = config.build().train()
    x = features(batch, 3, *spatial, seed=seed).to(kind).requires_grad_()
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
    assert x.grad.dtype == kind
    assert x.grad.isfinite().all()
    quantizer.update()
    assert all(tensor.isfinite().all() for tensor in quantizer.state_dict().values())


@given(config=CONFIGS, batch=st.integers(0, 3), spatial=SHAPES, kind=TYPES, trained=st.booleans())
@settings(max_examples=40, deadline=None)
def test_evaluation_mutates_nothing_and_gives_what_it_gave(
    config: EMAConfig | GradientConfig | FSQConfig, batch: int, spatial: list[int], kind: torch.dtype, trained: bool
) -> None:
    torch.manual_seed(0)
    quantizer = config.build()
    if trained:
        quantizer.train()(features(4, 3, 5))
        quantizer.update()
    quantizer.eval()
    before = state(quantizer)
    x = features(batch, 3, *spatial).to(kind)
    kept = x.clone()
    first = quantizer(x)
    quantizer.update()
    second = quantizer(x)
    assert torch.equal(x, kept)
    assert torch.equal(first.codes, second.codes)
    assert torch.equal(first.quantized, second.quantized)
    for name, tensor in state(quantizer).items():
        assert torch.equal(tensor, before[name]), name


@given(config=CONFIGS, seed=st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_places_do_not_matter(config: EMAConfig | GradientConfig | FSQConfig, seed: int) -> None:
    """Each vector is quantized on its own: maps shuffled before are maps shuffled after."""
    torch.manual_seed(seed)
    quantizer = config.build().eval()
    x, order = features(2, 3, 7, seed=seed), torch.randperm(7)
    assert torch.equal(quantizer(x[:, :, order]).codes, quantizer(x).codes[:, order])
