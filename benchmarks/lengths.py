"""How well output lengths are foreseen: on real lengths, with and without groups, before and while a job runs.

    python -m benchmarks.lengths ../shared/data

Two jobs. `evaluation`: BIG-Bench-Hard, GSM8K and SQuAD in one table, each answer as long as the reference answer.
`conversations`: the Mooncake trace with the output lengths that were served; its prompts as their blocks' hashes.
Sequences start in the plan's order; those of a batch of 256 teach what the next batch is expected to decode.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path

import click
import numpy as np

from batchllm.core import IntArray
from batchllm.dataset.keys import make_requests
from batchllm.planner.first_rows import sampled_requests
from batchllm.planner.length_errors import LengthErrors
from batchllm.planner.lengths import LengthEstimator
from batchllm.planner.plan import PlanDraft, PlanOptions, arrange, draft_plan
from benchmarks.mooncake import draft_trace, load_trace
from benchmarks.real_sets import bbh, gsm8k, squad, tokenized

_RESULTS = Path(__file__).parent / "results"
_BATCH = 256
_SAMPLES = (200, 1000)


@dataclass(frozen=True)
class Job:
    draft: PlanDraft
    length: IntArray  # [rows] what comes
    max_tokens: int

    def estimator_errors(self, sample_rows: int, grouped: bool) -> tuple[LengthErrors, LengthErrors]:
        """(of the plan made after a sample, of each sequence when it starts), both without the sample itself."""
        plan = arrange(self.draft, "decode_ratio")
        request = plan.request[plan.request_ptr[:-1]]
        length = self.length[self.draft.requests.row[request]]
        params = np.zeros(len(length), dtype=np.int32)
        limits = np.full(len(length), self.max_tokens)
        group = plan.sequence_group if grouped else None
        sampled = np.flatnonzero(sampled_requests(self.draft, sample_rows)[request]) if sample_rows else []
        left = np.delete(np.arange(len(length)), sampled)

        def of(chosen: IntArray) -> tuple[IntArray, IntArray, IntArray | None]:
            return params[chosen], limits[chosen], None if group is None else group[chosen]

        estimator, planned, started = LengthEstimator(), LengthErrors(), LengthErrors()
        if len(sampled):  # in no order, as a run reads the sample's answers from its folder
            sampled = np.random.default_rng(0).permutation(sampled)
            estimator.observe(0, length[sampled], None if group is None else group[sampled])
        planned.add(estimator.mean_total(*of(left)), length[left])
        for low in range(0, len(left), _BATCH):
            batch = left[low : low + _BATCH]
            started.add(estimator.mean_total(*of(batch)), length[batch])
            estimator.observe(0, length[batch], None if group is None else group[batch])
        return planned, started


def evaluation(data: Path) -> Job:
    answers = [
        example["target"]
        for task in sorted((data / "bbh" / "tasks").glob("*.json"))
        for example in json.loads(task.read_text(encoding="utf-8"))["examples"]
    ]
    lines = (data / "gsm8k" / "test.jsonl").read_text(encoding="utf-8").splitlines()
    answers += [json.loads(line)["answer"] for line in lines]
    found = json.loads((data / "squad2" / "dev-v2.0.json").read_text(encoding="utf-8"))
    answers += [
        question["answers"][0]["text"] if question["answers"] else "unanswerable"
        for article in found["data"]
        for paragraph in article["paragraphs"]
        for question in paragraph["qas"]
    ]
    prompts = tokenized([*bbh(data), *gsm8k(data), *squad(data)], data)
    length = np.diff(tokenized(answers, data).offsets) + 1  # with the end of sequence
    requests = make_requests(prompts, None, b"")
    draft = draft_plan(prompts, requests, np.ones(len(requests), dtype=bool), PlanOptions())
    return Job(draft, length, 512)


def conversations(data: Path) -> Job:
    trace = load_trace(data / "mooncake" / "conversation_trace.jsonl")
    draft = draft_trace(trace)
    key = np.random.default_rng(0).integers(0, 2**63, draft.requests.key.shape).astype(np.uint64)
    draft = replace(
        draft, requests=replace(draft.requests, key=key)
    )  # or else the sample would be the first hour
    return Job(draft, trace.output_tokens, int(trace.output_tokens.max()))


@click.command()
@click.argument("data", type=click.Path(exists=True, path_type=Path))
@click.option(
    "--out", type=click.Path(path_type=Path), default=None, help="default: results/DATE-lengths.json"
)
def main(data: Path, out: Path | None) -> None:
    """Prints mean absolute errors in tokens, and the bias of the whole."""
    rows = []
    for make in (evaluation, conversations):
        job = make(data)
        for sample_rows in (0, *_SAMPLES):
            for grouped in (False, True):
                planned, started = job.estimator_errors(sample_rows, grouped)
                about = {
                    "job": make.__name__,
                    "groups": int(job.draft.group.max(initial=-1)) + 1 if grouped else 0,
                }
                about |= {"sample_rows": sample_rows, "sequences": planned.sequences}
                rows.append({**about, "planned": planned.figures(), "started": started.figures()})
                click.echo(json.dumps(rows[-1]))
    report = {"date": date.today().isoformat(), "rows": rows}
    target = out or _RESULTS / f"{report['date']}-lengths.json"
    target.write_text(json.dumps(report, indent=2) + "\n")
    click.echo(f"written to {target}")


if __name__ == "__main__":
    main()
