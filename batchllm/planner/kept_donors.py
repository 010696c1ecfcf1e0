"""In a simulated run: nodes that are out of use but kept until the node that copies from them has started."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from batchllm.core import Plan
from batchllm.planner.timeline import Event, Level, Timeline


class KeptDonors:
    """A donor counts as kept from the step after its last use on."""

    def __init__(self, plan: Plan, time: Timeline):
        self._time = time
        self._donor: list[int] = plan.node_donor.tolist()
        self._copied: list[int] = plan.node_copied.tolist()
        self._has_heir: list[bool] = _has_heir(plan).tolist()
        self._kept: dict[int, tuple[int, int]] = {}  # last step in use, slots

    def keep(self, node: int, used: int, slots: int) -> None:
        """The node's last use is in step `used`; kept if a later one copies from it."""
        if self._has_heir[node]:
            self._kept[node] = (used, slots)
            self._time.change(Level.KEPT, used + 1, slots)

    def copy(self, node: int) -> int:
        """Tokens of a node that starts now which are copied from its donor; that one is free to go then."""
        donor = self._donor[node]
        if donor < 0 or donor not in self._kept:
            return 0
        used, slots = self._kept.pop(donor)
        now = self._time.now
        self._time.change(Level.KEPT, max(now, used + 1), -slots)
        if used < now:  # nothing else may have its memory in this step
            self._time.change(Level.RESERVED, now, slots)
            self._time.change(Level.RESERVED, now + 1, -slots)
        self._time.event(Event.COPIED, now, self._copied[node])
        return self._copied[node]

    def slots(self) -> int:
        """Held by donors that are out of use now."""
        return sum(slots for used, slots in self._kept.values() if used < self._time.now)

    def drop(self, step: int) -> None:
        """Gives up, from now on, the donors that are out of use in this step."""
        for node in [node for node, (used, _) in self._kept.items() if used < step]:
            self._time.change(Level.KEPT, self._time.now, -self._kept.pop(node)[1])


def _has_heir(plan: Plan) -> NDArray[np.bool_]:
    """[nodes] whether a later node copies from it."""
    heir = np.zeros(plan.num_nodes, dtype=np.bool_)
    heir[plan.node_donor[plan.node_copied > 0]] = True
    return heir
