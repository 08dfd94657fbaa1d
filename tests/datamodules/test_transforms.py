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
