"""The simulator against the executor's own scheduler, driven step by step without a model, on random plans."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from batchllm.core import RequestTable, SamplingParams
from batchllm.executor.kv_buffers import KvBuffers
from batchllm.executor.kv_pool import KvPool
from batchllm.executor.scheduler import Scheduler
from batchllm.forecast import simulate_plan
from batchllm.planner.lengths import LengthEstimator
from batchllm.planner.loads import StepLoads
from batchllm.planner.plan import PlanOptions, arrange, build_plan, draft_plan
from batchllm.planner.sample import part_of, spread_blocks
from batchllm.planner.simulate import Simulation, SimulationOptions, simulate
from tests.executor.harness import prompt_table, run
from tests.executor.test_scheduler import llama, random_prompts

COLUMNS = [field.name for field in dataclasses.fields(StepLoads) if field.name != "steps"]
CHANGING = {"own_pairs", "own_kv_read"}  # within an entry: only their mean is known


class Known:
    """Every sequence is as long as its limit."""

    def learn(self, params, length, limits, group):
        pass

    def estimate(self, params, decoded, limits, group):
        return np.maximum(limits - decoded, 1)


def random_job(random, longest):
    """A plan and the length of each sequence's output."""
    prompts = random_prompts(random)
    limits, samples = random.integers(1, longest + 1, 3), (1, 1, 3)
    params = tuple(
        SamplingParams(max_tokens=int(limit), temperature=float(n > 1 or i), n=n, ignore_eos=True)
        for i, (limit, n) in enumerate(zip(limits, samples))
    )
    params_of = random.integers(0, 3, len(prompts)).astype(np.int32)
    table = dataclasses.replace(prompt_table(prompts, params[0]), params=params, params_of=params_of)
    row = np.repeat(np.arange(len(prompts)), [samples[p] for p in params_of])
    key = np.stack([np.arange(len(row)), np.zeros(len(row))], axis=1).astype(np.uint64)
    requests = RequestTable(row, np.zeros(len(row), dtype=np.int32), key)
    options = PlanOptions(min_shared_tokens=int(random.integers(1, 12)))
    plan = build_plan(table, requests, np.ones(len(row), dtype=bool), options)
    return table, plan, limits[plan.sequence_params]


def scheduled(table, plan, options, compact):
    """(what each step does [steps, COLUMNS], the scheduler). `compact`: as if memory never fragmented."""
    pool = KvPool(KvBuffers.empty([], options.kv_tokens, None))
    limits = options.max_step_tokens, options.max_length, options.max_running
    scheduler = Scheduler(plan, table, pool, Known(), *limits)
    if compact:
        allocate = scheduler.memory._try_allocate

        def compacted(sizes):
            pool.compact()
            return allocate(sizes) if pool.used + sum(sizes) <= pool.capacity else None

        scheduler.memory._try_allocate = compacted
    steps = []
    while batch := scheduler.schedule():
        steps.append(load_of(batch))
        tokens = np.zeros(len(batch.samples), dtype=int)
        scheduler.absorb(batch, tokens, None, lambda run: len(run.output) >= run.limit)
    return np.array(steps, dtype=np.float64).reshape(-1, len(COLUMNS)), scheduler


def load_of(batch):
    chunks = [(chunk.held_before, chunk.count) for chunk in batch.chunks]
    counted = {
        "prompt_tokens": batch.prompt_tokens,
        "decode_tokens": batch.decode_tokens,
        "logit_rows": len(batch.logit_rows),
        "chunks": len(chunks),
        "own_pairs": sum(h * c + c * (c + 1) // 2 for h, c in chunks),
        "own_kv_read": sum(h + c for h, c in chunks),
        "shared_reads": len(batch.shared_reads),
        "shared_pairs": sum(read.length * sum(c.count for c in read.chunks) for read in batch.shared_reads),
        "shared_kv_read": sum(read.length for read in batch.shared_reads),
        "copied_tokens": len(batch.copy_to),
    }
    return [counted[name] for name in COLUMNS]


def assert_same_steps(simulation: Simulation, steps) -> None:
    loads = simulation.loads
    assert simulation.steps == len(steps)
    begin = np.append(0, np.cumsum(loads.steps)).astype(int)
    for column, name in enumerate(COLUMNS):
        means = getattr(loads, name)
        for entry, mean in enumerate(means.tolist()):
            real_values = steps[begin[entry] : begin[entry + 1], column]
            assert real_values.mean() == pytest.approx(mean)
            assert name in CHANGING or np.ptp(real_values) == 0


@pytest.mark.parametrize("seed", range(150))
def test_every_step_is_the_schedulers(seed):
    """With lengths known, and memory that does not fragment: whatever the memory and the size of a step."""
    random = np.random.default_rng(seed)
    table, plan, output = random_job(random, 25)
    longest = int(np.diff(table.offsets).max() + output.max())
    options = SimulationOptions(
        kv_tokens=[4000, max(200, longest), longest + int(random.integers(0, 30))][seed % 3],
        max_step_tokens=int(random.integers(2, 64)),
        max_running=int(random.choice([3, 4096])),
    )
    simulation = simulate(plan, output, options)
    steps, scheduler = scheduled(table, plan, options, compact=True)
    assert scheduler.preemptions == 0
    assert_same_steps(simulation, steps)
    assert simulation.peak_kv_tokens == scheduler.pool.peak
    assert simulation.failed == len(scheduler.failed) == 0


@pytest.mark.parametrize("seed", range(20))
def test_prompts_that_never_fit_fail_and_the_others_go_on(seed):
    random = np.random.default_rng(500 + seed)
    prompts = [[int(start), *[5] * int(length)] for start, length in zip(range(8), random.integers(1, 90, 8))]
    table = prompt_table(prompts, SamplingParams(max_tokens=9, ignore_eos=True))
    requests = RequestTable(np.arange(8), np.zeros(8, np.int32), np.zeros((8, 2), np.uint64))
    plan = build_plan(table, requests, np.ones(8, dtype=bool), PlanOptions())
    # No prompt is between those that fit with their output and those that do not fit at all.
    kv_tokens = next(t for t in range(30, 200) if not any(t - 9 < len(prompt) <= t for prompt in prompts))
    options = SimulationOptions(kv_tokens, 40)
    simulation = simulate(plan, np.full(8, 9), options)
    steps, scheduler = scheduled(table, plan, options, compact=True)
    assert_same_steps(simulation, steps)
    assert simulation.failed == len(scheduler.failed) == sum(len(prompt) > kv_tokens for prompt in prompts)


def test_the_jobs_above_are_not_all_easy():
    """Some wait for memory, some copy."""
    copied = waited = 0
    for seed in range(40):
        table, plan, output = random_job(np.random.default_rng(seed), 25)
        longest = int(np.diff(table.offsets).max() + output.max())
        tight = simulate(plan, output, SimulationOptions(longest, 32))
        ample = simulate(plan, output, SimulationOptions(100_000, 32))
        copied += ample.loads.total("copied_tokens") > 0
        waited += tight.steps > ample.steps
    assert min(copied, waited) >= 5


@pytest.mark.parametrize("seed", range(20))
def test_outputs_that_outgrow_their_first_slots(seed):
    """Leaves grow and move, so memory's peak may differ by what is there twice for a moment; steps do not."""
    random = np.random.default_rng(1000 + seed)
    table, plan, output = random_job(random, 500)
    options = SimulationOptions(20_000, int(random.integers(8, 64)))
    simulation = simulate(plan, output, options)
    steps, scheduler = scheduled(table, plan, options, compact=False)
    assert_same_steps(simulation, steps)
    assert simulation.peak_kv_tokens == pytest.approx(scheduler.pool.peak, rel=0.3)


def test_little_fragmented_memory_is_met_within_a_few_steps():
    """The real pool may fragment, drop what it had kept for copying, or run out and step back."""
    expected = measured = 0
    for seed in range(15):
        random = np.random.default_rng(2000 + seed)
        table, plan, output = random_job(random, 200)
        options = SimulationOptions(int(np.diff(table.offsets).max()) + 600, 48)
        expected += simulate(plan, output, options).steps
        measured += len(scheduled(table, plan, options, compact=False)[0])
    assert expected == pytest.approx(measured, rel=0.05)


def test_a_prompt_of_many_steps_and_a_long_output():
    """Longer than the window of steps in memory: 50,000 steps of prompt, then 40,000 of output."""
    prompts = prompt_table([[1] * 100_000], SamplingParams(max_tokens=40_000))
    requests = RequestTable(np.zeros(1, np.int64), np.zeros(1, np.int32), np.zeros((1, 2), np.uint64))
    plan = build_plan(prompts, requests, np.ones(1, dtype=bool), PlanOptions())
    simulation = simulate(plan, np.array([40_000]), SimulationOptions(200_000, 2))
    assert simulation.steps == 50_000 + 39_999
    assert simulation.prompt_tokens == 100_000
    assert simulation.loads.total("decode_tokens") == 39_999
    assert simulation.loads.total("own_pairs") == 139_999 * 140_000 // 2


def test_a_part_of_a_plan_is_the_plan_of_the_part():
    """Where nothing is copied, leaving sequences out is the same as never having had them."""
    for seed in range(30):
        random = np.random.default_rng(3000 + seed)
        _, plan, output = random_job(random, 25)
        keep = random.random(plan.num_sequences) < 0.6
        part = part_of(plan, keep)
        assert part.num_sequences == keep.sum()
        simulation = simulate(part, output[keep], SimulationOptions(4000, 32))
        assert simulation.loads.total("decode_tokens") == int((output[keep] - 1).sum())
        own = (part.node_end - part.node_start - part.node_copied).sum()
        assert simulation.prompt_tokens == own
        assert (part.node_parent < np.arange(part.num_nodes)).all()
    everything = part_of(plan, np.ones(plan.num_sequences, dtype=bool))
    for field in dataclasses.fields(plan):
        np.testing.assert_array_equal(getattr(everything, field.name), getattr(plan, field.name))


def test_blocks_are_spread_over_all_sequences():
    keep = spread_blocks(100_000, 10_000)
    assert 10_000 <= keep.sum() <= 10_100
    assert keep[:100].all()
    assert keep[99_000:].sum() < 400
    assert np.diff(np.flatnonzero(keep)).max() < 3200
    assert spread_blocks(0, 10).sum() == 0


@pytest.mark.parametrize("seed", range(4))
def test_a_model_run_has_the_predicted_steps_and_memory(seed):
    """The whole engine with a tiny model and its own estimates, which are exact: outputs as long as they may be."""
    random = np.random.default_rng(4000 + seed)
    params = SamplingParams(max_tokens=12, temperature=0.7, n=1 + seed % 2, ignore_eos=True)
    size = {"kv_tokens": 4096, "max_step_tokens": int(random.integers(16, 64))}
    outcome = run(llama()[1], random_prompts(random), params, **size)
    output = np.full(outcome.plan.num_sequences, 12)
    simulation = simulate(outcome.plan, output, SimulationOptions(**size))
    assert simulation.steps == outcome.stats.steps
    assert simulation.peak_kv_tokens == outcome.stats.kv_tokens_peak
    assert simulation.prompt_tokens == outcome.stats.prompt_tokens_computed


def test_outputs_end_where_the_model_does():
    """With a limit far beyond it, what is expected is what the scheduler allows, and nothing takes longer."""
    random = np.random.default_rng(9)
    prompts = [random.integers(4, 90, length).tolist() for length in random.integers(1, 64, 50)]
    table = prompt_table(prompts, SamplingParams(max_tokens=10**6, ignore_eos=True))
    requests = RequestTable(np.arange(50), np.zeros(50, np.int32), np.zeros((50, 2), np.uint64))
    draft = draft_plan(table, requests, np.ones(50, dtype=bool), PlanOptions(max_length=64))
    options = SimulationOptions(1000, 48, max_length=64)
    plan = arrange(draft, "tree")
    simulation, outputs = simulate_plan(plan, table, LengthEstimator(), options)
    assert outputs == draft.expected_decode(plan).sum() == sum(64 - len(prompt) for prompt in prompts)
    steps, scheduler = scheduled(table, plan, options, compact=True)
    assert_same_steps(simulation, steps)
    assert scheduler.output_tokens == outputs


def test_outputs_without_end_stop_where_memory_does():
    """Alone, a sequence runs until memory is full, whatever its limit."""
    table = prompt_table([[5] * 20], SamplingParams(max_tokens=2**31 - 1))
    requests = RequestTable(np.zeros(1, np.int64), np.zeros(1, np.int32), np.zeros((1, 2), np.uint64))
    plan = build_plan(table, requests, np.ones(1, dtype=bool), PlanOptions())
    options = SimulationOptions(500, 64)
    simulation, _ = simulate_plan(plan, table, LengthEstimator(), options)
    steps, scheduler = scheduled(table, plan, options, compact=True)
    assert len(scheduler.failed) == 1
    assert simulation.steps == len(steps)
