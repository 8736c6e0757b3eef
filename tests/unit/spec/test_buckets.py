"""Buckets: whatever an image's size, its bucket keeps its bounds and little of it is cut off."""

import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from trainbox.spec.buckets import buckets, enlargement, place
from trainbox.spec.recipe.diffusion import CaptionedData

SIDES = st.integers(1, 20_000)
GRIDS = st.sampled_from([
    CaptionedData(),
    CaptionedData(resolution=512, max_bucket_reso=1024),
    CaptionedData(resolution=768, bucket_reso_steps=32),
    CaptionedData(resolution=128, min_bucket_reso=64, max_bucket_reso=256, bucket_reso_steps=16),
    CaptionedData(resolution=512, min_bucket_reso=200, max_bucket_reso=1000),
    CaptionedData(resolution=256, min_bucket_reso=256, max_bucket_reso=256),
])  # fmt: skip


@given(SIDES, SIDES, GRIDS)
def test_sides_and_area_of_a_bucket_keep_their_bounds(width, height, data):
    found, step = place((width, height), data.resolution, data), data.bucket_reso_steps
    longest = data.max_bucket_reso // step * step
    for side in (found.width, found.height):
        assert side % step == 0
        assert data.min_bucket_reso <= side <= longest
    area, whole = found.width * found.height, data.resolution**2
    assert area <= whole
    # The other side was rounded down by less than a step, unless it is as long as it may be.
    longer = max(found.width, found.height)
    assert area > whole - step * longer or longer == longest


@given(SIDES, SIDES, GRIDS)
def test_the_scaled_image_covers_its_bucket_and_the_rest_is_cut_from_below_rather_than_above(width, height, data):
    found = place((width, height), data.resolution, data)
    right, below = found.scaled_width - found.width - found.left, found.scaled_height - found.height - found.top
    assert min(found.left, found.top, right, below) >= 0
    assert abs(right - found.left) <= 1
    assert found.top <= below / 3
    assert 0 <= found.cut < 1


@given(SIDES, SIDES, GRIDS)
def test_no_bucket_has_a_nearer_ratio_and_only_the_difference_is_cut_off(width, height, data):
    found = place((width, height), data.resolution, data)
    known = buckets(data.resolution, data.min_bucket_reso, data.max_bucket_reso, data.bucket_reso_steps)
    away = {size: abs(math.log(size[0] / size[1] * height / width)) for size in known}
    assert away[found.width, found.height] == pytest.approx(min(away.values()))
    rounding = 1 / min(found.scaled_width, found.scaled_height)
    assert found.cut <= 1 - math.exp(-min(away.values())) + rounding


@given(SIDES, SIDES, GRIDS)
def test_no_more_than_half_the_distance_of_two_buckets_is_cut_off_of_a_ratio_between_them(width, height, data):
    known = buckets(data.resolution, data.min_bucket_reso, data.max_bucket_reso, data.bucket_reso_steps)
    assume(min(w / h for w, h in known) <= width / height <= max(w / h for w, h in known))
    # Of two neighbours, w and w + step wide, the heights are at most area / w and more than area / (w + step) - step.
    # So their ratios differ by less than a factor of (1 + step / w)^2 / (1 - step / resolution), most for the least w;
    # the nearer one is at most the root of that away, and no more than this is cut off.
    step, least = data.bucket_reso_steps, min(w for w, _ in known)
    away = (1 + step / least) / math.sqrt(1 - step / data.resolution)
    found = place((width, height), data.resolution, data)
    assert found.cut <= 1 - 1 / away + 1 / min(found.scaled_width, found.scaled_height)


@given(st.floats(-math.log(4), math.log(4)))
def test_a_tenth_at_most_is_cut_off_of_any_photo_up_to_four_times_as_wide_as_high(ratio):
    size = round(4000 * math.exp(ratio / 2)), round(4000 * math.exp(-ratio / 2))
    assert place(size, 1024, CaptionedData()).cut < 0.1


@given(SIDES, SIDES, GRIDS)
def test_without_buckets_all_are_squares(width, height, data):
    data = data.model_copy(update={"enable_bucket": False})
    found = place((width, height), data.resolution, data)
    assert (found.width, found.height) == (data.resolution, data.resolution)
    assert min(found.scaled_width, found.scaled_height) == data.resolution


def test_a_size_of_a_bucket_stays_as_it_is():
    found = place((832, 1216), 1024, CaptionedData())
    assert (found.bucket, found.cut, enlargement((832, 1216), found)) == ("832x1216", 0, 1)
    assert enlargement((416, 608), place((416, 608), 1024, CaptionedData())) == 2
