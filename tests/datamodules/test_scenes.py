"""All views of a scene agree, and a scene follows from its three numbers."""

import numpy as np
import pytest

from litflora.datamodules.scenes import (
    COLORS,
    DOMAINS,
    KINDS,
    SHAPES,
    Scene,
    SceneObject,
    draw_scene,
    masks,
    render,
)

SIZE = 64


def one(kind: str, **changes: object) -> Scene:
    options: dict = {"color": "red", "center": (0.5, 0.5), "size": 0.4, "rotation": 0.0, **changes}
    return Scene((SceneObject(kind, **options),), seed=0)


def grid(count: int) -> tuple[np.ndarray, np.ndarray]:
    axis = (np.arange(count, dtype=np.float32) + 0.5) / count * 3 - 1.5
    return np.broadcast_to(axis, (count, count)), np.broadcast_to(axis[:, None], (count, count))


def test_a_scene_follows_from_its_numbers() -> None:
    assert draw_scene(0, 1, 2) == draw_scene(0, 1, 2)
    scenes = {draw_scene(*numbers) for numbers in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 10)]}
    assert len(scenes) == 4


def test_kinds_take_turns_as_the_main_object() -> None:
    assert [draw_scene(3, 0, index).main.kind for index in range(20)] == list(KINDS) * 2


def test_an_even_scene_has_shapes_alike_in_size_and_kinds_take_turns() -> None:
    scenes = [draw_scene(3, 0, index, "even") for index in range(20)]
    assert all(0.12 <= thing.size <= 0.22 for scene in scenes for thing in scene.objects)
    for index, scene in enumerate(scenes):
        assert KINDS[index % 10] in [thing.kind for thing in scene.objects]


@pytest.mark.parametrize("kind", KINDS)
def test_a_shape_fills_its_circle_and_stays_inside(kind: str) -> None:
    x, y = grid(300)
    inside = SHAPES[kind](x, y) <= 0
    radius = np.hypot(x, y)[inside].max()
    assert 0.93 < radius < 1.01
    assert inside.sum() * 1e-4 > 0.5  # the circle itself has an area of 3.14


@pytest.mark.parametrize("kind", KINDS)
def test_distances_are_signed_and_measured_from_the_outline(kind: str) -> None:
    x, y = grid(100)
    distance = SHAPES[kind](x, y)
    for axis in (0, 1):  # it changes by no more than the way gone
        assert abs(np.diff(distance, axis=axis)).max() < 0.03 * 1.01
    assert distance[0, 0] > 0 > distance.min()


@pytest.mark.parametrize("kind", KINDS)
def test_the_mask_is_where_the_picture_is_coloured(kind: str) -> None:
    scene = one(kind, center=(0.45, 0.55), rotation=0.7)
    red, _, blue = np.moveaxis(render(scene, SIZE).astype(int), -1, 0)
    (mask,) = masks(scene, SIZE)
    # Only the soft edge may differ.
    assert ((red - blue > 90) != mask).mean() < 0.03


def test_rotation_and_position_move_the_mask() -> None:
    up = masks(one("arrow"), SIZE)[0]
    right = masks(one("arrow", rotation=np.pi / 2), SIZE)[0]
    np.testing.assert_array_equal(np.rot90(up, -1), right)
    shifted = masks(one("arrow", center=(0.5 + 4 / SIZE, 0.5)), SIZE)[0]
    np.testing.assert_array_equal(np.roll(up, 4, axis=1), shifted)


def test_front_objects_hide_those_behind_them() -> None:
    back = SceneObject("square", "blue", (0.5, 0.5), 0.4, 0.0)
    front = SceneObject("circle", "green", (0.5, 0.5), 0.2, 0.0)
    scene = Scene((back, front), seed=0)
    behind, before = masks(scene, SIZE)
    assert not (behind & before).any()
    assert before[32, 32]
    red, green, blue = render(scene, SIZE)[32, 32] / 255
    assert abs(np.array([red, green, blue]) - COLORS["green"]).max() < 0.1
    assert scene.main is back


def test_domains_draw_the_same_scene_differently() -> None:
    scene = draw_scene(0, 0, 0)
    source, shifted = (render(scene, SIZE, domain).astype(int) for domain in DOMAINS)
    assert abs(source - shifted).mean() > 15


def test_a_larger_picture_shows_the_same() -> None:
    scene = draw_scene(0, 0, 3)
    large = render(scene, 2 * SIZE).reshape(SIZE, 2, SIZE, 2, 3).mean((1, 3))
    assert abs(large - render(scene, SIZE)).mean() < 8
