"""What is drawn where, and in which colour."""

import numpy as np
import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.patches import Rectangle

from litflora.callbacks.gallery import draw
from litflora.drawing import BoxDrawing, LabelDrawing, MaskDrawing
from litflora.drawing.base import Key, grid
from litflora.drawing.boxes import CROWD, FOUND, MISSED, OPACITY, WRONG

NAMES, PALETTE = ["cat", "dog"], [(200, 40, 0), (0, 60, 220)]
GROUND = (90, 120, 100)


def image(height=64, width=64):
    return torch.tensor(GROUND, dtype=torch.uint8)[:, None, None].expand(3, height, width)


def objects(*rows, size=64, masks=False, **more):
    """Objects from (label, box) with a mask that fills the box."""
    boxes = torch.tensor([box for _, box in rows], dtype=torch.float32).reshape(-1, 4)
    found = {"boxes": boxes, "labels": torch.tensor([n for n, _ in rows], dtype=torch.int64)}
    if masks:
        found["masks"] = torch.zeros(len(rows), size, size, dtype=torch.bool)
        for mask, (x0, y0, x1, y1) in zip(found["masks"], boxes.int().tolist(), strict=True):
            mask[y0:y1, x0:x1] = True
    return found | {key: torch.tensor(values) for key, values in more.items()}


def pixels(figure):
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].astype(int)


def rectangles(axis):
    """The boxes on an axis with their colours."""
    found = [patch for patch in axis.patches if isinstance(patch, Rectangle)]
    return [
        (
            tuple(round(255 * c) for c in to_rgb(each.get_edgecolor()[:3])),
            [v + 0.5 for v in (each.get_x(), each.get_y())] + [each.get_width(), each.get_height()],
        )
        for each in found
    ]


def texts(axis):
    return [text.get_text() for text in axis.texts]


def test_a_picture_has_box_and_mask_in_the_colour_of_the_class_where_they_are():
    found = objects((1, [16, 24, 40, 48]), masks=True, scores=[0.75])
    drawn = pixels(BoxDrawing(NAMES, PALETTE).picture(image(), found))
    assert drawn.shape == (640, 640, 3)  # ten times the image
    inside = np.multiply(OPACITY, PALETTE[1]) + np.multiply(1 - OPACITY, GROUND)
    assert np.abs(drawn[260:470, 180:380] - inside).max() <= 2
    assert (drawn[500:, 420:] == GROUND).all()
    for edge in (drawn[235:245, 380], drawn[475:485, 200]):
        assert (edge == PALETTE[1]).all(-1).any()
    for edge in (drawn[300, 155:165], drawn[300, 395:405]):
        assert (edge == PALETTE[1]).all(-1).any()
    above = drawn[224:238, 162:200]  # the name's ground
    assert (above == PALETTE[1]).all(-1).mean() > 0.3


@pytest.mark.parametrize(
    ("size", "drawn"), [((30, 20), (660, 440)), ((700, 300), (700, 300)), ((639, 1), (1278, 2))]
)
def test_a_picture_has_the_images_size_or_a_multiple(size, drawn):
    found = objects(scores=[])
    assert pixels(BoxDrawing(NAMES).picture(image(*size), found)).shape[:2] == drawn


def test_of_masks_one_above_another_the_likelier_is_seen():
    found = objects((0, [8, 8, 56, 56]), (1, [8, 8, 56, 56]), masks=True, scores=[0.9, 0.8])
    drawn = pixels(BoxDrawing(NAMES, PALETTE).picture(image(), found))
    over = np.multiply(OPACITY, PALETTE[0]) + np.multiply(1 - OPACITY, GROUND)
    assert np.abs(drawn[320, 320] - over).max() <= 2


def test_unlikely_predictions_are_left_out_and_the_others_named():
    found = objects((0, [1, 9, 9, 19]), (1, [20, 20, 50, 60]), scores=[0.3, 0.29])
    (axis,) = BoxDrawing(NAMES, PALETTE).picture(image(), found).axes
    assert rectangles(axis) == [(PALETTE[0], [1, 9, 8, 10])]
    assert texts(axis) == ["cat 0.30"]


def test_a_row_shows_what_is_true_what_is_found_and_what_is_wrong():
    truth = objects(
        *[(0, [4, 4, 20, 20]), (1, [30, 30, 50, 50]), (1, [0, 40, 30, 64])], iscrowd=[0, 0, 1]
    )
    found = objects(
        *[(0, [4, 5, 20, 20]), (0, [30, 30, 50, 50]), (1, [2, 44, 12, 54])], scores=[0.9, 0.8, 0.7]
    )
    figure = draw(BoxDrawing(NAMES, PALETTE), [(image(), truth, found)])
    true, predicted, errors = figure.axes
    assert texts(true) == ["cat", "dog", "dog"]
    assert [color for color, _ in rectangles(true)] == [*PALETTE, CROWD]
    assert texts(predicted) == ["cat 0.90", "cat 0.80", "dog 0.70"]
    assert rectangles(errors) == [
        (MISSED.color, [30, 30, 20, 20]),
        (FOUND.color, [4, 5, 16, 15]),
        (WRONG.color, [30, 30, 20, 20]),  # the right place, the wrong class
        (FOUND.color, [2, 44, 10, 10]),  # in the crowd
    ]
    assert texts(errors) == ["dog", "cat 0.80"]
    assert errors.get_xlabel() == "1 of 2 found, 1 wrong"
    told = [text.get_text() for text in figure.legends[0].get_texts()]
    assert told == [FOUND.label, MISSED.label, WRONG.label]
    drawn = pixels(figure).reshape(-1, 3)
    for key in (FOUND, MISSED, WRONG):
        assert (drawn == key.color).all(-1).sum() > 300


def test_a_row_of_nothing():
    nothing = objects(masks=True)
    figure = draw(BoxDrawing(NAMES), [(image(), nothing, nothing | {"scores": torch.zeros(0)})])
    assert figure.axes[2].get_xlabel() == "0 of 0 found, 0 wrong"


@pytest.mark.parametrize(
    ("box", "sides"),
    [
        ([2, 30, 20, 50], ("left", "bottom")),
        ([2, 1, 20, 50], ("left", "top")),  # no room above the image
        ([55, 30, 63, 50], ("right", "bottom")),  # none beside it
    ],
)
def test_names_stay_inside_the_image(box, sides):
    (axis,) = BoxDrawing(NAMES).picture(image(), objects((0, box), scores=[1.0])).axes
    (text,) = axis.texts
    assert (text.get_ha(), text.get_va()) == sides


def test_rows_are_as_high_as_their_images():
    figure, axes = grid([0.5, 2.0], 3)
    figure.draw_without_rendering()
    low, high = (axis.get_position().height for axis in axes[:, 0])
    assert high / low == pytest.approx(4, rel=0.05)


def test_masks_are_drawn_in_their_colours_and_explained():
    ids = torch.tensor([[0, 1], [255, 1]])
    _, axes = grid([1], 2)
    keys = MaskDrawing(NAMES, PALETTE).sample(axes[0], image(2, 2), ids)
    shown = axes[0, 1].images[0].get_array()
    assert shown.tolist() == [[[*PALETTE[0]], [*PALETTE[1]]], [[160, 160, 160], [*PALETTE[1]]]]
    assert (axes[0, 0].images[0].get_array() == GROUND).all()
    unknown = Key(255, "unknown", (160, 160, 160))
    assert sorted(keys) == [Key(0, "cat", PALETTE[0]), Key(1, "dog", PALETTE[1]), unknown]


def test_a_class_has_its_name_below():
    _, axes = grid([1], 1)
    assert LabelDrawing(NAMES).sample(axes[0], image(), 1) == set()
    assert axes[0, 0].get_xlabel() == "dog"


def test_colours_differ_where_the_data_have_none():
    assert len(set(BoxDrawing(["n"] * 20).palette)) == 20
    assert len(BoxDrawing(["n"] * 80).palette) == 80
