"""Image, mask and boxes stay where they were to each other."""

import pytest
import torch
from torch import Tensor
from torchvision import tv_tensors
from torchvision.transforms import v2

from litflora.datamodules.masks import IGNORE
from litflora.datamodules.transforms import (
    MEAN_COLOR,
    ScaleJitter,
    middle,
    random_crop,
    to_tensors,
    visible_boxes,
    whole,
)

SHADE = 40  # an image's colour is SHADE times the class below it


def blocks(height: int = 96, width: int = 120) -> tuple[tv_tensors.Image, tv_tensors.Mask]:
    """Blocks of 24 pixels of classes 0 to 5, and an image that shows them."""
    classes = torch.randint(6, (height // 24, width // 24), dtype=torch.uint8)
    mask = classes.repeat_interleave(24, 0).repeat_interleave(24, 1)
    return tv_tensors.Image((mask * SHADE).expand(3, -1, -1)), tv_tensors.Mask(mask)


def interior(mask: Tensor, margin: int) -> Tensor:
    """Pixels round which all are of one class; what lies outside of the mask is of none."""
    padded = torch.nn.functional.pad(mask[None].float(), [margin] * 4, value=-1)
    side = 2 * margin + 1
    most = torch.nn.functional.max_pool2d(padded, side, 1)[0]
    least = -torch.nn.functional.max_pool2d(-padded, side, 1)[0]
    return most == least


@pytest.mark.parametrize("size", [(64, 64), (80, 48), (40, 130)])
@pytest.mark.parametrize("scales", [(0.5, 2.0), (0.1, 2.0), (1.0, 1.0)])
def test_a_mask_shows_what_its_image_shows(
    size: tuple[int, int], scales: tuple[float, float]
) -> None:
    torch.manual_seed(0)
    transform = v2.Compose([random_crop(size, scales, photometric=False), to_tensors()])
    compared = 0
    for _ in range(20):
        image, mask = transform(blocks())
        assert (image.dtype, mask.dtype) == (torch.uint8, torch.int64)
        assert (image.shape, mask.shape) == ((3, *size), size)
        assert type(image) is type(mask) is Tensor
        assert set(mask.unique().tolist()) <= {0, 1, 2, 3, 4, 5, IGNORE}
        inside = interior(mask, 3) & (mask != IGNORE)
        assert torch.equal(image[:, inside], (mask[inside] * SHADE).byte().expand(3, -1))
        padding = image[:, mask == IGNORE]
        assert torch.equal(padding, torch.tensor(MEAN_COLOR)[:, None].byte().expand_as(padding))
        compared += int(inside.sum())
    assert compared > 5000


@pytest.mark.parametrize("scale", [0.13, 0.37, 0.61, 1.0, 1.27, 1.9])
@pytest.mark.parametrize("edge", [17, 50, 83])
def test_resizing_moves_no_edge(scale: float, edge: int) -> None:
    mask = torch.zeros(100, 100, dtype=torch.uint8)
    mask[:, edge:] = 1
    sample = tv_tensors.Image((mask * 200).expand(3, -1, -1)), tv_tensors.Mask(mask)
    flat = tv_tensors.Image(sample[0].mT), tv_tensors.Mask(mask.T)
    for pair in (sample, flat):
        image, resized = ScaleJitter((scale, scale))(pair)
        tie = image[0] == 100
        assert torch.equal((image[0] > 100)[~tie], (resized == 1)[~tie])
        assert tie.float().mean() < 0.1


def test_resizing_keeps_thin_images() -> None:
    sample = tv_tensors.Image(torch.zeros(3, 400, 2, dtype=torch.uint8))
    assert ScaleJitter((0.1, 0.1), fit=(50, 50))(sample).shape == (3, 5, 1)


def test_scale_one_is_the_images_own_or_fits() -> None:
    sample = blocks(96, 120)
    assert torch.equal(ScaleJitter((1.0, 1.0))(sample)[0], sample[0])
    assert ScaleJitter((1.0, 1.0), fit=(64, 200))(sample)[1].shape == (64, 80)


def test_the_middle_has_the_images_own_scale() -> None:
    sample = blocks(96, 120)
    image, mask = middle((64, 200))(sample)
    assert image.shape == (3, 64, 200)
    assert torch.equal(image[..., :120], sample[0][:, 16:80])
    assert (mask == IGNORE).sum() == 64 * 80


def test_colours_change_in_the_image_alone() -> None:
    sample = blocks()
    plain, distorted = (random_crop((96, 120), (1.0, 1.0), photometric=on) for on in (False, True))
    flipped = 0
    for seed in range(20):
        torch.manual_seed(seed)
        _, mask = distorted(sample)
        was_flipped = torch.equal(mask, sample[1].flip(-1))
        assert was_flipped or torch.equal(mask, sample[1])
        flipped += was_flipped
        torch.manual_seed(seed)
        assert torch.equal(plain(sample)[1], mask)
    assert 3 < flipped < 17
    changed = [not torch.equal(distorted(sample)[0].flip(-1), sample[0]) for _ in range(20)]
    assert sum(changed) > 10


def test_boxes_stay_round_their_objects() -> None:
    torch.manual_seed(0)
    masks = torch.zeros(2, 80, 100, dtype=torch.uint8)
    masks[0, 10:40, 20:50] = 1
    masks[1, 60:76, 70:96] = 1
    boxes = torch.tensor([[20, 10, 50, 40], [70, 60, 96, 76]])
    target = {
        "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(80, 100)),
        "masks": tv_tensors.Mask(masks),
        "labels": torch.tensor([3, 7]),
    }
    image = tv_tensors.Image((masks.sum(0) * 200).byte().expand(3, -1, -1))
    transform = random_crop((64, 64), (0.8, 2.0), photometric=False, mask_fill=0, boxes=True)
    kept = []
    for _ in range(30):
        _, out = transform((image, target))
        count = len(out["labels"])
        assert len(out["boxes"]) == len(out["masks"]) == count
        kept.append(count)
        for box, mask in zip(out["boxes"], out["masks"], strict=True):
            rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
            seen = [columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]
            assert box.min() >= 0
            assert box.max() <= 64
            assert (box - torch.tensor(seen)).abs().max() <= 1
    assert {1, 2} <= set(kept)


def drawn(box: list[int], height: int = 60, width: int = 90) -> tuple[tv_tensors.Image, dict]:
    """A bright rectangle and another that covers all of the image's left edge."""
    masks = torch.zeros(2, height, width, dtype=torch.uint8)
    masks[0, box[1] : box[3], box[0] : box[2]] = 1
    masks[1, :, :2] = 1
    target = {
        "boxes": tv_tensors.BoundingBoxes(
            torch.tensor([box, [0, 0, 2, height]], dtype=torch.float32),
            format="XYXY",
            canvas_size=(height, width),
        ),
        "masks": tv_tensors.Mask(masks),
        "labels": torch.tensor([3, 7]),
    }
    return tv_tensors.Image((masks[0] * 255).expand(3, -1, -1)), target


@pytest.mark.parametrize("size", [(48, 48), (40, 70)])
def test_an_object_is_found_again_in_image_mask_and_box(size: tuple[int, int]) -> None:
    transform = random_crop(size, (0.3, 2.0), False, mask_fill=0, boxes=True, fit=True)
    truncated = 0
    for seed in range(80):
        torch.manual_seed(seed)
        image, target = transform(drawn([30, 20, 70, 50]))
        assert len(target["boxes"]) == len(target["masks"]) == len(target["labels"])
        assert target["boxes"].dtype == torch.float32
        padding = (image == torch.tensor(MEAN_COLOR)[:, None, None]).all(0)
        bright = (image[0] > 127) & ~padding
        found = target["masks"][target["labels"] == 3]
        assert bright.any() == (len(found) == 1)
        if len(found):
            # An edge may lie on the line between half bright and half dark.
            differs = found[0].bool() != bright
            assert differs.sum() <= 0.1 * bright.sum() + 12
            (x0, y0, x1, y1) = target["boxes"][target["labels"] == 3][0].int().tolist()
            inside = torch.zeros(size, dtype=torch.bool)
            inside[y0:y1, x0:x1] = True
            assert torch.equal(inside, found[0].bool())
            truncated += x0 == 0 or y0 == 0 or x1 == size[1] or y1 == size[0]
    assert 10 < truncated < 70


def test_a_cut_object_has_a_tight_box_and_a_lost_one_none() -> None:
    masks = torch.zeros(3, 20, 20, dtype=torch.uint8)
    masks[0, 2:18, 2:6] = 1
    masks[0, 2:4, 2:18] = 1  # an L that reaches its box's right side at the top alone
    masks[1, 1, 1] = 1
    boxes = torch.tensor([[2.0, 2, 18, 18], [1, 1, 2, 2], [5, 5, 15, 15]])
    target = {
        "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(20, 20)),
        "masks": tv_tensors.Mask(masks),
        "labels": torch.tensor([4, 5, 6]),
    }
    cut = v2.Compose([v2.CenterCrop((10, 20)), visible_boxes()])
    _, out = cut((tv_tensors.Image(torch.zeros(3, 20, 20)), target))
    assert out["labels"].tolist() == [4]
    assert out["boxes"].tolist() == [[2, 0, 6, 10]]
    assert out["masks"].shape == (1, 10, 20)


@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize(
    "transform", [whole((32, 48)), random_crop((32, 48), boxes=True, fit=True)]
)
def test_an_image_may_have_no_objects(transform: v2.Transform, masks: bool) -> None:
    target = {
        "boxes": tv_tensors.BoundingBoxes(torch.zeros(0, 4), format="XYXY", canvas_size=(50, 40)),
        "labels": torch.zeros(0, dtype=torch.int64),
        **({"masks": tv_tensors.Mask(torch.zeros(0, 50, 40, dtype=torch.uint8))} if masks else {}),
    }
    for seed in range(5):
        torch.manual_seed(seed)
        image, out = transform(
            (tv_tensors.Image(torch.zeros(3, 50, 40, dtype=torch.uint8)), target)
        )
        assert image.shape == (3, 32, 48)
        assert out["boxes"].shape == (0, 4)
        assert out["labels"].shape == (0,)
        if masks:
            assert out["masks"].shape == (0, 32, 48)


def test_the_whole_image_fits() -> None:
    image, target = whole((120, 200))(drawn([30, 20, 70, 50]))
    assert image.shape == (3, 120, 200)
    assert target["boxes"].tolist() == [[60, 40, 140, 100], [0, 0, 4, 120]]
    assert torch.equal(image[0, :, :180] > 127, target["masks"][0, :, :180].bool())
    assert not target["masks"][..., 180:].any()
    small = whole((6, 9))(drawn([30, 20, 70, 50]))[1]  # the edge is a fifth of a pixel wide
    assert small["labels"].tolist() == [3]


def test_boxes_without_masks_are_cut_off() -> None:
    boxes = torch.tensor([[10.0, 10, 60, 60], [5, 5, 6, 25]])
    target = {
        "boxes": tv_tensors.BoundingBoxes(boxes, format="XYXY", canvas_size=(80, 80)),
        "labels": torch.tensor([1, 2]),
    }
    image = tv_tensors.Image(torch.zeros(3, 80, 80, dtype=torch.uint8))
    _, out = v2.Compose([v2.CenterCrop((40, 40)), visible_boxes()])((image, target))
    assert out["boxes"].tolist() == [[0, 0, 40, 40]]
    assert out["labels"].tolist() == [1]
    _, out = whole((40, 40))((image, target))
    assert out["boxes"].tolist() == [[5, 5, 30, 30]]  # half a pixel is not shown
