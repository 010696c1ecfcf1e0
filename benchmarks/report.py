"""The comparison's report: a JSON file that several runs add their pairs to."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Collection, Mapping
from datetime import date, datetime
from pathlib import Path
from typing import Any

from batchllm.versions import versions
from benchmarks import measured
from benchmarks.measured import Pair

_PROJECT = Path(__file__).parent.parent


class Report:
    """What has been measured, by workload. Saved after every pair, so that a run which is cut off loses one."""

    def __init__(self, path: Path, replaced: Collection[str] = ()):
        """Goes on with what is in `path`, but for the workloads of `replaced`. Raises ValueError for an older form."""
        self.path = path
        known: dict[str, Any] = {"rows": [], "startup_seconds": {}, "versions": {"engines": {}}}
        if path.exists():
            known = json.loads(path.read_text())
        self.rows = {row["workload"]: row for row in known["rows"] if row["workload"] not in replaced}
        if any("pairs" not in row for row in self.rows.values()):
            raise ValueError(f"{path} has no single pairs to add to; remove it or give another --out")
        self._known_starts: dict[str, list[float]] = known["startup_seconds"]
        self.startup_seconds = self._known_starts
        self._engines: dict[str, dict[str, str]] = known["versions"]["engines"]
        self._commit = _commit()

    def add(self, workload: Mapping[str, Any], pair: Pair) -> dict[str, Any]:
        """Adds a pair and returns the workload's row. Raises ValueError if the workload is another one than before."""
        name = workload["workload"]
        row = self.rows.get(name, {**workload, "pairs": []})
        if any(row[key] != value for key, value in workload.items()):
            raise ValueError(
                f"{self.path} has pairs of another workload {name}; give --replace or another --out"
            )
        row["pairs"].append({"time": f"{datetime.now():%Y-%m-%d %H:%M}", "commit": self._commit, **pair})
        self.rows[name] = {**row, **measured.figures(workload, row["pairs"])}
        self.save()
        return self.rows[name]

    def note_starts(self, seconds: Mapping[str, list[float]], engines: Mapping[str, dict[str, str]]) -> None:
        """All start-ups so far of this run's processes, and what they run; saved with the next pair."""
        names = {**self._known_starts, **seconds}
        self.startup_seconds = {
            name: [*self._known_starts.get(name, ()), *(round(value, 2) for value in seconds.get(name, ()))]
            for name in names
        }
        self._engines |= engines

    def save(self) -> None:
        report = {
            "date": date.today().isoformat(),
            "versions": {**versions(), "engines": self._engines},
            "cpus": os.cpu_count(),
            "startup_seconds": self.startup_seconds,
            "rows": list(self.rows.values()),
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_name(f".{self.path.name}.part")
        part.write_text(json.dumps(report, indent=1) + "\n")
        os.replace(part, self.path)


def _commit() -> str:
    """Of the code that is measured; `-dirty`: with changes."""
    command = ["git", "-C", str(_PROJECT), "describe", "--always", "--dirty"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"
