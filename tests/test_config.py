"""Test configs: loading, overrides, comparison, and one-line errors with the full key path."""

import json
from pathlib import Path
from typing import Annotated, Any, Literal

import pytest
from pydantic import Field

from sampling.run_config import RunConfig
from vqvae2.command_line import parse
from vqvae2.config import Config, differences
from vqvae2.errors import UserError


def load(path: Path, old: str = "", new: str = "") -> RunConfig:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    return RunConfig.from_yaml(path)


def test_yaml_round_trip(tiny_config: Path, tmp_path: Path) -> None:
    experiment = RunConfig.from_yaml(tiny_config)
    copy = tmp_path / "copy.yaml"
    copy.write_text(experiment.to_yaml())
    assert RunConfig.from_yaml(copy) == experiment


def test_overrides_reach_list_elements_unions_and_dictionaries(tiny_config: Path) -> None:
    changed = parse(
        RunConfig,
        [
            "--data.path=/somewhere",
            "--data.size",
            "48",
            "64",
            "--autoencoder.model.levels.1.quantizer.codebook_size",
            "7",
            "--priors.top.training.learning-rate",
            "3e-4",
        ],
        "vqvae2 run",
        RunConfig.from_yaml(tiny_config),
    )
    assert changed.data.path == "/somewhere"
    assert changed.data.shape == (48, 64)
    assert changed.autoencoder.model.levels[1].quantizer.codebook_size == 7
    assert changed.priors["top"].training.learning_rate == 3e-4


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("stride: 4", "strid: 4", ["autoencoder.model.levels.0.strid", "unknown key"]),
        (
            "codebook_size: 12",
            "codebook_size: -3",
            ["autoencoder.model.levels.1.quantizer.codebook_size", "greater than or equal to 1", "-3"],
        ),
        ("kind: gradient", "kind: gradiant", ["autoencoder.model.levels.1.quantizer", "gradiant", "'ema'"]),
        ("steps: 6, ", "", ["autoencoder.training.steps", "at least 1"]),
        ("kernel: 3", "kernel: 4", ["priors.top.model", "kernel: must be odd, not 4"]),
        ("  bottom:\n", "  bottem:\n", ["priors", "bottom", "bottem"]),
        ("labels: folder", "labels: class", ["data.labels", "none, folder, or a .csv"]),
        ("data: {", "data: {{", ["not valid YAML"]),
        ("data:", "dataa:", ["dataa", "unknown key"]),
    ],
)
def test_errors_name_the_key_path_in_one_line(tiny_config: Path, old: str, new: str, words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        load(tiny_config, old, new)
    message = str(error.value)
    assert "\n" not in message
    assert str(tiny_config) in message
    for word in words:
        assert word in message


def test_misspelled_override_suggests_the_correct_name(tiny_config: Path) -> None:
    with pytest.raises(UserError, match=r"--data\.pth.*--data\.path") as error:
        parse(RunConfig, ["--data.pth", "x"], "vqvae2 run", RunConfig.from_yaml(tiny_config))
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match=r"--data\.labels: must be none, folder"):
        parse(RunConfig, ["--data.labels", "x"], "vqvae2 run", RunConfig.from_yaml(tiny_config))


@pytest.mark.parametrize("name", ["missing.yaml", ".", "binary.yaml", "list.yaml"])
def test_invalid_config_file_error_names_the_file(tmp_path: Path, name: str) -> None:
    (tmp_path / "binary.yaml").write_bytes(bytes(range(256)))
    (tmp_path / "list.yaml").write_text("- a\n- b\n")
    with pytest.raises(UserError, match=str(tmp_path)):
        RunConfig.from_yaml(tmp_path / name)


def test_differences_have_full_key_paths() -> None:
    one = {"a": {"b": [1, {"c": 2}]}, "same": 3}
    other = {"a": {"b": [1, {"c": 5}]}, "same": 3, "new": 4}
    assert list(differences(one, other)) == [("a.b.1.c", 2, 5), ("new", None, 4)]
    assert not list(differences(one, one))


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("size: 32", "size: 2020-99-99", ["not valid YAML", "month"]),
        ("size: 32", "size: !!int abc", ["not valid YAML"]),
        ("size: 32", "size: 32, size: 64", ["not valid YAML", "`size` occurs twice"]),
        ("size: 32", "size: " + "[" * 5000, ["not valid YAML", "nested too deeply"]),
        ("steps: 6", "steps: true", ["autoencoder.training", "steps: expected an integer, not true"]),
        ("labels: folder", "labels: folder, crop: true", ["data", "crop"]),
        ("autoencoder:", "autoencodr:", ["autoencodr: unknown key", "Did you mean `autoencoder`?"]),
        ("code_dim: 8}}\n  training", "code_dimm: 8}}\n  training", ["code_dimm: unknown key", "`code_dim`"]),
        ("steps: 6", "seed: 18446744073709551616, steps: 6", ["autoencoder.training.seed", "less than or equal"]),
        ("channels: 16", "channels: 60000", ["autoencoder.model.channels", "less than or equal"]),
        ("count: 5", "count: 1000000000000", ["sampling.count", "less than or equal"]),
        ("batch_size: 8", "batch_size: 100000000000000", ["batch_size", "less than or equal"]),
        ("size: 32", "size: 99999999999", ["data.size", "less than or equal"]),
        ("size: 32", "size: 2.5", ["data.size: Input should be a valid integer, got a number with a fractional part"]),
        ("num_workers: 0", "num_workers: yes", ["num_workers: expected an integer, not true"]),
        ("steps: 6", "steps: 6, betas: [1.5, 0.9]", ["autoencoder.training.betas.0", "less than 1, not 1.5"]),
        (
            "  training: {steps: 6",
            "  loss: {adversarial: {betas: [-1, 0.9]}}\n  training: {steps: 6",
            ["autoencoder.loss.adversarial.betas.0", "greater than or equal to 0, not -1"],
        ),
        ("kind: ema, codebook_size: 16", "kind: fsq, grid: [1, 8]", ["quantizer.grid.0", "or equal to 2, not 1"]),
        ("kind: ema, codebook_size: 16", f"kind: fsq, grid: {[64] * 5}", ["grid: must have at most 16,777,216"]),
        ("kind: ema,", "kind: ema, epsilon: 0,", ["quantizer.epsilon", "greater than 0, not 0"]),
        ("val_fraction: 0.1", "val_fraction: .nan", ["data.val_fraction", "finite"]),
    ],
)
def test_malformed_yaml_and_out_of_range_values(tiny_config: Path, old: str, new: str, words: list[str]) -> None:
    with pytest.raises(UserError) as error:
        load(tiny_config, old, new)
    message = str(error.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_values_and_keys_of_any_length_give_short_errors(tmp_path: Path) -> None:
    class Record(Config):
        number: int = 0

    for value in ({"number": "9" * 5000}, {"k" * 5000: 1}, {"number": 1e300}, [1], "text", None):
        (tmp_path / "record.json").write_text(json.dumps(value))
        with pytest.raises(UserError, match=r"record\.json: .*Delete it\.$") as error:
            Record.from_json(tmp_path / "record.json", "Delete it.")
        assert len(str(error.value)) < 400 + len(str(tmp_path))


def test_partial_sections_keep_the_defaults_of_their_parent() -> None:
    class Inner(Config):
        kind: Literal["inner"] = "inner"
        size: int = 1
        width: int = 2

    class Other(Config):
        kind: Literal["other"] = "other"
        size: int = 3

    class Middle(Config):
        steps: int
        inner: Annotated[Inner | Other, Field(discriminator="kind")] = Inner(size=4)

    class Outer(Config):
        middle: Middle = Middle(steps=5)
        parts: tuple[Middle, ...] = ()

    def middle(**values: Any) -> dict[str, Any]:
        return Outer.from_dict({"middle": values}, "test").middle.to_dict()

    assert middle() == {"steps": 5, "inner": {"kind": "inner", "size": 4, "width": 2}}
    assert middle(inner={"kind": "inner", "width": 6}) == {
        "steps": 5,
        "inner": {"kind": "inner", "size": 4, "width": 6},
    }
    assert middle(inner={"kind": "other"}) == {"steps": 5, "inner": {"kind": "other", "size": 3}}
    with pytest.raises(UserError, match=r"parts\.0\.steps: required"):
        Outer.from_dict({"parts": [{}]}, "test")
