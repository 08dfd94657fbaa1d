"""What is installed, and how little of it `import litflora` costs."""

import os
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
# The package's folders, as pyproject mounts them.
MOUNTS = {
    "modules": "litflora",
    "datamodules": "litflora/datamodules",
    "configs": "litflora/configs",
}


def shipped():
    """The files that belong in the wheel, under the names they have there."""
    for folder, mount in MOUNTS.items():
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".yaml", ".safetensors", ".typed"):
                yield f"{mount}/{path.relative_to(ROOT / folder).as_posix()}"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The names in a wheel built from a copy of the tree."""
    copy, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    for name in MOUNTS:
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    (copy / "tests").mkdir()
    (copy / "tests" / "__init__.py").touch()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", out, copy]
    subprocess.run(build, check=True, capture_output=True, cwd=out)
    (found,) = out.glob("*.whl")
    with zipfile.ZipFile(found) as archive:
        return set(archive.namelist())


def test_wheel_holds_every_file_of_the_tree(wheel):
    assert set(shipped()) <= wheel
    assert {"litflora/backbones/convnext_shapes.safetensors", "litflora/py.typed"} <= wheel


def test_wheel_adds_litflora_alone_to_site_packages(wheel):
    version = PROJECT["project"]["version"]
    assert {name.split("/")[0] for name in wheel} == {"litflora", f"litflora-{version}.dist-info"}


def test_listed_packages_are_those_of_the_tree():
    found = {name.rpartition("/")[0] for name in shipped() if name.endswith("/__init__.py")}
    assert {name.replace("/", ".") for name in found} == set(
        PROJECT["tool"]["setuptools"]["packages"]
    )


def test_version_is_told_once():
    import litflora

    assert litflora.__version__ == PROJECT["project"]["version"]
    changes = (ROOT / "CHANGELOG.md").read_text()
    assert f"## [{litflora.__version__}]" in changes


def test_every_public_name_is_there():
    import litflora

    for name in litflora.__all__:
        assert getattr(litflora, name) is not None
    assert set(litflora.__all__) <= set(dir(litflora))
    with pytest.raises(AttributeError, match="no attribute 'FLORA'"):
        _ = litflora.FLORA


def python(code):
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)


def test_import_is_instant_and_loads_no_torch():
    done = python(
        "import sys, time; start = time.process_time(); import litflora\n"
        "print(time.process_time() - start)\n"
        "assert not {'torch', 'lightning', 'timm', 'torchvision'} & set(sys.modules)"
    )
    assert float(done.stdout) < 0.5


def test_the_engine_needs_torch_alone():
    python(
        "import sys, litflora; litflora.FLoRA; litflora.adapters.inject\n"
        "others = {'lightning', 'timm', 'torchvision', 'torchmetrics', 'jsonargparse', 'peft'}\n"
        "others.add('rich')\n"
        "assert not others & set(sys.modules), others & set(sys.modules)\n"
        "ours = {name for name in sys.modules if name.startswith('litflora.')}\n"
        "assert all(name.startswith('litflora.adapters') for name in ours), ours"
    )


def test_datamodules_need_nothing_of_the_rest():
    python(
        "import sys; from litflora.datamodules import *\n"
        "ours = {name for name in sys.modules if name.startswith('litflora.')}\n"
        "assert all(name.startswith('litflora.datamodules') for name in ours), ours"
    )


@pytest.mark.parametrize("command", [["--help"], ["recipes"]])
def test_light_command_takes_under_a_second(command):
    assert seconds("-m", "litflora", *command) < 1


@pytest.mark.slow
def test_help_of_fit_costs_little_more_than_lightnings_own():
    bare = "from lightning.pytorch.cli import LightningCLI; LightningCLI()"
    seconds("-m", "litflora", "fit", "--help")  # reads the files once
    ours = seconds("-m", "litflora", "fit", "--help")
    assert ours < 1.4 * seconds("-c", bare, "fit", "--help")


def seconds(*args):
    """Processor time of a Python process: what else the machine does is not counted."""
    before = os.times()
    subprocess.run([sys.executable, *args], check=True, capture_output=True)
    after = os.times()
    return sum(after[2:4]) - sum(before[2:4])
