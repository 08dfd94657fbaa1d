"""ADE20K: scenes of all kinds."""

from .mask_files import MaskFilesDataModule
from .masks import Legend, Pair, color_map, pairs_by_stem

# The first name that objectInfo150.txt gives each class.
_NAMES = """
wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet, sidewalk,
person, earth, door, table, mountain, plant, curtain, chair, car, water, painting, sofa, shelf,
house, sea, mirror, rug, field, armchair, seat, fence, desk, rock, wardrobe, lamp, bathtub,
railing, cushion, base, box, column, signboard, chest of drawers, counter, sand, sink, skyscraper,
fireplace, refrigerator, grandstand, path, stairs, runway, case, pool table, pillow, screen door,
stairway, river, bridge, bookcase, blind, coffee table, toilet, flower, book, hill, bench,
countertop, stove, palm, kitchen island, computer, swivel chair, boat, bar, arcade machine, hovel,
bus, towel, light, truck, tower, chandelier, awning, streetlight, booth, television, airplane,
dirt track, apparel, pole, land, bannister, escalator, ottoman, bottle, buffet, poster, stage,
van, ship, fountain, conveyer belt, canopy, washer, plaything, swimming pool, stool, barrel,
basket, waterfall, tent, bag, minibike, cradle, oven, ball, food, step, tank, trade name,
microwave, pot, animal, bicycle, lake, dishwasher, screen, blanket, sculpture, hood, sconce, vase,
traffic light, tray, ashcan, fan, pier, crt screen, plate, monitor, bulletin board, shower,
radiator, glass, clock, flag
"""


class ADE20KDataModule(MaskFilesDataModule):
    """ADE20K (Zhou et al., arXiv 1608.05442), the 150 classes of the scene parsing challenge.

    `root` is the folder `ADEChallengeData2016`, which holds `images/` and `annotations/`. The masks
    of the test images are not public: validation images stand in.
    """

    legend = Legend(
        [name.strip() for name in _NAMES.replace("\n", " ").split(",")],
        values=range(1, 151),
        ignored=(0,),
        palette=color_map(151)[1:],
    )

    def official_splits(self) -> dict[str, list[Pair]]:
        """The splits "train" and "val"."""
        images, masks = self.root / "images", self.root / "annotations"
        folders = {"train": "training", "val": "validation"}
        return {n: pairs_by_stem(images / at, masks / at) for n, at in folders.items()}
