"""Test priors: causality, incremental logits against the full forward pass, checkpointing, and weights files."""

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.decoders import incremental_logits
from vqvae2.code_maps import MapSpec
from vqvae2.errors import UserError
from vqvae2.priors import (
    PixelCNN,
    PixelCNNConfig,
    PixelSNAIL,
    PixelSNAILConfig,
    Prior,
    PriorSpec,
    Transformer,
    TransformerConfig,
    load_prior,
    save_prior,
)

CODES = 11


def build(
    size: tuple[int, int] = (5, 4),
    coarser: tuple[tuple[int, int], ...] = (),
    classes: int = 0,
    kind: str = "pixelsnail",
    **settings: Any,
) -> PixelSNAIL | PixelCNN | Transformer:
    torch.manual_seed(0)
    if kind == "pixelcnn":
        config = PixelCNNConfig(**{"channels": 8, "kernel": 3, "layers": 3, "output_channels": 9} | settings)
    elif kind == "transformer":
        config = TransformerConfig(**{"channels": 16, "layers": 2, "heads": 2} | settings)
    else:
        defaults = {"channels": 8, "residual_channels": 6, "kernel": 3, "blocks": 2, "layers": 1, "heads": 2}
        config = PixelSNAILConfig(**defaults | settings)
    level, *others = (MapSpec(codebook_size=CODES + i, height=h, width=w) for i, (h, w) in enumerate((size, *coarser)))
    return config.build(PriorSpec(level=level, coarser=tuple(others), num_classes=classes)).eval()


def inputs(prior: Prior, batch: int = 2) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    maps = [
        torch.randint(level.codebook_size, (batch, *level.shape), generator=generator)
        for level in (prior.spec.level, *prior.spec.coarser)
    ]
    labels = torch.arange(batch) % prior.spec.num_classes if prior.spec.num_classes else None
    return {"codes": maps[0], "coarser": tuple(maps[1:]), "labels": labels}


MATRIX: list[dict[str, Any]] = [
    {},
    {"kernel": 5},
    {"kernel": 7, "size": (9, 8)},
    {"attention": False},
    {"attention": (1,), "output_layers": 2},
    {"classes": 3},
    {"classes": 3, "attention": False, "kernel": 5},
    {"size": (1, 1)},
    {"size": (1, 6)},
    {"size": (6, 1)},
    {"size": (7, 5), "layers": 2},
    {"size": (8, 6), "coarser": ((4, 3),)},
    {"size": (8, 6), "coarser": ((4, 3),), "attention": False, "classes": 3},
    {"size": (8, 4), "coarser": ((4, 2), (2, 1)), "kernel": 5},
    {"size": (6, 6), "coarser": ((6, 6), (2, 2)), "condition_layers": 2, "classes": 2},
    {"size": (4, 4), "coarser": ((1, 1),)},
    *(
        {"kind": "pixelcnn"} | settings
        for settings in (
            {},
            {"kernel": 5, "layers": 1},
            {"kernel": 7, "size": (9, 8)},
            {"classes": 3},
            {"size": (1, 1)},
            {"size": (1, 6)},
            {"size": (6, 1)},
            {"size": (8, 6), "coarser": ((4, 3),), "classes": 3},
            {"size": (8, 4), "coarser": ((4, 2), (2, 1)), "kernel": 5},
            {"size": (6, 6), "coarser": ((6, 6), (2, 2)), "condition_layers": 0},
        )
    ),
    *(
        {"kind": "transformer"} | settings
        for settings in (
            {},
            {"layers": 1, "heads": 4, "feed_forward": 4.0},
            {"size": (9, 8)},
            {"classes": 3},
            {"size": (1, 1)},
            {"size": (1, 6)},
            {"size": (6, 1)},
            {"size": (8, 6), "coarser": ((4, 3),), "classes": 3},
            {"size": (8, 4), "coarser": ((4, 2), (2, 1))},
            {"size": (6, 6), "coarser": ((6, 6), (2, 2)), "condition_layers": 0},
        )
    ),
]


@pytest.mark.parametrize("settings", MATRIX, ids=str)
def test_incremental_logits_match_full_forward(settings: dict[str, Any]) -> None:
    prior = build(**settings)
    given = inputs(prior, batch=3)
    with torch.no_grad():
        expected = prior(**given)
    assert expected.shape == (3, CODES, *prior.spec.level.shape)
    found = incremental_logits(prior, **given)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    with_tensors = incremental_logits(prior, **given, as_tensors=True)
    torch.testing.assert_close(with_tensors, found, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "settings", [{}, {"kernel": 5, "attention": False}, {"output_layers": 1, "layers": 2}], ids=str
)
def test_gradients_are_causal(settings: dict[str, Any]) -> None:
    prior = build(size=(4, 5), **settings)
    codes = inputs(prior, batch=1)["codes"]
    embedded = prior.embedding(codes).detach().requires_grad_()
    prior.embedding.forward = lambda _: embedded  # pyright: ignore[reportAttributeAccessIssue]
    logits = prior(codes)[0].flatten(1)  # (K, positions)
    for position in range(20):
        (gradient,) = torch.autograd.grad(logits[:, position].sum(), embedded, retain_graph=True)
        depends = gradient[0].flatten(0, 1).abs().sum(1) > 0
        assert not depends[position:].any(), position
        if position:
            assert depends[position - 1] or position % 5 == 0, "the left neighbor is visible"
            assert depends.any()


def test_pixelsnail_is_causal_and_attention_reaches_the_last_position() -> None:
    prior = build(size=(6, 5), kernel=3, blocks=1, layers=1)
    codes = inputs(prior, batch=1)["codes"]
    with torch.no_grad():
        before = prior(codes)[0].flatten(1)
        for position in range(30):
            changed = codes.clone()
            changed.view(-1)[position] = (changed.view(-1)[position] + 1) % CODES
            differs = (prior(changed)[0].flatten(1) - before).abs().amax(0) > 0
            assert not differs[: position + 1].any()
            if position < 29:
                assert differs[29], "attention covers all previous positions"


@pytest.mark.parametrize("kind", ["pixelsnail", "pixelcnn", "transformer"])
def test_logits_depend_on_coarser_codes_and_labels(kind: str) -> None:
    prior = build(size=(8, 6), coarser=((4, 3), (2, 1)), classes=3, kind=kind)
    given = inputs(prior)
    with torch.no_grad():
        before = prior(**given)
        for level in range(2):
            coarser = list(given["coarser"])
            coarser[level] = (coarser[level] + 1) % CODES
            assert not torch.equal(prior(**given | {"coarser": tuple(coarser)}), before)
        assert not torch.equal(prior(**given | {"labels": (given["labels"] + 1) % 3}), before)
        assert not torch.equal(prior(**given | {"labels": None}), before)


def test_wrong_coarser_maps_raise() -> None:
    prior = build(size=(8, 6), coarser=((4, 3),))
    with pytest.raises(ValueError, match=r"coarser code maps of sizes \(\(4, 3\),\)"):
        prior(torch.zeros(1, 8, 6, dtype=torch.int64))


@pytest.mark.parametrize("kind", ["pixelcnn", "transformer"])
def test_pixelcnn_and_transformer_are_causal(kind: str) -> None:
    prior = build(size=(4, 5), kind=kind)
    codes = inputs(prior, batch=1)["codes"]
    with torch.no_grad():
        before = prior(codes)[0].flatten(1)
        for position in range(20):
            changed = codes.clone()
            changed.view(-1)[position] = (changed.view(-1)[position] + 1) % CODES
            differs = (prior(changed)[0].flatten(1) - before).abs().amax(0) > 0
            assert not differs[: position + 1].any(), position
            if position < 19:
                assert differs[position + 1 :].any(), position
            if kind == "transformer":
                assert differs[position + 1 :].all(), "attention covers all previous positions"


@pytest.mark.parametrize("kind", ["pixelsnail", "pixelcnn", "transformer"])
def test_gradient_checkpointing_keeps_gradients(kind: str) -> None:
    prior = build(size=(6, 6), coarser=((3, 3),), classes=2, kind=kind, dropout=0.3).train()
    given, gradients = inputs(prior), []
    for enabled in (False, True):
        prior.gradient_checkpointing = enabled
        prior.zero_grad()
        torch.manual_seed(0)
        torch.nn.functional.cross_entropy(prior(**given), given["codes"]).backward()
        gradients.append([parameter.grad for parameter in prior.parameters()])
    for kept, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, kept, atol=1e-7, rtol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"output_layers": 1},
        {"kind": "pixelcnn"},
        {"kind": "transformer"},
        {"kind": "transformer", "attention_order": "wavefront"},
    ],
    ids=str,
)
def test_gradients_reach_every_weight(settings: dict[str, Any]) -> None:
    prior = build(size=(6, 6), coarser=((3, 3),), classes=2, **settings).train()
    given = inputs(prior)
    torch.nn.functional.cross_entropy(prior(**given), given["codes"]).backward()
    for name, parameter in prior.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.any(), name


@pytest.mark.parametrize("kind", ["pixelsnail", "pixelcnn", "transformer"])
def test_save_and_load_round_trip(tmp_path: Path, kind: str) -> None:
    prior = build(size=(6, 6), coarser=((3, 3),), classes=2, kind=kind)
    path = tmp_path / "model.safetensors"
    save_prior(path, prior, prior.config, autoencoder="a" * 64)
    loaded = load_prior(path)
    given = inputs(prior)
    assert torch.equal(loaded(**given), prior(**given))
    assert loaded.made_from == {"autoencoder": "a" * 64}


def test_loading_an_autoencoder_as_a_prior_raises(finished_run: Path) -> None:
    with pytest.raises(UserError, match="network type 'autoencoder', expected 'prior'"):
        load_prior(finished_run / "autoencoder" / "model.safetensors")


def test_invalid_settings_raise() -> None:
    for settings, message in (
        ({"kernel": 4}, "odd"),
        ({"channels": 6, "heads": 2}, r"half the channels \(3\)"),
        ({"attention": (2,)}, "block 2"),
        ({"kind": "pixelcnn", "kernel": 4}, "odd"),
        ({"kind": "transformer", "channels": 12}, r"four times heads \(8\)"),
    ):
        with pytest.raises(ValueError, match=message):
            build(**settings)
