"""Metrics against counts and distances in plain numpy, in double precision."""

from itertools import chain

import numpy as np
import pytest
import torch
from torchmetrics.utilities import dim_zero_cat

from litflora.losses import IGNORED
from litflora.metrics import BoundaryFScore, JaccardIndex, segmentation_metrics

CLASSES = 5
SIZES = [(20, 31), (7, 9), (40, 12)]


def pair(size, seed, classes=CLASSES, ignored=0.2):
    """A prediction and a mask of blocks, the mask with noise and ignored pixels."""
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, classes, (size[0] // 5 + 1, size[1] // 5 + 1))
    mask = np.kron(blocks, np.ones((5, 5), int))[: size[0], : size[1]]
    preds = np.roll(mask, seed % 3, axis=seed % 2)
    for labels, share in ((mask, 0.03), (preds, 0.06)):
        noisy = rng.random(size) < share
        labels[noisy] = rng.integers(0, classes, noisy.sum())
    mask[rng.random(size) < ignored / 2] = IGNORED
    mask[: int(size[0] * ignored / 2)] = IGNORED
    return preds, mask


def updated(metric, pairs, dtype=torch.int64):
    for preds, mask in pairs:
        metric.update(torch.tensor(preds, dtype=dtype), torch.tensor(mask, dtype=dtype))
    return metric


def confusion(pairs):
    counts = np.zeros((CLASSES, CLASSES))
    for preds, mask in pairs:
        kept = mask != IGNORED
        np.add.at(counts, (mask[kept], preds[kept]), 1)
    return counts


def boundary(labels, c):
    """Rows and columns ``[n, 2]`` of the boundary of a class, neighbour by neighbour."""
    height, width = labels.shape
    found = []
    for y, x in np.argwhere(labels == c):
        around = [(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)]
        inside = [labels[v, u] for v, u in around if 0 <= v < height and 0 <= u < width]
        if any(label not in (c, IGNORED) for label in inside):
            found.append((y, x))
    return np.array(found, dtype=float).reshape(-1, 2)


def share_near(points, others, radius):
    if len(points) == 0 or len(others) == 0:
        return 0.0
    distances = np.linalg.norm(points[:, None] - others[None], axis=-1)
    return (distances.min(1) <= radius).mean()


def boundary_f(pairs, tolerance):
    images = []
    for preds, mask in pairs:
        radius = max(tolerance * np.linalg.norm(mask.shape), 1.0)
        preds = np.where(mask == IGNORED, IGNORED, preds)
        scores = []
        for c in range(CLASSES):
            drawn, true = boundary(preds, c), boundary(mask, c)
            if len(drawn) + len(true):
                precision = share_near(drawn, true, radius)
                recall = share_near(true, drawn, radius)
                both = precision + recall
                scores.append(2 * precision * recall / both if both else 0.0)
        if scores:
            images.append(np.mean(scores))
    return np.mean(images)


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8])
@pytest.mark.parametrize("present", [CLASSES, 3])
def test_all_against_a_confusion_matrix_of_all_images(dtype, present):
    pairs = [pair(size, seed, present) for seed, size in enumerate(SIZES)]
    values = updated(segmentation_metrics(CLASSES), pairs, dtype).compute()
    counts = confusion(pairs)
    with np.errstate(invalid="ignore"):
        iou = counts.diagonal() / (counts.sum(0) + counts.sum(1) - counts.diagonal())
    assert np.isnan(iou).sum() == CLASSES - present
    np.testing.assert_allclose(values["iou"], iou, rtol=1e-6)
    assert values["miou"].item() == pytest.approx(np.nanmean(iou), rel=1e-6)
    assert values["acc"].item() == pytest.approx(counts.trace() / counts.sum(), rel=1e-6)
    assert values["boundary_f"].item() == pytest.approx(boundary_f(pairs, 0.0075), rel=1e-6)


def test_a_class_that_is_only_predicted_counts_as_wrong():
    mask, preds = torch.zeros(4, 4).long(), torch.zeros(4, 4).long()
    preds[0] = 1
    metrics = segmentation_metrics(3)
    metrics.update(preds, mask)
    values = metrics.compute()
    assert values["iou"][:2].tolist() == [0.75, 0.0]
    assert values["miou"] == 0.375
    assert values["boundary_f"] == 0


def test_ignored_pixels_count_on_neither_side():
    """Whatever is predicted there, and beside it."""
    preds, mask = pair((30, 30), 1, ignored=0.4)
    other = np.where(mask == IGNORED, (preds + 2) % CLASSES, preds)
    one, two = (updated(segmentation_metrics(CLASSES), [(p, mask)]) for p in (preds, other))
    assert (preds != other).any()
    for name, value in one.compute().items():
        torch.testing.assert_close(two.compute()[name], value, rtol=0, atol=0, equal_nan=True)


def test_an_ignored_image_changes_nothing():
    pairs = [pair((20, 31), 3)]
    expected = updated(segmentation_metrics(CLASSES), pairs).compute()
    pairs.append((pairs[0][0], np.full((20, 31), IGNORED)))
    values = updated(segmentation_metrics(CLASSES), pairs).compute()
    for name, value in values.items():
        torch.testing.assert_close(value, expected[name], rtol=0, atol=0, equal_nan=True)


def test_nothing_but_ignored_pixels_has_no_score():
    metrics = updated(segmentation_metrics(CLASSES), [(np.zeros((5, 5)), np.full((5, 5), IGNORED))])
    values = metrics.compute()
    assert all(values[name].isnan().all() for name in ("miou", "iou", "boundary_f"))


@pytest.mark.parametrize("tolerance", [0.0, 0.0075, 0.04, 0.1, 0.5])
@pytest.mark.parametrize("seed", range(4))
def test_boundaries_against_all_distances(tolerance, seed):
    pairs = [pair(SIZES[seed % 3], seed + 10, ignored=0.1 * seed), pair((23, 17), seed)]
    metric = updated(BoundaryFScore(CLASSES, tolerance), pairs)
    assert metric.compute().item() == pytest.approx(boundary_f(pairs, tolerance), rel=1e-5)


@pytest.mark.parametrize(("shift", "score"), [(0, 1.0), (2, 1.0), (3, 0.0)])
def test_a_straight_boundary_may_be_off_by_the_tolerance(shift, score):
    """400 x 300 pixels have a diagonal of 500, and a share of 0.004 is 2 pixels."""
    mask, preds = torch.zeros(300, 400).long(), torch.zeros(300, 400).long()
    mask[:, 200:] = preds[:, 200 + shift :] = 1
    metric = BoundaryFScore(2, tolerance=0.004)
    metric.update(preds, mask)
    assert metric.compute() == score


def test_void_makes_no_boundary():
    mask = torch.zeros(20, 20).long()
    mask[:, 9:11] = IGNORED
    metric = BoundaryFScore(2)
    metric.update(torch.zeros_like(mask), mask)
    assert metric.compute().isnan()


def test_images_without_boundaries_are_left_out():
    preds, mask = pair((20, 31), 0)
    plain = np.ones((9, 9), int)
    expected = updated(BoundaryFScore(CLASSES), [(preds, mask)]).compute()
    assert updated(BoundaryFScore(CLASSES), [(plain, plain), (preds, mask)]).compute() == expected


def test_states_of_processes_are_joined():
    pairs = [pair(size, seed) for seed, size in enumerate(SIZES)]
    whole = updated(segmentation_metrics(CLASSES), pairs)
    parts = [updated(segmentation_metrics(CLASSES), p) for p in (pairs[:1], pairs[1:])]
    for name, metric in whole.items(keep_base=True, copy_state=False):
        for state, reduce in metric._reductions.items():
            states = [getattr(part[name], state) for part in parts]
            joined = list(chain(*states)) if isinstance(states[0], list) else torch.stack(states)
            torch.testing.assert_close(reduce(joined), dim_zero_cat(getattr(metric, state)))


def test_clones_of_another_prefix_and_a_reset():
    pairs = [pair((20, 31), 0)]
    metrics = segmentation_metrics(CLASSES).clone(prefix="val/")
    first = updated(metrics, pairs).compute()
    assert set(first) == {"val/miou", "val/iou", "val/acc", "val/boundary_f"}
    metrics.reset()
    second = updated(metrics, pairs).compute()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_deterministic_mode_counts_in_little_memory():
    preds, mask = torch.randint(0, 150, (2, 500, 500))
    expected = JaccardIndex(150, ignore_index=IGNORED)
    expected.update(preds, mask)
    torch.use_deterministic_algorithms(True)
    try:
        metrics = segmentation_metrics(150)
        metrics.update(preds, mask)
        assert metrics.compute()["miou"] == expected.compute()
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("preds", "mask", "message"),
    [
        (torch.zeros(4, 4), torch.zeros(4, 5), "of one size"),
        (torch.zeros(1, 4, 4), torch.zeros(1, 4, 4), r"\[H, W\]"),
        (torch.zeros(4, 4), torch.full((4, 4), 5), "the mask has class ids from 5 to 5"),
        (torch.zeros(4, 4), torch.full((4, 4), -1), "the mask has class ids from -1"),
        (torch.full((4, 4), 255), torch.zeros(4, 4), "the prediction has class ids"),
    ],
)
@pytest.mark.parametrize("make", [segmentation_metrics, BoundaryFScore])
def test_what_is_no_pair_of_masks(make, preds, mask, message):
    with pytest.raises(ValueError, match=message):
        make(CLASSES).update(preds.long(), mask.long())


def test_wrong_settings():
    with pytest.raises(ValueError, match="num_classes must be 2 to 255"):
        segmentation_metrics(256)
    with pytest.raises(ValueError, match="tolerance is a share"):
        BoundaryFScore(CLASSES, tolerance=6)
