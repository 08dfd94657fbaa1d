"""Drawn scenes: plain descriptions of coloured shapes, and the pictures, masks and boxes of them.

A scene says what is where; every view of it (image, masks, boxes) is computed from the same
signed distances, so that all views agree at any image size and in either domain.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.floating]
Distance = Callable[[Floats, Floats], Floats]


def _polygon(*vertices: tuple[float, float]) -> Distance:
    """Signed distance to a polygon, negative inside; its vertices go round once."""
    start = np.array(vertices, np.float32)[:, :, None, None]
    edge = np.roll(start, -1, axis=0) - start
    squared_length = (edge**2).sum(1)

    def distance(x: Floats, y: Floats) -> Floats:
        px, py = x - start[:, 0], y - start[:, 1]
        ex, ey = edge[:, 0], edge[:, 1]
        along = np.clip((px * ex + py * ey) / squared_length, 0, 1)
        nearest = np.sqrt(((px - ex * along) ** 2 + (py - ey * along) ** 2).min(0))
        # A point is inside when a ray from it crosses the outline an odd number of times.
        straddles = (py >= 0) != (py - ey >= 0)
        crossings = straddles & ((ex * py - ey * px > 0) == (ey > 0))
        return np.where(crossings.sum(0) % 2, -nearest, nearest)

    return distance


def _regular(corners: int, inner: float | None = None) -> Distance:
    """A regular polygon, or a star whose inner corners lie at radius `inner`."""
    radii = [1.0] if inner is None else [1.0, inner]
    count = corners * len(radii)
    angles = [2 * np.pi * k / count for k in range(count)]
    radius = [radii[k % len(radii)] for k in range(count)]
    return _polygon(*((r * np.sin(a), -r * np.cos(a)) for r, a in zip(radius, angles, strict=True)))


def _circle(x: Floats, y: Floats) -> Floats:
    return np.hypot(x, y) - 1


def _ring(x: Floats, y: Floats) -> Floats:
    return np.abs(np.hypot(x, y) - 0.75) - 0.25


def _crescent(x: Floats, y: Floats) -> Floats:
    # Near its horns this is less than the distance, which costs them a little of their outline.
    return np.maximum(np.hypot(x, y) - 1, 0.8 - np.hypot(x - 0.5, y))


def _heart(x: Floats, y: Floats) -> Floats:
    """Two half circles on a square standing on its corner."""
    x, y = np.abs(x) * _HEART, 0.63 - y * _HEART  # the tip comes to the origin, the notch to (0, 1)
    lobe = np.hypot(x - 0.25, y - 0.75) - np.float32(np.sqrt(2) / 4)
    half = np.maximum(x + y, 0) / 2
    notch, side = np.hypot(x, y - 1), np.hypot(x - half, y - half)
    body = np.minimum(notch, side) * np.sign(x - y)
    return np.where(x + y > 1, lobe, body) / _HEART


_HEART = 0.64  # radius of the circle round a heart that is 1 from tip to notch
_CROSS = 0.32  # half the width of an arm
_ARM = np.sqrt(1 - _CROSS**2)  # keeps the ends of the arms on the unit circle

# Every shape fills the unit circle. The order is that of the class labels.
SHAPES: dict[str, Distance] = {
    "circle": _circle,
    "ring": _ring,
    "crescent": _crescent,
    "heart": _heart,
    "triangle": _regular(3),
    "square": _regular(4),
    "pentagon": _regular(5),
    "star": _regular(5, inner=0.42),
    "cross": _polygon(
        *[(-_ARM, -_CROSS), (-_CROSS, -_CROSS), (-_CROSS, -_ARM), (_CROSS, -_ARM)],
        *[(_CROSS, -_CROSS), (_ARM, -_CROSS), (_ARM, _CROSS), (_CROSS, _CROSS)],
        *[(_CROSS, _ARM), (-_CROSS, _ARM), (-_CROSS, _CROSS), (-_ARM, _CROSS)],
    ),
    "arrow": _polygon(
        *[(0, -1), (0.8, -0.1), (0.28, -0.1), (0.28, 0.95), (-0.28, 0.95), (-0.28, -0.1)],
        (-0.8, -0.1),
    ),
}
KINDS = tuple(SHAPES)

COLORS: dict[str, tuple[float, float, float]] = {
    "red": (0.85, 0.15, 0.15),
    "orange": (0.95, 0.55, 0.10),
    "yellow": (0.90, 0.80, 0.10),
    "green": (0.15, 0.65, 0.25),
    "cyan": (0.10, 0.70, 0.75),
    "blue": (0.15, 0.30, 0.85),
    "purple": (0.55, 0.20, 0.75),
    "pink": (0.95, 0.45, 0.70),
}


@dataclass(frozen=True)
class Style:
    """How a domain draws its scenes; the scenes themselves are the same."""

    background: tuple[float, float]  # range of its brightness
    texture: float  # amplitude of the background's waves
    noise: float  # standard deviation of the pixel noise
    fill: float  # opacity of an object's inside
    outline: float  # width of an object's outline, as a share of the image


DOMAINS: dict[str, Style] = {
    "source": Style((0.75, 1.0), texture=0.0, noise=0.02, fill=1.0, outline=0.0),
    "shifted": Style((0.55, 0.85), texture=0.14, noise=0.05, fill=0.5, outline=0.06),
}


# Sizes of the first shape and of the others. A scene of one class has a main shape, and small ones
# that distract from it; where every shape counts, they are alike in size.
LAYOUTS: dict[str, tuple[tuple[float, float], tuple[float, float]]] = {
    "main": ((0.24, 0.38), (0.06, 0.12)),
    "even": ((0.12, 0.22), (0.12, 0.22)),
}


@dataclass(frozen=True)
class SceneObject:
    """One shape; lengths are shares of the image's side, the origin is its top left corner."""

    kind: str
    color: str
    center: tuple[float, float]  # x, y
    size: float  # radius of the circle round the shape
    rotation: float  # radians

    def distance(self, size: int) -> Floats:
        """Signed distance of each pixel's centre to the outline, in pixels, negative inside.

        Outside the square round the shape, where no view needs it, it is `size`.
        """
        columns, x = self._along(self.center[0], size)
        rows, y = self._along(self.center[1], size)
        x, y = x[None, :], y[:, None]
        cos, sin = np.float32(np.cos(self.rotation)), np.float32(np.sin(self.rotation))
        near = SHAPES[self.kind](cos * x + sin * y, cos * y - sin * x) * (self.size * size)
        field = np.full((size, size), size, np.float32)
        field[rows, columns] = near
        return field

    def _along(self, center: float, size: int) -> tuple[slice, Floats]:
        """The pixels that the shape and its soft edge can reach on an axis; their coordinates."""
        reach = self.size * size + 1
        middle = center * size
        pixels = slice(max(0, int(middle - reach)), min(size, int(middle + reach) + 1))
        positions = np.arange(pixels.start, pixels.stop, dtype=np.float32) + 0.5
        return pixels, (positions / size - center) / self.size


@dataclass(frozen=True)
class Scene:
    """What a picture shows: objects from back to front, and the seed of background and noise."""

    objects: tuple[SceneObject, ...]
    seed: int

    @property
    def main(self) -> SceneObject:
        """The largest object, which gives the scene its class."""
        return max(self.objects, key=lambda thing: thing.size)


def draw_scene(seed: int, split: int, index: int, layout: str = "main") -> Scene:
    """Make up a scene that depends on the arguments alone; classes take turns by index."""
    first, others = LAYOUTS[layout]
    rng = np.random.default_rng((seed, split, index))
    objects = _add([], rng, KINDS[index % len(KINDS)], first)
    for _ in range(rng.integers(2, 6)):
        objects = _add(objects, rng, KINDS[rng.integers(len(KINDS))], others)
    order = rng.permutation(len(objects))
    return Scene(tuple(objects[i] for i in order), seed=int(rng.integers(2**32)))


def _add(
    objects: list[SceneObject], rng: np.random.Generator, kind: str, sizes: tuple[float, float]
) -> list[SceneObject]:
    """The objects and one more that hides none of them; without it, where there is no room."""
    size = rng.uniform(*sizes)
    color = tuple(COLORS)[rng.integers(len(COLORS))]
    rotation = rng.uniform(0, 2 * np.pi)
    for x, y in rng.uniform(size, 1 - size, (8, 2)).tolist():
        gaps = (np.hypot(x - o.center[0], y - o.center[1]) / (size + o.size) for o in objects)
        if all(gap > 0.8 for gap in gaps):
            return [*objects, SceneObject(kind, color, (x, y), size, rotation)]
    return objects


def render(scene: Scene, size: int, domain: str = "source") -> NDArray[np.uint8]:
    """The picture of a scene: [size, size, 3]."""
    style = DOMAINS[domain]
    rng = np.random.default_rng(scene.seed)
    image = _background(rng, style, size)
    for thing in scene.objects:
        distance = thing.distance(size)
        inside = np.clip(0.5 - distance, 0, 1)
        stroke = np.clip(0.5 + distance + style.outline * size, 0, 1)
        opacity = (inside * np.maximum(stroke, style.fill))[..., None]
        image += opacity * (np.array(COLORS[thing.color], np.float32) - image)
    image += rng.normal(0, style.noise, image.shape)
    return (image.clip(0, 1) * 255).round().astype(np.uint8)


def _background(rng: np.random.Generator, style: Style, size: int) -> Floats:
    """A plain colour near grey, crossed by two plane waves."""
    brightness, tone = rng.uniform(*style.background), rng.uniform(-0.05, 0.05, 3)
    image = np.broadcast_to(np.float32(brightness + tone), (size, size, 3)).copy()
    axis = (np.arange(size, dtype=np.float32) + 0.5) / size
    for _ in range(2):
        angle, phase = rng.uniform(0, 2 * np.pi, 2)
        waves = 2 * np.pi * rng.uniform(3, 9)
        ramp = np.cos(angle) * axis[None, :] + np.sin(angle) * axis[:, None]
        image += np.float32(style.texture) * np.sin(waves * ramp + phase)[..., None]
    return image


def masks(scene: Scene, size: int) -> NDArray[np.bool_]:
    """The visible pixels of each object, in the order of `scene.objects`: [objects, size, size]."""
    inside = np.stack([thing.distance(size) <= 0 for thing in scene.objects])
    front_first = inside[::-1]
    hidden = np.logical_or.accumulate(front_first, axis=0)[::-1]
    inside[:-1] &= ~hidden[1:]
    return inside
