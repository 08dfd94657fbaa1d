import copy

import pytest
import timm
import torch
from lightning.pytorch import LightningDataModule, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.cli import LightningCLI
from tiny import NAMES, Colours, module, save_base, trainer
from torch import nn
from torch.optim import SGD, AdamW
from torch.optim.lr_scheduler import OneCycleLR, StepLR

from litflora.adapters import BitFit, FLoRA, Full, LoRA, NormTuning, Probe, adapter_names, save
from litflora.classification import ClassificationModule
from litflora.module import TuningModule, from_adapter
from litflora.optim import OneCycle, build_optimizer, scheduler_config


class CLI(LightningCLI):
    def add_arguments_to_parser(self, parser):
        for key in ("num_classes", "class_names"):
            target = f"model.init_args.{key}"
            parser.link_arguments(f"data.{key}", target, apply_on="instantiate")


TUNINGS = [FLoRA(rank=2), LoRA(rank=2), Full(), Probe(), BitFit(), NormTuning()]


@pytest.fixture
def base(tmp_path):
    return save_base(tmp_path)


def built(base, **options):
    made = module(base, **options)
    made.configure_model()
    return made


def trained(made):
    return {name for name, p in made.named_parameters() if p.requires_grad}


# The network ----------------------------------------------------------------------------------


def test_configure_model_builds_once(base):
    made = built(base)
    net, keys = made.net, list(made.state_dict())
    made.configure_model()
    assert made.net is net
    assert list(made.state_dict()) == keys


@pytest.mark.parametrize("tuning", TUNINGS, ids=lambda t: type(t).__name__)
def test_what_trains(base, tuning):
    made = built(base, tuning=tuning)
    names = {name.removeprefix("net.") for name in trained(made)}
    head = {"head.weight", "head.bias"}
    everything = set(dict(timm.create_model("test_vit").named_parameters()))
    expected = {
        "FLoRA": {name for name in names if ".adapters." in name},
        "LoRA": {name for name in names if ".adapters." in name},
        "Full": everything,
        "Probe": set(),
        "BitFit": {name for name in everything if name.endswith("bias")},
        "NormTuning": {name for name in everything if "norm" in name},
    }[type(tuning).__name__]
    assert names == expected | head
    if type(tuning) in (FLoRA, LoRA):
        assert {name.split(".adapters.")[0].split(".", 2)[2] for name in expected} == {
            "attn.qkv",
            "attn.proj",
            "mlp.fc1",
            "mlp.fc2",
        }


def test_targets_that_are_named_win_over_the_backbones_own(base):
    made = built(base, tuning=LoRA(rank=2, targets=["attn.qkv"]))
    assert all("attn.qkv" in name or "head" in name for name in trained(made))


def test_the_tuning_given_is_not_changed(base):
    tuning = FLoRA(rank=2)
    before = copy.deepcopy(tuning)
    built(base, tuning=tuning)
    assert tuning == before


def test_tuned_outputs_start_as_the_bases(base):
    images = torch.rand(2, 3, 32, 32)
    made = built(base, tuning=FLoRA(rank=2), num_classes=5, class_names=None).eval()
    plain = built(base, tuning=Probe(), num_classes=5, class_names=None).eval()
    assert torch.equal(made(images), plain(images))


def test_a_random_frozen_base_warns():
    with pytest.warns(UserWarning, match="the frozen base is random"):
        built(None)


def test_frozen_batch_norm_keeps_its_statistics():
    options = {"backbone": "test_resnet", "num_classes": 3}
    frozen = built(None, tuning=Probe(), **options).train()
    full = built(None, tuning=Full(), **options).train()
    images = torch.rand(4, 3, 32, 32)
    for made, stays in ((frozen, True), (full, False)):
        norm = next(m for m in made.modules() if isinstance(m, nn.BatchNorm2d))
        before = norm.running_mean.clone()
        made(images)
        assert torch.equal(norm.running_mean, before) is stays
        assert norm.training is not stays


# Input ------------------------------------------------------------------------------------------


def test_images_are_normalised_once_by_the_backbones_statistics(base):
    made = built(base)
    images = torch.rand(2, 3, 4, 4)
    mean = torch.tensor(made.net.pretrained_cfg["mean"]).view(3, 1, 1)
    std = torch.tensor(made.net.pretrained_cfg["std"]).view(3, 1, 1)
    assert torch.allclose(made.normalize(images), (images - mean) / std)
    seen = []
    made.net.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    made(torch.full((1, 3, 32, 32), 128, dtype=torch.uint8))
    assert torch.allclose(seen[0][0, :, 0, 0], ((128 / 255 - mean) / std).flatten())


def test_the_statistics_are_in_no_checkpoint(base):
    keys = built(base).state_dict().keys()
    assert not keys & {"mean", "std", "class_weights"}


# Optimisation -----------------------------------------------------------------------------------


def groups(optimizer):
    return {group["name"]: group for group in optimizer.param_groups}


def adamw(params):
    return AdamW(params, lr=1e-3, weight_decay=0.05)


@pytest.mark.parametrize(
    ("tuning", "rate"), [(FLoRA(rank=2), 5e-3), (LoRA(rank=2), 1e-3), (Full(), 1e-4)]
)
def test_each_tuning_has_a_rate_of_its_own(base, tmp_path, tuning, rate):
    once = {"max_epochs": 1, "limit_train_batches": 1}
    made, run = module(base, tuning=tuning, lr_scheduler=None), trainer(tmp_path, **once)
    run.fit(made, Colours())
    assert {group["lr"] for group in run.optimizers[0].param_groups} == {rate}
    save(made.net, tmp_path / "adapter")
    again, run = from_adapter_of(base, tmp_path / "adapter", tuning), trainer(tmp_path, **once)
    run.fit(again, Colours())
    assert {group["lr"] for group in run.optimizers[0].param_groups} == {rate}


def from_adapter_of(base, folder, tuning):
    """A module that goes on with an adapter; only in-place tunings must be said again."""
    said = {"tuning": tuning} if isinstance(tuning, Full) else {}
    return module(base, adapter=str(folder), lr_scheduler=None, **said)


def test_groups_of_an_adapter(base):
    net = built(base, tuning=LoRA(rank=2)).net
    found = groups(build_optimizer(adamw, net, ["head"], head_lr=1e-2))
    decay = {name: (group["lr"], group["weight_decay"]) for name, group in found.items()}
    assert decay == {"adapters": (1e-3, 0.0), "head": (1e-2, 0.05), "head_1d": (1e-2, 0.0)}
    count = sum(len(group["params"]) for group in found.values())
    assert count == sum(p.requires_grad for p in net.parameters())


def test_groups_of_full_tuning(base):
    net = built(base, tuning=Full()).net
    found = groups(build_optimizer(adamw, net, ["head"]))
    assert set(found) == {"base", "base_1d", "head", "head_1d"}
    exempt = {id(p) for name, p in net.named_parameters() if name in net.no_weight_decay()}
    assert exempt
    assert all(p.ndim == 1 or id(p) in exempt for p in found["base_1d"]["params"])
    assert found["base_1d"]["weight_decay"] == 0.0
    assert {id(p) for p in found["head"]["params"]} == {id(net.head.weight)}


@pytest.mark.parametrize("tuning", [Full(), LoRA(rank=2)], ids=["Full", "LoRA"])
def test_layer_decay_follows_depth(base, tuning):
    net = built(base, tuning=tuning).net
    optimizer = build_optimizer(adamw, net, ["head"], layer_decay=0.5)
    rate = {id(p): g["lr"] for g in optimizer.param_groups for p in g["params"]}
    trains = {name: rate[id(p)] for name, p in net.named_parameters() if p.requires_grad}
    depth = len(net.blocks)
    for name, lr in trains.items():
        if name.startswith("blocks."):
            assert lr == pytest.approx(1e-3 * 0.5 ** (depth - int(name.split(".")[1])))
    assert trains["head.weight"] == 1e-3
    if isinstance(tuning, Full):
        assert trains["patch_embed.proj.weight"] == pytest.approx(1e-3 * 0.5 ** (depth + 1))


def test_nothing_trains(base):
    net = built(base).net.requires_grad_(False)
    with pytest.raises(ValueError, match="nothing trains"):
        build_optimizer(adamw, net, ["head"])


def rates(total_steps, **options):
    parameters = [nn.Parameter(torch.ones(1)), nn.Parameter(torch.ones(1))]
    optimizer = SGD([{"params": parameters[0], "lr": 1.0}, {"params": parameters[1], "lr": 0.1}])
    scheduler = OneCycle(optimizer, **options)
    scheduler_config(scheduler, total_steps, "val/acc")
    seen = []
    for _ in range(total_steps):
        seen.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    return torch.tensor(seen)


def test_one_cycle_is_torchs_with_a_peak_for_each_group():
    total = 20
    optimizer = SGD([nn.Parameter(torch.ones(1))], lr=1.0)
    theirs = OneCycleLR(optimizer, max_lr=1.0, total_steps=total, cycle_momentum=False)
    expected = []
    for _ in range(total):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()
    ours = rates(total)
    assert torch.allclose(ours[:, 0], torch.tensor(expected))
    assert torch.allclose(ours[:, 1], ours[:, 0] / 10)


def test_one_cycle_without_warmup_only_falls():
    ours = rates(10, warmup=0.0)[:, 0]
    assert ours[0] == 1.0
    assert (ours.diff() < 0).all()


def test_one_cycle_needs_a_length():
    optimizer = SGD([nn.Parameter(torch.ones(1))], lr=1.0)
    with pytest.raises(ValueError, match="max_epochs"):
        scheduler_config(OneCycle(optimizer), float("inf"), "val/acc")


def test_schedules_step_by_batch_or_epoch():
    optimizer = SGD([nn.Parameter(torch.ones(1))], lr=1.0)
    assert scheduler_config(OneCycle(optimizer), 10, "val/acc")["interval"] == "step"
    assert scheduler_config(StepLR(optimizer, 1), 10, "val/acc")["interval"] == "epoch"


def test_the_run_ends_at_the_end_of_the_schedule(base, tmp_path):
    fit = trainer(tmp_path, max_epochs=2)
    fit.fit(module(base, optimizer=lambda params: AdamW(params, lr=1.0)), Colours())
    assert fit.global_step == 6
    # the rate after the last step: the schedule is over
    assert fit.optimizers[0].param_groups[0]["lr"] == pytest.approx(4e-6)


# Checkpoints ------------------------------------------------------------------------------------


def fit(base, folder, epochs=2, every=True, ckpt_path=None, **options):
    seed_everything(3)
    made = module(base, mixup=0.3, **options)
    checkpoint = ModelCheckpoint(dirpath=folder, filename="{epoch}", save_top_k=-1)
    run = trainer(folder, max_epochs=epochs, callbacks=[checkpoint], enable_checkpointing=True)
    run.fit(made, Colours(), ckpt_path=ckpt_path, weights_only=True)
    return made, run


@pytest.mark.parametrize(
    "tuning", [FLoRA(rank=2, dropout=0.1), Full()], ids=lambda t: type(t).__name__
)
def test_resume_continues_bit_for_bit(base, tmp_path, tuning):
    whole, run = fit(base, tmp_path / "whole", tuning=tuning)
    resumed, again = fit(
        base, tmp_path / "resumed", ckpt_path=tmp_path / "whole" / "epoch=0.ckpt", tuning=tuning
    )
    assert again.global_step == run.global_step
    expected = whole.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in resumed.state_dict().items())
    moments, others = (r.optimizers[0].state_dict()["state"] for r in (run, again))
    assert torch.equal(moments[0]["exp_avg"], others[0]["exp_avg"])


def test_a_checkpoint_holds_what_trains_and_nothing_else(base, tmp_path):
    made, _ = fit(base, tmp_path, epochs=1, tuning=FLoRA(rank=2))
    checkpoint = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)
    assert set(checkpoint["state_dict"]) == trained(made)
    states = checkpoint["optimizer_states"][0]["state"]
    assert len(states) == len(trained(made))
    assert (tmp_path / "epoch=0.ckpt").stat().st_size < base.stat().st_size / 2


def test_frozen_factors_are_kept_in_a_checkpoint(base, tmp_path):
    made, _ = fit(base, tmp_path, epochs=1, tuning=FLoRA(rank=2, freeze_factors=True))
    state = torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)["state_dict"]
    assert any(".factors." in key for key in state)
    again = ClassificationModule.load_from_checkpoint(tmp_path / "epoch=0.ckpt")
    expected = made.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in again.state_dict().items())


def test_batch_norm_statistics_that_move_are_kept(tmp_path):
    base = save_base(tmp_path, "test_resnet")
    made, _ = fit(base, tmp_path, epochs=1, tuning=NormTuning(), backbone="test_resnet")
    again = ClassificationModule.load_from_checkpoint(tmp_path / "epoch=0.ckpt")
    key = next(key for key in made.state_dict() if key.endswith("running_mean"))
    assert torch.equal(again.state_dict()[key], made.state_dict()[key])


def test_a_random_base_is_kept_whole(tmp_path):
    made, _ = fit(None, tmp_path, epochs=1, tuning=Probe())
    again = ClassificationModule.load_from_checkpoint(tmp_path / "epoch=0.ckpt")
    expected = made.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in again.state_dict().items())


@pytest.mark.parametrize("tuning", [*TUNINGS, None], ids=lambda t: type(t).__name__)
def test_load_from_checkpoint_of_a_module_made_in_python(base, tmp_path, tuning, recwarn):
    made, _ = fit(base, tmp_path, epochs=1, tuning=tuning)
    again = ClassificationModule.load_from_checkpoint(tmp_path / "epoch=0.ckpt")
    assert type(again.tuning) is type(made.tuning)
    assert again.tuning == made.tuning
    images = torch.rand(2, 3, 32, 32)
    assert torch.equal(again.eval()(images), made.eval()(images))
    assert not [w for w in recwarn if "Found keys" in str(w.message)]


def test_a_checkpoint_of_another_tuning_is_refused(base, tmp_path):
    fit(base, tmp_path, epochs=1, tuning=FLoRA(rank=2))
    checkpoint = tmp_path / "epoch=0.ckpt"
    with pytest.raises(ValueError, match=r"lacks net\.blocks.*lora_.*does not expect .*core"):
        fit(base, tmp_path / "other", ckpt_path=checkpoint, tuning=LoRA(rank=2))
    with pytest.raises(ValueError, match=r"differs at net\.blocks"):
        fit(base, tmp_path / "other", ckpt_path=checkpoint, tuning=FLoRA(rank=3))


def test_a_checkpoint_without_a_trained_key_is_refused(base):
    made = built(base)
    state = {key: value for key, value in made.state_dict().items() if "head.bias" not in key}
    with pytest.raises(ValueError, match=r"lacks net\.head\.bias \(1\)"):
        made.load_state_dict(state)


def test_classes_as_targets_are_refused_since_checkpoints_are_plain(base):
    with pytest.raises(ValueError, match=r"targets: .* give a keyword or a glob"):
        module(base, tuning=LoRA(targets=[nn.Linear]))


def test_load_from_checkpoint_of_a_module_made_by_the_command_line(base, tmp_path):
    arguments = {
        "model": "litflora.classification.ClassificationModule",
        "model.init_args.backbone": "test_vit",
        "model.init_args.weights": base,
        "model.init_args.img_size": 32,
        "model.init_args.tuning": "litflora.adapters.LoRA",
        "model.init_args.tuning.init_args.rank": 3,
        "model.init_args.optimizer": "torch.optim.AdamW",  # bitsandbytes has one, too
        "model.init_args.optimizer.init_args.lr": 0.01,
        "model.init_args.lr_scheduler.init_args.warmup": 0.1,
        "data": "tiny.Colours",
        "trainer.accelerator": "cpu",
        "trainer.max_epochs": 1,
        "trainer.logger": "false",
        "trainer.enable_progress_bar": "false",
        "trainer.default_root_dir": tmp_path,
    }
    made = CLI(
        TuningModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        save_config_callback=None,
        args=["fit", *(f"--{key}={value}" for key, value in arguments.items())],
    )
    (path,) = tmp_path.rglob("*.ckpt")
    again = ClassificationModule.load_from_checkpoint(path)
    assert again.tuning == LoRA(rank=3)
    assert again.class_names == NAMES
    assert again.optimizer_factory([nn.Parameter(torch.ones(1))]).defaults["lr"] == 0.01
    expected = made.model.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in again.state_dict().items())


# Adapters ---------------------------------------------------------------------------------------


def saved(base, folder, **options):
    made, _ = fit(base, folder / "run", epochs=1, tuning=LoRA(rank=2), **options)
    metadata = {"model": made.description(), "class_names": made.class_names}
    save(made.net, folder / "adapter", metadata=metadata)
    return made, folder / "adapter"


def test_a_module_starts_from_a_saved_adapter_whatever_its_tuning(base, tmp_path):
    made, folder = saved(base, tmp_path)
    again = built(base, adapter=str(folder), tuning=FLoRA(rank=4))
    assert torch.equal(
        again.eval()(torch.ones(1, 3, 32, 32)), made.eval()(torch.ones(1, 3, 32, 32))
    )
    assert trained(again) == trained(made)
    assert adapter_names(again.net) == ["default"]


def test_from_adapter_needs_the_folder_alone(base, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    made, folder = saved(base.relative_to(tmp_path), tmp_path, label_smoothing=0.1)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    again = from_adapter(folder)
    assert isinstance(again, ClassificationModule)
    assert (again.class_names, again.label_smoothing) == (NAMES, 0.1)
    again.configure_model()
    assert torch.equal(
        again.eval()(torch.ones(1, 3, 32, 32)), made.eval()(torch.ones(1, 3, 32, 32))
    )


def test_from_adapter_of_a_folder_that_no_fit_wrote(base, tmp_path):
    save(built(base).net, tmp_path / "bare")
    with pytest.raises(ValueError, match="does not say which model"):
        from_adapter(tmp_path / "bare")


def test_from_adapter_makes_nothing_but_tuning_modules(base, tmp_path):
    metadata = {"model": {"class_path": "subprocess.Popen", "init_args": {"args": ["true"]}}}
    save(built(base).net, tmp_path / "bad", metadata=metadata)
    with pytest.raises(ValueError, match=r"belongs to subprocess\.Popen, no litflora module"):
        from_adapter(tmp_path / "bad")


def test_a_task_says_how_its_network_is_built():
    with pytest.raises(NotImplementedError):
        TuningModule().configure_model()
