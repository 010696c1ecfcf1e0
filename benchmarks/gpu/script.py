"""The parts of the benchmark, in the order of their weight, within a budget of minutes."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import click
import torch
from batchllm_kernels.reference_set import TorchKernels

from batchllm.executor.device import Gpu, Placement, choose_device, this_machine
from batchllm.executor.device_memory import collect, free_bytes
from batchllm.executor.model import ModelRunner, prepare_model
from batchllm.executor.paged_backend import PagedBackend
from batchllm.executor.parity import check_parity
from benchmarks.gpu import attention, checks, jobs, profile
from benchmarks.gpu.clock import Rates, measure_rates
from benchmarks.gpu.models import make_model
from benchmarks.gpu.workloads import Workload, workloads

RESULTS = Path(__file__).parents[1] / "results"
# Model → workloads, those with transformers' continuous batching beside them, in the order they are run.
_PLAN: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("Llama-3.1-8B", ("groups", "nothing shared", "three levels", "decode-heavy"), ("groups",)),
    ("Llama-3.2-1B", ("groups", "decode-heavy"), ("groups",)),
    ("Qwen3-4B", ("groups",), ()),
    ("Llama-3.1-8B", ("groups, all",), ()),
    ("Qwen3-30B-A3B", ("groups",), ()),
)
_DRY: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
    ("tiny", ("groups", "nothing shared", "three levels", "decode-heavy"), ("groups",)),
)
_SMALL = ("Llama-3.2-1B", "tiny")  # models that fit in float32 as well


@dataclass
class Report:
    """Everything that is written as JSON."""

    device: str
    versions: dict[str, str]
    rates: dict[str, float] = field(default_factory=dict)
    checks: dict[str, Any] = field(default_factory=dict)
    attention: list[dict[str, Any]] = field(default_factory=list)
    jobs: list[dict[str, Any]] = field(default_factory=list)
    profile: dict[str, Any] = field(default_factory=dict)
    left_out: list[str] = field(default_factory=list)  # and why
    seconds: float = 0.0


class Bench:
    """One run of the script."""

    def __init__(self, placement: Placement, name: str, minutes: float, out: Path, tiny: bool):
        self.placement, self.device, self.tiny = placement, placement.device, tiny
        self.dtype = torch.float32 if tiny else torch.bfloat16
        self.report = Report(
            name, {package: version(package) for package in ("torch", "triton", "transformers")}
        )
        self._started, self._limit, self._out = time.perf_counter(), 60 * minutes, out

    def run(self) -> None:
        self.part("rates", 0, self._rates)
        rates = Rates(**self.report.rates)
        self.part("greedy tokens", 20, self._greedy)
        self.part("graphs", 20, self._graphs)
        self.part("attention", 40, lambda: self._attention(rates))
        for number, (model, names, with_peer) in enumerate(_DRY if self.tiny else _PLAN):
            self.part(
                f"{model}, {names[0]}", 60, partial(self._model, model, names, with_peer, rates, number == 0)
            )

    def part(self, name: str, needed: float, work: Callable[[], None]) -> None:
        """Runs a part that takes about `needed` seconds if there is time for it. What fails is named."""
        spent = time.perf_counter() - self._started
        if spent + needed > self._limit:
            self.report.left_out.append(f"{name}: no time")
        else:
            try:
                work()
            except Exception as error:
                reason = (str(error).strip().splitlines() or [""])[0]
                self.report.left_out.append(f"{name}: {type(error).__name__}: {reason[:200]}")
            collect()
        self.report.seconds = time.perf_counter() - self._started
        self._out.parent.mkdir(parents=True, exist_ok=True)
        self._out.write_text(json.dumps(asdict(self.report), indent=1) + "\n")

    def _rates(self) -> None:
        self.report.rates = asdict(measure_rates(self.device, self.dtype, self.tiny))

    def _greedy(self) -> None:
        self.report.checks["greedy tokens equal the CPU's"] = checks.greedy_tokens_equal(self.placement)

    def _graphs(self) -> None:
        self.report.checks["decode steps"] = checks.recorded_steps(self.placement, 20 if self.tiny else 640)

    def _attention(self, rates: Rates) -> None:
        self.report.attention = attention.measure(self.device, self.dtype, rates, self.tiny)

    def _model(
        self, name: str, names: tuple[str, ...], with_peer: tuple[str, ...], rates: Rates, with_profile: bool
    ) -> None:
        runner = prepare_model(make_model(name, self.device, self.dtype), placement=self.placement)
        if self.tiny:
            runner.backend = PagedBackend(self.device, 16, TorchKernels())
        check_parity(runner)
        known = workloads(runner.text_config.vocab_size, self.tiny)
        jobs.run_ours(runner, Workload("warm-up", known["groups"].prompts[:32], 4))
        for workload in map(known.__getitem__, names):
            work = partial(self._job, runner, name, workload, rates)
            self.part(f"{name}, {workload.name}", 30, work)
        if with_profile:
            self.part("profile", 30, lambda: self._profile(runner, known["groups"]))
        fused = runner.fused
        runner.unfuse()
        for workload in map(known.__getitem__, with_peer):
            peer = partial(self._peer, runner, name, workload)
            self.part(f"{name}, {workload.name}, transformers", 90, peer)
        if name in _SMALL:
            self.part(f"{name}, logits", 20, lambda: self._logits(runner, name, fused))

    def _logits(self, runner: ModelRunner, name: str, fused: bool) -> None:
        """Last: the weights are replaced meanwhile. `fused`: as the jobs ran."""
        self.report.checks[f"errors of logits, {name}"] = checks.logit_errors(runner, fused)

    def _job(self, runner: ModelRunner, model: str, workload: Workload, rates: Rates) -> None:
        ours = jobs.run_ours(runner, workload)
        floor = jobs.floor_seconds(runner, workload, rates)
        row: dict[str, Any] = {"model": model, "workload": workload.name, "rows": len(workload.prompts)}
        row |= {"ours": ours, "floor_seconds": floor, "of_floor": floor / ours["seconds"]}
        if workload.name == "nothing shared":
            plain = jobs.run_ours(runner, workload, min_shared_tokens=jobs.NEVER)
            row["of_plain_path"] = plain["seconds"] / ours["seconds"]
        self.report.jobs.append(row)
        click.echo(job_line(row))

    def _profile(self, runner: ModelRunner, workload: Workload) -> None:
        self.report.profile = profile.shares(lambda: jobs.run_ours(runner, workload), self.device)

    def _peer(self, runner: ModelRunner, model: str, workload: Workload) -> None:
        runner.model.set_attn_implementation("sdpa")
        found = jobs.run_transformers(runner.model, workload, self.tiny)
        runner.model.set_attn_implementation("batchllm")
        for row in self.report.jobs:
            if (row["model"], row["workload"]) == (model, workload.name):
                row["transformers"] = found
                row["times_transformers"] = found["seconds"] / row["ours"]["seconds"]
                click.echo(job_line(row))


def job_line(row: dict[str, Any]) -> str:
    ours = row["ours"]
    text = f"{row['model']:<14} {row['workload']:<15}{row['rows']:>6}{ours['seconds']:>9.2f} s"
    text += f"{ours['output_tokens_per_second']:>10,.0f} tok/s{row['of_floor']:>8.0%} of floor"
    text += "" if ours["own_forward"] else ", HF modules"
    if "of_plain_path" in row:
        text += f"{row['of_plain_path']:>7.2f} of plain path"
    if "times_transformers" in row:
        text += f"{row['times_transformers']:>7.1f} x transformers"
    return text


def table(report: Report) -> str:
    """What a person reads."""
    rates = report.rates
    lines = [report.device + ", " + ", ".join(f"{name} {number}" for name, number in report.versions.items())]
    if rates:
        copy, product = rates["copy_bytes"] / 1e12, rates["product_flops"] / 1e12
        lines.append(f"copy {copy:.2f} TB/s, products {product:.1f} TFLOP/s")
    lines += [f"{name}: {value}" for name, value in report.checks.items()]
    for case in report.attention:
        torch_times = "-" if case["times_torch"] is None else f"{case['times_torch']:.1f} x torch"
        times = f"{case['microseconds']:>9.0f} us{case['of_floor']:>7.0%} of floor  {torch_times}"
        lines.append(f"attention, {case['case']:<44}{times}")
    lines += [job_line(row) for row in report.jobs]
    if report.profile:
        wall = report.profile["wall_seconds"]
        parts = [(name, value) for name, value in report.profile.items() if name != "wall_seconds"]
        shares = ", ".join(f"{name.removesuffix('_seconds')} {value / wall:.0%}" for name, value in parts)
        lines.append(f"profile: {shares}")
    lines += [f"left out: {reason}" for reason in report.left_out]
    return "\n".join(lines)


@click.command()
@click.option("--dry-run", is_flag=True, help="A handful of tokens, on a CPU.")
@click.option("--minutes", default=9.5, show_default=True, help="What is not begun by then is left out.")
@click.option("--out", type=click.Path(path_type=Path), help="Where the JSON goes.")
def main(dry_run: bool, minutes: float, out: Path | None) -> None:
    if dry_run:
        cpu = torch.device("cpu")
        placement, name = Placement(Gpu("dry run", True, free_bytes(cpu), cpu)), "dry run"
    else:
        placement = choose_device("cuda", 0, this_machine())
        assert placement.gpu is not None
        name = placement.gpu.name
    folder = name.lower().replace("nvidia", "").split()[0]
    bench = Bench(placement, name, minutes, out or RESULTS / folder / "gpu.json", dry_run)
    bench.run()
    click.echo(table(bench.report))
