"""Load schedules: nothing is used before it is there, the buffer never overflows, nothing could begin earlier."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchllm.planner.load_ahead import BufferTooSmall, ChunkUses, LoadSchedule, plan_loads, preload_depth


def make_uses(steps: list[list[int]], layer_bytes: np.ndarray, loaded: list[bool] | None = None) -> ChunkUses:
    chunk = np.array([chunk for chunks in steps for chunk in chunks], dtype=np.int64)
    ptr = np.append(0, np.cumsum([len(chunks) for chunks in steps])).astype(np.int64)
    must_load = np.ones(len(chunk), bool) if loaded is None else np.array(loaded[: len(chunk)], bool)
    return ChunkUses(ptr, chunk, must_load, np.full(len(chunk), 10.0), layer_bytes)


@st.composite
def worlds(draw: st.DrawFn) -> tuple[ChunkUses, np.ndarray, int]:
    layers = draw(st.integers(1, 4))
    sizes = draw(st.lists(st.integers(1, 20), min_size=3 * layers, max_size=3 * layers))
    steps = draw(st.lists(st.lists(st.integers(0, 2), max_size=3), min_size=1, max_size=5))
    loaded = draw(st.lists(st.booleans(), min_size=15, max_size=15))
    seconds = draw(st.lists(st.integers(0, 5), min_size=len(steps) * layers, max_size=len(steps) * layers))
    uses = make_uses(steps, np.array(sizes).reshape(3, layers), loaded)
    return uses, np.array(seconds, dtype=float).reshape(len(steps), layers), draw(st.integers(20, 200))


@settings(max_examples=200, deadline=None)
@given(worlds())
def test_schedules_keep_what_they_promise(world: tuple[ChunkUses, np.ndarray, int]):
    uses, seconds, buffer = world
    needed = needed_by_stage(uses)
    if max((sum(loads.values()) for loads in needed), default=0) > buffer:
        with pytest.raises(BufferTooSmall, match="the buffer holds"):
            plan_loads(uses, seconds, buffer)
        return
    schedule = plan_loads(uses, seconds, buffer)
    assert_all_loaded_in_order(schedule, uses)
    assert_nothing_early_or_late(schedule)
    assert_fits(schedule, buffer)
    assert schedule.seconds >= seconds.sum() - 1e-9
    assert schedule.stall_seconds == pytest.approx(schedule.seconds - seconds.sum())
    wide = plan_loads(uses, seconds, 10_000)
    assert wide.seconds <= schedule.seconds + 1e-9
    assert (wide.after == -1).all()


def needed_by_stage(uses: ChunkUses) -> list[dict[int, int]]:
    """By stage: use → bytes."""
    needed: list[dict[int, int]] = []
    for step in range(uses.num_steps):
        for layer in range(uses.num_layers):
            own = range(uses.ptr[step], uses.ptr[step + 1])
            needed.append(
                {use: int(uses.layer_bytes[uses.chunk[use], layer]) for use in own if uses.must_load[use]}
            )
    return needed


def assert_all_loaded_in_order(schedule: LoadSchedule, uses: ChunkUses) -> None:
    assert (np.diff(schedule.stage) >= 0).all()
    for stage, loads in enumerate(needed_by_stage(uses)):
        mine = schedule.stage == stage
        assert sorted(schedule.bytes[mine].tolist()) == sorted(loads.values())
        assert sorted(schedule.chunk[mine].tolist()) == sorted(int(uses.chunk[use]) for use in loads)
    for load in range(len(schedule.stage)):
        assert schedule.step(load) * uses.num_layers + schedule.layer(load) == schedule.stage[load]


def assert_nothing_early_or_late(schedule: LoadSchedule) -> None:
    end = 0.0
    for load, begin in enumerate(schedule.begin):
        room = schedule.compute_end[schedule.after[load]] if schedule.after[load] >= 0 else 0.0
        assert begin == max(end, room)
        end = schedule.end[load]
        assert end == pytest.approx(begin + schedule.bytes[load] / 10)
        assert schedule.compute_begin[schedule.stage[load]] >= end - 1e-9
    before = np.append(0.0, schedule.compute_end[:-1])
    for stage, begin in enumerate(schedule.compute_begin):
        mine = schedule.end[schedule.stage == stage]
        assert begin == pytest.approx(max([before[stage], *mine]))


def assert_fits(schedule: LoadSchedule, buffer: int) -> None:
    """At every begin of a load: what was issued and whose stage has not been computed."""
    for load, begin in enumerate(schedule.begin):
        held = [
            int(schedule.bytes[other])
            for other in range(load + 1)
            if schedule.compute_end[schedule.stage[other]] > begin or other == load
        ]
        # A stage without work ends when it begins; what it needed may still count at that very moment.
        by_order = schedule.bytes[: load + 1][schedule.stage[: load + 1] > schedule.after[load]].sum()
        assert min(sum(held), int(by_order)) <= buffer
        assert by_order <= buffer


@pytest.mark.parametrize(
    ("layers", "load", "compute"), [(8, 16.0, 4.0), (32, 3.0, 2.9), (5, 1.0, 2.0), (1, 4.0, 1.0)]
)
def test_the_preload_depth_is_the_least_that_never_waits(layers: int, load: float, compute: float):
    depth = preload_depth(layers, load, compute)

    def waits(preloaded: int) -> bool:
        """Whether a layer is waited for when computing starts once so many layers are there."""
        start = preloaded * load / layers
        return any((layer + 1) * load > start * layers + layer * compute + 1e-9 for layer in range(layers))

    assert not waits(depth)
    assert depth == 1 or waits(depth - 1)
    assert preload_depth(layers, 0.0, compute) == 0


def test_loading_hides_behind_computing():
    """Two steps of three layers; loads of the second run while the first is computed."""
    uses = make_uses([[0], [1]], np.full((2, 3), 10))
    seconds = np.full((2, 3), 2.0)
    schedule = plan_loads(uses, seconds, 1000)
    assert schedule.stall_seconds == 1.0  # for the first layer of all
    tight = plan_loads(uses, seconds, 10)  # one layer at a time
    assert tight.after.tolist() == [-1, 0, 1, 2, 3, 4]
    assert tight.stall_seconds == 6.0
    assert plan_loads(uses, seconds, 1000, latency=0.5).stall_seconds == 1.5
    nothing = plan_loads(make_uses([[], []], np.full((2, 3), 10)), seconds, 10)
    assert nothing.stall_seconds == 0.0 and nothing.seconds == 12.0
