"""Losses against formulas of their own, written pixel by pixel in double precision."""

import builtins
import math

import pytest
import torch

from litflora.losses import IGNORED, LOSSES, SegmentationLoss

CLASSES = 4
LIBRARY = [name for name in LOSSES if name != "cross_entropy"]


def batch(ignored=5, absent=3):
    """Logits and masks of two images of 3 x 4 pixels, one class of which is absent."""
    generator = torch.manual_seed(2)
    logits = torch.randn(2, CLASSES, 3, 4, generator=generator, dtype=torch.float64)
    masks = torch.randint(0, absent, (2, 3, 4), generator=generator)
    masks.view(-1)[torch.randperm(24, generator=generator)[:ignored]] = IGNORED
    return logits, masks


def pixels(logits, masks):
    """Logits and class of each pixel that counts, as lists."""
    flat = logits.movedim(1, -1).reshape(-1, CLASSES).tolist()
    pairs = zip(flat, masks.flatten().tolist(), strict=True)
    return [(row, label) for row, label in pairs if label != IGNORED]


def softmax(row):
    powers = [math.exp(value) for value in row]
    return [power / sum(powers) for power in powers]


def cross_entropy(pairs, weights=(1.0,) * CLASSES, smoothing=0.0):
    total = 0.0
    for row, label in pairs:
        logs = [math.log(p) for p in softmax(row)]
        total -= (1 - smoothing) * weights[label] * logs[label]
        total -= smoothing / CLASSES * sum(w * v for w, v in zip(weights, logs, strict=True))
    return total / sum(weights[label] for _, label in pairs)


def dice(pairs):
    total = 0.0
    for c in {label for _, label in pairs}:
        hit = sum(softmax(row)[c] for row, label in pairs if label == c)
        predicted = sum(softmax(row)[c] for row, _ in pairs)
        total += 1 - 2 * hit / (predicted + sum(label == c for _, label in pairs))
    return total / CLASSES


def focal(pairs):
    total = 0.0
    for row, label in pairs:
        for c, value in enumerate(row):
            right = 1 / (1 + math.exp(-value if c == label else value))
            total -= (1 - right) ** 2 * math.log(right)
    return total / len(pairs) / CLASSES


def lovasz(pairs):
    """The Jaccard loss of the worst k pixels, weighted by how much worse they are than the next."""
    present = {label for _, label in pairs}
    total = 0.0
    for c in present:
        errors = [abs((label == c) - softmax(row)[c]) for row, label in pairs]
        order = sorted(range(len(pairs)), key=errors.__getitem__, reverse=True)
        size = sum(label == c for _, label in pairs)
        for k in range(1, len(order) + 1):
            wrong = [pairs[i][1] == c for i in order[:k]]
            jaccard = 1 - (size - sum(wrong)) / (size + k - sum(wrong))
            step = errors[order[k - 1]] - (errors[order[k]] if k < len(order) else 0.0)
            total += step * jaccard
    return total / len(present)


FORMULAS = {"cross_entropy": cross_entropy, "dice": dice, "focal": focal, "lovasz": lovasz}


def made(weights, **options):
    if any(name in LIBRARY for name in weights):
        pytest.importorskip("segmentation_models_pytorch")
    return SegmentationLoss(weights, **options)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("ignored", [0, 5, 23])
def test_each_loss_is_its_formula(name, ignored):
    logits, masks = batch(ignored)
    loss = made({name: 1.0})(logits, masks)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(FORMULAS[name](pixels(logits, masks)), rel=1e-5)


def test_the_sum_is_weighted():
    logits, masks = batch()
    weights = {"cross_entropy": 0.5, "dice": 2.0, "lovasz": 0.0, "focal": 3.0}
    expected = sum(w * FORMULAS[n](pixels(logits, masks)) for n, w in weights.items())
    assert made(weights)(logits, masks).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("smoothing", [0.0, 0.3])
def test_class_weights_and_label_smoothing(smoothing):
    logits, masks = batch()
    weights = [0.5, 2.0, 1.0, 7.0]
    loss = made({"cross_entropy": 1.0}, class_weights=weights, label_smoothing=smoothing)
    expected = cross_entropy(pixels(logits, masks), weights, smoothing)
    assert loss(logits, masks).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_ignored_pixels_are_as_if_they_were_not_there(name):
    """Neither the value nor the gradient follows their logits."""
    logits, masks = batch()
    ignored = (masks == IGNORED)[:, None].expand_as(logits)
    other = torch.where(ignored, 30 * torch.randn_like(logits), logits).requires_grad_()
    loss = made({name: 1.0})
    value = loss(other, masks)
    value.backward()
    assert value.item() == pytest.approx(loss(logits, masks).item(), rel=1e-6)
    assert (other.grad[ignored] == 0).all()
    assert (other.grad[~ignored] != 0).any()


@pytest.mark.parametrize("name", LOSSES)
def test_a_batch_of_ignored_pixels_teaches_nothing(name):
    logits, masks = batch()
    logits.requires_grad_()
    loss = made({name: 1.0})(logits, torch.full_like(masks, IGNORED))
    loss.backward()
    assert loss.shape == ()
    assert loss.item() == 0
    assert (logits.grad == 0).all()


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_logits_are_taken_in_single(name, dtype):
    logits, masks = batch()
    logits = logits.to(dtype)
    loss = made({name: 1.0})
    with torch.autocast("cpu", torch.bfloat16):
        halved = loss(logits, masks.to(torch.uint8))
    assert halved.dtype == torch.float32
    assert halved.item() == loss(logits.float(), masks).item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_class_weights_follow_a_module_of_any_dtype(dtype):
    loss = made({"cross_entropy": 1.0}, class_weights=[1.0, 2.0, 0.5, 4.0])
    expected = loss(*batch())
    assert "class_weights" in dict(loss.named_buffers())
    assert loss.to(dtype)(*batch()).item() == expected.item()


@pytest.mark.parametrize(
    ("weights", "options", "message"),
    [
        ({"crossentropy": 1.0}, {}, "unknown loss 'crossentropy'.*cross_entropy, dice"),
        ({}, {}, "no loss has a weight"),
        ({"cross_entropy": 0.0}, {}, "no loss has a weight"),
        ({"cross_entropy": -1.0}, {}, "the weight of cross_entropy"),
        ({"cross_entropy": math.nan}, {}, "the weight of cross_entropy"),
        ({"cross_entropy": 1.0}, {"class_weights": [0.0, 1.0]}, "class_weights must be .* above 0"),
        ({"cross_entropy": 1.0}, {"label_smoothing": 1.0}, "label_smoothing"),
        ({"dice": 1.0}, {"class_weights": [1.0, 1.0]}, "are for cross_entropy"),
    ],
)
def test_wrong_settings(weights, options, message):
    with pytest.raises(ValueError, match=message):
        SegmentationLoss(weights, **options)


def test_the_library_is_asked_for_only_where_it_is_needed(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("segmentation_models_pytorch"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    SegmentationLoss({"cross_entropy": 1.0})
    with pytest.raises(ImportError, match=r"pip install 'litflora\[dense\]'"):
        SegmentationLoss({"cross_entropy": 1.0, "dice": 1.0})
