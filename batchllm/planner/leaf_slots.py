"""How many KV slots a leaf gets, in a run and in its simulation: more than it holds, for it will grow."""

LEAD = 128  # output tokens that a leaf gets room for when it starts
ROUND = 16  # slots come in multiples of this, so that neighbours are often equally long


def first_slots(own: int, output: int, lead: int) -> int:
    """When it starts, with `own` tokens that are known, at most `output` to come, and room for `lead` of these."""
    lead = min(lead, output)
    room = _rounded(own + lead) if lead > 1 else own + 1
    return max(min(room, max(1, own + output - 1)), own)


def grown_slots(own: int, output: int, slots: int) -> int:
    """When its `slots` are full, with `own` tokens known and at most `output` to come. The last one never needs one."""
    return min(_rounded(slots + max(ROUND, slots // 2)), own + output - 1)


def _rounded(tokens: int) -> int:
    return -(-tokens // ROUND) * ROUND
