"""The text of a plan: everything in 80 columns, what matters first, nothing said that does not apply."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from batchllm.planner.explain import DeviceReport, LevelReport, PlanReport, PrefixReport
from batchllm.report.explain import duration, plan_json, plan_text, size

DEVICE = DeviceReport("H200 SXM", 8, 7260.0, 2_053_000, 84_000_000, 7 << 30, 111 << 30, 100 << 30, 0, False)
REPORT = PlanReport(
    job="/home/somebody/with/a/long/path/to/the/very/folder/in/which/the/job/lies/job.yaml",
    model="phi-3-mini",
    parameters=3_821_000_000,
    rows=1_000_000,
    faulty_rows=3,
    requests=1_999_994,
    sequences=1_500_000,
    prompt_tokens=1_000_000_000,
    longest_prompt=2610,
    output_tokens=256_000_000,
    output_source="every answer as long as max_tokens",
    sample_rows=0,
    computed_tokens=83_000_000,
    optimum_tokens=82_000_000,
    single_level_tokens=103_000_000,
    published_rule_tokens=107_000_000,
    reordering_saves=0,
    order_reason="decode_ratio: 7,260.0 s predicted, 3.0% less than tree order, in 2,053 steps instead of 2,100.",
    levels=(LevelReport(23, 1_500_000, 21_612, 5_925_956_000), LevelReport(314, 1948, 20_936, 82_463)),
    prefixes=(
        PrefixReport(
            0, 750_000, 810, 810, 606_690_000, "A task requiring determining the final position " * 3
        ),
        PrefixReport(1, 250, 1620, 810, 201_690, "short"),
    ),
    shared_prefixes=700,
    devices=(DEVICE, replace(DEVICE, name="this device", workers=1, calibrated=True, seconds=99.0)),
    warnings=(
        "3 rows cannot be answered; 3 because the prompt has 5,000 tokens; the model reads at most 4,095.",
    ),
    seconds={"open": 0.1, "tokenize": 300.0, "plan": 60.0, "forecast": 5.0, "explain": 0.0},
)


def test_everything_fits_in_80_columns():
    lines = plan_text(REPORT).splitlines()
    assert max(map(len, lines)) <= 80
    head = "\n".join(lines[:12])
    for said in (
        "job.yaml",
        "1,000,000, 3 of them without a prompt; 1,999,994 answers",
        "1,500,000 different",
    ):
        assert said in head
    assert "83,000,000 (91.7% saved by sharing)" in head
    assert "! 3 rows cannot be answered" in "\n".join(lines[:16])  # before anything that only informs


def test_a_sample_that_is_run_first():
    assert "sample" not in plan_text(REPORT)
    text = " ".join(plan_text(replace(REPORT, sample_rows=2000)).split())
    assert "sample 2,000 rows are run first, and the rest is planned anew with the lengths" in text


def test_devices():
    text = plan_text(REPORT)
    assert "8 x H200 SXM" in text
    assert "~2 h 01" in text
    (here,) = [line for line in text.splitlines() if line.startswith("this device")]
    assert "  99.0 s" in here  # measured: no doubt is shown
    words = " ".join(text.split())
    assert "workers each of 8 takes a stretch" in words and "1,000,000 prompt tokens more (1.2%)" in words
    assert "workers" not in plan_text(replace(REPORT, devices=REPORT.devices[1:]))
    heavy = replace(DEVICE, steps=0, kv_budget_bytes=0, failed_sequences=9)
    assert "8 x H200 SXM                   no room: the weights take 7.0 GiB" in plan_text(
        replace(REPORT, devices=(heavy,))
    )
    small = replace(DEVICE, steps=0, kv_budget_bytes=5, failed_sequences=9)
    assert "no sequence fits in KV memory" in plan_text(replace(REPORT, devices=(small,)))


def test_nothing_shared_and_nothing_at_all():
    alone = replace(REPORT, levels=(), prefixes=(), shared_prefixes=0, warnings=())
    assert "no two rows share a beginning that is worth keeping" in plan_text(alone)
    assert "!" not in plan_text(alone)
    assert "reordering" not in plan_text(alone)
    reordered = plan_text(replace(alone, reordering_saves=5_000_000))
    assert "reordering     saves about 5,000,000 of these tokens (prompt.reorder)" in reordered
    empty = replace(
        alone,
        rows=0,
        faulty_rows=0,
        requests=0,
        sequences=0,
        prompt_tokens=0,
        computed_tokens=0,
        optimum_tokens=0,
    )
    assert "0 (0.0% saved by sharing)" in plan_text(empty)


def test_json_has_every_field():
    found = json.loads(plan_json(REPORT))
    assert found["devices"][0]["kv_peak_bytes"] == 100 << 30
    assert found["levels"][1] == {
        "prefixes": 314,
        "sequences": 1948,
        "tokens": 20_936,
        "saved_tokens": 82_463,
    }
    assert found["saved_fraction"] == pytest.approx(0.917)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (99.9, "99.9 s"), (600, "10 min"), (7500, "2 h 05"), (86400 * 3.4, "3.4 days")],
)
def test_durations(seconds, text):
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0 bytes"), (1536, "1.5 KiB"), (812 << 20, "812 MiB"), (2 << 40, "2.0 TiB")]
)
def test_sizes(count, text):
    assert size(count) == text
