"""How the CUDA extension chooses to carry out a call: it fits the GPU, covers the image, and is what is documented."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.support import emulated

ROOT = Path(__file__).resolve().parents[2]
ASSOCIATE, WEIGHTED, PRODUCTS, DIFFERENTIATE = range(4)
H100 = (132, 232448)  # multiprocessors, bytes of shared memory that a block can have


def plan(
    shape: tuple[int, int, int, int], tile: tuple[int, int], map_: int = ASSOCIATE, size: int = 2,
    limits: tuple[int, int] = H100,
) -> dict[str, Any]:  # fmt: skip
    return emulated.extension().plan(map_, map_ == ASSOCIATE, map_ == DIFFERENTIATE, *shape, *tile, size, *limits)


def documented() -> list[tuple[str, ...]]:
    text = (ROOT / "docs" / "kernels.md").read_text().split("<!-- plan:begin")[1].split("<!-- plan:end")[0]
    row = re.compile(
        r"\| C = (\d+), (\d+) x \2, (\d+) x \3"
        r" \| (one|two) pass(?:es)?, groups of (\d+) tiles, (\d+) ahead \| (\d+) KiB"
        r" \| groups of (\d+), (\d+) ahead \| (\d+) KiB \|"
    )
    rows = row.findall(text)
    assert len(rows) == text.count("\n| C = ") == 8
    return rows


@pytest.mark.parametrize("row", documented(), ids="-".join)
def test_the_documented_plans_are_those_taken(row: tuple[str, ...]) -> None:
    channels, tile, side = map(int, row[:3])
    passes, (group, ahead, kib, group_back, ahead_back, kib_back) = {"one": 1, "two": 2}[row[3]], map(int, row[4:])
    shape = (128, channels, side, side)
    forward, backward = (plan(shape, (tile, tile), map_) for map_ in (ASSOCIATE, WEIGHTED))
    assert (forward["pools"], forward["reads"], backward["reads"]) == (passes == 1, passes, 1)
    assert (forward["rows"], forward["columns"]) == (side // tile, side // tile)
    assert (forward["group"], forward["ahead"], round(forward["shared_bytes"] / 1024)) == (group, ahead, kib)
    assert (backward["group"], backward["ahead"], round(backward["shared_bytes"] / 1024)) == (
        group_back, ahead_back, kib_back,
    )  # fmt: skip


def test_the_documented_plans_of_float32_are_those_taken() -> None:
    text = " ".join((ROOT / "docs" / "kernels.md").read_text().split())  # however its lines break
    found = re.search(r"takes groups of one tile and (\d+) KiB, .{0,40} groups of four tiles and (\d+) KiB", text)
    assert found
    for shape, tile, group, kib in (
        ((128, 64, 56, 56), (8, 8), 1, found[1]),
        ((128, 128, 28, 28), (4, 4), 4, found[2]),
    ):
        taken = plan(shape, tile, size=4)
        assert taken["pools"] and taken["reads"] == 1 and taken["ahead"] == 2
        assert (taken["group"], round(taken["shared_bytes"] / 1024)) == (group, int(kib))


@given(
    shape=st.tuples(*(st.integers(1, n) for n in (300, 80, 400, 400))).map(lambda s: (s[0], 8 * s[1], *s[2:])),
    size=st.sampled_from([2, 4]),
    tile=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    map_=st.integers(0, 3),
    limits=st.tuples(st.integers(1, 200), st.sampled_from([49152, 101376, 166912, 232448])),
)
def test_plans_fit_and_cover_the_image(
    shape: tuple[int, int, int, int], size: int, tile: tuple[int, int], map_: int, limits: tuple[int, int]
) -> None:
    found = plan(shape, tile, map_, size, limits)
    if not found["fits"]:
        return
    batch, channels, height, width = shape
    grid = -(-height // tile[0]), -(-width // tile[1])
    down, across = -(-grid[0] // found["rows"]), -(-grid[1] // found["columns"])
    assert found["regions"] == batch * down * across
    assert found["shared_bytes"] <= limits[1] and channels <= 384 and tile[0] * tile[1] <= 1024
    once = down * across == 1 and (found["pools"] or map_ != ASSOCIATE)
    assert found["reads"] >= 1 and (found["reads"] == 1) == once
    assert 1 <= found["ahead"] <= 3 and found["stages"] > found["ahead"] * found["group"]
    assert not found["pools"] or (map_ == ASSOCIATE and found["columns"] == grid[1])


@pytest.mark.parametrize(
    ("shape", "tile", "size"),
    [
        ((1, 64, 8, 8), (4, 4), 8),
        ((1, 90, 8, 8), (4, 4), 4),
        ((1, 388, 8, 8), (4, 4), 4),
        ((1, 90, 8, 8), (4, 4), 2),
        ((1, 392, 8, 8), (4, 4), 2),
        ((1, 64, 64, 64), (64, 32), 2),
    ],
    ids=[
        "float64",
        "float32, 90 channels",
        "float32, 388 channels",
        "90 channels",
        "392 channels",
        "a tile of 2048 pixels",
    ],
)
def test_what_the_walk_leaves_to_the_general_kernels(
    shape: tuple[int, int, int, int], tile: tuple[int, int], size: int
) -> None:
    assert not plan(shape, tile, size=size)["fits"]
    assert plan((1, 64, 8, 8), (4, 4))["fits"] and plan((1, 60, 8, 8), (4, 4), size=4)["fits"]


def test_rows_that_do_not_fit_take_two_passes() -> None:
    narrow, wide = (plan((128, 64, 56, width), (8, 8)) for width in (56, 560))
    assert narrow["pools"] and narrow["reads"] == 1
    assert wide["fits"] and not wide["pools"] and wide["reads"] >= 2


def test_few_images_are_split() -> None:
    assert plan((132, 64, 56, 56), (8, 8))["regions"] == 132
    few = plan((33, 64, 56, 56), (8, 8))
    assert few["regions"] >= 2 * 33 and few["reads"] > 1
