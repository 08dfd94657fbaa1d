"""Every shipped recipe says what it is, parses, and runs through the real command line."""

from pathlib import Path

import pytest
import timm
import yaml
from shell import QUIET, litflora, make_masks, make_photos

from litflora.commands.recipes import ROOT, comment, names

pytestmark = pytest.mark.filterwarnings("ignore:weights is null")  # there is no hub to ask

RECIPES = names()
TASKS = ("classification/", "segmentation/")
# What makes a run small, by the first part of the recipe's name. Tuning, trainer and logger
# recipes are laid over the embedded data.
ONE_BATCH = {
    "trainer.max_epochs": 1,
    "trainer.limit_train_batches": 1,
    "trainer.limit_val_batches": 1,
    "trainer.num_sanity_val_steps": 1,
    "data.init_args.batch_size": 2,
}
SHAPES = {
    "data.init_args.train_samples": 4,
    "data.init_args.val_samples": 2,
    "model.init_args.weights": "null",
    "trainer.accelerator": "cpu",
}


def options(settings):
    return [str(each) for key, value in settings.items() for each in (f"--{key}", value)]


def base_of(name):
    """The recipes that make a whole with this one."""
    whole = name == "quickstart" or name.startswith(TASKS)
    return ["--config", name] if whole else ["--config", "classification/shapes", "--config", name]


def settings_of(name):
    return yaml.safe_load((ROOT / f"{name}.yaml").read_text())


def needs_root(name):
    data = settings_of(name).get("data", {})
    return "Shapes" not in data.get("class_path", "Shapes") and "root" not in data["init_args"]


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_opens_by_saying_what_it_is_and_how_to_run_it(name):
    what, command = comment(name)
    assert what.endswith(".")
    assert command.startswith("litflora fit --config ")
    assert f"--config {name}" in command
    assert command.endswith("FOLDER") == needs_root(name)


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_states_only_what_differs(name):
    text = (ROOT / f"{name}.yaml").read_text()
    assert len(text.splitlines()) <= 30


@pytest.mark.parametrize("name", RECIPES)
def test_recipe_fits_the_signatures(name):
    root = ["--data.init_args.root", "anywhere"] if needs_root(name) else []
    printed = litflora("fit", *base_of(name), *root, "--print_config")
    assert printed.code == 0, printed.err
    parsed = yaml.safe_load(printed.out)
    assert_holds(parsed, settings_of(name))


def assert_holds(parsed, said):
    """What the recipe says is in the parsed config, interpolations aside."""
    for key, value in said.items():
        held = parsed[key.removesuffix("+")]  # which adds to a list
        if isinstance(value, dict):
            assert_holds(held, value)
        elif "${" not in str(value):
            assert held == value, key


@pytest.mark.parametrize("name", ["quickstart", "classification/shapes", "segmentation/shapes"])
def test_embedded_recipe_runs(name, tmp_path):
    runs = {"trainer.default_root_dir": tmp_path, **ONE_BATCH, **SHAPES}
    fit = litflora("fit", "--config", name, *options(runs), *QUIET)
    assert fit.code == 0, fit.err
    assert (tmp_path / name / "version_0" / "adapter").is_dir()


PARTS = [name for name in RECIPES if name.split("/")[0] in ("tuning", "trainer", "logger")]


@pytest.mark.parametrize("name", PARTS)
def test_part_runs_over_the_embedded_recipe(name, tmp_path):
    import torch

    if name == "trainer/gpu" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    runs = {"trainer.default_root_dir": tmp_path, **ONE_BATCH, **SHAPES}
    if name.startswith("trainer/"):
        del runs["trainer.accelerator"]
    fit = litflora("fit", *base_of(name), *options(runs), *QUIET)
    assert fit.code == 0, fit.err
    run = tmp_path / "classification" / "shapes" / "version_0"
    if name == "trainer/debug":
        assert not list(tmp_path.iterdir())
    elif name == "logger/tensorboard":
        assert list(run.glob("events.out.tfevents.*"))
    else:
        assert (run / "metrics.csv").is_file()


PHOTOS = [name for name in RECIPES if "Shapes" not in str(settings_of(name).get("data", "Shapes"))]


@pytest.mark.parametrize("name", PHOTOS)
def test_recipe_for_photos_runs(name, tmp_path):
    """On a few small photos, with a small net of the family where the recipe's own is large.

    torchvision's data sets are read in the tests of their datamodule; here folders stand in.
    """
    dense = name.startswith("segmentation/")
    data, sides = ("MaskFolder", "crop_size") if dense else ("ImageFolder", "img_size")
    photos = (make_masks if dense else make_photos)(tmp_path / "photos", count=2)
    backbone = settings_of(name).get("model", {}).get("init_args", {}).get("backbone", "")
    small = {"vit_small": "test_vit", "convnext_tiny": "test_convnext"}
    stand_in = [net for large, net in small.items() if backbone.startswith(large)]
    folders = {
        **({"model.init_args.backbone": stand_in[0]} if stand_in else {}),
        "data": f"litflora.datamodules.{data}DataModule",
        "data.init_args.root": photos,
        f"data.init_args.{sides}": 64,
        **({"data.init_args.class_names": "[ground, disc]"} if dense else {}),
        "data.init_args.num_workers": 0,
        "model.init_args.weights": "null",
        "trainer.default_root_dir": tmp_path,
        "trainer.accelerator": "cpu",
    }
    fit = litflora("fit", *base_of(name), *options({**folders, **ONE_BATCH}), *QUIET)
    assert fit.code == 0, fit.err
    assert list(tmp_path.glob("**/version_0/adapter/adapter_model.safetensors"))


@pytest.mark.parametrize("name", [name for name in PHOTOS if "model" in settings_of(name)])
def test_backbone_has_pretrained_weights(name):
    backbone = settings_of(name)["model"]["init_args"]["backbone"]
    assert timm.models.get_pretrained_cfg(backbone).hf_hub_id


def test_the_promised_recipes_are_there():
    promised = {"quickstart", "classification/shapes", "classification/cifar10_vit_tiny"}
    promised |= {f"classification/image_folder_{net}" for net in ("vit_tiny", "convnext_atto")}
    promised |= {f"tuning/{m}" for m in ("flora", "lora", "full", "probe", "bitfit", "norm")}
    promised |= {f"trainer/{kind}" for kind in ("cpu", "gpu", "debug")}
    assert promised <= set(RECIPES)


def test_every_dataset_of_masks_has_a_recipe_for_either_family():
    from litflora import datamodules
    from litflora.datamodules.mask_files import MaskFilesDataModule

    classes = {name for name in datamodules.__all__ if "DataModule" in name}
    masks = {n for n in classes if issubclass(getattr(datamodules, n), MaskFilesDataModule)}
    for family in ("vit", "convnext"):
        found = [n for n in RECIPES if n.startswith("segmentation/") and f"_{family}_" in n]
        told = {settings_of(name)["data"]["class_path"].rpartition(".")[2] for name in found}
        assert told == masks


def test_every_dataset_has_a_recipe():
    from litflora.datamodules.vision import SOURCES

    texts = [Path(ROOT, f"{name}.yaml").read_text() for name in RECIPES]
    shipped = {key for key in SOURCES if any(f"dataset: {key}\n" in text for text in texts)}
    assert shipped | {"cifar10"} == set(SOURCES)  # CIFAR-10's recipe takes image folders
