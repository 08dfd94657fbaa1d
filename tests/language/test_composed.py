"""A tower, a connector and a language model as one network."""

import copy

import pytest
import torch
from timm.models import group_parameters
from torch.nn.functional import cross_entropy

from litflora.adapters import FLoRA, Frozen, Full, LoRA, PerModule, inject
from litflora.backbones import default_targets, with_targets
from litflora.backbones.blocks import blocks, checkpoint_activations
from litflora.backbones.create import build
from litflora.language.composed import VisionLanguageNet
from litflora.language.connectors import CONNECTORS, Connector
from litflora.language.tiny import tiny_language_model
from litflora.optim import build_optimizer, default_optimizer

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
TOWERS = {"convnext_shapes": (48, 16), "test_vit": (64, 4)}  # channels and tokens at 32 pixels
IMAGE = 3


def net(tower="test_vit", connector="mlp", double=True):
    torch.manual_seed(0)
    layer = 1 if tower == "convnext_shapes" else -1
    channels, _ = TOWERS[tower]
    backbone = build(tower, None, 0, 32)
    made = VisionLanguageNet(
        backbone, Connector(connector, channels, 32), tiny_language_model(SMALL), IMAGE, layer
    )
    return (made.double() if double else made).eval()


def inputs(tower="test_vit", tokens=None, seed=0):
    """Two rows: text, an image and text; text alone, padded."""
    generator = torch.Generator().manual_seed(seed)
    tokens = TOWERS[tower][1] if tokens is None else tokens
    words = torch.randint(6, 200, (2, 6), generator=generator)
    row = torch.cat([words[0, :2], torch.full((tokens,), IMAGE), words[0, 2:]])
    ids = torch.stack([row, torch.cat([words[1], torch.zeros(tokens, dtype=torch.long)])])
    mask = torch.ones_like(ids)
    mask[1, 6:] = 0
    labels = ids.masked_fill((ids == IMAGE) | (mask == 0), -100)
    images = torch.rand(1, 3, 32, 32, generator=generator, dtype=torch.double)
    return {"input_ids": ids, "attention_mask": mask, "images": images, "labels": labels}


@pytest.mark.parametrize("tower", TOWERS)
def test_features_take_the_places_of_image_tokens(tower):
    own, given = net(tower), inputs(tower)
    features = own.features(given["images"])
    assert features.shape[1:] == (TOWERS[tower][0], *[int(TOWERS[tower][1] ** 0.5)] * 2)
    embedded = own.embed(given["input_ids"], given["images"])
    words = own.language_model.get_input_embeddings()(given["input_ids"])
    places = given["input_ids"] == IMAGE
    assert torch.equal(embedded[~places], words[~places])
    by_hand = own.connector[2](
        own.connector[1](own.connector[0](features[0].flatten(1).T))  # row by row of the map
    )
    torch.testing.assert_close(embedded[places], by_hand, rtol=1e-12, atol=1e-12)


def test_features_are_patches_without_prefix_tokens():
    own, images = net(), torch.rand(1, 3, 32, 32, dtype=torch.double)
    every = own.tower.forward_features(images)[:, own.tower.num_prefix_tokens :]
    torch.testing.assert_close(own.features(images).flatten(2).mT, every)


def test_features_of_several_layers_follow_each_other_in_channels():
    torch.manual_seed(0)
    tower = build("convnext_shapes", None, 0, 32).double().eval()
    images = torch.rand(2, 3, 32, 32, dtype=torch.double)
    every = tower.forward_intermediates(images, intermediates_only=True)
    connector = Connector("linear", 24 + 72, 32).double()
    made = VisionLanguageNet(tower, connector, tiny_language_model(SMALL), IMAGE, [-2, 0])
    found = made.features(images)
    assert found.shape == (2, 24 + 72, 2, 2)
    normed = [
        (each - each.mean(1, True)) / (each.var(1, correction=0, keepdim=True) + 1e-5).sqrt()
        for each in every
    ]
    torch.testing.assert_close(found[:, 24:], normed[2])
    fine = normed[0].view(2, 24, 2, 4, 2, 4).mean((3, 5))  # 8 x 8 to 2 x 2
    torch.testing.assert_close(found[:, :24], fine)


def test_the_loss_is_that_of_the_next_tokens():
    own, given = net(), inputs()
    loss, logits, tokens = own(**given)
    told = logits[:, :-1].reshape(-1, logits.shape[-1])
    torch.testing.assert_close(loss, cross_entropy(told, given["labels"][:, 1:].reshape(-1)))
    assert tokens is None


def test_padding_and_neighbours_change_nothing():
    own, given = net(), inputs()
    both = own(**given).logits
    one = own(input_ids=given["input_ids"][1:, :6]).logits
    torch.testing.assert_close(both[1, :6], one[0], rtol=1e-9, atol=1e-12)


def test_answers_are_the_likeliest_tokens_one_by_one():
    own, given = net(), inputs()
    ids, images = given["input_ids"][:1], given["images"]
    prompt = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "images": images}
    options = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    tokens = own(prompt=prompt, **options).tokens
    for step in range(5):
        likeliest = own(input_ids=ids, images=images).logits[0, -1].argmax()
        assert tokens[0, step] == likeliest
        ids = torch.cat([ids, likeliest.view(1, 1)], 1)


@pytest.mark.parametrize("connector", CONNECTORS)
def test_connectors(connector):
    made = Connector(connector, 6, 5).double()
    map_ = torch.rand(2, 6, 4, 4, dtype=torch.double)
    found = made(map_)
    assert found.shape == (2, made.tokens(4, 4), 5)
    assert made.tokens(4, 4) == (4 if connector == "pixel_shuffle" else 16)
    if connector == "pixel_shuffle":  # the second token: rows 0 and 1, columns 2 and 3
        corner = map_[1, :, :2, 2:].permute(1, 2, 0).reshape(-1)
        by_hand = made[3](made[2](made[1](made[0](corner))))
        torch.testing.assert_close(found[1, 1], by_hand)
        with pytest.raises(ValueError, match="maps of even sides, not 3 x 4"):
            made.tokens(3, 4)


def test_a_connector_of_another_name():
    with pytest.raises(ValueError, match="connector 'qformer' is none of linear, mlp, pixel"):
        Connector("qformer", 6, 5)


@pytest.mark.parametrize("checkpointing", ["none", "blocks"])
@pytest.mark.parametrize("tower", TOWERS)
@pytest.mark.parametrize("method", [FLoRA, LoRA])
def test_gradients_reach_the_tower_through_a_frozen_language_model(tower, checkpointing, method):
    own = net(tower)
    tuning = method(rank=2)
    targets = default_targets(own, tuning, "tower")
    parts = {"tower": method(rank=2, targets=targets), "connector": Full()}
    inject(own, PerModule({**parts, "language_model": Frozen()}))
    with torch.no_grad():
        for name, parameter in own.named_parameters():
            if ".adapters." in name:
                parameter.copy_(torch.randn(parameter.shape, dtype=torch.double) * 0.1)
    plain = copy.deepcopy(own)
    checkpoint_activations(own, checkpointing)
    given = inputs(tower)
    for each in (own, plain):
        each.train()
        each(**given).loss.backward()
    reference = dict(plain.named_parameters())
    for name, parameter in own.named_parameters():
        assert (parameter.grad is not None) == parameter.requires_grad, name
        assert parameter.requires_grad == (".adapters." in name or name.startswith("connector"))
        if parameter.requires_grad:
            assert parameter.grad.abs().sum() > 0, name
            torch.testing.assert_close(parameter.grad, reference[name].grad)


def test_every_parameter_takes_part_in_a_step_without_images():
    own = net()
    own.train()
    given = inputs()
    ids = given["input_ids"][1:, :6]
    own(input_ids=ids, images=given["images"][:0], labels=ids).loss.backward()
    for name, parameter in own.named_parameters():
        assert parameter.grad is not None, name
    assert own.connector[0].weight.grad.abs().sum() == 0


def test_blocks_are_those_of_the_tower_and_of_the_language_model():
    found = list(blocks(net()))
    assert found[0] == "tower.blocks.0"
    assert found[-2:] == ["language_model.model.layers.0", "language_model.model.layers.1"]


def test_layers_follow_each_other_from_the_stem_of_the_tower_to_the_output():
    layers = layers_of(net())
    depth = 6  # blocks of the tower, which has a last norm
    tower = [
        layers["tower.patch_embed.proj.weight"],
        *(layers[f"tower.blocks.{n}.mlp.fc1.weight"] for n in range(depth)),
    ]
    assert tower == list(range(depth + 1))
    between = layers["connector.0.weight"]
    told = "language_model.model"
    after = [layers[f"{told}.layers.{n}.mlp.up_proj.weight"] for n in (0, 1)]
    assert layers["tower.norm.weight"] == depth
    assert [between, layers[f"{told}.embed_tokens.weight"], *after] == [7, 8, 9, 10]
    assert layers[f"{told}.norm.weight"] == 11 == max(layers.values())


def test_learning_rates_fall_with_the_depth_below_the_output():
    made = net()
    tuning = PerModule({"tower": LoRA(rank=1), "language_model": Full()})
    inject(made, with_targets(made, tuning))
    made.connector.requires_grad_(True)
    optimizer = build_optimizer(default_optimizer("Full"), made, ["connector"], None, 0.5, lr=1.0)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    found = {name: rates[id(p)] for name, p in made.named_parameters() if p.requires_grad}
    layers = layers_of(made)
    assert len({*found.values()}) == 10
    for name, rate in found.items():
        below = 0 if name.startswith("connector") else 11 - layers[name]
        assert rate == 0.5**below, name


def layers_of(made):
    return group_parameters(made, made.group_matcher(coarse=False), reverse=True)


def test_targets_of_the_language_model():
    found = default_targets(net(), LoRA(), "language_model")
    layers = "language_model.model.layers.*"
    attention = [f"{layers}.self_attn.{name}_proj" for name in "qkvo"]
    assert found == [*attention, *(f"{layers}.mlp.{n}_proj" for n in ("gate", "up", "down"))]


def test_parts_must_fit():
    tower, told = build("test_vit", None, 0, 32), tiny_language_model(SMALL)
    with pytest.raises(ValueError, match="the connector takes 48 channels, and the tower gives 64"):
        VisionLanguageNet(tower, Connector("mlp", 48, 32), told, IMAGE)
    with pytest.raises(ValueError, match="connector gives 40 channels, and the language model tak"):
        VisionLanguageNet(tower, Connector("linear", 64, 40), told, IMAGE)
    with pytest.raises(ValueError, match="layer 9 of a tower with"):
        VisionLanguageNet(tower, Connector("mlp", 64, 32), told, IMAGE, 9)


def test_as_many_image_tokens_as_features():
    given = inputs(tokens=3)
    with pytest.raises(ValueError, match="3 image tokens, and features for 4"):
        net()(**given)
