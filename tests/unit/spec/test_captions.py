"""Images with captions: what each folder means, and every fault by the path of its file."""

import shutil

import pytest
from PIL import Image

from trainbox.spec.dataset import check, find_splits, located, reader
from trainbox.spec.recipe.diffusion import CaptionedData, Subset, TextToImageRecipe


@pytest.fixture
def photo(tmp_path):
    """Write an image of its own color below `data`, with a caption where one is given."""
    made = []

    def write(name, caption=None, size=(320, 240)):
        path = tmp_path / "data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        made.append(path)
        Image.new("RGB", size, (len(made) * 7 % 256, len(made), 90)).save(path)
        if caption is not None:
            path.with_suffix(".txt").write_text(caption, encoding="utf-8")
        return path

    return write


@pytest.fixture
def recipe(tmp_path):
    def make(**data):
        small = {"resolution": 256, "min_bucket_reso": 128, "max_bucket_reso": 512, "bucket_reso_steps": 16}
        path = {} if "subsets" in data else {"path": str(tmp_path / "data")}
        return TextToImageRecipe(data=CaptionedData(**{**small, **path, **data}))

    return make


def facts(recipe, tmp_path):
    found = located(recipe, tmp_path)
    return check(found, find_splits(found, tmp_path))


def examples(recipe, tmp_path, split="train"):
    found = located(recipe, tmp_path)
    return [example for _, example in reader(found).read(find_splits(found, tmp_path)[split])]


def told(recipe, tmp_path):
    return [(each["caption"], each["num_repeats"], each["is_reg"]) for each in examples(recipe, tmp_path)]


# --- what folders and captions mean


def test_a_folder_says_repeats_and_the_caption_of_images_without_one(photo, recipe, tmp_path):
    photo("10_sks dog/1.png", "a dog  on\n a beach\n")
    photo("10_sks dog/2.png")
    photo("3_house/1.jpg", "")
    photo("regularization/1_dog/1.png")
    photo("reg/2.png", "another dog")
    photo("validation/1.png", "a dog in bed")
    assert told(recipe(), tmp_path) == [
        ("a dog on a beach", 10, False), ("sks dog", 10, False), ("house", 3, False),
        ("another dog", 1, True), ("dog", 1, True),
    ]  # fmt: skip
    found = facts(recipe(), tmp_path)
    assert found.rows == {"train": 5, "validation": 1}
    assert found.warnings == ()


def test_images_may_lie_straight_in_the_folder(photo, recipe, tmp_path):
    photo("1.png", "one")
    photo("2.webp", "two")
    assert told(recipe(), tmp_path) == [("one", 1, False), ("two", 1, False)]


def test_txt_comes_before_caption_unless_the_ending_is_named_and_a_mark_of_utf_8_is_no_text(photo, recipe, tmp_path):
    image = photo("1.png", "from txt")
    image.with_suffix(".caption").write_bytes("\ufefffrom caption é".encode())
    assert told(recipe(), tmp_path)[0][0] == "from txt"
    assert told(recipe(caption_extension="caption"), tmp_path)[0][0] == "from caption é"
    image.with_suffix(".txt").unlink()
    assert told(recipe(), tmp_path)[0][0] == "from caption é"


def test_the_trigger_word_stands_in_every_caption_but_those_of_the_class(photo, recipe, tmp_path):
    photo("10_dog/1.png", "photo of [trigger], running")
    photo("10_dog/2.png", "ohwx asleep")
    photo("10_dog/3.png")
    photo("reg/4.png", "a dog")
    assert [caption for caption, *_ in told(recipe(trigger_word="ohwx"), tmp_path)] == [
        "photo of ohwx, running", "ohwx asleep", "ohwx, dog", "a dog",
    ]  # fmt: skip


def test_a_trigger_in_a_prefix_is_the_word_and_not_put_in_front_again(photo, recipe, refuses, tmp_path):
    photo("1.png", "one")
    parts = {"caption_prefix": "by [trigger],", "caption_suffix": ", [trigger]"}
    assert told(recipe(trigger_word="ohwx", **parts), tmp_path)[0][0] == "by ohwx, one , ohwx"
    with refuses(3, "1.txt", "no trigger word"):
        facts(recipe(**parts), tmp_path)


def test_the_trigger_word_alone_is_a_caption(photo, recipe, tmp_path):
    photo("1.png")
    assert told(recipe(trigger_word="ohwx", caption_prefix="photo of"), tmp_path)[0][0] == "photo of ohwx"


def test_a_folder_named_like_one_with_repeats_may_be_the_whole(photo, recipe, refuses, tmp_path):
    photo("10_dog/1.png", "one")
    chosen = recipe(path=str(tmp_path / "data/10_dog"))
    assert told(chosen, tmp_path) == [("one", 1, False)]
    photo("10_dog/2.png")
    with refuses(3, "2.png", f"name the folder around it: {tmp_path / 'data'}"):
        facts(chosen, tmp_path)


def test_validation_has_folders_with_class_tokens_too_and_images_of_the_class(photo, recipe, tmp_path):
    photo("1_dog/1.png")
    photo("validation/5_cat/2.png")
    photo("validation/reg/3.png", "a pet")
    found = examples(recipe(), tmp_path, "validation")
    assert [(each["caption"], each["is_reg"]) for each in found] == [("cat", False), ("a pet", True)]


def test_images_of_the_class_may_have_folders_beside_plain_images(photo, recipe, tmp_path):
    photo("1.png", "one")
    photo("reg/2_dog/2.png")
    assert told(recipe(), tmp_path) == [("one", 1, False), ("dog", 2, True)]


def test_a_subset_says_otherwise_than_the_data(photo, recipe, tmp_path):
    photo("a/1.png", "one, two")
    photo("b/1.png")
    subsets = [
        Subset(path="data/a", num_repeats=4, shuffle_caption=False, caption_prefix="x"),
        Subset(path="data/b", class_tokens="cat", is_reg=True),
    ]
    chosen = recipe(subsets=subsets, shuffle_caption=True, keep_tokens=2, caption_prefix="p,", caption_suffix="s")
    found = examples(chosen, tmp_path)
    assert [each["caption"] for each in found] == ["x one, two s", "p, cat s"]
    assert [(each["shuffle_caption"], each["keep_tokens"]) for each in found] == [(False, 2), (True, 2)]
    assert [(each["num_repeats"], each["is_reg"], each["subset"]) for each in found] == [
        (4, False, "a"),
        (1, True, "b"),
    ]


def test_held_out_images_may_lie_elsewhere(photo, recipe, tmp_path):
    photo("1.png", "one")
    photo("../other/2_dog/9.png")
    chosen = recipe(validation_file=str(tmp_path / "other"))
    assert facts(chosen, tmp_path).rows == {"train": 1, "validation": 1}
    assert [each["caption"] for each in examples(chosen, tmp_path, "validation")] == ["dog"]


def test_the_hash_follows_images_captions_and_repeats_but_not_the_place(photo, recipe, tmp_path):
    photo("10_dog/1.png", "one")
    photo("10_dog/2.png")
    first = facts(recipe(), tmp_path).hash
    shutil.move(tmp_path / "data", tmp_path / "moved")
    assert facts(recipe(path=str(tmp_path / "moved")), tmp_path).hash == first
    shutil.move(tmp_path / "moved", tmp_path / "data")
    (tmp_path / "data/10_dog/1.txt").write_text("two")
    second = facts(recipe(), tmp_path).hash
    (tmp_path / "data/10_dog").rename(tmp_path / "data/11_dog")
    assert len({first, second, facts(recipe(), tmp_path).hash}) == 3


# --- faults


def two_names(photo):
    photo("1.jpg", "one")
    return photo("1.png")


def twice(photo):
    first = photo("1.png", "one")
    again = first.with_name("2.png")
    shutil.copy(first, again)
    again.with_suffix(".txt").write_text("two")
    return again


def latin(photo):
    caption = photo("1.png").with_suffix(".txt")
    caption.write_bytes(b"caf\xe9")
    return caption


def latin_with_a_mark(photo):
    caption = photo("1.png").with_suffix(".txt")
    caption.write_bytes(b"\xef\xbb\xbfcaf\xe9")
    return caption


def broken(photo):
    path = photo("1.png", "one")
    path.write_bytes(path.read_bytes()[:60])
    return path


def beside(photo):
    photo("10_dog/1.png")
    return photo("2.png", "two")


FAULTS = {
    "a folder without a number": (lambda photo: photo("sks dog/1.png").parent, "10_sks dog"),
    "a folder with a number alone": (lambda photo: photo("10_/1.png").parent, "rename it: 10_photo"),
    "a class without a number": (lambda photo: photo("reg/dog/1.png").parent, "10_dog"),
    "no repeats at all": (lambda photo: photo("0_dog/1.png").parent, "how often"),
    "a folder too deep": (lambda photo: photo("10_dog/more/1.png").parent, "data/10_more"),
    "a folder with repeats too deep": (lambda photo: photo("all/10_dog/1.png").parent, "data/10_dog"),
    "images beside folders": (beside, "10_dog"),
    "no caption": (lambda photo: photo("1.png"), "has no caption"),
    "a trigger that is not named": (lambda photo: photo("1.png", "a [trigger]").with_suffix(".txt"), "trigger_word"),
    "unreadable": (broken, "cannot be read"),
    "tiny": (lambda photo: photo("1.png", "one", (40, 30)), "40 x 30"),
    "there twice": (twice, "same image as"),
    "two of one name": (two_names, "1.jpg"),
    "not UTF-8": (latin, "byte 4"),
    "not UTF-8, with a mark that it is": (latin_with_a_mark, "byte 7"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_told_with_its_path(fault, photo, recipe, refuses, tmp_path):
    make, words = FAULTS[fault]
    with refuses(3, f"{make(photo)}: ", words, "\n  "):
        facts(recipe(), tmp_path)


def test_images_of_the_class_alone_teach_nothing(photo, recipe, refuses, tmp_path):
    photo("reg/1_dog/1.png")
    with refuses(3, str(tmp_path / "data"), "only regularization images", "\n  add images"):
        facts(recipe(), tmp_path)


def test_images_beside_folders_are_told_wherever_the_data_lie(photo, recipe, refuses, tmp_path):
    photo("reg/x/10_dog/1.png")
    plain = photo("reg/x/2.png", "two")
    with refuses(3, str(plain), "10_dog"):
        facts(recipe(path=str(tmp_path / "data/reg/x")), tmp_path)


@pytest.mark.parametrize("folders", [("a", "a"), ("a", "a/more"), ("a/more", "a")])
def test_an_image_is_of_one_subset(folders, photo, recipe, refuses, tmp_path):
    photo("a/more/1.png", "one")
    subsets = [Subset(path=f"data/{folder}") for folder in folders]
    with refuses(3, "1.png", "lies in the folders of two subsets", "name each folder once"):
        facts(recipe(subsets=subsets), tmp_path)


def test_a_subset_without_captions_needs_class_tokens(photo, recipe, refuses, tmp_path):
    image = photo("a/1.png")
    with refuses(3, str(image), "class_tokens"):
        facts(recipe(subsets=[Subset(path="data/a")]), tmp_path)


def test_the_same_image_is_told_where_it_is_held_out_or_of_the_class(photo, recipe, refuses, tmp_path):
    first = photo("1.png", "one")
    for folder in ("validation", "reg"):
        again = tmp_path / "data" / folder / "2.png"
        again.parent.mkdir()
        shutil.copy(first, again)
        again.with_suffix(".txt").write_text("two")
        with refuses(3, f"{again}: is the same image as {first}"):
            facts(recipe(), tmp_path)
        shutil.rmtree(again.parent)


def test_a_subset_is_one_folder(photo, recipe, refuses, tmp_path):
    photo("a/1.png", "one")
    deeper = photo("a/more/2.png", "two")
    with refuses(3, str(deeper), "subset"):
        facts(recipe(subsets=[Subset(path="data/a")]), tmp_path)


def test_some_may_be_unreadable_where_that_is_allowed(photo, recipe, tmp_path):
    photo("2.png", "two")
    path = broken(photo)
    found = facts(recipe(max_unreadable=1), tmp_path)
    assert found.rows == {"train": 1}
    assert str(path) in found.warnings[0]


def test_what_is_odd_is_a_warning(photo, recipe, tmp_path):
    photo("1.png", "one", (128, 128))
    photo("2.png", "two", (2000, 150))
    for name in ("notes.docx", "3.txt", "1.npz", ".hidden"):
        (tmp_path / "data" / name).write_text("x")
    few, enlarged, cut, stray = facts(recipe(min_images=10), tmp_path).warnings
    assert "2 training images: 10 at least" in few
    assert "1 images are smaller" in enlarged
    assert "1 images are of a shape that no bucket has" in cut
    assert "2 files are neither" in stray
    assert ("notes.docx" in stray, "3.txt" in stray, "npz" in stray) == (True, True, False)
