import contextlib
import io

import pytest
import torch
from torchvision.ops import box_convert

from litflora.drawing.matching import CROWD, NOTHING, match


def objects(count, generator):
    """Boxes that often overlap, of two classes."""
    corner = torch.randint(0, 30, (count, 2), generator=generator)
    size = torch.randint(8, 30, (count, 2), generator=generator)
    labels = torch.randint(0, 2, (count,), generator=generator)
    return {"boxes": torch.cat([corner, corner + size], 1).float(), "labels": labels}


@pytest.mark.parametrize("seed", range(20))
def test_pairs_are_those_of_cocos_evaluation(seed):
    coco = pytest.importorskip("pycocotools.coco", reason="the evaluation that it is compared to")
    from pycocotools.cocoeval import COCOeval

    generator = torch.Generator().manual_seed(seed)
    target, found = objects(12, generator), objects(30, generator)
    target["iscrowd"] = (torch.rand(12, generator=generator) < 0.2).long()
    rows = zip(
        box_convert(target["boxes"], "xyxy", "xywh").tolist(),
        target["labels"].tolist(),
        target["iscrowd"].tolist(),
        strict=True,
    )
    truth = coco.COCO()
    truth.dataset = {
        "images": [{"id": 1}],
        "categories": [{"id": 0}, {"id": 1}],
        "annotations": [
            {"id": n + 1, "image_id": 1, "bbox": box, "category_id": label, "iscrowd": crowd}
            | {"area": box[2] * box[3]}
            for n, (box, label, crowd) in enumerate(rows)
        ],
    }
    boxes = box_convert(found["boxes"], "xyxy", "xywh").tolist()
    results = [
        {"image_id": 1, "category_id": label, "bbox": box, "score": 1 - n / 100}
        for n, (box, label) in enumerate(zip(boxes, found["labels"].tolist(), strict=True))
    ]
    with contextlib.redirect_stdout(io.StringIO()):
        truth.createIndex()
        evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
        evaluation.evaluate()
    matches = match(target, found).tolist()
    crowd = target["iscrowd"].tolist()
    for image in evaluation.evalImgs[:: len(evaluation.params.areaRng)]:  # all areas come first
        for result, partner in zip(image["dtIds"], image["dtMatches"][0].astype(int), strict=True):
            expected = NOTHING if partner == 0 else CROWD if crowd[partner - 1] else partner - 1
            assert matches[result - 1] == expected


def test_nothing_matches_nothing():
    none = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)}
    some = {"boxes": torch.tensor([[0.0, 0.0, 4.0, 4.0]]), "labels": torch.tensor([0])}
    assert match(none, some).tolist() == [NOTHING]
    assert match(some, none).tolist() == []
