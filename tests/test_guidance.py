"""Test sampling parameters per level, and classifier-free guidance."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from sampling.guidance import ClassifierFreeGuidance
from sampling.logits import sample_codes
from sampling.params import LevelSamplingParams, SamplingConfig, SamplingParams
from sampling.pipeline import VQVAE2Pipeline
from sampling.report.report import format_value
from sampling.run_config import RunConfig
from sampling.sample_level import Noise, sample_level
from tests.test_commands import contents, fails
from tests.test_configs import CONFIGS
from tests.test_priors import build, inputs
from vqvae2.__main__ import main
from vqvae2.command_line import parse
from vqvae2.errors import UserError
from vqvae2.priors import Prior, load_prior, save_prior

KINDS = ["pixelsnail", "pixelcnn", "transformer"]


def allow_guidance(pipeline: VQVAE2Pipeline) -> VQVAE2Pipeline:
    for prior in pipeline.priors:
        prior.made_from["label_dropout"] = 0.1
    return pipeline


def test_params_accept_one_value_or_values_per_level() -> None:
    params = SamplingParams(
        temperature=0.5, top_k={"top": 7}, top_p={"bottom": 0.9, "top": 0.8}, guidance_scale={"top": 3}
    )
    assert params.for_level("top") == LevelSamplingParams(temperature=0.5, top_k=7, top_p=0.8, guidance_scale=3)
    assert params.for_level("bottom") == LevelSamplingParams(temperature=0.5, top_p=0.9)
    assert SamplingParams().recorded(["top"]).model_fields_set == {"temperature", "top_k", "top_p"}
    assert params.recorded(["top"]).guidance_scale == {"top": 3.0}
    assert "guidance_scale" in params.recorded(["top"]).model_fields_set


def test_yaml_command_line_and_python_share_one_syntax() -> None:
    text = SamplingConfig.from_dict({"temperature": "top=0.8,bottom=0.7", "top_k": "5"}, "file")
    mapping = SamplingConfig.from_dict({"temperature": {"top": 0.8, "bottom": 0.7}, "top_k": 5}, "file")
    arguments = parse(SamplingConfig, ["--temperature", "top=0.8,bottom=0.7", "--top-k", "5"], "vqvae2 sample")
    assert text == mapping == arguments
    assert parse(SamplingConfig, ["--top_k", "top=3, bottom=4"], "x").top_k == {"top": 3, "bottom": 4}
    assert parse(SamplingConfig, ["--classes", "7,2"], "x").classes == ("7", "2")  # names first, see `class_numbers`
    assert parse(SamplingConfig, ["--classes", "a,7"], "x").classes == ("a", "7")
    nested = parse(RunConfig, ["--sampling.temperature", "top=0.8"], "x", RunConfig.from_yaml(CONFIGS / "demo.yaml"))
    assert nested.sampling.temperature == {"top": 0.8}
    for bad in (["--temperature", "cold"], ["--temperature", "top=cold"], ["--top-k", "2.5"]):
        with pytest.raises(UserError, match=f"{bad[0].strip('-').replace('-', '.')}.*{bad[1]}"):
            parse(SamplingConfig, bad, "x")
    for options in (["--temperature", "top=1,top=2"], ["--top-k", "top=1, top=1"]):
        with pytest.raises(UserError, match=f"{options[0]}: the level 'top' occurs twice$"):
            parse(SamplingConfig, options, "x")
    with pytest.raises(UserError, match="file: temperature: the level 'top' occurs twice"):
        SamplingConfig.from_dict({"temperature": "top=1,bottom=1,top=2"}, "file")


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"top_p": {"top": 1.5}}, r"top_p\.top: .*less than or equal to 1, not 1\.5"),
        ({"temperature": -1}, r"temperature: .*greater than or equal to 0, not -1"),
        ({"guidance_scale": {"bottom": -2}}, r"guidance_scale\.bottom: .*greater than or equal to 0, not -2"),
        ({"temperature": float("nan")}, "finite"),
    ],
)
def test_values_of_every_level_are_validated(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        SamplingParams(**settings)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("scale", [0.0, 2.5])
def test_guided_codes_match_two_full_passes(kind: str, scale: float) -> None:
    prior = build(size=(4, 6), coarser=((4, 3),), classes=3, kind=kind)
    given = inputs(prior, batch=3)
    coarser, labels = given["coarser"], given["labels"]
    found = sample_level(prior, Noise(0, range(3), 0), LevelSamplingParams(guidance_scale=scale), coarser, labels)
    uniform, codes = Noise(0, range(3), 0).draw(4, 6), torch.zeros(3, 4, 6, dtype=torch.int64)
    for row in range(4):
        for column in range(6):
            with torch.no_grad():
                conditional = prior(codes, coarser, labels)[:, :, row, column]
                unconditional = prior(codes, coarser, None)[:, :, row, column]
            logits = unconditional + scale * (conditional - unconditional)
            codes[:, row, column] = sample_codes(logits, uniform[:, row, column], LevelSamplingParams())
    assert torch.equal(found, codes)
    for part in ([2], [1, 0]):
        coarser_part = tuple(level[part] for level in coarser)
        alone = sample_level(
            prior, Noise(0, part, 0), LevelSamplingParams(guidance_scale=scale), coarser_part, labels[part]
        )
        assert torch.equal(alone, found[part])


@pytest.mark.parametrize("kind", KINDS)
def test_guided_logits_extrapolate_from_unconditional_to_conditional(kind: str) -> None:
    prior = build(classes=3, kind=kind)
    labels = torch.tensor([0, 2])
    decoders: list[Any] = [
        prior.incremental_decoder(2, (), labels),
        prior.incremental_decoder(2, (), None),
        *(
            ClassifierFreeGuidance(prior.incremental_decoder(4, (), torch.tensor([0, 2, 3, 3])), scale)
            for scale in (1.0, 0.0, 3.0)
        ),
    ]
    for decoder in decoders:
        decoder.begin_row(0)
    conditional, unconditional, scale_1, scale_0, scale_3 = (decoder.logits(0) for decoder in decoders)
    assert not torch.allclose(conditional, unconditional, atol=1e-3)
    torch.testing.assert_close(scale_1, conditional)
    torch.testing.assert_close(scale_0, unconditional)
    torch.testing.assert_close(scale_3, unconditional + 3 * (conditional - unconditional))


def test_error_of_an_option_with_values_per_level_names_the_option_only() -> None:
    integer = "--top-k: Input should be a valid integer, got a number with a fractional part, not 2.5"
    with pytest.raises(UserError, match=f"^{integer}$"):
        parse(SamplingConfig, ["--top-k", "2.5"], "vqvae2 sample")


def test_each_level_uses_its_own_params(finished_run: Path) -> None:
    pipeline = allow_guidance(VQVAE2Pipeline.from_pretrained(finished_run))
    images, labels = range(2), pipeline.labels_of(range(2), None)
    bottom, top = pipeline.sample_codes(images, labels, 0, SamplingParams())
    for params in (SamplingParams(temperature={"bottom": 0}), SamplingParams(top_k={"bottom": 1})):
        found = pipeline.sample_codes(images, labels, 0, params)
        assert torch.equal(found[1], top)
        prior = pipeline.priors[0]
        most_likely = sample_level(prior, Noise(0, images, 0), LevelSamplingParams(temperature=0), (top,), labels)
        assert torch.equal(found[0], most_likely)
        assert not torch.equal(found[0], bottom)
    guided = pipeline.sample_codes(images, labels, 0, SamplingParams(guidance_scale={"top": 40}))
    assert not torch.equal(guided[1], top)
    sampled = pipeline(2, guidance_scale={"top": 40})
    torch.testing.assert_close(sampled, pipeline.autoencoder.decode(guided))


def test_guidance_without_label_dropout_or_labels_raises(finished_run: Path) -> None:
    pipeline = VQVAE2Pipeline.from_pretrained(finished_run)
    with pytest.raises(UserError, match="level bottom was trained without label dropout"):
        pipeline(1, guidance_scale=2)
    with pytest.raises(UserError, match="guidance_scale 3: the prior of level top was trained without label dropout"):
        pipeline(1, guidance_scale={"top": 3})
    priors: tuple[Prior, ...] = (build(coarser=((5, 4),)), build())
    with pytest.raises(UserError, match="guidance_scale 2: the prior of level bottom has no class labels"):
        VQVAE2Pipeline(pipeline.autoencoder, priors)(1, guidance_scale=2)
    with pytest.raises(UserError, match=r"no level is named 'middle'\. The levels are bottom, top"):
        pipeline(1, temperature={"middle": 0.5})


def test_sample_command_accepts_values_per_level(
    finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(finished_run, tmp_path / "run")
    before = contents(run)
    sample = ["sample", str(run)]
    fails(capsys, [*sample, "--guidance-scale", "2"], "guidance_scale 2", "label dropout")
    fails(capsys, [*sample, "--top-p", "top=1.5"], "top_p.top", "less than or equal to 1")
    fails(capsys, [*sample, "--top-k", "middle=3"], "no level is named 'middle'", "bottom, top")
    fails(capsys, [*sample, "--temperature", "top=cold"], "--temperature", "numbers per level such as top=1,bottom=2")
    assert contents(run) == before
    for level in ("bottom", "top"):
        path = run / f"prior-{level}" / "model.safetensors"
        prior: Any = load_prior(path)
        save_prior(path, prior, prior.config, **prior.made_from | {"label_dropout": 0.1})
    out = tmp_path / "out"
    command = [
        *sample,
        "--temperature",
        "top=1.0,bottom=0.5",
        "--guidance-scale",
        "2",
        "--count",
        "2",
        "--out",
        str(out),
    ]
    assert main(command) == 0
    params = json.loads((out / "manifest.json").read_text())["sampling_params"]
    assert params == {"temperature": {"top": 1.0, "bottom": 0.5}, "top_k": 0, "top_p": 1.0, "guidance_scale": 2.0}
    assert format_value(params).startswith("temperature (top 1.0, bottom 0.5), top-k 0")
