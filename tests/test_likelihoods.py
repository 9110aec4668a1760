"""Test the likelihood and the bounds against enumeration, numerical integration and NumPy."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from experiments.likelihoods.networks import LatentModel, NetworkConfig
from experiments.likelihoods.vae import VAE
from experiments.likelihoods.vimco import VIMCO
from experiments.likelihoods.vqvae import VQVAE
from vqvae2.models.logistic import log_probability
from vqvae2.models.multi_sample_bounds import multi_sample_bound, vimco_objective
from vqvae2.quantizers import EMAConfig, FSQConfig, GradientConfig, QuantizerConfig

TINY = NetworkConfig(stride=2, channels=4, residual_channels=4, residual_layers=1)  # 2×2 pixels to one position
IMAGES = torch.tensor([[[[0, 90], [128, 255]]], [[[250, 7], [30, 201]]]], dtype=torch.uint8)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


def sharpen(model: LatentModel) -> LatentModel:
    """Return the model in float64 with larger weights, so that the latents matter and bounds are not tight."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    return model.double()


@pytest.mark.parametrize("log_scale", [-9.0, -7.0, -4.0, -1.0, 0.0, 3.0, 8.0])
@pytest.mark.parametrize("mean", [-3.0, -1.0, -0.37, 0.0, 0.5, 1.2])
def test_probabilities_of_the_256_values_sum_to_one(mean: float, log_scale: float) -> None:
    values = torch.arange(256).to(torch.uint8)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-4)):
        log_p = log_probability(values, torch.full((256,), mean, dtype=dtype), torch.full((256,), log_scale).to(dtype))
        assert log_p.dtype == dtype
        assert log_p.isfinite().all()
        assert abs(float(log_p.double().exp().sum()) - 1) < tolerance


def test_probabilities_equal_those_of_numpy() -> None:
    generator = np.random.default_rng(0)
    values = np.concatenate([[0, 255], generator.integers(0, 256, 500)])
    mean, log_scale = generator.normal(0, 1, 502), generator.uniform(-5, 1, 502)

    def cdf(x: np.ndarray) -> np.ndarray:
        return 1 / (1 + np.exp(-(x - mean) / np.exp(log_scale)))

    centers = values / 127.5 - 1
    upper = np.where(values == 255, 1, cdf(centers + 1 / 255))
    lower = np.where(values == 0, 0, cdf(centers - 1 / 255))
    expected = upper - lower
    assert (expected > 1e-12).sum() > 300
    arguments = torch.from_numpy(values).to(torch.uint8), torch.from_numpy(mean), torch.from_numpy(log_scale)
    found = log_probability(*arguments).exp().numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-15)
    single = log_probability(arguments[0], arguments[1].float(), arguments[2].float())
    np.testing.assert_allclose(single.numpy(), log_probability(*arguments).numpy(), rtol=1e-3, atol=1e-4)


def test_probabilities_have_finite_gradients_far_from_the_mean() -> None:
    values = torch.tensor([0, 0, 1, 254, 255, 255], dtype=torch.uint8)
    mean = torch.tensor([30.0, -30, 30, -30, 30, -30], requires_grad=True)
    log_scale = torch.tensor([-8.0, 5, -7, -6, 2, -7], requires_grad=True)
    log_probability(values, mean, log_scale).sum().backward()
    for parameter in (mean, log_scale):
        assert parameter.grad is not None
        assert parameter.grad.isfinite().all()


def all_codes(model: VIMCO | VQVAE, size: int) -> Tensor:
    """Return every assignment of the codes of a model with one position, (K^n, n, 1, 1)."""
    return torch.tensor(list(itertools.product(range(size), repeat=model.latents)))[:, :, None, None]


def exact_log_likelihood(model: VIMCO | VQVAE, inputs: Tensor, size: int) -> Tensor:
    """Return log Σ p(x | z) p(z) over all codes, given the decoder's inputs for each of them (Z, d, h, w)."""
    each = model.log_likelihood(inputs[:, None].expand(-1, len(IMAGES), -1, -1, -1), IMAGES)
    return each.logsumexp(0) - model.latents * math.log(size)


def tiny_vimco(samples: int = 2, categories: int = 3) -> VIMCO:
    model = sharpen(VIMCO(TINY, 1, 2, categories, 2, samples))
    assert isinstance(model, VIMCO)
    return model


def test_vimco_bound_rises_to_the_exact_log_likelihood() -> None:
    model = tiny_vimco()
    with torch.no_grad():
        codes = all_codes(model, 3)
        exact = exact_log_likelihood(model, model.decoder_inputs(codes), 3)
        log_posterior = model.log_posterior(IMAGES)
        log_weights, log_q = model.weigh(IMAGES, log_posterior, codes[:, None].expand(-1, 2, -1, -1, -1))
        torch.testing.assert_close(log_q.exp().sum(0), torch.ones(2, dtype=torch.float64))
        means = []
        for samples in (1, 2, 3):  # the expectation over all tuples of samples
            tuples = torch.tensor(list(itertools.product(range(len(codes)), repeat=samples)))
            probability = log_q[tuples].sum(1).exp()
            bounds = torch.stack([multi_sample_bound(log_weights[each]) for each in tuples])
            means.append((probability * bounds).sum(0))
        assert (means[0] < means[1] - 1e-4).all()
        assert (means[1] < means[2] - 1e-4).all()
        assert (means[2] < exact - 1e-4).all()
        found = multi_sample_bound(model.log_weights(IMAGES, 4000))
    torch.testing.assert_close(found, exact, atol=0.05, rtol=0)
    assert (exact - means[0] > 0.1).all()  # so that the last comparison means something


def test_vimco_bound_is_the_mean_of_its_samples() -> None:
    model = tiny_vimco()
    with torch.no_grad():
        codes = all_codes(model, 3)
        log_weights, log_q = model.weigh(IMAGES, model.log_posterior(IMAGES), codes[:, None].expand(-1, 2, -1, -1, -1))
        pairs = torch.tensor(list(itertools.product(range(9), repeat=2)))
        bounds = torch.stack([multi_sample_bound(log_weights[each]) for each in pairs])
        expected = (log_q[pairs].sum(1).exp() * bounds).sum(0)
        drawn = torch.stack([model.bound(IMAGES) for _ in range(2000)])
    error = drawn.std(0) / 2000**0.5
    assert ((drawn.mean(0) - expected).abs() < 4 * error).all()


@pytest.mark.parametrize(("samples", "categories"), [(2, 2), (2, 3), (3, 2)])
def test_vimco_gradient_is_that_of_the_expected_bound(samples: int, categories: int) -> None:
    model = tiny_vimco(samples, categories)
    codes = all_codes(model, categories)
    tuples = torch.tensor(list(itertools.product(range(len(codes)), repeat=samples)))  # K^(n · k) rows

    def gradient(estimate: bool) -> list[Tensor]:
        """Return the gradient of the mean over all tuples: of the estimator, or of the exact expectation."""
        log_weights, log_q = model.weigh(IMAGES, model.log_posterior(IMAGES), codes[:, None].expand(-1, 2, -1, -1, -1))
        probability = log_q[tuples].sum(1).exp()  # (tuples, b)
        if estimate:
            values = torch.stack([vimco_objective(log_weights[each], log_q[each]) for each in tuples])
            total = (probability.detach() * values).sum()
        else:
            total = (probability * torch.stack([multi_sample_bound(log_weights[each]) for each in tuples])).sum()
        return list(torch.autograd.grad(total, list(model.parameters())))

    found, expected = gradient(estimate=True), gradient(estimate=False)
    for (name, _), one, other in zip(model.named_parameters(), found, expected, strict=True):
        torch.testing.assert_close(one, other, atol=1e-8, rtol=1e-8, msg=lambda text, name=name: f"{name}: {text}")
    assert max(float(each.abs().max()) for each in expected) > 0.1


def test_vimco_baseline_is_the_geometric_mean_of_the_others() -> None:
    log_weights = torch.tensor([[-1.0], [2.0], [0.5]], dtype=torch.float64)
    log_q = torch.tensor([[-0.3], [-0.4], [-0.5]], dtype=torch.float64, requires_grad=True)
    objective = vimco_objective(log_weights, log_q)
    (signal,) = torch.autograd.grad(objective.sum(), log_q)
    weights = np.exp(log_weights.numpy()[:, 0])
    for j in range(3):
        others = np.delete(weights, j)
        baseline = np.log((others.sum() + np.sqrt(others.prod())) / 3)
        assert abs(float(signal[j]) - (np.log(weights.mean()) - baseline)) < 1e-12
    assert abs(float(objective.detach()) - np.log(weights.mean())) < 1e-12


@pytest.mark.parametrize(
    ("quantizer", "size"),
    [
        (EMAConfig(codebook_size=5, code_dim=2), 5),
        (GradientConfig(codebook_size=3, code_dim=4), 3),
        (FSQConfig(grid=(3, 2), code_dim=2), 6),
    ],
)
def test_vq_vae_bound_is_below_the_exact_log_likelihood(quantizer: QuantizerConfig, size: int) -> None:
    model = VQVAE(TINY, 1, 2, quantizer).eval()
    with torch.no_grad():
        for parameter in (*model.encoder.parameters(), *model.decoder.parameters()):
            parameter.mul_(3)
        codes = all_codes(model, size)[:, :, 0]  # (Z, n, 1)
        inputs = model.decoder_inputs(model.quantizer.lookup(codes[..., None]))
        exact, bound = exact_log_likelihood(model, inputs, size), model.bound(IMAGES)
        assert (bound < exact).all()
        each = model.log_likelihood(inputs[:, None].expand(-1, 2, -1, -1, -1), IMAGES)
        chosen = model.quantize(IMAGES).codes  # (b, n, 1, 1)
        found = [(codes[..., None] == chosen[b]).flatten(1).all(1).nonzero().item() for b in range(2)]
        expected = torch.stack([each[int(row), b] for b, row in enumerate(found)]) - 2 * math.log(size)
    torch.testing.assert_close(bound, expected)
    torch.testing.assert_close(model.log_weights(IMAGES, 3), bound.expand(3, 2))


def test_vq_vae_objective_is_the_bound_minus_the_commitment_and_trains_all_networks() -> None:
    model = VQVAE(TINY, 1, 2, GradientConfig(codebook_size=4, code_dim=3, kmeans_init=False))
    objective, terms = model.objective(IMAGES)
    expected = model.bound(IMAGES) - 4 * (0.25 * terms["commitment"] + terms["codebook"])
    torch.testing.assert_close(objective, expected)
    objective.sum().backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert parameter.grad.abs().sum() > 0, name


def test_first_steps_train_without_quantization_but_bounds_are_quantized() -> None:
    model = VQVAE(TINY, 1, 2, EMAConfig(codebook_size=4, code_dim=3, kmeans_init=False))
    bound = model.bound(IMAGES)
    features = model.features(IMAGES)
    expected = model.log_likelihood(model.decoder_inputs(features), IMAGES) - 2 * math.log(4)
    torch.testing.assert_close(model.objective(IMAGES, quantized=False)[0], expected)
    torch.testing.assert_close(model.bound(IMAGES), bound)
    assert (bound - expected).abs().min() > 1e-3


def test_vae_bounds_are_below_numerical_integration_and_many_samples_reach_it() -> None:
    model = sharpen(VAE(TINY, 1, 1))
    with torch.no_grad():
        z = torch.linspace(-12, 12, 4001, dtype=torch.float64)
        latents = z.view(-1, 1, 1, 1, 1).expand(-1, 2, -1, -1, -1)
        log_prior = -0.5 * z.square() - 0.5 * math.log(2 * math.pi)
        exact = (model.log_likelihood(latents, IMAGES) + log_prior[:, None]).logsumexp(0) + math.log(24 / 4000)
        elbo = torch.stack([model.bound(IMAGES) for _ in range(2000)])
        weights = model.log_weights(IMAGES, 4000)
    assert (elbo.mean(0) < exact - 0.05).all()
    torch.testing.assert_close(multi_sample_bound(weights), exact, atol=0.05, rtol=0)
    # The mean of the log-weights is the ELBO with a sampled instead of an exact KL divergence.
    error = weights.std(0) / 4000**0.5 + elbo.std(0) / 2000**0.5
    assert ((weights.mean(0) - elbo.mean(0)).abs() < 4 * error).all()


def test_vae_divergence_is_that_of_torch() -> None:
    model = sharpen(VAE(TINY, 1, 3))
    assert isinstance(model, VAE)
    mean, log_variance = model.posterior(IMAGES)
    posterior = torch.distributions.Normal(mean, (log_variance / 2).exp())
    expected = torch.distributions.kl_divergence(posterior, torch.distributions.Normal(0.0, 1.0)).flatten(1).sum(1)
    torch.testing.assert_close(model.objective(IMAGES)[1]["divergence"], expected.mean())


def test_models_share_encoder_and_decoder() -> None:
    config = NetworkConfig(channels=8)
    models = (
        VAE(config, 3, 2),
        VQVAE(config, 3, 2, EMAConfig(codebook_size=7, code_dim=4)),
        VIMCO(config, 3, 2, 7, 4, 2),
    )

    def shapes(model: LatentModel) -> dict[str, tuple[int, ...]]:
        """Return the shapes of all weights that do not touch the latents."""
        state = model.state_dict()
        prefixes = ("encoder.", "decoder.")
        return {
            name: tuple(tensor.shape)
            for name, tensor in state.items()
            if name.startswith(prefixes) and name != "decoder.0.weight"
        }

    assert shapes(models[0]) == shapes(models[1]) == shapes(models[2])
    assert len(shapes(models[0])) > 10
