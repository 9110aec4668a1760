"""The documentation names files, functions, options and sections that exist."""

import importlib
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from experiments.likelihoods.likelihood_run import LikelihoodConfig, LikelihoodOptions
from experiments.speech.speech_run import SpeechConfig, SpeechOptions
from experiments.video.video_run import VideoConfig, VideoOptions
from sampling.run_config import RunConfig
from train.run import RunOptions
from vqvae2.__main__ import COMMANDS
from vqvae2.command_line import option_names, options_class

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted([*DOCS.glob("*.md"), ROOT / "CONTRIBUTING.md", ROOT / "README.md"])
EXPERIMENTS = ("speech.md", "likelihoods.md", "video.md")
ARCHITECTURE = (DOCS / "architecture.md").read_text(encoding="utf-8")


def file_tree() -> set[str]:
    """Return the paths in the file trees; a folder of Python files stands for its `__init__.py` too."""
    pages = [(DOCS / name).read_text(encoding="utf-8") for name in ("architecture.md", *EXPERIMENTS)]
    return set().union(*(paths_in_tree(page) for page in pages))


def paths_in_tree(page: str) -> set[str]:
    """Return the paths in the file tree of one page."""
    block = re.search(r"```\n(.*?)```", page, re.DOTALL)
    assert block
    paths, folders = set(), []
    for line in block[1].splitlines():
        indent = (len(line) - len(line.lstrip())) // 2
        name = line.split()[0]
        folders = folders[:indent]
        paths.add("/".join([*folders, name.rstrip("/")]))
        if name.endswith("/"):
            folders.append(name.rstrip("/"))
    return paths


def tracked_python_files() -> set[str]:
    command = ["git", "ls-files", "vqvae2/*.py", "sampling/*.py", "train/*.py", "experiments/*.py"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout.split()
    if not listed:
        pytest.skip("not a git checkout")
    return {path for path in listed if (ROOT / path).exists()}


def test_every_path_in_the_file_tree_exists() -> None:
    assert [path for path in sorted(file_tree()) if not (ROOT / path).exists()] == []


def test_the_file_tree_names_every_python_file() -> None:
    tree = file_tree()
    named = tree | {f"{path}/__init__.py" for path in tree if (ROOT / path).is_dir()}
    assert sorted(tracked_python_files() - named) == []


def test_architecture_fits_in_one_sitting() -> None:
    before, tree, after = ARCHITECTURE.split("```")
    assert len((before + after).splitlines()) < 80
    assert max(map(len, tree.splitlines())) <= 120


def functions() -> list[str]:
    _, section = ARCHITECTURE.split("## The life of one image")
    return sorted(set(re.findall(r"`((?:vqvae2|sampling|train)(?:\.\w+)+)`", section)))


@pytest.mark.parametrize("name", functions())
def test_functions_in_the_life_of_an_image_exist(name: str) -> None:
    parts = name.split(".")
    found: Any = None
    for end in range(1, len(parts) + 1):  # import modules as far as possible; the rest are attributes
        try:
            found = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            for part in parts[end - 1 :]:
                found = getattr(found, part)
            break
    assert callable(found)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http:", "https:")):
            continue
        name, _, anchor = target.partition("#")
        linked = page.parent / name if name else page
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", heading).lower().replace(" ", "-") for heading in headings}, (
                target
            )


def options_of(command: str) -> set[str]:
    """Return the options of a command, such as `guidance-scale`; those of a run for two levels."""
    module, _, function = COMMANDS[command].target.partition(":")
    cls = options_class(getattr(importlib.import_module(module), function))
    names = {name for name, _ in option_names(cls)}
    if issubclass(cls, VideoOptions):
        names |= {name for name, _ in option_names(VideoConfig.from_yaml(ROOT / "configs" / "video-mazes.yaml"))}
    elif issubclass(cls, RunOptions):
        names |= {name for name, _ in option_names(RunConfig.from_yaml(ROOT / "configs" / "demo.yaml"))}
    if issubclass(cls, SpeechOptions):
        names |= {name for name, _ in option_names(SpeechConfig.from_yaml(ROOT / "configs" / "speech-digits.yaml"))}
    if issubclass(cls, LikelihoodOptions):
        names |= {
            name for name, _ in option_names(LikelihoodConfig.from_yaml(ROOT / "configs" / "likelihoods-32.yaml"))
        }
    return {name.replace("_", "-") for name in names}


def commands() -> list[tuple[str, str]]:
    """Return (page, command line) of all `vqvae2` command lines in code."""
    found = []
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        code = [*re.findall(r"`([^`\n]+)`", text), *re.findall(r"^    (.+)$", text, re.MULTILINE)]
        found += [(page.name, line) for line in code if re.search(r"(^|-m )vqvae2 [a-z]", line)]
    return found


def test_commands_in_the_documentation_have_the_options_they_use() -> None:
    assert len(commands()) > 30
    wrong = []
    for page, line in commands():
        command, *arguments = re.sub(r"^.*?vqvae2 ", "", line).split()
        if f"{command} {arguments[0] if arguments else ''}" in COMMANDS:  # a name of two words
            command = f"{command} {arguments.pop(0)}"
        if command not in COMMANDS:
            wrong.append(f"{page}: {line}: no command {command}")
            continue
        options = options_of(command)
        wrong += [
            f"{page}: {line}: no option {argument}"
            for argument in arguments
            if argument.startswith("--") and argument[2:].partition("=")[0].replace("_", "-") not in options
        ]
    assert wrong == []


def test_settings_in_the_documentation_exist() -> None:
    images = {name for name, _ in option_names(RunConfig.from_yaml(ROOT / "configs" / "demo.yaml"))}
    speech = {name for name, _ in option_names(SpeechConfig.from_yaml(ROOT / "configs" / "speech-digits.yaml"))}
    likelihoods = {
        name for name, _ in option_names(LikelihoodConfig.from_yaml(ROOT / "configs" / "likelihoods-32.yaml"))
    }
    video = {name for name, _ in option_names(VideoConfig.from_yaml(ROOT / "configs" / "video-mazes.yaml"))}
    unknown = []
    for page in PAGES:
        names = {"speech.md": speech, "likelihoods.md": likelihoods, "video.md": video}.get(page.name, images)
        last = {name.rpartition(".")[2] for name in names}
        sections = "|".join(sorted({name.partition(".")[0] for name in names}))
        for code in set(re.findall(r"`([^`\n]+)`", page.read_text(encoding="utf-8"))) - set(functions()):
            if match := re.fullmatch(rf"((?:{sections})\.[\w.]+)(: .+)?", code):
                key = match[1].replace("priors.LEVEL", "priors.top")
                known = any(f"{name}.".startswith(f"{key}.") for name in names)
            elif match := re.fullmatch(r"(\w+): [\w.]+", code):
                known = match[1] in last
            else:
                continue
            if not known:
                unknown.append(f"{page.name}: {code}")
    assert unknown == []


def test_figures_are_those_that_the_script_draws(tmp_path: Path) -> None:
    script = tmp_path / "make_figures.py"
    script.write_text((DOCS / "make_figures.py").read_text(encoding="utf-8"), encoding="utf-8")
    subprocess.run([sys.executable, str(script)], check=True)
    for name in ("network.svg", "data-flow.svg"):
        assert (tmp_path / name).read_text(encoding="utf-8") == (DOCS / name).read_text(encoding="utf-8")


def test_code_store_example_runs(finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (DOCS / "recipes.md").read_text(encoding="utf-8")
    code = text.split("runs as written -->\n```python\n")[1].split("```")[0]
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "first").symlink_to(finished_run)
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, Any] = {}
    exec(code, namespace)
    assert namespace["images"].shape == (2, 3, 32, 32)
    assert namespace["loss"].isfinite()


def test_readme_example_runs_and_its_shapes_are_right() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    code = text.split("```python\n")[1].split("```")[0]
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    namespace: dict[str, Any] = {}
    exec(code, namespace)
    shapes = {name: tuple(namespace[name].shape) for name in ("bottom", "top", "images", "samples")}
    assert shapes == {"bottom": (4, 16, 16), "top": (4, 8, 8), "images": (4, 3, 64, 64), "samples": (2, 3, 64, 64)}
    assert namespace["images"].abs().max() <= 1
