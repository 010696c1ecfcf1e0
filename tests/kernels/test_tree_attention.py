"""Tree attention on random trees against dense attention in float64, for every feature of the kernels."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from batchllm_kernels.attention import AttentionOptions, Parts, tree_attention
from batchllm_kernels.device_plan import DevicePlan, PlanCapacity
from batchllm_kernels.merge import merge_parts
from batchllm_kernels.reference import reference_attention, reference_merge
from batchllm_kernels.tile_config import TileConfig
from batchllm_kernels.tile_plan import LARGE, SMALL, TilePlan, plan_tiles
from torch import Tensor

from tests.kernels.tree_worlds import TreeWorld, dense_attention, make_world

NAN = float("nan")
SCALE = 0.3


@dataclass(frozen=True)
class Case:
    kv_heads: int = 2
    group: int = 2
    dim: int = 16
    value_dim: int = 16
    page: int = 16
    large_rows: int = 32
    group_splits: int = 1
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False
    scales: bool = False
    dtype: torch.dtype = torch.float32
    kv_dtype: torch.dtype | None = None
    layout: str = "page, head, token"  # order of the pool's dimensions in memory
    descriptors: bool = False
    resident: int = 264
    least_split: int = 512
    longest: int = 40

    @property
    def config(self) -> TileConfig:
        return TileConfig(self.page, 16, self.large_rows, self.group_splits, 4, 2, self.descriptors)


CASES = {
    "plain": Case(),
    "one head a group": Case(group=1, kv_heads=3),
    "three heads": Case(group=3),
    "seven heads": Case(group=7, large_rows=64),
    "more heads than a small tile": Case(group=20, kv_heads=1),
    "more heads than a large tile": Case(group=37, kv_heads=1, group_splits=2, longest=20),
    "tiles of one size": Case(group=7, large_rows=16),
    "tiles of one size, more heads than fit": Case(
        group=20, kv_heads=1, large_rows=16, group_splits=2, longest=20
    ),
    "window": Case(window=11),
    "window of one": Case(window=1),
    "soft cap": Case(softcap=3.0),
    "sinks": Case(sinks=True),
    "sinks in a window, parts": Case(sinks=True, window=25, resident=9999, least_split=16),
    "many parts": Case(resident=9999, least_split=16, longest=100),
    "head dim 8": Case(dim=8, value_dim=8),
    "head dim 4, wider values": Case(dim=4, value_dim=24),
    "head dim 80": Case(dim=80, value_dim=80, kv_heads=1),
    "head dim 96": Case(dim=96, value_dim=96, kv_heads=1),
    "head dim 128": Case(dim=128, value_dim=128, kv_heads=1),
    "head dim 256, page 32": Case(dim=256, value_dim=256, kv_heads=1, page=32),
    "narrow values": Case(dim=24, value_dim=16, group=1),
    "wide values": Case(dim=16, value_dim=40),
    "page 64": Case(page=64, longest=90),
    "float16": Case(dtype=torch.float16, resident=9999, least_split=16),
    "bfloat16": Case(dtype=torch.bfloat16, resident=9999, least_split=16),
    "float8 keys": Case(dtype=torch.float16, kv_dtype=torch.float8_e4m3fn, scales=True),
    "tokens before heads": Case(layout="page, token, head"),
    "heads before pages": Case(layout="head, page, token"),
    "descriptors": Case(descriptors=True),
    "descriptors, tokens before heads": Case(descriptors=True, layout="page, token, head"),
    "descriptors, head dim 8": Case(descriptors=True, dim=8, value_dim=8),
    "descriptors, head dim 80": Case(descriptors=True, dim=80, value_dim=80, kv_heads=2),
    "descriptors, head dim 80, tokens before heads": Case(
        descriptors=True, dim=80, value_dim=80, layout="page, token, head"
    ),
    "descriptors, all at once": Case(
        descriptors=True, group=3, window=30, softcap=5.0, sinks=True, resident=9999, least_split=32, page=32
    ),
}
# Relative error of the whole result. The interpreter rounds bfloat16 towards zero.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@dataclass
class Inputs:
    world: TreeWorld
    query: Tensor
    keys: Tensor
    values: Tensor
    positions: Tensor
    sinks: Tensor | None
    scales: tuple[Tensor, Tensor] | None


def make_inputs(case: Case, seed: int, device: torch.device, world: TreeWorld | None = None) -> Inputs:
    """Slots that nobody may read hold NaN."""
    world = world or make_world(np.random.default_rng(seed), case.page, longest=case.longest)
    generator = torch.Generator().manual_seed(seed)
    rows, heads = len(world.reads.positions), case.kv_heads * case.group
    query = torch.randn(heads, rows, case.dim, generator=generator).to(case.dtype).transpose(0, 1)
    unused = ~world.written()
    pools = []
    for dim in (case.dim, case.value_dim):
        dense = torch.randn(world.num_pages, case.kv_heads, case.page, dim, generator=generator)
        dense.transpose(1, 2)[unused] = NAN
        pools.append(laid_out(dense.to(case.kv_dtype or case.dtype), case.layout).to(device))
    sinks = torch.randn(heads, generator=generator).to(device) if case.sinks else None
    scales = torch.rand(2, case.kv_heads, generator=generator).to(device) + 0.5
    positions = torch.from_numpy(world.reads.positions).int().to(device)
    kept = (scales[0], scales[1]) if case.scales else None
    return Inputs(world, query.to(device), pools[0], pools[1], positions, sinks, kept)


def laid_out(pool: Tensor, layout: str) -> Tensor:
    """The same pool with another order of dimensions in memory."""
    if layout == "page, token, head":
        return pool.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "head, page, token":
        return pool.transpose(0, 1).contiguous().transpose(0, 1)
    return pool


def plan_of(case: Case, world: TreeWorld, horizon: int = 0) -> TilePlan:
    return plan_tiles(
        world.reads,
        case.config.tile_shape(case.kv_heads * case.group, case.kv_heads),
        window=case.window,
        horizon=horizon,
        resident_programs=case.resident,
        least_split=case.least_split,
    )


def run(case: Case, inputs: Inputs, plan: DevicePlan) -> tuple[Tensor, Parts]:
    """The result, and the parts left in memory that held NaN before."""
    heads = case.kv_heads * case.group
    parts = Parts.empty(plan.capacity.slots, heads, case.value_dim, inputs.query)
    parts.output.fill_(NAN)
    parts.lse.fill_(NAN)
    options = AttentionOptions(SCALE, case.window, case.softcap)
    output = tree_attention(
        inputs.query,
        inputs.keys,
        inputs.values,
        inputs.positions,
        plan,
        case.config,
        options,
        inputs.sinks,
        inputs.scales,
        parts,
    )
    return output, parts


def relative_error(ours: Tensor, expected: Tensor) -> float:
    return float((ours.cpu().double() - expected).norm() / expected.norm())


def oracle(case: Case, inputs: Inputs) -> Tensor:
    sinks = None if inputs.sinks is None else inputs.sinks.cpu()
    keys, values = inputs.keys.cpu(), inputs.values.cpu()
    if inputs.scales:
        keys, values = (
            pool.double() * scale.cpu().double()[None, :, None, None]
            for pool, scale in zip((keys, values), inputs.scales)
        )
    return dense_attention(
        inputs.world,
        inputs.query.cpu(),
        keys,
        values,
        scale=SCALE,
        window=case.window,
        softcap=case.softcap,
        sinks=sinks,
    )


@pytest.mark.parametrize("name", CASES)
def test_tree_attention_equals_dense_attention(name: str, device: torch.device) -> None:
    case = CASES[name]
    inputs = make_inputs(case, seed=list(CASES).index(name), device=device)
    ours, _ = run(case, inputs, DevicePlan.of(plan_of(case, inputs.world), device))
    assert ours.dtype == case.dtype
    assert relative_error(ours, oracle(case, inputs)) < TOLERANCE[case.dtype]


def test_the_cases_make_tiles_of_both_kinds_masks_parts_and_whole_results() -> None:
    kinds, unmasked, masked, parts, whole = set(), 0, 0, 0, 0
    for seed, name in enumerate(CASES):
        case = CASES[name]
        plan = plan_of(case, make_world(np.random.default_rng(seed), case.page, longest=case.longest))
        kinds |= set(plan.tiles[:, 5].tolist())
        unmasked += int((plan.tiles[:, 3] - plan.tiles[:, 2]).sum())
        masked += int((plan.tiles[:, 4] - plan.tiles[:, 3]).sum())
        parts += plan.num_slots
        whole += int((plan.tile_slots < 0).sum())
    assert kinds == {SMALL, LARGE} and min(unmasked, masked, parts, whole) > 100


@pytest.mark.parametrize("ahead", [0, 1, 5])
def test_one_plan_serves_steps_to_come(ahead: int, device: torch.device) -> None:
    """Positions move on the device, the plan stays: what a captured graph of decode steps does."""
    case = Case(page=16, window=20, resident=9999, least_split=16)
    world = make_world(np.random.default_rng(5), case.page, spare=5, decode_only=True)
    plan = DevicePlan.of(plan_of(case, world, horizon=5), device)
    for stretch in {id(path[-1]): path[-1] for path in world.path_of_row}.values():
        stretch.length += ahead
    world.reads.positions[:] += ahead
    inputs = make_inputs(case, 1, device, world)
    ours, _ = run(case, inputs, plan)
    assert relative_error(ours, oracle(case, inputs)) < TOLERANCE[case.dtype]


def test_a_smaller_plan_can_take_the_place_of_a_larger_one(device: torch.device) -> None:
    case = replace(CASES["many parts"], longest=30)
    large, small = (make_world(np.random.default_rng(seed), 16, num_nodes=n) for seed, n in ((1, 9), (2, 3)))
    plan = DevicePlan(PlanCapacity.of(plan_of(case, large), room=1.5), device)
    for world in (large, small):
        plan.load(plan_of(case, world))
        inputs = make_inputs(case, 3, device, world)
        ours, _ = run(case, inputs, plan)
        assert relative_error(ours, oracle(case, inputs)) < TOLERANCE[case.dtype]


def test_parts_carry_the_natural_logarithm_of_their_sum(device: torch.device) -> None:
    case = replace(CASES["many parts"], window=30)
    inputs = make_inputs(case, 4, device)
    plan = plan_of(case, inputs.world)
    _, parts = run(case, inputs, DevicePlan.of(plan, device))
    assert torch.isneginf(parts.lse).any(), "some row sees no key in one of its tiles"
    row, begin, end = int(plan.merge_rows[0]), int(plan.merge_ptr[0]), int(plan.merge_ptr[1])
    position, world = int(inputs.positions[row]), inputs.world
    places = torch.tensor([world.place(row, seen) for seen in range(max(0, position - 29), position + 1)])
    keys = inputs.keys.cpu()[places[:, 0], :, places[:, 1]].double().repeat_interleave(case.group, dim=1)
    scores = torch.einsum("hd,lhd->hl", inputs.query[row].cpu().double(), keys) * SCALE
    ours = torch.logsumexp(parts.lse[begin:end].cpu().double(), dim=0)
    assert torch.allclose(ours, torch.logsumexp(scores, dim=-1), atol=1e-5)


@pytest.mark.parametrize("with_sinks", [False, True])
def test_parts_that_saw_no_key_take_no_share(with_sinks: bool, device: torch.device) -> None:
    heads, dim = 3, 24
    parts = torch.randn(6, heads, dim, device=device)
    lse = torch.randn(6, heads, device=device) * 40
    lse[1] = lse[3, 0] = lse[4:] = float("-inf")  # one part, one head of a part, all parts of the last row
    sinks = torch.randn(heads, device=device)
    ptr = torch.tensor([0, 4, 6], dtype=torch.int32, device=device)
    rows = torch.tensor([5, 2], dtype=torch.int32, device=device)
    count = torch.tensor([2], dtype=torch.int32, device=device)
    output = torch.full((7, heads, dim), NAN, device=device)
    merge_parts[(4, 2)](
        parts,
        lse,
        output,
        sinks,
        rows,
        ptr,
        count,
        output.stride(0),
        output.stride(1),
        heads,
        2,
        dim,
        with_sinks,
    )
    used = (sinks.double() if with_sinks else None,)
    for row, begin, end in ((5, 0, 4), (2, 4, 6)):
        expected = reference_merge(parts[begin:end].double(), lse[begin:end].double(), *used)
        assert torch.allclose(output[row].double(), expected, atol=1e-5)
    assert torch.equal(output[2], torch.zeros(heads, dim, device=device))
    assert output[[0, 1, 3, 4, 6]].isnan().all(), "rows that are not merged stay as they are"


@pytest.mark.parametrize(
    "name", ["plain", "seven heads", "soft cap", "sinks in a window, parts", "narrow values"]
)
def test_the_torch_reference_runs_the_same_plan(name: str) -> None:
    case = CASES[name]
    inputs = make_inputs(case, 7, torch.device("cpu"))
    ours = reference_attention(
        inputs.query.double(),
        inputs.keys,
        inputs.values,
        inputs.positions,
        plan_of(case, inputs.world),
        scale=SCALE,
        window=case.window,
        softcap=case.softcap,
        sinks=inputs.sinks,
    )
    assert relative_error(ours, oracle(case, inputs)) < 1e-12
