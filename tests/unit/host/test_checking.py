import json

import pytest
from PIL import Image

from trainbox.errors import ConfigError, DataError
from trainbox.host import checking
from trainbox.host.pipeline import recipe_names
from trainbox.spec.load import Choices


@pytest.fixture(autouse=True)
def apart(tmp_path, monkeypatch):
    monkeypatch.setenv("TRAINBOX_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", recipe_names())
def test_every_recipe_tells_what_its_sample_holds(name, capsys, tmp_path):
    checking.check(Choices(name), None)
    told = capsys.readouterr().out
    assert ("files " if name.startswith("custom-") else "train ") in told
    assert "sha256" in told
    assert (tmp_path / checking.SHEET).exists() == (name == "image-classifier" or "chelsea cat" in told)


def test_labels_are_counted_by_split(capsys, tmp_path):
    rows = [{"text": "x", "label": label} for label in "aabbbbbbbb"]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    checking.check(Choices("text-classifier", data="rows.jsonl"), None)
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["label", "train"] in lines
    assert ["a", "2"] in lines
    assert ["b", "8"] in lines


def test_the_sheet_shows_each_image_in_its_colour_above_its_label(tmp_path):
    for number, color in enumerate(("red", "lime", "blue", "red")):
        path = tmp_path / "photos" / f"label-{number % 2}-{'long' * 20}" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (300, 200), color).save(path)
    checking.check(
        Choices("image-classifier", data="photos", set=("data.validation_split=0.5",)), tmp_path / "sheet.png"
    )
    sheet = Image.open(tmp_path / "sheet.png")
    half = checking.THUMBNAIL // 2
    shown = [sheet.getpixel((number * checking.THUMBNAIL + half, half)) for number in range(4)]
    assert shown == [(255, 0, 0), (0, 0, 255), (0, 255, 0), (255, 0, 0)]
    caption = sheet.crop((0, checking.THUMBNAIL, checking.THUMBNAIL, sheet.height)).convert("L")
    assert caption.getextrema() == (0, 255)
    assert sheet.crop((checking.THUMBNAIL - 2, checking.THUMBNAIL, checking.THUMBNAIL, sheet.height)).getextrema() == (
        ((255, 255),) * 3
    )


def test_bad_data_and_a_taken_name_are_refused(tmp_path):
    (tmp_path / "taken.png").write_bytes(b"")
    with pytest.raises(ConfigError, match=r"new name that ends in \.png"):
        checking.check(Choices("image-classifier"), tmp_path / "taken.png")
    (tmp_path / "photos/a").mkdir(parents=True)
    (tmp_path / "photos/a/1.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"photos/a/1\.png: is no image"):
        checking.check(Choices("image-classifier", data="photos"), None)
