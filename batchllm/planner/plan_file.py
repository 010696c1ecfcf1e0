"""A plan as a Parquet file, one row per node in execution order: for people, for tools, and to be read back."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from batchllm.core import Plan, PlanStats
from batchllm.durable import writing

_STATS = b"batchllm.plan"
_NODE_COLUMNS = ("parent", "start", "end", "row", "donor", "copied", "leaves", "sequence")


def write_plan(plan: Plan, path: Path) -> None:
    """Columns are those of `core.Plan` without `node_`. A leaf also has its params, its group and `requests`, with how
    many prompt tokens each of them takes from another's work in `shared`. The file appears whole or not at all.
    Raises WriteFailed."""
    columns = {name: pa.array(getattr(plan, f"node_{name}")) for name in _NODE_COLUMNS}
    leaf = np.zeros(plan.num_nodes, dtype=np.bool_)
    leaf[plan.sequence_node] = True
    for name, of_sequence in (("params", plan.sequence_params), ("group", plan.sequence_group)):
        of_node = np.zeros(plan.num_nodes, dtype=np.int32)
        of_node[plan.sequence_node] = of_sequence
        columns[name] = pa.array(of_node, mask=~leaf)
    count = np.zeros(plan.num_nodes, dtype=np.int64)
    count[plan.sequence_node] = np.diff(plan.request_ptr)
    offsets = pa.array(np.append(0, np.cumsum(count)))
    columns["requests"] = pa.LargeListArray.from_arrays(offsets, pa.array(plan.request))
    columns["shared"] = pa.LargeListArray.from_arrays(offsets, pa.array(plan.request_shared[plan.request]))
    about = {"num_requests": len(plan.request_shared), "stats": asdict(plan.stats)}
    table = pa.table(columns).replace_schema_metadata({_STATS: json.dumps(about)})
    temporary = path.with_name(path.name + ".tmp")
    try:
        with writing(path):
            pq.write_table(table, temporary, compression="zstd")
            os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read_plan(path: Path) -> Plan:
    """Raises ValueError for a file that write_plan has not written."""
    table = pq.read_table(path)
    about = (table.schema.metadata or {}).get(_STATS)
    if about is None:
        raise ValueError(f"{path} is not a plan")
    described = json.loads(about)
    nodes = {f"node_{name}": table[name].to_numpy() for name in _NODE_COLUMNS}
    leaf = np.flatnonzero(nodes["node_sequence"] >= 0)
    of_leaf = {
        f"sequence_{name}": table[name].combine_chunks().take(pa.array(leaf)).to_numpy().astype(np.int32)
        for name in ("params", "group")
    }
    requests = table["requests"].combine_chunks()
    request = requests.flatten().to_numpy()
    request_shared = np.zeros(described["num_requests"], dtype=np.int64)
    request_shared[request] = table["shared"].combine_chunks().flatten().to_numpy()
    return Plan(
        **nodes,
        sequence_node=leaf.astype(np.int32),
        **of_leaf,
        request_ptr=np.append(0, np.cumsum(requests.value_lengths().to_numpy()[leaf])),
        request=request,
        request_shared=request_shared,
        stats=PlanStats(**described["stats"]),
    )
