import re

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.models._hub import save_for_hf
from tiny import save_base

from litflora.backbones import create, normalization
from litflora.heads import classifier_names


@pytest.fixture
def images():
    return torch.rand(2, 3, 32, 32)


def test_none_starts_at_random(images):
    assert create("test_vit", None, 7, 32).eval()(images).shape == (2, 7)


def test_a_file_gives_what_timm_gives(tmp_path, images):
    path = save_base(tmp_path, "test_convnext")
    expected = timm.create_model("test_convnext", num_classes=5)
    expected.load_state_dict(load_file(path))
    net = create("test_convnext", str(path), num_classes=5)
    assert torch.equal(net.eval()(images), expected.eval()(images))


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model"])
def test_pth_files_and_their_wrappers(tmp_path, wrapper):
    state = load_file(save_base(tmp_path))
    path = tmp_path / "base.pth"
    torch.save({wrapper: state, "epoch": 3} if wrapper else state, path)
    net = create("test_vit", str(path), num_classes=5)
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())


@pytest.mark.parametrize("name", ["test_vit", "test_convnext"])
def test_another_number_of_classes_starts_a_new_head_and_keeps_the_rest(tmp_path, name):
    path = save_base(tmp_path, name)
    net, state = create(name, str(path), num_classes=3), load_file(path)
    (head,) = classifier_names(net)
    assert net.get_submodule(head).out_features == 3
    assert net.num_classes == 3
    own = net.state_dict()
    assert all(torch.equal(own[k], v) for k, v in state.items() if not k.startswith(f"{head}."))


def test_a_file_without_head(tmp_path):
    path, state = tmp_path / "features.safetensors", load_file(save_base(tmp_path))
    save_file({key: v for key, v in state.items() if not key.startswith("head.")}, path)
    net = create("test_vit", str(path), num_classes=3)
    assert torch.equal(net.norm.weight, state["norm.weight"])
    assert net.head.out_features == 3


def test_position_embeddings_are_resampled(tmp_path, images):
    path = save_base(tmp_path)
    net = create("test_vit", str(path), num_classes=5, img_size=32)
    assert net.pos_embed.shape[1] == 2 * 2 + 1 < load_file(path)["pos_embed"].shape[1]
    assert net(images).shape == (2, 5)
    assert net(torch.rand(1, 3, 64, 48)).shape == (1, 5)  # and again for any other size


@pytest.mark.parametrize("name", ["test_vit", "test_convnext"])
def test_a_file_with_a_missing_and_an_unknown_key_is_refused_by_name(tmp_path, name):
    path = save_base(tmp_path, name)
    state = load_file(path)
    lost = next(key for key in state if "blocks.0" in key)
    save_file({**{k: v for k, v in state.items() if k != lost}, "surplus": torch.ones(1)}, path)
    with pytest.raises(ValueError, match=re.escape(f"lacks {lost}; has no place for surplus")):
        create(name, str(path), num_classes=5)
    with pytest.raises(ValueError, match=re.escape(lost)):  # nor with a new head
        create(name, str(path), num_classes=3)


@pytest.mark.parametrize(
    ("saved", "asked", "said"),
    [
        ("test_convnext", "test_vit", "lacks .* has no place for stages"),
        ("test_vit", "test_convnext", "its layout is another"),
        ("test_vit", "vit_tiny_patch16_224", "does not fit backbone vit_tiny_patch16_224"),
    ],
)
def test_a_file_of_another_architecture(tmp_path, saved, asked, said):
    path = save_base(tmp_path, saved)
    with pytest.raises(ValueError, match=said) as caught:
        create(asked, str(path), num_classes=5)
    assert str(path) in str(caught.value)
    assert str(caught.value).count("\n") < 3


def test_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no\.safetensors does not exist: give the path"):
        create("test_vit", str(tmp_path / "no.safetensors"))


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_truncated_file(tmp_path, suffix):
    whole = save_base(tmp_path)
    path = tmp_path / f"cut{suffix}"
    if suffix == ".pth":
        torch.save(load_file(whole), path)
        whole = path
    path.write_bytes(whole.read_bytes()[:5000])
    with pytest.raises(ValueError, match=f"cut{suffix} cannot be read.*\n.*damaged") as caught:
        create("test_vit", str(path))
    assert str(caught.value).count("\n") < 3


def test_a_file_that_would_run_code_is_not_read(tmp_path):
    class Evil:
        def __reduce__(self):
            return print, ("ran",)

    torch.save({"weight": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match="cannot be read"):
        create("test_vit", str(tmp_path / "evil.pth"))


def test_a_failing_hub_points_to_local_files(monkeypatch):
    def offline(*args, **kwargs):
        raise OSError("cannot reach the hub\nand much more")

    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", offline)
    with pytest.raises(ValueError, match="cannot reach the hub\nGive weights a local") as caught:
        create("test_vit", "pretrained")
    assert str(caught.value).count("\n") < 3


def test_a_model_in_a_folder(tmp_path):
    net = timm.create_model("test_vit", num_classes=7)
    save_for_hf(net, tmp_path)
    made = create(f"local-dir:{tmp_path}", num_classes=7, img_size=64)
    assert torch.equal(made.head.weight, net.head.weight)
    with pytest.raises(ValueError, match="local-dir:nowhere could not be read"):
        create("local-dir:nowhere")


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("convnext_tny", "did you mean 'convnext_tiny'"),
        ("vit_tiny_patch16_224.augrg_in21k", "it has 'augreg_in21k'"),
        ("qqqqqq", "timm.list_models"),
    ],
)
def test_unknown_names_suggest_the_nearest(name, said):
    with pytest.raises(ValueError, match=re.escape(said)):
        create(name, None)


@pytest.mark.parametrize(
    ("name", "size", "said"),
    [
        ("vit_small_patch14_dinov2", 96, "multiple of the patch size 14 .* use 84 or 98"),
        ("test_vit", 8, "use 16 or 32"),
        ("test_convnext", 16, "too small .* at least 32"),
    ],
)
def test_sizes_that_do_not_fit(name, size, said):
    with pytest.raises(ValueError, match=said):
        create(name, None, img_size=size)


def test_convnext_takes_any_size():
    assert create("test_convnext", None, 3, img_size=50)(torch.rand(1, 3, 50, 70)).shape == (1, 3)


def test_embedded_weights_are_for_the_embedded_backbone():
    with pytest.raises(ValueError, match="belong to convnext_shapes"):
        create("test_vit", "embedded")


def test_the_embedded_backbone_comes_with_its_head():
    net = create("convnext_shapes", "embedded", num_classes=10)
    again = create("convnext_shapes", "embedded", num_classes=10)
    assert torch.equal(net.head.fc.weight, again.head.fc.weight)


@pytest.mark.parametrize("classes", [0, -1])
def test_no_classes(classes):
    with pytest.raises(ValueError, match="num_classes must be at least 1"):
        create("test_vit", None, num_classes=classes)


def test_normalization_is_the_backbones_own():
    assert normalization(create("vit_tiny_patch16_224", None))[0] == (0.5, 0.5, 0.5)
    assert normalization(create("convnext_atto", None))[0] == (0.485, 0.456, 0.406)


def test_a_distilled_deit_has_two_classifiers():
    net = create("deit_tiny_distilled_patch16_224", None, 3, 32)
    assert classifier_names(net) == ["head", "head_dist"]


def test_no_classifier():
    with pytest.raises(ValueError, match="num_classes >= 1"):
        classifier_names(timm.create_model("test_vit", num_classes=0))


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "convnext_atto_cifar10"])
def test_real_weights_keep_their_head(shared_data, name):
    path = shared_data / "weights" / f"{name}.safetensors"
    backbone, classes = (name, 1000) if "vit" in name else ("convnext_atto", 10)
    net, state = create(backbone, str(path), classes), load_file(path)
    assert all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
