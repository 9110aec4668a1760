"""Test quantizers against NumPy: nearest codes, EMA updates, losses, gradients, restarts, k-means, and FSQ."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vqvae2.quantizers import EMAConfig, ExternalConfig, FSQConfig, GradientConfig, Quantizer, SimVQConfig
from vqvae2.quantizers.gradient_estimators import rotation_trick, straight_through
from vqvae2.quantizers.nearest import cluster_sums, kmeans, nearest_codes

CONFIGS = {
    "ema": EMAConfig(codebook_size=6, code_dim=4, kmeans_init=False),
    "gradient": GradientConfig(codebook_size=6, code_dim=4, kmeans_init=False),
    "cosine": EMAConfig(codebook_size=6, code_dim=4, kmeans_init=False, cosine=True),
    "projected": GradientConfig(codebook_size=6, code_dim=4, kmeans_init=False, codebook_dim=2),
    "rotation": EMAConfig(codebook_size=6, code_dim=4, kmeans_init=False, gradient_estimator="rotation"),
    "simvq": SimVQConfig(codebook_size=6, code_dim=4),
    "fsq": FSQConfig(grid=(3, 2), code_dim=4),
    "external": ExternalConfig(name="LFQ", arguments={"codebook_size": 8}, code_dim=4),
}


def features(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rows_of(x: Tensor) -> np.ndarray:
    return x.detach().movedim(1, -1).flatten(0, -2).double().numpy()


@given(
    n=st.integers(0, 40), k=st.integers(1, 20), d=st.integers(1, 9), block=st.integers(1, 999), seed=st.integers(0, 99)
)
@settings(max_examples=60, deadline=None)
def test_nearest_codes_match_numpy_for_any_block_size(n: int, k: int, d: int, block: int, seed: int) -> None:
    rows, vectors = features(n, d, seed=seed), features(k, d, seed=seed + 1)
    found = nearest_codes(rows, vectors, block_bytes=block).numpy()
    distances = np.square(rows.double().numpy()[:, None] - vectors.double().numpy()[None]).sum(-1)
    assert found.shape == (n,)
    np.testing.assert_allclose(distances[np.arange(n), found], distances.min(1, initial=np.inf), atol=1e-5)


def test_nearest_codes_of_features_with_a_large_common_offset() -> None:
    rows, vectors = features(2000, 64) + 100, features(64, 64, seed=1) + 100
    assert torch.equal(nearest_codes(rows, vectors), torch.cdist(rows.double(), vectors.double()).argmin(1))


def test_cluster_sums_match_masked_sums() -> None:
    rows, codes = features(50, 3), torch.randint(5, (50,))
    counts, sums = cluster_sums(rows, codes, 5)
    for code in range(5):
        assert counts[code] == (codes == code).sum()
        torch.testing.assert_close(sums[code], rows[codes == code].sum(0), atol=1e-5, rtol=0)


def test_kmeans_finds_separate_clusters() -> None:
    true = torch.tensor([[0.0, 0.0], [10.0, 0.0], [0.0, 10.0], [10.0, 10.0]])
    rows = (true[:, None] + 0.1 * features(4, 50, 2)).flatten(0, 1)
    best = min(
        float((kmeans(rows, 4, 10, torch.Generator().manual_seed(seed))[0][:, None] - true).norm(dim=2).amin(0).max())
        for seed in range(5)
    )
    assert best < 0.1


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("spatial", [(), (5,), (3, 4), (2, 3, 2)])
def test_any_rank_keeps_its_shape_and_lookup_matches(name: str, spatial: tuple[int, ...]) -> None:
    quantizer = CONFIGS[name].build().eval()
    x = features(3, 4, *spatial)
    result = quantizer(x)
    assert result.quantized.shape == x.shape
    assert result.codes.shape == (3, *spatial)
    assert result.quantized.dtype == torch.float32
    torch.testing.assert_close(quantizer.lookup(result.codes), result.quantized, atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", CONFIGS)
def test_empty_batch_is_supported_and_wrong_channels_raise(name: str) -> None:
    quantizer = CONFIGS[name].build()
    result = quantizer(torch.empty(0, 4, 3))
    assert result.codes.shape == (0, 3)
    assert result.loss == 0
    with pytest.raises(ValueError, match=r"\(batch, 4, \.\.\.\), got \(2, 5, 3\)"):
        quantizer(torch.zeros(2, 5, 3))


@pytest.mark.parametrize("name", CONFIGS)
def test_evaluation_changes_no_state(name: str) -> None:
    quantizer = CONFIGS[name].build().eval()
    before = {key: value.clone() for key, value in quantizer.state_dict().items()}
    quantizer(features(4, 4, 8))
    quantizer.update()
    for key, value in quantizer.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_ema_update_matches_appendix_a1() -> None:
    config = EMAConfig(
        codebook_size=5, code_dim=3, kmeans_init=False, dead_code_threshold=0, ema_decay=0.9, epsilon=1e-5
    )
    quantizer = config.build()
    vectors = quantizer.embedding.double().numpy().copy()
    n, m = np.ones(5), vectors.copy()
    for step in range(3):
        x = features(4, 3, 7, seed=step)
        rows = rows_of(x)
        codes = np.square(rows[:, None] - vectors[None]).sum(-1).argmin(1)
        result = quantizer(x)
        np.testing.assert_array_equal(result.codes.flatten().numpy(), codes)
        quantizer.update()
        n = 0.9 * n + 0.1 * np.bincount(codes, minlength=5)
        m = 0.9 * m + 0.1 * np.stack([rows[codes == code].sum(0) for code in range(5)])
        smoothed = (n + 1e-5) / (n.sum() + 5 * 1e-5) * n.sum()
        vectors = m / smoothed[:, None]
        np.testing.assert_allclose(quantizer.embedding.numpy(), vectors, atol=1e-5)


def test_accumulated_batches_match_full_batch() -> None:
    torch.manual_seed(0)
    one = EMAConfig(codebook_size=6, code_dim=4, kmeans_init=False, dead_code_threshold=0).build()
    two = EMAConfig(codebook_size=6, code_dim=4, kmeans_init=False, dead_code_threshold=0).build()
    two.load_state_dict(one.state_dict())
    x = features(8, 4, 5)
    one(x)
    two(x[:4])
    two(x[4:])
    one.update()
    two.update()
    torch.testing.assert_close(one.embedding, two.embedding, atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "config",
    [
        EMAConfig(codebook_size=6, code_dim=4, kmeans_init=False),
        GradientConfig(codebook_size=6, code_dim=4, kmeans_init=False),
    ],
)
def test_losses_match_equation_3(config: EMAConfig | GradientConfig) -> None:
    quantizer = config.build()
    x = features(2, 4, 5)
    result = quantizer(x)
    error = np.square(rows_of(x) - rows_of(quantizer.lookup(result.codes))).mean()
    expected = config.commitment_weight * error + (error if isinstance(config, GradientConfig) else 0)
    np.testing.assert_allclose(result.loss.item(), expected, rtol=1e-5)
    for term in result.loss_terms.values():
        np.testing.assert_allclose(term.item(), error, rtol=1e-5)


def test_commitment_weight_scales_the_encoder_gradient_only() -> None:
    quantizer = GradientConfig(codebook_size=6, code_dim=4, kmeans_init=False, commitment_weight=0.25).build()
    x = features(2, 4, 5).requires_grad_()
    result = quantizer(x)
    result.loss.backward()
    assert x.grad is not None
    difference = x - quantizer.lookup(result.codes)
    torch.testing.assert_close(x.grad, 0.25 * 2 * difference.detach() / x.numel(), atol=1e-7, rtol=1e-5)
    expected = torch.zeros(6, 4)
    rows = torch.from_numpy(rows_of(difference)).float()
    expected.index_add_(0, result.codes.flatten(), -2 * rows / x.numel())
    torch.testing.assert_close(quantizer.embedding.grad, expected, atol=1e-7, rtol=1e-5)


def test_decoder_gradient_reaches_only_the_encoder() -> None:
    quantizer = GradientConfig(codebook_size=6, code_dim=4, kmeans_init=False).build()
    x = features(2, 4, 5).requires_grad_()
    weight = features(2, 4, 5, seed=1)
    (quantizer(x).quantized * weight).sum().backward()
    torch.testing.assert_close(x.grad, weight)
    assert quantizer.embedding.grad is None or not quantizer.embedding.grad.any()


def test_rotation_trick_keeps_values_and_rotates_gradients() -> None:
    x, q = features(7, 4).requires_grad_(), features(7, 4, seed=1)
    torch.testing.assert_close(rotation_trick(x, q), q, atol=1e-5, rtol=0)
    torch.testing.assert_close(straight_through(x, q), q, atol=1e-6, rtol=0)
    # The upstream gradient, rotated back: its angle to q becomes its angle to x.
    upstream = features(7, 4, seed=2)
    (gradient,) = torch.autograd.grad(rotation_trick(x, q), x, upstream)
    scale = q.norm(dim=1) / x.norm(dim=1)
    cosine = torch.nn.functional.cosine_similarity
    torch.testing.assert_close(cosine(gradient, x.detach()), cosine(upstream, q), atol=1e-4, rtol=0)
    torch.testing.assert_close(gradient.norm(dim=1), scale * upstream.norm(dim=1), atol=1e-4, rtol=1e-4)


def test_rotation_trick_without_a_rotation_is_straight_through() -> None:
    x = torch.tensor([[0.0, 0.0], [2.0, -1.0], [2.0, -1.0]], requires_grad=True)
    q = torch.tensor([[3.0, 4.0], [-4.0, 2.0], [-4.0, 2.0 + 1e-6]])
    found, upstream = rotation_trick(x, q), features(3, 2)
    torch.testing.assert_close(found, q)
    torch.testing.assert_close(torch.autograd.grad(found, x, upstream)[0], upstream)


def test_autocast_does_not_change_the_quantizer() -> None:
    quantizer = CONFIGS["ema"].build().eval()
    x = features(3, 4, 50)
    plain = quantizer(x)
    with torch.autocast("cpu", torch.bfloat16):
        cast = quantizer(x)
    assert torch.equal(plain.codes, cast.codes)
    assert cast.quantized.dtype == torch.float32
    assert torch.equal(plain.quantized, cast.quantized)


@pytest.mark.parametrize("config", [EMAConfig, GradientConfig])
def test_dead_codes_restart_at_features(config: type[EMAConfig] | type[GradientConfig]) -> None:
    quantizer = config(codebook_size=4, code_dim=2, kmeans_init=False, dead_code_threshold=0.1, ema_decay=0.5).build()
    with torch.no_grad():
        quantizer.embedding.copy_(torch.tensor([[0.0, 0.0], [1.0, 1.0], [50.0, 50.0], [-50.0, 50.0]]))
        if isinstance(config(), EMAConfig):
            quantizer.get_buffer("ema_embedding_sum").copy_(quantizer.embedding)
    for step in range(8):
        x = features(16, 2, 4, seed=step)
        quantizer(x)
        quantizer.update()
    assert quantizer.embedding.abs().max() < 10, "codes far from all features restart at features"
    codes = quantizer.eval()(features(64, 2, 4, seed=99)).codes
    assert len(codes.unique()) == 4


@pytest.mark.parametrize("config", [EMAConfig, GradientConfig])
def test_larger_batches_do_not_restart_codes_in_use(config: type[EMAConfig] | type[GradientConfig]) -> None:
    quantizer = config(codebook_size=16, code_dim=4).build()
    for step in range(20):
        quantizer(features(2, 4, 64, seed=step))
        quantizer.update()
    trained = quantizer.codebook.clone()
    quantizer(features(100, 4, 64, seed=99))
    quantizer.update()
    moved = (quantizer.codebook - trained).norm(dim=1) / trained.norm(dim=1)
    assert moved.max() < 0.5, "no code is replaced by a random feature"


def test_codes_of_kmeans_are_kept_with_many_micro_batches() -> None:
    quantizer = EMAConfig(codebook_size=16, code_dim=4).build()
    for part in features(64, 4, 64).split(2):
        quantizer(part)
        initial = quantizer.codebook.clone()
    quantizer.update()
    assert (quantizer.codebook - initial).norm(dim=1).max() < 0.5


def test_batch_without_features_restarts_nothing() -> None:
    quantizer = EMAConfig(codebook_size=4, code_dim=2, kmeans_init=False).build()
    quantizer.ema_cluster_size.copy_(torch.tensor([0.0, 1.0, 1.0, 1.0]))
    before = quantizer.codebook.clone()
    quantizer(torch.zeros(0, 2, 4))
    quantizer.update()
    assert torch.equal(quantizer.codebook[0].isfinite(), before[0].isfinite())
    assert quantizer.ema_cluster_size[0] == 0


def test_dead_codes_stay_if_restarts_are_off() -> None:
    quantizer = EMAConfig(codebook_size=2, code_dim=2, kmeans_init=False, dead_code_threshold=0).build()
    for buffer in (quantizer.embedding, quantizer.ema_embedding_sum):
        buffer.copy_(torch.tensor([[0.0, 0.0], [50.0, 50.0]]))
    for step in range(8):
        quantizer(features(16, 2, 4, seed=step))
        quantizer.update()
    assert len(quantizer.eval()(features(16, 2, 4)).codes.unique()) == 1


@pytest.mark.parametrize("config", [EMAConfig, GradientConfig])
def test_kmeans_initializes_the_codebook_from_the_first_batch(
    config: type[EMAConfig] | type[GradientConfig],
) -> None:
    quantizer: Quantizer = config(codebook_size=16, code_dim=4).build()
    x = 30 + features(8, 4, 64)
    error = quantizer(x).loss_terms["commitment"]
    assert error < 1.0, "the error is within the variance of the features, which are 30 away from the initial codebook"
    vectors = quantizer.state_dict()["embedding"].clone()
    quantizer(x)
    assert torch.equal(vectors, quantizer.state_dict()["embedding"]), "only the first batch initializes the codebook"


def test_kmeans_uses_each_of_few_latents_once() -> None:
    x = features(2, 4, 8)
    quantizer = EMAConfig(codebook_size=20_000, code_dim=4).build()  # Lloyd's iterations would take minutes
    output = quantizer(x)
    torch.testing.assert_close(output.quantized, x)
    assert len(output.codes.unique()) == 16
    latents = x.movedim(1, -1).flatten(0, 1)
    few = EMAConfig(codebook_size=3, code_dim=4, dead_code_threshold=0).build()
    few(x)
    torch.testing.assert_close(few.ema_embedding_sum.sum(0), latents.sum(0))  # no latent is drawn twice
    assert few.ema_cluster_size.sum() == 16


@pytest.mark.parametrize("grid", [(2,), (3,), (8, 8, 8), (5, 4, 3, 2)])
def test_fsq_uses_every_code(grid: tuple[int, ...]) -> None:
    quantizer = FSQConfig(grid=grid, code_dim=len(grid)).build().eval()
    torch.nn.init.eye_(quantizer.project_in.weight)
    torch.nn.init.zeros_(quantizer.project_in.bias)
    uniform = torch.rand(20_000, len(grid), generator=torch.Generator().manual_seed(0)) * 1.998 - 0.999
    half, offset = (quantizer.grid - 1) * 1.001 / 2, (quantizer.grid % 2 == 0) / 2
    codes = quantizer(uniform.atanh() - torch.atanh(offset / half)).codes  # all cells of the grid are equally likely
    assert sorted(codes.unique().tolist()) == list(range(quantizer.codebook_size))
    all_codes = torch.arange(quantizer.codebook_size)[None]
    assert len(quantizer.lookup(all_codes)[0].T.unique(dim=0)) == quantizer.codebook_size


def test_fsq_codes_of_a_long_grid_are_in_the_codebook() -> None:
    for values in (1001, 1002, 5000):
        quantizer = FSQConfig(grid=(values,), code_dim=1).build().eval()
        torch.nn.init.ones_(quantizer.project_in.weight)
        codes = quantizer(torch.tensor([[-1e6], [1e6]])).codes
        assert codes.tolist() == [0, values - 1]


def test_fsq_gradient_is_that_of_the_bounded_value() -> None:
    quantizer = FSQConfig(grid=(7, 4), code_dim=2).build()
    x = features(5, 2).requires_grad_()
    values = quantizer(x).quantized
    (found,) = torch.autograd.grad(values.sum(), x)
    smooth = quantizer._to_features(quantizer._bound(quantizer.project_in(x)))
    (expected,) = torch.autograd.grad(smooth.sum(), x)
    torch.testing.assert_close(found, expected)
