"""The tile plan as a property: every row reads every position it sees exactly once, from the right page."""

from __future__ import annotations

from collections import Counter

import numpy as np
from batchllm_kernels.tile_plan import LARGE, SMALL, TILE_COLUMNS, KvReads, TilePlan, TileShape, plan_tiles
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernels.tree_worlds import TreeWorld, make_world

PAGE = 16

SHAPES = {
    "four heads": TileShape(PAGE, 16, 64, heads_per_row=4, head_programs=2),
    "seven heads": TileShape(PAGE, 16, 64, heads_per_row=7, head_programs=1),
    "one head": TileShape(PAGE, 16, 64, heads_per_row=1, head_programs=8),
    "no small tiles": TileShape(PAGE, 16, 64, heads_per_row=20, head_programs=1),
}

trees = st.builds(
    lambda seed, nodes, longest: make_world(
        np.random.default_rng(seed), PAGE, num_nodes=nodes, longest=longest
    ),
    st.integers(0, 2**32),
    st.integers(1, 12),
    st.sampled_from([5, 40, 120]),
)


@given(
    world=trees,
    shape=st.sampled_from(list(SHAPES.values())),
    window=st.sampled_from([None, 1, 13, 64]),
    resident=st.sampled_from([1, 8, 264]),
    least_split=st.sampled_from([16, 48, 512]),
)
@settings(deadline=None, max_examples=120)
def test_every_row_reads_every_position_it_sees_exactly_once(world, shape, window, resident, least_split):
    plan = plan_tiles(world.reads, shape, window=window, resident_programs=resident, least_split=least_split)
    check_coverage(world, plan, window, 0)
    check_tiles(world, plan, shape, window, 0)
    check_slots(plan, len(world.reads.positions))


@given(
    seed=st.integers(0, 2**32),
    horizon=st.integers(1, 20),
    window=st.sampled_from([None, 13, 64]),
    shape=st.sampled_from(list(SHAPES.values())),
)
@settings(deadline=None, max_examples=60)
def test_a_plan_made_ahead_serves_every_step_up_to_its_horizon(seed, horizon, window, shape):
    world = make_world(np.random.default_rng(seed), PAGE, spare=horizon, decode_only=True)
    plan = plan_tiles(world.reads, shape, window=window, horizon=horizon)
    for ahead in (0, 1, horizon):
        check_coverage(world, plan, window, ahead)
        check_tiles(world, plan, shape, window, ahead, horizon)


def check_coverage(world: TreeWorld, plan: TilePlan, window: int | None, ahead: int) -> None:
    """Positions are those of the plan plus `ahead`."""
    reads, page_of = world.reads, {}
    for index, (start, length) in enumerate(zip(reads.start.tolist(), reads.length.tolist())):
        pages = reads.pages[reads.page_ptr[index] : reads.page_ptr[index + 1]]
        for row in reads.rows[reads.row_ptr[index] : reads.row_ptr[index + 1]].tolist():
            page_of.update({(row, start + token): pages[token // PAGE] for token in range(length)})
    read: Counter[tuple[int, int]] = Counter()
    for tile in plan.tiles:
        for row in rows_of(plan, tile):
            position = int(reads.positions[row]) + ahead
            first = 0 if window is None else position - window + 1
            for entry in range(tile[2], tile[4]):
                begin = int(plan.entry_positions[entry])
                for seen in range(max(begin, first), min(begin + int(plan.entry_fills[entry]), position + 1)):
                    assert page_of[row, seen] == plan.entry_pages[entry]
                    read[row, seen] += 1
    expected = {
        (row, seen)
        for row, start in enumerate(reads.positions.tolist())
        for seen in range(0 if window is None else max(0, start + ahead - window + 1), start + ahead + 1)
    }
    assert set(read) == expected
    assert set(read.values()) == {1}


def check_tiles(
    world: TreeWorld, plan: TilePlan, shape: TileShape, window: int | None, ahead: int, horizon: int = 0
) -> None:
    """Tiles are no larger than their kind, read no page in vain, and leave unmasked only what needs no mask."""
    assert plan.tiles.shape[1] == TILE_COLUMNS
    for tile in plan.tiles:
        _, count, first, first_masked, end, kind = tile[:6]
        assert first <= first_masked <= end and first < end
        limit = shape.small_tokens if kind == SMALL else shape.large_tokens
        assert 1 <= count <= limit
        assert kind in (SMALL, LARGE) and (kind == SMALL) == (count <= shape.small_tokens)
        rows = rows_of(plan, tile)
        assert len(set(rows)) == count
        lowest = min(int(world.reads.positions[row]) for row in rows)
        highest = max(int(world.reads.positions[row]) for row in rows)
        for entry in range(first, end):
            begin, fill = int(plan.entry_positions[entry]), int(plan.entry_fills[entry])
            assert 1 <= fill <= PAGE
            assert begin <= highest + horizon, "a page that no row sees"
            if window is not None:
                assert begin + fill - 1 > lowest - window, "a page that no row sees any more"
            if entry < first_masked:
                assert fill == PAGE and begin + PAGE - 1 <= lowest + ahead
                assert window is None or begin > highest + ahead - window


def check_slots(plan: TilePlan, num_rows: int) -> None:
    """Rows in one tile write their result; others own a run of slots, one for each of their tiles."""
    parts = Counter(plan.tile_rows.tolist())
    assert set(parts) == set(range(num_rows))
    assert plan.merge_rows.tolist() == [row for row in range(num_rows) if parts[row] > 1]
    slots_of: dict[int, list[int]] = {row: [] for row in range(num_rows)}
    for row, slot in zip(plan.tile_rows.tolist(), plan.tile_slots.tolist()):
        slots_of[row].append(slot)
    for row, begin, end in zip(plan.merge_rows, plan.merge_ptr[:-1], plan.merge_ptr[1:]):
        assert sorted(slots_of.pop(int(row))) == list(range(begin, end))
    assert all(slots == [-1] for slots in slots_of.values())
    assert plan.num_slots == plan.merge_ptr[-1] == sum(count for count in parts.values() if count > 1)


def rows_of(plan: TilePlan, tile: np.ndarray) -> list[int]:
    return plan.tile_rows[tile[0] : tile[0] + tile[1]].tolist()


# ---- sizes of tiles


def one_node(readers: int, shared: int, own: int) -> KvReads:
    """One shared node above `readers` decode rows."""
    length = np.array([shared, *[own] * readers])
    pages = -(-length // PAGE)
    return KvReads(
        positions=np.full(readers, shared + own - 1),
        start=np.array([0, *[shared] * readers]),
        length=length,
        page_ptr=np.cumsum([0, *pages]),
        pages=np.arange(pages.sum()),
        row_ptr=np.cumsum([0, readers, *[1] * readers]),
        rows=np.concatenate([np.arange(readers), np.arange(readers)]),
    )


def test_a_shared_node_is_read_once_for_all_rows_that_fit_a_tile():
    plan = plan_tiles(one_node(16, 320, 40), SHAPES["four heads"])
    large = plan.tiles[plan.tiles[:, 5] == LARGE]
    assert len(large) == 1 and large[0, 1] == 16
    assert large[0, 4] - large[0, 2] == 20, "all pages of the node"
    assert large[0, 3] == large[0, 4], "none of them masked"
    assert len(plan.tiles) == 17 and plan.num_slots == 32


def test_a_node_with_one_reader_is_read_together_with_the_readers_own_pages():
    plan = plan_tiles(one_node(1, 320, 40), SHAPES["four heads"])
    assert len(plan.tiles) == 1 and plan.num_slots == 0
    assert plan.tile_slots.tolist() == [-1]


def test_long_reads_are_split_into_equal_pieces_when_the_device_would_idle():
    whole = plan_tiles(one_node(8, 4000, 16), SHAPES["four heads"], resident_programs=1)
    assert (whole.tiles[:, 5] == LARGE).sum() == 1
    split = plan_tiles(one_node(8, 4000, 16), SHAPES["four heads"], resident_programs=264)
    pieces = split.tiles[split.tiles[:, 5] == LARGE]
    lengths = (pieces[:, 4] - pieces[:, 2]) * PAGE
    assert len(pieces) == 8 and lengths.sum() == 4000
    assert lengths.max() <= 512 and lengths.max() - lengths.min() <= PAGE


def test_the_longest_tiles_start_first_and_kinds_alternate():
    random = np.random.default_rng(3)
    world = make_world(random, PAGE, num_nodes=60, longest=200, decode_only=True)
    tiles = plan_tiles(world.reads, SHAPES["four heads"]).tiles
    for kind in (SMALL, LARGE):
        costs = tiles[tiles[:, 5] == kind, 6]
        assert len(costs) > 3 and np.all(np.diff(costs) <= 0)
    places = np.flatnonzero(tiles[:, 5] == LARGE)
    expected = len(tiles) / len(places)
    assert np.diff(places).max() <= 2 * expected, "large tiles are spread over the launch"
