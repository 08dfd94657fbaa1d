import pytest
import torch
import torch.nn.functional as F
from tiny import NAMES, Colours, colours, module, save_base, trainer

from litflora.adapters import LoRA, Probe, save
from litflora.classification import ClassificationModule


@pytest.fixture
def base(tmp_path):
    return save_base(tmp_path)


def built(base, **options):
    made = module(base, **options)
    made.configure_model()
    return made


def logged(made, monkeypatch):
    values = {}
    monkeypatch.setattr(made, "log", lambda name, value, **_: values.update({name: value}))
    return values


def test_it_learns(base, tmp_path):
    torch.manual_seed(0)
    run = trainer(tmp_path, max_epochs=6)
    run.fit(module(base, head_lr=1e-2), Colours(n=48))
    assert {"train/loss", "val/acc", "val/f1", "val/loss"} <= run.callback_metrics.keys()
    (metrics,) = run.test(run.lightning_module, Colours(n=48), verbose=False)
    assert metrics["test/acc"] > 0.9
    assert set(metrics) == {f"test/{name}" for name in ("acc", "top5", "f1", "ece", "loss")}


def test_metrics_are_those_of_the_whole_set(base, tmp_path):
    """Uneven last batch: the mean of batch means would be another number."""
    made = module(base, tuning=Probe())
    run = trainer(tmp_path)
    (metrics,) = run.validate(made, Colours(n=10), verbose=False)
    images, labels = colours(10, seed=1)
    logits = made.eval()(images)
    assert metrics["val/acc"] == pytest.approx((logits.argmax(1) == labels).float().mean().item())
    assert metrics["val/loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-4)
    assert metrics["val/top5"] == 1.0  # there are three classes


def test_top5_does_not_follow_top1_after_a_perfect_batch(base):
    made = built(base, num_classes=7, class_names=None)
    logits = torch.eye(7) + torch.eye(7).roll(1, 1) / 2
    made.val_metrics.update(logits, torch.arange(7))
    made.val_metrics.update(logits, (torch.arange(7) + 1) % 7)  # each is second
    values = made.val_metrics.compute()
    assert (values["val/acc"], values["val/top5"]) == (0.5, 1.0)


def test_label_smoothing_and_class_weights(base, monkeypatch):
    weights = [1.0, 2.0, 3.0]
    made = built(base, label_smoothing=0.2, class_weights=weights).eval()
    logged(made, monkeypatch)
    images, labels = colours(4)
    expected = F.cross_entropy(
        made(images), labels, weight=torch.tensor(weights), label_smoothing=0.2
    )
    assert torch.allclose(made.training_step((images, labels), 0), expected)


@pytest.mark.parametrize("mix", [{"mixup": 0.5}, {"cutmix": 1.0}, {"mixup": 0.5, "cutmix": 1.0}])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
def test_mixing_mixes_images_and_labels(base, monkeypatch, mix, dtype):
    made = built(base, **mix)
    logged(made, monkeypatch)
    seen = {}
    monkeypatch.setattr(made, "_loss", lambda logits, labels: seen.update(labels=labels))
    made.net.register_forward_pre_hook(lambda _, args: seen.update(images=args[0]))
    images, labels = colours(6)
    images = images if dtype is torch.float32 else (images * 255).round().to(dtype)
    torch.manual_seed(0)
    made.training_step((images, labels), 0)
    assert seen["labels"].shape == (6, 3)
    assert torch.allclose(seen["labels"].sum(1), torch.ones(6))
    assert not torch.equal(seen["labels"], F.one_hot(labels, 3).float())
    assert not torch.allclose(seen["images"], made.normalize(images))
    lowest, highest = made.normalize(torch.tensor([0.0, 1.0]).view(2, 1, 1, 1).expand(2, 3, 1, 1))
    assert (seen["images"] >= lowest.amin() - 1e-5).all()
    assert (seen["images"] <= highest.amax() + 1e-5).all()


def test_evaluation_is_never_mixed(base, monkeypatch):
    made = built(base, mixup=1.0, cutmix=1.0).eval()
    logged(made, monkeypatch)
    images, labels = colours(6)
    found = made.test_step((images, labels), 0)
    assert torch.equal(found["labels"], labels)
    assert torch.allclose(found["probs"], made(images).softmax(-1))


def test_predict_gives_paths_and_probabilities(base, tmp_path):
    made = module(base)
    batches = trainer(tmp_path).predict(made, Colours(n=10, batch_size=4))
    assert [path for batch in batches for path in batch["paths"]] == [
        f"image {i}.png" for i in range(10)
    ]
    probs = torch.cat([batch["probs"] for batch in batches])
    assert probs.shape == (10, 3)
    assert torch.allclose(probs.sum(1), torch.ones(10), atol=1e-6)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true", "64-true"])
def test_precisions(base, tmp_path, precision):
    made = module(base, tuning=LoRA(rank=2))
    run = trainer(tmp_path, precision=precision)
    run.fit(made, Colours(as_bytes=True))
    assert run.callback_metrics["train/loss"].isfinite()
    (batch, *_) = run.predict(made, Colours())
    assert batch["probs"].isfinite().all()
    assert batch["probs"].dtype == torch.float32


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_classes": 1, "class_names": None}, "at least 2 classes, not 1"),
        ({"class_names": ["a", "b"]}, "class_names has 2 entries, and there are 3 classes"),
        ({"class_weights": [1.0]}, "class_weights has 1 entries, and there are 3 classes"),
    ],
)
def test_wrong_numbers_of_classes(base, options, said):
    with pytest.raises(ValueError, match=said):
        module(base, **options)


def test_an_adapter_of_other_classes_is_refused_before_anything_is_built(base, tmp_path):
    made = built(base)
    save(made.net, tmp_path / "adapter", metadata={"class_names": NAMES})
    adapter = str(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"knows 3 classes \(red.*data has 2 classes \(0, 1\)"):
        ClassificationModule("test_vit", 2, adapter=adapter)
    with pytest.raises(ValueError, match=r"green, blue.*data has 3 classes \(green, red"):
        module(base, class_names=["green", "red", "blue"], adapter=adapter)
    assert module(base, class_names=None, adapter=adapter).class_names == NAMES
