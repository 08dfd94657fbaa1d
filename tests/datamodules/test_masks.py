"""What mask files mean, and what is said of files that mean nothing."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from litflora.datamodules.masks import (
    IGNORE,
    Legend,
    color_map,
    pack,
    pairs_by_stem,
    pairs_in_list,
    read_mask,
    read_pair,
    unpack,
)

IDS = np.array([[0, 1, 2, 2], [0, 9, 1, 0]])
LEGEND = Legend(("a", "b", "c"), ignored=(9,))
CLASSES = [[0, 1, 2, 2], [0, IGNORE, 1, 0]]


def save(path: Path, mode: str) -> Path:
    if mode == "16":
        image = Image.fromarray(IDS.astype(np.uint16))
    else:
        image = Image.fromarray(IDS.astype(np.uint8))
    if mode == "P":
        image.putpalette([200, 10, 10] * 256)  # all ids look alike: colours must not matter
    image.save(path)
    return path


@pytest.mark.parametrize(("mode", "name"), [("L", "m.png"), ("P", "m.png"), ("16", "m.png")])
def test_ids_are_read_as_they_are(tmp_path: Path, mode: str, name: str) -> None:
    mask = read_mask(save(tmp_path / name, mode), LEGEND)
    assert mask.dtype == np.uint8
    assert mask.tolist() == CLASSES


def test_ids_may_be_large_and_have_gaps(tmp_path: Path) -> None:
    Image.fromarray(np.array([[7, 30000], [65535, 7]], np.uint16)).save(tmp_path / "m.png")
    legend = Legend(("a", "b"), values=(30000, 7), ignored=(65535,))
    assert read_mask(tmp_path / "m.png", legend).tolist() == [[1, 0], [IGNORE, 1]]


def test_one_bit_is_two_ids(tmp_path: Path) -> None:
    Image.fromarray(np.array([[True, False]])).save(tmp_path / "m.png")
    assert read_mask(tmp_path / "m.png", LEGEND).tolist() == [[1, 0]]


@pytest.mark.parametrize("mode", ["RGB", "P", "RGBA"])
def test_colours_are_classes(tmp_path: Path, mode: str) -> None:
    palette = [(10, 20, 30), (30, 20, 10), (255, 255, 255)]
    shown = np.array([*palette, (0, 0, 0)], np.uint8)[np.minimum(IDS, 3)]
    image = Image.fromarray(shown)
    image = image.quantize(8) if mode == "P" else image.convert(mode)
    image.save(tmp_path / "m.png")
    legend = Legend(
        "abc", [pack(color) for color in palette], [pack((0, 0, 0))], palette, colored=True
    )
    assert read_mask(tmp_path / "m.png", legend).tolist() == CLASSES
    assert unpack(int(pack((1, 2, 3)))) == (1, 2, 3)


def test_an_unknown_id_is_named_with_file_and_known_ids(tmp_path: Path) -> None:
    path = save(tmp_path / "m.png", "L")
    with pytest.raises(ValueError, match=r"mask .*m\.png holds id 9, .*known are 0, 1, 2$"):
        read_mask(path, Legend("abc"))


def test_an_unknown_colour_is_named(tmp_path: Path) -> None:
    Image.new("RGB", (2, 2), (1, 2, 3)).save(tmp_path / "m.png")
    with pytest.raises(ValueError, match=r"holds colour \[1, 2, 3\], .*known are \[0, 0, 9\]"):
        read_mask(tmp_path / "m.png", Legend("a", [9], colored=True))


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA", "F"])
def test_a_picture_is_no_mask_of_ids(tmp_path: Path, mode: str) -> None:
    Image.new(mode, (2, 2)).save(tmp_path / "m.tif")
    with pytest.raises(ValueError, match=rf"m\.tif is a picture of mode {mode}.*`colors`"):
        read_mask(tmp_path / "m.tif", LEGEND)


@pytest.mark.parametrize("value", [-3, 70000])
def test_ids_of_32_bits_are_refused_not_wrapped(tmp_path: Path, value: int) -> None:
    Image.fromarray(np.full((2, 2), value, np.int32)).save(tmp_path / "m.tif")
    with pytest.raises(ValueError, match=f"holds id {value} to {value}"):
        read_mask(tmp_path / "m.tif", LEGEND)


def turned(path: Path, orientation: int) -> Path:
    """A photo 6 x 4 whose left half is white, to be turned when shown."""
    image = Image.new("RGB", (6, 4))
    image.paste((255, 255, 255), (0, 0, 3, 4))
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(path, exif=exif)
    return path


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_a_photo_is_turned_as_a_viewer_shows_it(tmp_path: Path, suffix: str) -> None:
    photo = turned(tmp_path / f"x.{suffix}", 6)  # the left half is shown on top
    Image.new("L", (4, 6)).save(tmp_path / "m.png")
    image, mask = read_pair(photo, tmp_path / "m.png", LEGEND)
    assert image.size == (4, 6)
    assert mask.shape == (6, 4)
    pixels = np.asarray(image)
    assert pixels[:2].min() > 200
    assert pixels[4:].max() < 50


def test_a_mask_of_the_photo_as_stored_is_refused(tmp_path: Path) -> None:
    photo = turned(tmp_path / "x.jpg", 6)
    Image.new("L", (6, 4)).save(tmp_path / "m.png")
    said = r"x\.jpg is 4 x 6 pixels as a viewer shows it, its mask .*m\.png 6 x 4"
    with pytest.raises(ValueError, match=said):
        read_pair(photo, tmp_path / "m.png", LEGEND)


@pytest.mark.parametrize("mode", ["L", "CMYK", "RGBA", "P", "1"])
def test_photos_become_rgb(tmp_path: Path, mode: str) -> None:
    Image.new(mode, (3, 2)).save(tmp_path / "x.tif")
    Image.new("L", (3, 2)).save(tmp_path / "m.png")
    image, _ = read_pair(tmp_path / "x.tif", tmp_path / "m.png", LEGEND)
    assert image.mode == "RGB"


def test_a_photo_of_16_bits_is_refused_not_whitened(tmp_path: Path) -> None:
    Image.fromarray(np.full((2, 2), 4000, np.uint16)).save(tmp_path / "x.png")
    Image.new("L", (2, 2)).save(tmp_path / "m.png")
    with pytest.raises(ValueError, match=r"x\.png has mode I;16"):
        read_pair(tmp_path / "x.png", tmp_path / "m.png", LEGEND)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"values": (0, 1)}, "2 values for 3 classes"),
        ({"values": (0, 1, 1)}, "stands for two"),
        ({"ignored": (2,)}, "stands for two"),
        ({"values": (0, 1, 65536)}, "lie in 0 to 65535"),
        ({"values": (0, 1, -1)}, "lie in 0 to 65535"),
        ({"palette": ((0, 0, 0),)}, "1 palette for 3"),
        ({"names": []}, "0 classes"),
        ({"names": ["x", "y", "x"]}, "two classes have one name"),
        ({"names": ["x"] * 256}, "256 classes"),
    ],
)
def test_a_legend_that_makes_no_sense(options: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        Legend(**{"names": "abc", **options})


def test_generated_colours_are_those_of_voc() -> None:
    known = {0: (0, 0, 0), 1: (128, 0, 0), 7: (128, 128, 128), 15: (192, 128, 128)}
    colors = color_map(150)
    assert {index: colors[index] for index in known} == known
    assert colors[20] == (0, 64, 128)
    assert len(set(colors)) == 150


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def test_pairs_go_by_name_below_their_folders(tmp_path: Path) -> None:
    images, masks = tmp_path / "i", tmp_path / "m"
    touch(images / "a" / "x_img.jpg", images / "b" / "x_img.JPG", images / "a.b_img.png")
    touch(masks / "a" / "x_ids.png", masks / "b" / "x_ids.png", masks / "a.b_ids.png")
    touch(masks / "a" / "x_color.png", images / "._z_img.jpg")
    pairs = pairs_by_stem(images, masks, "_img", "_ids")
    assert [str(path.relative_to(tmp_path)) for pair in pairs for path in pair] == [
        *("i/a.b_img.png", "m/a.b_ids.png", "i/a/x_img.jpg", "m/a/x_ids.png"),
        *("i/b/x_img.JPG", "m/b/x_ids.png"),
    ]


def test_files_without_a_partner_are_all_named(tmp_path: Path) -> None:
    images, masks = tmp_path / "i", tmp_path / "m"
    touch(images / "x.jpg", images / "y.jpg", images / "z.jpg", masks / "x.png", masks / "w.png")
    said = r"2 images without a mask below .*/m: .*y\.jpg, .*z\.jpg; 1 masks .*/i: .*w\.png"
    with pytest.raises(FileNotFoundError, match=said):
        pairs_by_stem(images, masks)


def test_two_files_of_one_name(tmp_path: Path) -> None:
    touch(tmp_path / "i" / "x.jpg", tmp_path / "i" / "x.png", tmp_path / "m" / "x.png")
    with pytest.raises(ValueError, match=r"x\.jpg and .*x\.png have one name"):
        pairs_by_stem(tmp_path / "i", tmp_path / "m")


def test_missing_folders_and_lists(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no image files below .*/i \(set"):
        pairs_by_stem(tmp_path / "i", tmp_path / "m")
    listing = tmp_path / "train.txt"
    with pytest.raises(FileNotFoundError, match=r"train\.txt is missing"):
        pairs_in_list(listing, tmp_path, tmp_path)
    listing.write_text("x 1 1\n\ny 2 1\n")
    touch(tmp_path / "x.jpg", tmp_path / "x.png", tmp_path / "y.jpg")
    with pytest.raises(FileNotFoundError, match=r"1 files that .*train\.txt lists .*y\.png$"):
        pairs_in_list(listing, tmp_path, tmp_path)
