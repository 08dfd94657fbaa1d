"""Backbone, neck and head of a dense net, each tuned in its own way on a merged file's weights."""

import copy
from functools import partial

import pytest
import torch
from lightning.pytorch import LightningDataModule, seed_everything
from safetensors.torch import load_file, save_file
from shell import QUIET, litflora
from tiny import trainer
from torch.optim import SGD
from torch.utils.data import DataLoader

from litflora import ClassificationModule, SegmentationModule
from litflora.adapters import (
    BitFit,
    FLoRA,
    Frozen,
    Full,
    LoRA,
    NormTuning,
    PerModule,
    Probe,
    adapter_names,
    merge,
    read_config,
)
from litflora.callbacks import AdapterFolder
from litflora.module import from_adapter
from litflora.optim import LEARNING_RATES, OTHERS

SIZE, CLASSES = 32, 4
PARTS = ("backbone", "neck", "head")
BACKBONES = {"convnext": "convnext_shapes", "vit": "test_vit"}


class Crops(LightningDataModule):
    """Noise, and masks of it."""

    def __init__(self, n=8, batch_size=2):
        super().__init__()
        self.n, self.batch_size = n, batch_size

    def train_dataloader(self):
        generator = torch.Generator().manual_seed(0)
        images = torch.rand(self.n, 3, SIZE, SIZE, generator=generator)
        samples = [(image, (image[0] * CLASSES).long()) for image in images]
        return DataLoader(samples, self.batch_size)


def segmentation(family, weights, **options):
    settings = {"head": "linear", "head_width": 16, "img_size": SIZE, **options}
    return SegmentationModule(BACKBONES[family], CLASSES, weights=weights, **settings)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Files of whole nets, as `litflora merge` writes them, by family."""
    folder, paths = tmp_path_factory.mktemp("whole"), {}
    for seed, family in enumerate(BACKBONES):
        torch.manual_seed(seed)
        net = segmentation(family, None).build()
        for name, buffer in net.named_buffers():
            if name.endswith("running_var"):
                buffer.uniform_(0.5, 2.0)
        paths[family] = str(folder / f"{family}.safetensors")
        save_file({k: v.contiguous() for k, v in net.state_dict().items()}, paths[family])
    return paths


def built(family, weights, **options):
    made = segmentation(family, weights, **options)
    made.configure_model()
    return made


def trained(made):
    return {name for name, p in made.net.named_parameters() if p.requires_grad}


def part_of(name):
    return next(p for p in PARTS if name.startswith((p, f"pyramid.{p}")))


# What is tuned ------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", BACKBONES)
def test_a_merged_file_is_the_whole_net(whole, family):
    state = built(family, whole[family], tuning=Probe()).net.state_dict()
    for key, value in load_file(whole[family]).items():
        assert torch.equal(state[key], value), key


def test_each_part_has_its_own_method(whole):
    tunings = {"tuning": FLoRA(rank=2), "neck_tuning": NormTuning(), "head_tuning": LoRA(rank=3)}
    names = trained(built("vit", whole["vit"], **tunings))
    by_part = {part: {n for n in names if part_of(n) == part} for part in PARTS}
    assert all(".adapters." in name for name in by_part["backbone"])
    assert {name.split(".adapters.")[0] for name in by_part["head"]} == {
        f"head.layers.{level}" for level in range(4)
    }
    assert by_part["neck"]
    assert not [name for name in by_part["neck"] if ".adapters." in name]


@pytest.mark.parametrize("tuning", [Frozen(), Probe(), BitFit(), Full(), FLoRA(rank=1)], ids=str)
def test_a_head_is_tuned_as_is_asked(whole, tuning):
    made = built("convnext", whole["convnext"], head_tuning=tuning)
    found = {name for name in trained(made) if part_of(name) == "head"}
    everything = {name for name, _ in made.net.named_parameters() if part_of(name) == "head"}
    expected = {
        "Frozen": set(),
        "Probe": set(),
        "BitFit": {name for name in everything if name.endswith("bias")},
        "Full": everything,
        "FLoRA": {name for name in everything if ".adapters." in name},
    }[type(tuning).__name__]
    assert found == expected
    assert any(part_of(name) == "backbone" for name in trained(made))


def test_a_neck_trains_whole_unless_its_tuning_says_otherwise(whole):
    neck = {f"pyramid.neck.{n}" for n, _ in built("vit", None).net.pyramid.neck.named_parameters()}
    assert neck <= trained(built("vit", whole["vit"], head_tuning=LoRA(rank=1)))
    assert not neck & trained(built("vit", whole["vit"], neck_tuning=Frozen()))


def test_a_kernel_of_the_head_is_adapted_by_flora(whole):
    made = built("vit", whole["vit"], neck_tuning=FLoRA(rank=1), head_tuning=Frozen())
    kernels = [
        (name, module)
        for name, module in made.net.pyramid.neck.named_modules()
        if isinstance(module, torch.nn.Conv2d | torch.nn.ConvTranspose2d)
    ]
    assert kernels
    assert all(hasattr(module, "adapters") for _, module in kernels)


def test_frozen_batch_norms_of_a_head_keep_their_statistics(whole):
    made = built("convnext", whole["convnext"], head_tuning=LoRA(rank=1)).train()
    before = made.net.head.norms[0].running_mean.clone()
    made(torch.rand(2, 3, SIZE, SIZE))
    assert torch.equal(made.net.head.norms[0].running_mean, before)


# Learning rates -----------------------------------------------------------------------------------


def rates(made):
    """Learning rates by parameter, with the default optimizer or the module's own."""
    optimizer = made.configure_optimizers()
    rate = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    names = [group["name"] for group in optimizer.param_groups]
    assert len(set(names)) == len(names)
    assert len(rate) == len(trained(made))
    return {name: rate[id(p)] for name, p in made.net.named_parameters() if p.requires_grad}


def rates_by_part(made):
    found = {}
    for name, rate in rates(made).items():
        found.setdefault(part_of(name), set()).add(round(rate, 12))
    return found


TUNINGS = {"tuning": FLoRA(rank=2), "neck_tuning": Full(), "head_tuning": LoRA(rank=2)}
SETTINGS = {"lr_scheduler": None, **TUNINGS}


def test_default_rates_are_those_of_the_parts_methods(whole):
    found = rates_by_part(built("vit", whole["vit"], **SETTINGS))
    flora, full = LEARNING_RATES["FLoRA"], LEARNING_RATES["Full"]
    assert found == {"backbone": {flora}, "neck": {full}, "head": {OTHERS}}


def test_a_part_that_trains_whole_has_the_backbones_rate(whole):
    made = built("vit", whole["vit"], **{**SETTINGS, "neck_tuning": None})
    assert rates_by_part(made)["neck"] == {LEARNING_RATES["FLoRA"]}


def test_head_lr_is_also_that_of_adapters_in_the_head(whole):
    found = rates_by_part(built("vit", whole["vit"], head_lr=0.02, **SETTINGS))
    assert found == {"backbone": {LEARNING_RATES["FLoRA"]}, "neck": {0.02}, "head": {0.02}}


def test_an_optimizer_that_is_named_has_one_rate(whole):
    made = built("vit", whole["vit"], optimizer=partial(SGD, lr=0.3), **SETTINGS)
    assert set(rates(made).values()) == {0.3}


def test_rates_of_a_loaded_adapter_are_those_it_was_trained_with(whole, tmp_path):
    made = fitted(whole["vit"], tmp_path, "vit", **SETTINGS)
    again = built("vit", whole["vit"], adapter=str(tmp_path / "adapter"), lr_scheduler=None)
    assert rates(again) == rates(made)


@pytest.mark.parametrize("tuning", [Full(), LoRA(rank=1)], ids=["Full", "LoRA"])
def test_layer_decay_follows_depth_up_to_neck_and_head(whole, tuning):
    options = {"lr_scheduler": None, "optimizer": partial(SGD, lr=1.0), "layer_decay": 0.5}
    made = built("vit", whole["vit"], tuning=tuning, **options)
    depth = len(made.net.pyramid.backbone.blocks)
    for name, rate in rates(made).items():
        if ".blocks." in name:
            block = int(name.split(".blocks.")[1].split(".")[0])
            assert rate == pytest.approx(0.5 ** (depth - block)), name
        elif "patch_embed" in name:
            assert rate == pytest.approx(0.5 ** (depth + 1)), name
        elif part_of(name) != "backbone":
            assert rate == 1.0, name


# A run --------------------------------------------------------------------------------------------


def fitted(weights, folder, family="convnext", data=None, **options):
    seed_everything(0)
    made = segmentation(family, weights, **options)
    settings = {"max_epochs": 1, "limit_val_batches": 0, "callbacks": [AdapterFolder()]}
    trainer(folder, **settings).fit(made, data or Crops())
    return made


@pytest.mark.parametrize("family", BACKBONES)
def test_an_adapter_of_all_parts_is_read_again_bit_for_bit(whole, tmp_path, family):
    tunings = {"tuning": FLoRA(rank=2), "head_tuning": LoRA(rank=2)}
    if family == "vit":
        tunings["neck_tuning"] = NormTuning()
    made = fitted(whole[family], tmp_path, family, **tunings)
    images = torch.rand(2, 3, SIZE, SIZE)
    assert (made.eval()(images) != built(family, whole[family]).eval()(images)).any()
    again = from_adapter(tmp_path / "adapter")
    assert again.head_tuning == LoRA(rank=2)
    assert again.neck_tuning == tunings.get("neck_tuning")
    again.configure_model()
    assert torch.equal(again.eval()(images), made(images))
    assert trained(again) == trained(made)
    bare = built(family, whole[family], adapter=str(tmp_path / "adapter"))  # nothing said again
    assert trained(bare) == trained(made)
    tuning = read_config(tmp_path / "adapter")["tuning"]
    assert tuning["modules"]["head"]["class"] == "LoRA"


def test_a_frozen_head_stays_frozen_where_nothing_is_adapted(whole, tmp_path):
    made = fitted(whole["convnext"], tmp_path, tuning=NormTuning(), head_tuning=Frozen())
    again = from_adapter(tmp_path / "adapter")
    again.configure_model()
    assert trained(again) == trained(made)
    assert not [name for name in trained(again) if part_of(name) == "head"]


def test_merging_what_was_tuned_on_a_merged_file(whole, tmp_path):
    made = fitted(whole["convnext"], tmp_path, tuning=LoRA(rank=2), head_tuning=LoRA(rank=2)).eval()
    file = tmp_path / "again.safetensors"
    merged = litflora("merge", tmp_path / "adapter", "--out", file)
    assert merged.code == 0, merged.err
    net = built("convnext", str(file), tuning=Probe(), head_tuning=Full()).eval()
    images = torch.rand(2, 3, SIZE, SIZE)
    torch.testing.assert_close(net(images), made(images), atol=1e-5, rtol=1e-4)
    merge(made.net, unload=True)
    assert not adapter_names(made.net)


def test_a_checkpoint_lacks_every_frozen_part(whole, tmp_path):
    options = {"tuning": LoRA(rank=2), "head_tuning": LoRA(rank=1), "lr_scheduler": None}
    made = segmentation("convnext", whole["convnext"], **options)
    run = trainer(tmp_path, limit_val_batches=0)
    run.fit(made, Crops())
    run.save_checkpoint(tmp_path / "one.ckpt")
    state = torch.load(tmp_path / "one.ckpt", weights_only=True)["state_dict"]
    assert "net.head.layers.0.weight" not in state
    assert [key for key in state if key.startswith("net.head.layers.0.adapters")]
    again = SegmentationModule.load_from_checkpoint(tmp_path / "one.ckpt", weights_only=True)
    again.configure_model()
    assert (again.tuning, again.head_tuning) == (LoRA(rank=2), LoRA(rank=1))
    resumed = trainer(tmp_path, max_epochs=2, limit_val_batches=0)
    more = segmentation("convnext", whole["convnext"], **options)
    resumed.fit(more, Crops(), ckpt_path=tmp_path / "one.ckpt", weights_only=True)
    assert resumed.current_epoch == 2


def test_accumulated_batches_are_one_large_one(whole, tmp_path):
    """With the batch norms frozen, the mean of the gradients of equal batches is theirs."""
    found = {}
    for size, batches in ((8, 1), (2, 4)):
        made = segmentation(
            "convnext",
            whole["convnext"],
            tuning=LoRA(rank=2),
            head_tuning=LoRA(rank=1),
            optimizer=partial(SGD, lr=0.1),
            lr_scheduler=None,
        )
        seed_everything(0)
        made.configure_model()
        options = {"accumulate_grad_batches": batches, "precision": "64-true"}
        run = trainer(tmp_path, limit_val_batches=0, **options)
        before = copy.deepcopy(made.net.state_dict())
        run.fit(made, Crops(8, size))
        assert run.global_step == 1
        after = made.net.state_dict()
        found[size] = {key: after[key] - value.double() for key, value in before.items()}
    assert max(change.abs().max() for change in found[8].values()) > 1e-3
    for key, change in found[8].items():
        torch.testing.assert_close(found[2][key], change, atol=1e-7, rtol=1e-5)


# The command line ---------------------------------------------------------------------------------


def test_parts_by_the_command_line(whole, tmp_path):
    base = segmentation("convnext", "embedded", head_width=32)
    base.num_classes = 11
    net = base.build()
    file = tmp_path / "whole.safetensors"
    save_file(net.state_dict(), file)
    small = {
        "model.init_args.weights": file,
        "model.init_args.head": "linear",
        "model.init_args.head_tuning": "litflora.adapters.LoRA",
        "model.init_args.head_tuning.init_args.rank": 3,
        "model.init_args.drop_path": 0.1,
        "data.init_args.train_samples": 4,
        "data.init_args.val_samples": 2,
        "data.init_args.test_samples": 2,
        "data.init_args.img_size": SIZE,
        "data.init_args.batch_size": 2,
        "trainer.max_epochs": 1,
        "trainer.accelerator": "cpu",
        "trainer.default_root_dir": tmp_path,
    }
    options = [str(each) for key, value in small.items() for each in (f"--{key}", value)]
    fit = litflora("fit", "--config", "segmentation/shapes", *options, *QUIET)
    assert fit.code == 0, fit.err
    assert "tuning   FLoRA, head LoRA: " in fit.out
    (adapter,) = tmp_path.glob("**/adapter")
    again = from_adapter(adapter)
    assert again.head_tuning == LoRA(rank=3)
    assert again.drop_path == 0.1
    again.configure_model()
    test = litflora("test", "--adapter", adapter, "--trainer.accelerator", "cpu", *QUIET)
    assert test.code == 0, test.err
    (checkpoint,) = tmp_path.glob("**/last.ckpt")
    loaded = SegmentationModule.load_from_checkpoint(checkpoint, weights_only=True)
    assert loaded.head_tuning == LoRA(rank=3)


def test_per_module_by_hand(whole, tmp_path):
    """A PerModule as the tuning itself, down to one layer of the head."""
    tuning = PerModule({"pyramid.backbone": LoRA(rank=2), "head.layers.0": LoRA(rank=1)})
    made = fitted(whole["convnext"], tmp_path, tuning=tuning)
    heads = {name.split(".adapters.")[0] for name in trained(made) if part_of(name) == "head"}
    assert heads == {"head.layers.0"}
    again = from_adapter(tmp_path / "adapter")
    assert again.tuning == tuning
    again.configure_model()
    assert trained(again) == trained(made)


# Mistakes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("weights", [None, "pretrained", "embedded", "backbone"])
@pytest.mark.parametrize("part", ["neck", "head"])
def test_a_random_base_is_refused_before_building(whole, tmp_path, weights, part, monkeypatch):
    if weights == "backbone":
        weights = str(tmp_path / "backbone.safetensors")
        save_file({"stem.weight": torch.zeros(1)}, weights)
    made = segmentation("vit", weights, **{f"{part}_tuning": LoRA()})
    monkeypatch.setattr(made, "assemble", lambda weights: pytest.fail("it was built"))
    with pytest.raises(ValueError, match=f"{part}_tuning LoRA keeps the {part}'s base"):
        made.configure_model()


def test_a_head_that_trains_whole_needs_no_weights():
    made = built("convnext", "embedded", head_tuning=Full())
    assert {n for n, _ in made.net.head.named_parameters()} == {
        name.removeprefix("head.") for name in trained(made) if part_of(name) == "head"
    }


def test_a_net_without_neck_says_so(whole):
    with pytest.raises(ValueError, match="convnext_shapes has no neck here: leave neck_tuning out"):
        built("convnext", whole["convnext"], neck_tuning=Frozen())


def test_per_module_beside_part_tunings():
    with pytest.raises(ValueError, match="tuning is a PerModule"):
        segmentation("vit", None, tuning=PerModule({"head": LoRA()}), head_tuning=LoRA())


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"head": "fpn", "head_width": 64}, r"lacks head\.\S+ and \d+ more; has no place for head"),
        ({"blocks": [0, 1]}, "does not fit this net"),
    ],
)
def test_a_file_of_another_net(whole, options, said):
    with pytest.raises(ValueError, match=said):
        built("vit", whole["vit"], **options)


def test_a_file_that_is_not_there(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"gone\.safetensors does not exist"):
        built("vit", str(tmp_path / "gone.safetensors"), head_tuning=LoRA())


def test_a_file_of_other_classes(whole):
    made = SegmentationModule(
        "test_vit", 7, weights=whole["vit"], head="linear", head_width=16, img_size=SIZE
    )
    said = r"differs at head\.layers\.0\.weight \(\[4, 16, 1, 1\], not \[7, 16, 1, 1\]\)"
    with pytest.raises(ValueError, match=said):
        made.configure_model()


# Stochastic depth ---------------------------------------------------------------------------------


def classification(backbone="test_vit", **options):
    return ClassificationModule(backbone, 3, weights=None, img_size=SIZE, tuning=Full(), **options)


DENSE = partial(segmentation, "vit", None, tuning=Full())


@pytest.mark.parametrize("make", [classification, DENSE], ids=["classification", "segmentation"])
def test_blocks_are_left_out_in_training_only(make):
    made, images = make(drop_path=0.9), torch.rand(8, 3, SIZE, SIZE)
    made.configure_model()
    torch.manual_seed(0)
    rates = [m.drop_prob for m in made.net.modules() if type(m).__name__ == "DropPath"]
    assert rates
    assert max(rates) == pytest.approx(0.9)
    assert rates == sorted(rates)
    backbone = made.net if isinstance(made, ClassificationModule) else made.net.pyramid.backbone
    backbone.train()
    assert not torch.equal(backbone.forward_features(images), backbone.forward_features(images))
    backbone.eval()
    assert torch.equal(backbone.forward_features(images), backbone.forward_features(images))


def test_without_it_the_net_is_the_same():
    found = []
    for options in ({}, {"drop_path": 0.0}, {"drop_path": 0.5}):
        torch.manual_seed(0)
        made = classification(**options)
        made.configure_model()
        found.append(made.eval()(torch.full((1, 3, SIZE, SIZE), 0.5)))
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize(
    ("backbone", "drop_path", "said"),
    [
        ("test_vit", 1.0, r"drop_path must lie in \[0, 1\), not 1.0"),
        ("test_vit", -0.1, r"drop_path must lie in \[0, 1\), not -0.1"),
        ("vgg11", 0.1, "vgg11 has no stochastic depth"),
    ],
)
def test_depths_that_cannot_be(backbone, drop_path, said):
    with pytest.raises(ValueError, match=said):
        classification(backbone, drop_path=drop_path).configure_model()
