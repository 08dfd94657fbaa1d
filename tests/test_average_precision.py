"""Average precision against COCO's own evaluation, which pycocotools is."""

import sys
import warnings

import numpy as np
import pytest
import torch
from torchvision.ops import box_convert, masks_to_boxes

from litflora.average_precision import SUMMARY, AveragePrecision
from litflora.datamodules import CocoDataModule, ShapesDetectionDataModule

SIZE = (150, 160)
CLASSES = 6
FALSE, UNSEEN = 4, 5  # classes that are found and never there, and that never occur
KINDS = {"box": "bbox", "mask": "segm"}
# Where `COCOeval.stats` has what is logged.
PLACES = {"map": 0, "map50": 1, "map75": 2, "map_small": 3, "map_medium": 4, "map_large": 5}
PLACES["mar100"] = 8


def blob(rng, centre, radii):
    """An ellipse with holes, which is not its box."""
    y, x = np.mgrid[: SIZE[0], : SIZE[1]]
    inside = ((y - centre[0]) / radii[0]) ** 2 + ((x - centre[1]) / radii[1]) ** 2 <= 1
    return inside & (rng.random(SIZE) < 0.9)


def objects(masks, labels, rng):
    masks = torch.from_numpy(np.array(masks, dtype=bool).reshape(-1, *SIZE))
    boxes = masks_to_boxes(masks) + torch.tensor([0.0, 0.0, 1.0, 1.0])
    boxes += torch.from_numpy(rng.random((len(masks), 4)).astype(np.float32) / 2)
    return {"boxes": boxes, "labels": torch.tensor(labels, dtype=torch.long), "masks": masks}


def image(seed):
    """What is in an image, and what was found: near it, twice, in crowds, and elsewhere."""
    rng = np.random.default_rng(seed)
    count = 0 if seed % 5 == 1 else rng.integers(1, 6)
    places = [
        (rng.uniform(20, 130, 2), 2 + 75 * rng.random() ** 2 * rng.uniform(0.8, 1.2, 2))
        for _ in range(count)
    ]
    labels = rng.integers(0, FALSE, count)
    target = objects([blob(rng, *place) for place in places], labels, rng)
    target["iscrowd"] = torch.from_numpy((rng.random(count) < 0.2).astype(np.int64))
    target["area"] = target["masks"].sum((1, 2)).float()
    near = [] if seed % 7 == 2 else [index for index in range(count) for _ in range(3)]
    finds = [
        blob(rng, places[i][0] + rng.normal(0, 1, 2), places[i][1] * rng.uniform(0.9, 1.1))
        for i in near
    ]
    others = 0 if seed % 7 == 2 else 3
    finds += [blob(rng, rng.uniform(20, 130, 2), rng.uniform(3, 50, 2)) for _ in range(others)]
    kinds = [labels[i] if rng.random() < 0.8 else FALSE for i in near]
    kinds += rng.integers(0, FALSE + 1, others).tolist()
    found = objects(finds, kinds, rng)
    found["scores"] = torch.from_numpy(rng.random(len(finds)).astype(np.float32))
    return found, target


@pytest.fixture(scope="module")
def images():
    return list(zip(*(image(seed) for seed in range(24)), strict=True))


def computed(found, targets, masks, per_class=False):
    metric = AveragePrecision(masks, per_class)
    for start in range(0, len(found), 5):  # in batches
        metric.update(list(found[start : start + 5]), list(targets[start : start + 5]))
    return metric.compute()


def cocos(found, targets, kind, categories):
    """`COCOeval.stats` of boxes or masks."""
    coco = pytest.importorskip("pycocotools.coco").COCO
    evaluation = pytest.importorskip("pycocotools.cocoeval").COCOeval
    truth = coco()
    truth.dataset = {
        "info": {},
        "images": [{"id": n + 1, "height": SIZE[0], "width": SIZE[1]} for n in range(len(targets))],
        "categories": [{"id": n, "name": str(n)} for n in range(CLASSES)],
        "annotations": [
            {**row, "id": number, "area": area, "iscrowd": crowd}
            for number, (row, area, crowd) in enumerate(rows_of_truth(targets), 1)
        ],
    }
    truth.createIndex()
    key = {"bbox": "bbox", "segm": "segmentation"}[kind]
    rows = [
        {"image_id": row["image_id"], "category_id": row["category_id"], key: row[key], "score": s}
        for n, item in enumerate(found, 1)
        for row, s in zip(rows_of(n, item), item["scores"].tolist(), strict=True)
    ]
    judged = evaluation(truth, truth.loadRes(rows), kind)
    judged.params.catIds = categories
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        judged.evaluate()
    judged.accumulate()
    judged.summarize()
    return judged.stats


def rows_of_truth(targets):
    for number, target in enumerate(targets, 1):
        extra = target["area"].tolist(), target["iscrowd"].tolist()
        yield from zip(rows_of(number, target), *extra, strict=True)


def rows_of(number, item):
    api = pytest.importorskip("pycocotools.mask")
    boxes = box_convert(item["boxes"], "xyxy", "xywh").tolist()
    codes = api.encode(np.asfortranarray(item["masks"].permute(1, 2, 0).numpy().astype(np.uint8)))
    columns = zip(item["labels"].tolist(), boxes, codes, strict=True)
    return [
        {"image_id": number, "category_id": label, "bbox": box, "segmentation": code}
        for label, box, code in columns
    ]


# Against COCO's own ------------------------------------------------------------------------------


def test_the_images_have_all_that_can_go_wrong(images):
    found, targets = images
    areas = torch.cat([target["area"] for target in targets])
    assert min((areas < 32**2).sum(), (areas > 96**2).sum()) >= 3
    assert ((areas > 32**2) & (areas < 96**2)).sum() >= 3
    assert sum(int(target["iscrowd"].sum()) for target in targets) >= 3
    for items in images:
        assert {0} < {len(item["labels"]) for item in items}
    seen = {label for item in (*found, *targets) for label in item["labels"].tolist()}
    assert seen == set(range(CLASSES)) - {UNSEEN}


@pytest.mark.parametrize("masks", [False, True])
def test_precisions_are_cocos(images, masks, capsys):
    ours = computed(*images, masks)
    kinds = ["box", "mask"] if masks else ["box"]
    assert set(ours) == {f"{kind}_{name}" for kind in kinds for name in SUMMARY}
    for kind in kinds:
        stats = cocos(*images, KINDS[kind], list(range(CLASSES)))
        assert min(stats[:6]) > 0.02
        for name, place in PLACES.items():
            assert ours[f"{kind}_{name}"] == pytest.approx(stats[place], abs=1e-6), (kind, name)


@pytest.mark.parametrize("masks", [False, True])
def test_precisions_of_each_class_are_cocos(images, masks):
    ours = computed(*images, masks, per_class=True)
    assert ours["classes"].tolist() == [0, 1, 2, 3, FALSE]
    for kind in ["box", "mask"] if masks else ["box"]:
        told = ours[f"{kind}_map_per_class"].tolist()
        theirs = [cocos(*images, KINDS[kind], [label])[0] for label in ours["classes"].tolist()]
        assert told == pytest.approx(theirs, abs=1e-6)
        assert told[-1] == -1
        assert ours[f"{kind}_map"] == pytest.approx(np.mean(theirs[:-1]), abs=1e-6)


def test_half_precision_costs_no_more_than_its_rounding(images):
    """Sizes of boxes are told from rounded corners, not rounded once more."""
    found, targets = images
    numbers = ("boxes", "scores")
    halves = [{**item, **{key: item[key].bfloat16() for key in numbers}} for item in found]
    rounded = [{**item, **{key: item[key].float() for key in numbers}} for item in halves]
    assert computed(halves, targets, masks=True) == computed(rounded, targets, masks=True)


# Extremes ----------------------------------------------------------------------------------------


def perfect(targets):
    """The truth as finds, but for crowds, which nobody is to find."""
    return [
        {key: value[target["iscrowd"] == 0] for key, value in target.items()}
        | {"scores": torch.ones(int((target["iscrowd"] == 0).sum()))}
        for target in targets
    ]


def test_the_truth_has_a_precision_of_one_on_drawn_data():
    data = ShapesDetectionDataModule(val_samples=6, img_size=48)
    data.setup("validate")
    targets = [target for _, target, _ in data.datasets["val"]]
    told = computed(perfect(targets), targets, masks=True, per_class=True)
    for kind in KINDS:
        assert told[f"{kind}_map"] == told[f"{kind}_map75"] == told[f"{kind}_mar100"] == 1
        assert (told[f"{kind}_map_per_class"] == 1).all()
        assert told[f"{kind}_map_large"] == -1  # there are none


def test_the_truth_has_a_precision_of_one_on_real_photos(shared_data):
    root = shared_data / "coco"
    if not root.is_dir():
        pytest.skip(f"no COCO images in {root}")
    data = CocoDataModule(str(root), masks=True)
    data.setup("validate")
    targets = [target for _, target, _ in data.datasets["val"]]
    told = computed(perfect(targets), targets, masks=True)
    for name, value in told.items():
        assert value == pytest.approx(1, abs=1e-6), name


def test_nothing_found_and_nothing_there(images):
    _, targets = images
    nothing = {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0).long()}
    nothing |= {"scores": torch.zeros(0), "masks": torch.zeros(0, *SIZE).bool()}
    told = computed([nothing] * len(targets), targets, masks=True)
    assert all(value == 0 for value in told.values())
    told = computed([nothing], [nothing], masks=True, per_class=True)
    assert told["box_map"] == told["mask_map50"] == -1
    assert told["classes"].numel() == told["box_map_per_class"].numel() == 0


def test_one_class_has_a_list_of_one(images):
    found = [{**item, "labels": item["labels"] * 0} for item in images[0]]
    targets = [{**item, "labels": item["labels"] * 0} for item in images[1]]
    told = computed(found, targets, masks=False, per_class=True)
    assert told["classes"].view(-1).tolist() == [0]
    assert told["box_map_per_class"].view(-1).tolist() == [told["box_map"].item()]


def test_more_than_a_hundred_finds_are_cocos_affair(recwarn):
    """COCO counts the best hundred of an image; nobody is to be warned of its definition."""
    box = torch.tensor([[1.0, 1, 9, 9]])
    found = {"boxes": box.repeat(300, 1), "labels": torch.zeros(300).long()}
    found["scores"] = torch.linspace(1, 0, 300)
    metric = AveragePrecision(masks=False)
    metric.update([found], [{"boxes": box, "labels": torch.zeros(1).long()}])
    assert metric.compute()["box_map"] == 1
    assert not [warning for warning in recwarn if "detections" in str(warning.message)]


def test_a_missing_library_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    with pytest.raises(ImportError, match=r"pip install 'litflora\[dense\]'"):
        AveragePrecision(masks=False)
