from itertools import product

import pytest
import torch
import torch.nn.functional as F
from jsonargparse import ArgumentParser
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from litflora.windows import Inference, Resized, SlidingWindow, Whole

SIZES = [(33, 47), (64, 31), (16, 16), (17, 90)]


def picture(height, width, dtype=torch.float64):
    """Noise in [0, 1)."""
    return torch.rand(3, height, width, generator=torch.manual_seed(0), dtype=dtype)


def scores(images):
    """Scores of five classes that depend on each pixel and on where it lies in its window."""
    y, x = torch.meshgrid(*(torch.arange(n).to(images) for n in images.shape[2:]), indexing="ij")
    r, g, b = images.unbind(1)
    return torch.stack([r, g * b, b + 0.01 * y, r - 0.02 * x, g.sin()], dim=1)


def naive(image, window, overlap):
    """All sums and weights in full size, a pixel's weight written out on its own."""
    (_, height, width), (h, w) = image.shape, window
    sums, weights = torch.zeros(5, height, width).double(), torch.zeros(height, width).double()
    ramp = [(torch.arange(n).double() + 0.5).mul(torch.pi / n).sin() ** 2 for n in window]
    steps = [round(n * (1 - overlap)) for n in window]
    tops = sorted({min(top, height - h) for top in range(0, height, steps[0])})
    lefts = sorted({min(left, width - w) for left in range(0, width, steps[1])})
    for top, left in product(tops, lefts):
        here = (..., slice(top, top + h), slice(left, left + w))
        sums[here] += scores(image[None][here])[0] * torch.outer(*ramp)
        weights[here] += torch.outer(*ramp)
    return sums / weights


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(("window", "overlap"), [((16, 16), 0.5), ((11, 15), 0.3), ((16, 9), 0.8)])
@pytest.mark.parametrize("batch_size", [1, 3])
def test_windows_are_blended_as_in_full_size(size, window, overlap, batch_size):
    image = picture(*size)
    inference = SlidingWindow(window, overlap, batch_size)
    expected = naive(image, window, overlap)
    torch.testing.assert_close(inference.scores(scores, image), expected, rtol=0, atol=1e-13)
    assert torch.equal(inference(scores, image), expected.argmax(0))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("overlap", [0.0, 0.1, 1 / 3, 0.5, 0.77])
def test_no_seam_is_left_in_what_all_windows_agree_on(size, overlap):
    y, x = torch.meshgrid(*(torch.arange(n).double() for n in size), indexing="ij")
    image = torch.stack([torch.ones_like(y), 3 * y - x, x])
    blended = SlidingWindow(13, overlap).scores(lambda crops: crops, image)
    torch.testing.assert_close(blended, image, rtol=1e-14, atol=1e-13)


def test_where_windows_disagree_the_scores_pass_smoothly():
    """The second window's share grows with every column of the overlap, from about 0 to 1."""
    answers = iter([0.0, 1.0])

    def predict(crops):
        return torch.full_like(crops, next(answers))

    inference = SlidingWindow(16, overlap=0.5, batch_size=1)
    row = inference.scores(predict, picture(16, 24))[0, 5]
    assert (row[:8] == 0).all()
    assert (row[16:] == 1).all()
    steps = row[7:17].diff()
    assert (steps > 0).all()
    assert steps.max() < 0.25
    assert row[8] < 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [(32, 32), (20, 27), (1, 1)])
def test_one_window_is_the_whole_image(dtype, size):
    image = picture(*size, dtype)
    expected = scores(image[None])[0]
    assert torch.equal(SlidingWindow(32).scores(scores, image), expected)
    assert torch.equal(Whole().scores(scores, image), expected)
    assert torch.equal(SlidingWindow(32)(scores, image), Whole()(scores, image))


@pytest.mark.parametrize("size", [(20, 50), (50, 20), (20, 20)])
def test_zeros_fill_images_smaller_than_a_window(size):
    seen = []

    def predict(crops):
        seen.append(crops)
        return scores(crops / 255)

    image = picture(*size).mul(200).add(20).to(torch.uint8)
    assert SlidingWindow(32)(predict, image).shape == size
    crops = torch.cat(seen)
    assert crops.dtype == torch.uint8
    assert crops.shape[1:] == (3, 32, 32)
    assert (crops[:, :, size[0] :] == 0).all()
    assert (crops[:, :, :, size[1] :] == 0).all()
    assert (crops[:, :, : min(size[0], 32), : min(size[1], 32)] > 0).all()


def test_batches_hold_no_more_than_they_may():
    counts = []

    def predict(crops):
        counts.append(len(crops))
        return crops

    SlidingWindow(8, overlap=0.5, batch_size=3)(predict, picture(16, 24))
    assert counts == [3, 2] * 3  # windows begin at columns 0, 4, 8, 12, 16 and rows 0, 4, 8


class Allocations(TorchDispatchMode):
    """The most bytes that one tensor has taken."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        sizes = [t.untyped_storage().nbytes() for t in tree_leaves(result) if torch.is_tensor(t)]
        self.largest = max(self.largest, *sizes, 0)
        return result


@pytest.mark.parametrize(
    ("inference", "rows"),
    [(SlidingWindow(32), 32), (SlidingWindow(32, 0.25), 32), (Resized(32), 64)],
)
def test_memory_holds_a_band_of_all_classes_and_never_the_image(inference, rows):
    classes, width = 150, 400
    with Allocations() as taken:
        inference(
            lambda crops: crops[:, :1].expand(-1, classes, -1, -1), picture(300, width).float()
        )
    assert taken.largest <= classes * rows * width * 4
    with Allocations() as taken:  # and the count sees what it should
        inference.scores(lambda crops: crops, picture(300, width).float())
    assert taken.largest >= 3 * 300 * width * 4


def test_an_image_of_24_megapixels():
    image = torch.randint(0, 256, (3, 4000, 6000), dtype=torch.uint8)
    ids = SlidingWindow(1024, overlap=0.1)(lambda crops: crops[:, :2].float(), image)
    assert torch.equal(ids, image[:2].argmax(0))


def test_half_precision_is_summed_in_single():
    image = torch.full((3, 40, 40), 1 / 3, dtype=torch.bfloat16)
    blended = SlidingWindow(16, overlap=0.7).scores(lambda crops: crops, image)
    assert blended.dtype == torch.float32
    torch.testing.assert_close(blended, image.float(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("size", [(33, 47), (150, 70), (8, 200)])
def test_resized_scores_are_those_of_one_interpolation(size):
    """Bands meet where the interpolation of the whole has them."""
    image = picture(*size, torch.float32)
    low = torch.rand(1, 5, 24, 24, generator=torch.manual_seed(1))
    scale = min(24 / size[0], 24 / size[1])
    h, w = round(size[0] * scale), round(size[1] * scale)
    expected = F.interpolate(low[..., :h, :w], size, mode="bilinear")[0]
    made = Resized(24).scores(lambda images: low, image)
    torch.testing.assert_close(made, expected, rtol=0, atol=1e-5)
    assert torch.equal(Resized(24)(lambda images: low, image), made.argmax(0))


@pytest.mark.parametrize(
    ("size", "fit"), [((60, 120), (20, 40)), ((120, 60), (30, 15)), ((3, 4), (30, 40))]
)
def test_resized_images_keep_their_shape(size, fit):
    def predict(images):
        assert images.shape == (1, 3, 30, 40)
        assert images.dtype == torch.uint8
        inside = images[..., : fit[0], : fit[1]]
        assert (inside == 200).all()
        assert images.sum() == inside.sum()
        return images

    image = torch.full((3, *size), 200, dtype=torch.uint8)
    assert Resized((30, 40))(predict, image).shape == size


def test_no_graph_is_kept():
    weight = torch.ones(1, requires_grad=True)
    for inference in (Whole(), Resized(8), SlidingWindow(8)):
        assert not inference.scores(lambda crops: crops * weight, picture(20, 20)).requires_grad


def test_the_modes_are_arguments_of_the_command_line():
    parser = ArgumentParser()
    parser.add_argument("--inference", type=Inference)

    def chosen(*words):
        return parser.instantiate(parser.parse_args(words)).inference

    sliding = chosen("--inference=SlidingWindow", "--inference.window=[96, 128]")
    assert sliding == SlidingWindow((96, 128))
    assert chosen("--inference=Resized", "--inference.size=512") == Resized(512)
    assert chosen("--inference=Whole") == Whole()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SlidingWindow(0), "window is in pixels"),
        (lambda: SlidingWindow((4, -1)), "window is in pixels"),
        (lambda: SlidingWindow(8, overlap=1.0), "overlap is a share"),
        (lambda: SlidingWindow(8, batch_size=0), "batch_size must be 1"),
        (lambda: Resized(0), "size is in pixels"),
    ],
)
def test_wrong_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("inference", [Whole(), Resized(16), SlidingWindow(16)])
def test_scores_of_another_size_are_refused(inference):
    with pytest.raises(ValueError, match=r"it must return \[\d, classes, \d+, \d+\]"):
        inference(lambda crops: crops[..., ::4, ::4], picture(32, 32))
