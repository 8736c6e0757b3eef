import csv
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from trainbox.spec.dataset import check, find_splits, hash_splits, reader
from trainbox.spec.images import ORIENTATION, fault_of, open_image, read_images, size_of
from trainbox.spec.recipe.encoder import ImageClassifierRecipe


def draw(path, color="red", size=(40, 30), **settings):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, color).save(path, **settings)
    return path


def damage(path):
    """The file without its end."""
    path.write_bytes(path.read_bytes()[:-40])
    return path


@pytest.fixture
def folders(tmp_path):
    """Two animals, two images each."""
    for name in ("cat/1.png", "cat/2.jpg", "dog/1.png", "dog/2.webp"):
        draw(tmp_path / "train" / name, "red" if "cat" in name else "blue")
    draw(tmp_path / "validation/cat/3.png")
    return tmp_path


def facts(folder, **fields):
    data = {"path": str(folder), **fields.pop("data", {})}
    recipe = ImageClassifierRecipe(data=data, **fields)
    return check(recipe, find_splits(recipe, folder))


def table(path, *rows, header=("path", "label")):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return path


# --- where the images are


def test_a_folder_for_each_label_in_a_folder_for_each_split(folders):
    found = facts(folders)
    assert (found.rows, found.labels) == ({"train": 4, "validation": 1}, ("cat", "dog"))
    assert found.formats == {"folders": 5}


def test_labels_may_be_called_as_splits_are_where_there_are_no_splits(tmp_path):
    for name in ("train/1.png", "train/2.png", "test/1.png", "test/2.png"):
        draw(tmp_path / name)
    assert facts(tmp_path).labels == ("test", "train")


def test_a_name_of_an_image_is_no_split(tmp_path):
    for name in ("a/test.png", "a/validation-2.png", "b/eval.png", "b/2.png"):
        draw(tmp_path / name)
    assert facts(tmp_path).rows == {"train": 4}


def test_a_table_names_images_below_its_folder(folders):
    table(folders / "train.csv", ["train/cat/1.png", "a"], ["train/cat/2.jpg", "b"], ["train/dog/1.png", "a"],
          ["train/dog/2.webp", "b"])  # fmt: skip
    found = facts(folders)
    assert (found.rows, found.labels, found.formats) == ({"train": 4}, ("a", "b"), {"table": 4})


def test_columns_are_found_by_usual_names_or_named(folders):
    rows = [[f"train/{name}", name[:3]] for name in ("cat/1.png", "cat/2.jpg", "dog/1.png", "dog/2.webp")]
    assert facts(table(folders / "a.csv", *rows, header=("file_name", "category"))).labels == ("cat", "dog")
    named = {"columns": {"path": "photo", "label": "animal"}}
    assert facts(table(folders / "b.csv", *rows, header=("photo", "animal")), data=named).labels == ("cat", "dog")


def test_an_image_of_a_table_may_have_several_labels(folders):
    path = table(folders / "a.csv", ["train/cat/1.png", "a,b"], ["train/cat/2.jpg", "b,a"], ["train/dog/1.png", ""])
    assert facts(path, classification={"multi_label": True}).labels == ("a", "b")


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (["train/cat/9.png", "a"], ("a.csv:3", "there is no image train/cat/9.png", "start at the table's folder")),
        (["../{}/train/cat/1.png", "a"], ("a.csv:3", "lies outside")),
        (["", "a"], ("a.csv:3", "column 'path' is empty")),
        (["train/cat/1.png", ""], ("a.csv:3", "the label (column 'label') is empty")),
    ],
)
def test_a_row_that_names_no_image_is_told_with_its_line(folders, refuses, row, words):
    (folders / "inner").mkdir()
    outside = row[0].startswith("..")
    where = folders / "inner" if outside else folders
    good = draw(where / "good.png").name
    with refuses(3, *words):
        facts(table(where / "a.csv", [good, "a"], ["../train/cat/1.png" if outside else row[0], row[1]]))


# --- which of them can be read


@pytest.mark.parametrize("name", ["1.png", "2.jpg", "3.gif", "4.tif", "5.webp", "6.bmp"])
def test_an_image_that_ends_too_early_is_told_with_its_path(folders, refuses, name):
    path = draw(folders / "train/cat/more" / name, size=(300, 200))
    assert not fault_of(str(path))
    copy = damage(draw(folders / "train/cat" / f"bad-{name}", size=(300, 200)))
    with refuses(3, str(copy), "repair or remove it", "SET=data.max_unreadable=10"):
        list(reader(ImageClassifierRecipe()).read([copy]))


def test_a_file_that_is_no_image_is_told(folders, refuses):
    path = folders / "train/cat/page.jpg"
    path.write_text("<html>")
    with refuses(3, str(path), "is no image"):
        facts(folders)


def test_what_pillow_would_read_by_starting_a_program_is_no_image(tmp_path, refuses):
    path = tmp_path / "1.png"
    path.write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n")
    with refuses(3, "is no image"):
        open_image(path)


def test_so_many_are_left_out_as_the_recipe_allows_and_named(folders, refuses):
    bad = [damage(draw(folders / f"train/cat/bad-{number}.png")) for number in range(2)]
    found = facts(folders, data={"max_unreadable": 2})
    assert found.rows == {"train": 4, "validation": 1}
    (warning,) = found.warnings
    assert all(str(path) in warning for path in bad)
    assert "2 images cannot be read" in warning
    with refuses(3, str(bad[1]), f"left out before:\n  {bad[0]}"):
        facts(folders, data={"max_unreadable": 1})


def test_a_label_with_one_image_or_one_label_alone_is_refused(folders, refuses):
    draw(folders / "train/owl/1.png")
    with refuses(3, "train/owl/1.png", "'owl' has a single row"):
        facts(folders)
    with refuses(3, "the only label is 'cat'", "make a folder for each label"):
        facts(folders / "train/cat/..", data={"path": str(draw(folders / "one/cat/1.png").parents[1])})


def test_a_label_of_the_validation_images_alone_is_refused(folders, refuses):
    path = draw(folders / "validation/cats/1.png")
    with refuses(3, str(path), "'cats' is not among the labels", "did you mean cat?"):
        facts(folders)


# --- what the hash depends on


def test_the_hash_changes_with_an_image_and_with_its_label(folders):
    draw(folders / "train/cat/4.png")
    before = facts(folders).hash
    (folders / "train/cat/1.png").rename(folders / "train/dog/3.png")
    assert facts(folders).hash != before
    (folders / "train/dog/3.png").rename(folders / "train/cat/1.png")
    assert facts(folders).hash == before
    recipe = ImageClassifierRecipe(data={"path": str(folders)})
    assert hash_splits(recipe, find_splits(recipe, folders)) == before


def test_the_hash_of_a_table_changes_with_its_images(folders):
    rows = [[f"train/{name}", name[:3]] for name in ("cat/1.png", "cat/2.jpg", "dog/1.png", "dog/2.webp")]
    path = table(folders / "a.csv", *rows)
    before = facts(path).hash
    draw(folders / "train/cat/1.png", "green")
    assert facts(path).hash != before


# --- how they are read


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "CMYK", "1", "LA"])
def test_every_kind_of_image_is_read_as_rgb(tmp_path, mode):
    path = tmp_path / ("1.tif" if mode == "CMYK" else "1.png")
    Image.new("RGB", (6, 4), "white").convert(mode).save(path)
    image = open_image(path)
    assert (image.mode, image.size, image.getpixel((2, 2))) == ("RGB", (6, 4), (255, 255, 255))


@given(orientation=st.integers(1, 8), width=st.integers(1, 90), height=st.integers(1, 90))
def test_an_image_is_upright_however_the_camera_was_held(tmp_path_factory, orientation, width, height):
    path = tmp_path_factory.mktemp("exif") / "1.jpg"
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    Image.new("RGB", (width, height)).save(path, exif=exif)
    upright = (height, width) if orientation >= 5 else (width, height)
    assert open_image(path).size == size_of(path) == upright


@pytest.mark.parametrize("orientation", [1, 6])
def test_a_large_jpeg_is_decoded_smaller_but_never_below_what_is_needed(tmp_path, orientation):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    path = draw(tmp_path / "1.jpg", size=(1600, 1200), exif=exif)
    whole = size_of(path)
    for least in ((200, 150), (150, 200), (801, 10), whole):
        assert all(side >= wanted for side, wanted in zip(open_image(path, least).size, least, strict=True))
    assert max(open_image(path, (200, 150)).size) < 500


def test_what_is_asked_about_is_an_image_a_folder_or_a_table(folders):
    cat = folders / "train/cat/1.png"
    assert list(read_images(cat)) == [(str(cat), {"path": "1.png"}, cat)]
    assert [row["path"] for _, row, _ in read_images(folders / "train")] == [
        "cat/1.png", "cat/2.jpg", "dog/1.png", "dog/2.webp",
    ]  # fmt: skip
    path = table(folders / "a.csv", ["train/cat/1.png", "x"])
    assert list(read_images(path)) == [("a.csv:2", {"path": "train/cat/1.png", "label": "x"}, cat)]
    assert isinstance(next(read_images(cat))[2], Path)
