"""Every shipped recipe says what it is, parses, and runs through the real command line."""

from pathlib import Path

import pytest
import timm
import torch
import yaml
from checkpoints import save_checkpoint
from conversation_files import WRITERS
from objects import write_coco, write_coco_folder, write_people, write_voc
from safetensors.torch import load_file, save_file
from shell import QUIET, litflora, litflora_process, make_masks, make_photos

from litflora.commands.recipes import ROOT, comment, names
from litflora.language.tiny import byte_tokenizer, tiny_language_model

pytestmark = pytest.mark.filterwarnings("ignore:weights is null")  # there is no hub to ask

RECIPES = names()
TASKS = ("classification/", "segmentation/", "detection/", "vision_language/")
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
    if name == "quickstart" or name.startswith(TASKS):
        return ["--config", name]
    base = "vision_language/vqa_rad" if name == "data/llava" else "classification/shapes"
    return ["--config", base, "--config", name]


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
    if isinstance(said, dict):
        for key, value in said.items():
            assert_holds(parsed[key.removesuffix("+")], value)  # which adds to a list
    elif isinstance(said, list):
        for own, each in zip(parsed, said, strict=True):
            assert_holds(own, each)
    elif "${" not in str(said):
        assert parsed == said


@pytest.mark.parametrize("name", ["quickstart", *(f"{task}shapes" for task in TASKS)])
def test_embedded_recipe_runs(name, tmp_path):
    runs = {"trainer.default_root_dir": tmp_path, **ONE_BATCH, **SHAPES}
    fit = litflora("fit", "--config", name, *options(runs), *QUIET)
    assert fit.code == 0, fit.err
    assert (tmp_path / name / "version_0" / "adapter").is_dir()


PARTS = [name for name in RECIPES if name.split("/")[0] in ("tuning", "trainer", "logger")]


@pytest.mark.parametrize("name", PARTS)
def test_part_runs_over_the_embedded_recipe(name, tmp_path):
    trainer = settings_of(name).get("trainer", {})
    if trainer.get("accelerator") == "gpu" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    runs = {"trainer.default_root_dir": tmp_path, **ONE_BATCH, **SHAPES}
    if name.startswith("trainer/"):
        del runs["trainer.accelerator"]
    if name == "trainer/source_monitor":  # which asks what is left of them
        runs["model.init_args.weights"] = "embedded"
    command = litflora_process if "strategy" in trainer else litflora  # it starts itself again
    fit = command("fit", *base_of(name), *options(runs), *QUIET)
    assert fit.code == 0, fit.err
    run = tmp_path / "classification" / "shapes" / "version_0"
    if name == "trainer/debug":
        assert not list(tmp_path.iterdir())
    elif name == "logger/tensorboard":
        assert list(run.glob("events.out.tfevents.*"))
    else:
        assert (run / "metrics.csv").is_file()


PHOTOS = [name for name in RECIPES if "Shapes" not in str(settings_of(name).get("data", "Shapes"))]


OBJECTS = {
    "CocoDataModule": write_coco,
    "CocoFolderDataModule": write_coco_folder,
    "PennFudanDataModule": write_people,
    "VOCDetectionDataModule": write_voc,
}
# Small nets of the families of large ones.
STAND_INS = {
    "vit_small": "test_vit",
    "convnext_tiny": "test_convnext",
    "convnextv2": "test_convnext",
}


# Of a small language model, which is random, all is trained.
SMALL_ANSWERS = {
    "tower": "test_vit",
    "layer": -1,
    "img_size": 32,
    "weights": "null",
    "language_model": "tiny",
    "language_tuning": "litflora.adapters.Full",
}


SHORT = {"model.init_args.max_length": 300, "model.init_args.max_new_tokens": 4}


def backbone_of(name):
    said = settings_of(name).get("model", {}).get("init_args", {})
    return said.get("backbone") or said.get("tower", "")


def about_conversations(name):
    return settings_of(name)["data"]["class_path"].rpartition(".")[2] in WRITERS


def small_model(name, folder):
    """The recipe's model without weights; small where its own net or its detector is large."""
    if has_checkpoint(name):
        return {"model.init_args.model": save_checkpoint("llava", folder), **SHORT}
    if about_conversations(name):
        return {f"model.init_args.{key}": each for key, each in SMALL_ANSWERS.items()}
    stand_in = [net for large, net in STAND_INS.items() if backbone_of(name).startswith(large)]
    return {
        **({"model.init_args.backbone": stand_in[0]} if stand_in else {}),
        **({"model.init_args.head_width": 64} if name.startswith("detection/") else {}),
        "model.init_args.weights": "null",
    }


def has_checkpoint(name):
    """Whether the model is a checkpoint of transformers, with its tower."""
    return "PretrainedVisionLanguage" in str(settings_of(name).get("model"))


def small_data(name, folder):
    """A few small photos.

    Those of a detector are in the recipe's own layout. torchvision's data sets and masks are read
    in the tests of their datamodules; here folders stand in.
    """
    if name.startswith("detection/"):
        write = OBJECTS[settings_of(name)["data"]["class_path"].rpartition(".")[2]]
        return {"data.init_args.root": write(folder), "data.init_args.crop_size": 64}
    if about_conversations(name):
        write = WRITERS[settings_of(name)["data"]["class_path"].rpartition(".")[2]]
        return {"data.init_args.root": write(folder), "data.init_args.val_fraction": 0.3}
    if name.startswith("segmentation/"):
        return {
            "data": "litflora.datamodules.MaskFolderDataModule",
            "data.init_args.root": make_masks(folder, count=2),
            "data.init_args.class_names": "[ground, disc]",
            "data.init_args.crop_size": 64,
        }
    return {
        "data": "litflora.datamodules.ImageFolderDataModule",
        "data.init_args.root": make_photos(folder, count=2),
        "data.init_args.img_size": 64,
    }


def fit_on_photos(name, folder, **options_):
    """Runs a recipe in one process of a CPU."""
    runs = {
        **small_data(name, folder / "photos"),
        **small_model(name, folder / "checkpoint"),
        "data.init_args.num_workers": 0,
        "trainer.default_root_dir": folder,
        "trainer.accelerator": "cpu",
        "trainer.devices": 1,
        "trainer.strategy": "auto",
        "trainer.sync_batchnorm": "false",  # there is none on a CPU
        **ONE_BATCH,
    }
    fit = litflora("fit", *base_of(name), *options({**runs, **options_}), *QUIET)
    assert fit.code == 0, fit.err
    assert list(folder.glob("**/version_0/adapter/adapter_model.safetensors"))


def often(names):
    """Slow what differs from a recipe before it in its backbone alone."""
    seen = set()
    for name in names:
        data = name.rpartition("_convnext")[0] or name.rpartition("_vit")[0] or name
        yield pytest.param(name, marks=pytest.mark.slow if data in seen else ())
        seen.add(data)


@pytest.mark.parametrize("name", list(often(PHOTOS)))
def test_recipe_for_photos_runs(name, tmp_path):
    fit_on_photos(name, tmp_path)


def test_the_second_stage_of_llava_starts_from_the_first(tmp_path):
    """As docs/vision_language.md has it: of a language model in a folder, which stays as it is."""
    told = tmp_path / "language_model"
    tiny_language_model().save_pretrained(told)
    byte_tokenizer().save_pretrained(told)
    save_file(timm.create_model("test_vit").state_dict(), tmp_path / "tower.safetensors")
    frozen = {
        "model.init_args.weights": tmp_path / "tower.safetensors",
        "model.init_args.language_model": told,
        "model.init_args.language_tuning": "litflora.adapters.Frozen",
    }
    stage_1, stage_2 = "vision_language/llava_stage_1", "vision_language/llava_stage_2"
    fit_on_photos(stage_1, tmp_path, **frozen)
    first = tmp_path / stage_1 / "version_0" / "adapter"
    assert parts_in(first) == {"connector"}
    merged = litflora("merge", first, "--out", tmp_path / "stage_1")
    assert merged.code == 0, merged.err
    rest = {"model.init_args.language_tuning": "litflora.adapters.FLoRA"}
    base = {"model.init_args.weights": tmp_path / "stage_1"}
    fit_on_photos(stage_2, tmp_path, **base, **rest)
    second = tmp_path / stage_2 / "version_0" / "adapter"
    assert parts_in(second) == {"connector", "language_model"}
    learnt, start = (load_file(f / "adapter_model.safetensors") for f in (second, first))
    key = "connector.0.weight"
    assert 0 < (learnt[key] - start[key]).abs().max() < 1e-3  # one step from there


def parts_in(adapter):
    return {key.partition(".")[0] for key in load_file(adapter / "adapter_model.safetensors")}


@pytest.mark.parametrize("detector", ["mask_rcnn", "retinanet", "fcos"])
def test_a_detector_is_one_option(detector, tmp_path):
    """As docs/detection.md has it."""
    chosen = {"model.detector": detector, "data.masks": str(detector == "mask_rcnn").lower()}
    fit_on_photos("detection/coco_folder_vit_tiny", tmp_path, **chosen)


@pytest.mark.parametrize("name", [name for name in PHOTOS if backbone_of(name)])
def test_backbone_has_pretrained_weights(name):
    assert timm.models.get_pretrained_cfg(backbone_of(name)).hf_hub_id


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("name", ["gpu", "ddp", "fsdp1", "fsdp2"])
def test_recipes_of_gpus_fail_for_want_of_one_alone(name, tmp_path):
    where = ("--trainer.default_root_dir", tmp_path)
    result = litflora("fit", "--config", "quickstart", "--config", f"trainer/{name}", *where)
    assert result.code == 2
    assert "gpu" in result.err.lower()
    assert "strategy" not in result.err


def test_the_promised_recipes_are_there():
    promised = {"quickstart", "classification/shapes", "classification/cifar10_vit_tiny"}
    promised |= {f"classification/image_folder_{net}" for net in ("vit_tiny", "convnext_atto")}
    promised |= {"segmentation/shapes", "detection/shapes", "segmentation/camvid_vit_tiny"}
    promised |= {f"detection/pennfudan_{net}" for net in ("vit_tiny", "convnext_atto")}
    promised |= {
        f"tuning/{m}" for m in ("flora", "lora", "lisa", "full", "probe", "bitfit", "norm")
    }
    kinds = ("cpu", "gpu", "ddp", "ddp_cpu", "fsdp1", "fsdp2", "fsdp2_cpu", "debug")
    promised |= {f"trainer/{kind}" for kind in kinds}
    promised |= {f"trainer/{kind}_finder" for kind in ("lr", "batch_size")}
    assert promised <= set(RECIPES)


@pytest.mark.parametrize("task", ["segmentation", "detection"])
def test_every_dense_dataset_has_a_recipe_for_either_family(task):
    from litflora import datamodules
    from litflora.datamodules.detection_files import DetectionFilesDataModule
    from litflora.datamodules.mask_files import MaskFilesDataModule

    kind = MaskFilesDataModule if task == "segmentation" else DetectionFilesDataModule
    classes = {name for name in datamodules.__all__ if "DataModule" in name}
    shipped = {name for name in classes if issubclass(getattr(datamodules, name), kind)}
    for family in ("vit", "convnext"):
        found = [n for n in RECIPES if n.startswith(f"{task}/") and f"_{family}_" in n]
        told = {settings_of(name)["data"]["class_path"].rpartition(".")[2] for name in found}
        assert told == shipped


def test_every_dataset_of_conversations_has_a_recipe():
    from litflora import datamodules
    from litflora.datamodules.conversation_files import ConversationFilesDataModule

    classes = [name for name in datamodules.__all__ if name.endswith("DataModule")]
    kinds = {name: getattr(datamodules, name) for name in classes}
    files = {name for name, kind in kinds.items() if issubclass(kind, ConversationFilesDataModule)}
    found = [name for name in RECIPES if name.startswith("vision_language/")]
    told = {settings_of(name)["data"]["class_path"].rpartition(".")[2] for name in found}
    assert told >= files == set(WRITERS)


def test_every_dataset_has_a_recipe():
    from litflora.datamodules.vision import SOURCES

    texts = [Path(ROOT, f"{name}.yaml").read_text() for name in RECIPES]
    shipped = {key for key in SOURCES if any(f"dataset: {key}\n" in text for text in texts)}
    assert shipped | {"cifar10"} == set(SOURCES)  # CIFAR-10's recipe takes image folders
