"""What README and docs show runs as it stands there."""

import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from shell import litflora

ROOT = Path(__file__).resolve().parents[1]
PAGES = (
    "README.md",
    "docs/engine.md",
    "docs/cli.md",
    "docs/compare.md",
    "docs/scaling.md",
    "docs/segmentation.md",
    "docs/detection.md",
    "docs/forgetting.md",
    "docs/vision_language.md",
)


def blocks(page: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (ROOT / page).read_text(), re.S | re.M)


@pytest.mark.parametrize("page", ["README.md", "docs/engine.md", "docs/forgetting.md"])
def test_python_blocks_run(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    short = ("--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2")
    if page == "README.md":  # which has run the quickstart when it comes to its adapter
        assert litflora("fit", "--config", "quickstart", *short).code == 0
    found = blocks(page, "python")
    assert found
    for block in found:
        exec(compile(block, page, "exec"), {"__name__": "example"})


def test_questions_of_ones_own_are_learnt(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    (block,) = blocks("docs/vision_language.md", "python")
    exec(compile(block, "vision_language", "exec"), {"__name__": "example"})
    assert capsys.readouterr().out.splitlines()[-1] == "yes"


def write_leaves(folder: Path) -> None:
    for split in ("train", "val"):
        for kind, mode in (("photos", "RGB"), ("labels", "L")):
            (folder / kind / split).mkdir(parents=True)
            for name in ("a.png", "b.png"):
                image = Image.new(mode, (40, 30), 1 if mode == "L" else (9, 99, 9))
                image.save(folder / kind / split / name)


def write_bees(folder: Path) -> None:
    for split in ("train", "val"):
        (folder / split).mkdir(parents=True)
        for name, text in (("a", "0 .5 .5 .4 .6\n1 .2 .2 .2 .2\n"), ("b", "")):
            Image.new("RGB", (40, 30), (99, 99, 9)).save(folder / split / f"{name}.jpg")
            (folder / split / f"{name}.txt").write_text(text)


@pytest.mark.parametrize(
    ("page", "write", "classes"),
    [("segmentation", write_leaves, "healthy, ill"), ("detection", write_bees, "worker, drone")],
)
def test_a_data_set_of_ones_own_takes_a_file_and_a_recipe(
    page: str, write: Callable[[Path], None], classes: str, tmp_path: Path, monkeypatch
) -> None:
    """As the page walks through it."""
    name = write.__name__.removeprefix("write_")
    (tmp_path / f"{name}.py").write_text(blocks(f"docs/{page}.md", "python")[0])
    (tmp_path / f"{name}.yaml").write_text(blocks(f"docs/{page}.md", "yaml")[0])
    write(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    fit = litflora("fit", "--config", f"{name}.yaml", "--trainer.accelerator", "cpu")
    assert fit.code == 0, fit.err
    assert f"2 classes: {classes}" in fit.out
    assert next(tmp_path.glob("runs/**/adapter")).is_dir()


def test_the_example_of_the_engine_in_other_code(tmp_path: Path) -> None:
    """Somebody else's LightningModule and a plain loop, with nothing but the engine of litflora."""
    example = ROOT / "docs" / "engine_example.py"
    text = example.read_text()
    assert set(re.findall(r"litflora[\w.]*", text)) == {"litflora.adapters"}
    assert len([line for line in text.splitlines() if line.strip()]) <= 40
    subprocess.run([sys.executable, example], check=True, cwd=tmp_path, capture_output=True)
    names = {path.name for path in (tmp_path / "plain_adapter").iterdir()}
    assert names == {"adapter_config.json", "adapter_model.safetensors"}


def commands() -> list[str]:
    """The commands on photos and adapters, which a test has not; others' tests run the rest."""
    lines = [b.replace("\\\n", " ") for page in PAGES for b in blocks(page, "bash")]
    return [line for b in lines for line in b.splitlines() if re.search("photos|adapter", line)]


@pytest.mark.parametrize("command", commands())
def test_commands_lack_nothing_but_the_readers_files(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    result = litflora(*shlex.split(command)[1:])
    assert result.code == 2
    assert re.search("photos is no folder|is not an adapter folder", result.err), result.err


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", (ROOT / page).read_text()):
            assert (ROOT / page).parent.joinpath(target).exists(), f"{page}: {target}"
