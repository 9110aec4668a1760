"""Test `vqvae2 tune-sampling`: distances, resuming, the run's config, and errors."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from sampling.evaluation import tune_sampling
from sampling.run_config import RunConfig
from tests.test_commands import fails
from vqvae2.__main__ import main

FEATURES = ["--features", "efficientnet-lite0"]


@pytest.fixture
def run(finished_run: Path, tmp_path: Path) -> Path:
    return shutil.copytree(finished_run, tmp_path / "run")


def trials(run: Path, name: str = "tuning.json") -> dict[tuple[str, str], float]:
    found = json.loads((run / "evaluation" / name).read_text())["trials"]
    return {(str(trial["temperature"]), str(trial["top_p"])): trial["distance"] for trial in found}


def test_best_combination_becomes_the_default(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    command = ["tune-sampling", str(run), *FEATURES, "--count", "4", "--top-p", "0.9"]
    assert main([*command, "--temperature", "0.5", "top=1.0,bottom=0.9"]) == 0
    found = trials(run)
    assert found.keys() == {("0.5", "0.9"), ("{'top': 1.0, 'bottom': 0.9}", "0.9")}

    # The distances are those of `vqvae2 evaluate`.
    out = tmp_path / "samples"
    assert main(["sample", str(run), "--count", "4", "--temperature", "0.5", "--top-p", "0.9", "--out", str(out)]) == 0
    assert main(["evaluate", str(run), *FEATURES, "--samples", str(out)]) == 0
    metrics = json.loads((run / "evaluation" / "metrics.json").read_text())
    expected = metrics["features"]["efficientnet-lite0"]["fd"]["value"]
    assert found["0.5", "0.9"] == pytest.approx(expected, rel=1e-5)

    # A further combination is measured, and the others are not measured again.
    measured = []
    monkeypatch.setattr(tune_sampling, "_distance", lambda _, config, *__: measured.append(config) or 0.25)
    capsys.readouterr()
    assert main([*command, "--temperature", "0.5", "0.7"]) == 0
    assert [config.temperature for config in measured] == [0.7]
    assert trials(run) == {**found, ("0.7", "0.9"): 0.25}
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split() == ["FD", "0.25", "temperature", "0.7,", "top-p", "0.9"]
    assert "4 samples, 16 held-out images" in printed[3]
    assert yaml.safe_load(printed[-1]) == {"sampling": {"temperature": 0.7, "top_p": 0.9}}

    sampling = RunConfig.from_resolved_yaml(run / "config.yaml").sampling
    assert (sampling.temperature, sampling.top_p, sampling.count) == (0.7, 0.9, 5)
    assert main(["sample", str(run)]) == 0
    manifest = json.loads((run / "samples-2" / "manifest.json").read_text())
    assert manifest["sampling_params"]["temperature"] == 0.7

    # Another number of images is another measurement, and so are other parameters. Earlier ones are kept.
    first = (run / "evaluation" / "tuning.json").read_bytes()
    assert main([*command, "--temperature", "0.5", "--count", "5"]) == 0
    assert trials(run, "tuning-2.json") == {("0.5", "0.9"): 0.25}
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text(config.replace("top_k: 0", "top_k: 3"))
    assert main([*command, "--temperature", "0.8", "--count", "5"]) == 0
    assert trials(run, "tuning-3.json") == {("0.8", "0.9"): 0.25}
    (run / "config.yaml").write_text(config)
    assert main([*command, "--temperature", "0.8", "--count", "5"]) == 0
    assert trials(run, "tuning-2.json") == {("0.5", "0.9"): 0.25, ("0.8", "0.9"): 0.25}
    assert (run / "evaluation" / "tuning.json").read_bytes() == first
    assert main([*command, "--temperature", "0.5", "0.7"]) == 0
    assert len(measured) == 4, "the first combinations are not measured again"


def test_invalid_options_and_damaged_files_give_one_line_errors(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["tune-sampling", str(run), *FEATURES]
    fails(capsys, [*command, "--temperature", "-1"], "temperature", "greater than or equal to 0")
    fails(capsys, [*command, "--top-p", "middle=0.5"], "no level is named 'middle'")
    fails(capsys, ["tune-sampling", str(run), "--features", "vgg"], "no network 'vgg'")
    (run / "evaluation").mkdir()
    (run / "evaluation" / "tuning.json").write_text("[]")
    fails(capsys, [*command, "--count", "4"], "tuning.json", "expected keys and values", "tune-sampling` again")
