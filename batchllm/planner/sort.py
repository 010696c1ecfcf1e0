"""Lexicographic order of many prompts and the exact common prefix of neighbours, reading few tokens.

A multiway radix sort by leaders, in rounds. Rows whose first `depth` tokens are known to be equal form a
group, contiguous in the order. Each round compares the next block of tokens of every row with that of one
member of its group, the leader. A row that differs after `agreed` tokens lies before or after the leader
according to its first different token; all rows with the same `agreed` and the same token stay together and
go on from there. Groups of one row, and groups of identical rows, drop out. The order of a finished round
is never touched again.

Tokens are compared with tokens: there are no hashes, so none can collide, and no two prompts can be taken for the same
that are not. Work: every row is read up to a
block past the point where it becomes unique, plus one block for each of the O(log rows) splits it takes
part in.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from batchllm.core import IntArray, TokenArray

BoolArray = NDArray[np.bool_]

END = -1  # stands after the last token of a row and sorts before every token
_SLICE_TOKENS = 1 << 18  # gathered at a time: stays in the CPU's cache
_MIN_BLOCK = 64  # tokens; shorter gathers pay more for finding the row than for reading it
_MAX_BLOCK = 1 << 16  # tokens; few long rows take few rounds
_GOLDEN = 0.6180339887498949


class SortedPrompts(NamedTuple):
    order: IntArray  # [rows] indices of the rows in lexicographic order, identical rows by index
    lcp: IntArray  # [rows] tokens that order[i - 1] and order[i] have in common from the start; lcp[0] = 0


class _Rows(NamedTuple):
    tokens: TokenArray
    start: IntArray
    length: IntArray


class _Active(NamedTuple):
    """Rows still to be separated: ascending positions in the order, grouped."""

    position: IntArray  # [active] position in the order
    head: BoolArray  # [active] first of its group
    depth: IntArray  # [active] tokens known to be equal within the group


class _Compared(NamedTuple):
    """How each active row compares with the leader of its group within the block."""

    agreed: IntArray  # [active] equal tokens, `block` if none differs
    token: IntArray  # [active] first different token of the row, END if it is over or nothing differs
    before: BoolArray  # [active] the row sorts before the leader


def sort_prompts(tokens: TokenArray, starts: IntArray, lengths: IntArray) -> SortedPrompts:
    """Row i is `tokens[starts[i]:starts[i] + lengths[i]]`, tokens >= 0. A prefix sorts before its extensions.

    `tokens` may be memory-mapped: it is only gathered from, `_SLICE_TOKENS` at a time.
    """
    rows = _Rows(np.asarray(tokens), starts, lengths)
    count = len(starts)
    order, lcp = np.arange(count), np.zeros(count, dtype=np.int64)
    if count < 2 or len(tokens) == 0:
        return SortedPrompts(order, lcp)
    active = _Active(np.arange(count), order == 0, np.zeros(count, dtype=np.int64))
    turn = 0
    while len(active.position):
        row = order[active.position]
        block = _block_width(len(row), int((lengths[row] - active.depth).max()))
        leader = _leaders(active.head, turn)
        compared = _compare(rows, row, active, leader, block)
        agreed, active = _rearrange(order, lcp, compared, active, block)
        active = _carry_on(rows, order, lcp, agreed, active, block)
        turn += 1
    return SortedPrompts(order, lcp)


def _block_width(active: int, longest: int) -> int:
    """Wider blocks for fewer rows: a round gathers enough to be worth its fixed cost, if there is as much."""
    width = _MIN_BLOCK
    while width < min(_MAX_BLOCK, longest) and width * active < _SLICE_TOKENS:
        width *= 2
    return width


def _leaders(head: BoolArray, turn: int) -> IntArray:
    """Index among the active rows of each group's leader: another member each turn.

    A fixed choice would need a round per row for nested prefixes (each row extending the last); a choice
    that spreads over the group halves it, as a random pivot does in quicksort.
    """
    first = np.flatnonzero(head)
    size = np.diff(first, append=len(head))
    share = ((turn + 1) * _GOLDEN) % 1.0
    leader: IntArray = first + (size * share).astype(np.int64)
    return leader


def gather_blocks(tokens: TokenArray, start: IntArray, remaining: IntArray, block: int) -> TokenArray:
    """`[rows, block]`: the next `block` tokens from `start`, END after the `remaining` ones of a row."""
    last = len(tokens) - block
    if last >= 0:
        blocks = sliding_window_view(tokens, block)[np.minimum(start, last)]
        clipped = np.flatnonzero(start > last)
    else:
        blocks = np.empty((len(start), block), dtype=tokens.dtype)
        clipped = np.arange(len(start))
    span = np.arange(block)
    if len(clipped):
        blocks[clipped] = tokens[np.minimum(start[clipped, None] + span, len(tokens) - 1)]
    if blocks.size and blocks.min() < 0:
        raise ValueError("the token store is damaged: it holds a negative token")
    short = np.flatnonzero(remaining < block)
    if len(short):
        blocks[short] = np.where(span < remaining[short, None], blocks[short], END)
    return blocks


def _compare(rows: _Rows, row: IntArray, active: _Active, leader: IntArray, block: int) -> _Compared:
    start = rows.start[row] + active.depth
    remaining = rows.length[row] - active.depth
    group = np.cumsum(active.head) - 1
    agreed = np.empty(len(row), dtype=np.int64)
    token = np.empty(len(row), dtype=np.int64)
    before = np.empty(len(row), dtype=np.bool_)
    step = max(1, _SLICE_TOKENS // block)
    for low in range(0, len(row), step):
        part = slice(low, low + step)
        mine = gather_blocks(rows.tokens, start[part], remaining[part], block)
        lead = leader[group[low] : group[part][-1] + 1]
        theirs = gather_blocks(rows.tokens, start[lead], remaining[lead], block)
        if len(lead) > 1:  # one leader is broadcast
            theirs = theirs[group[part] - group[low]]
        agreed[part], token[part], before[part] = _first_difference(mine, theirs)
    return _Compared(agreed, token, before)


def _first_difference(mine: TokenArray, theirs: TokenArray) -> tuple[IntArray, IntArray, BoolArray]:
    """`theirs` is `[rows, block]` or `[1, block]`."""
    differs = mine != theirs
    agreed = differs.argmax(axis=1)
    each = np.arange(len(mine))
    different = differs[each, agreed]
    token = np.where(different, mine[each, agreed], END).astype(np.int64)
    other = theirs[each if len(theirs) > 1 else 0, agreed]
    return np.where(different, agreed, mine.shape[1]), token, different & (token < other)


def _rearrange(
    order: IntArray, lcp: IntArray, compared: _Compared, active: _Active, block: int
) -> tuple[IntArray, _Active]:
    """Bring `order` into order within the groups that split, set `lcp` and heads at their new borders.

    Returns `agreed` in the new order.
    """
    agreed = compared.agreed
    position, head, depth = active
    group = np.cumsum(head) - 1
    uneven = np.logical_or.reduceat(agreed < block, np.flatnonzero(head))
    chosen = np.flatnonzero(uneven[group])
    if len(chosen) == 0:
        return agreed, active
    # Rows before the leader ascend in `agreed`, those after it descend: the later they part, the nearer.
    side = np.where(compared.before, agreed, 2 * block - agreed)[chosen]
    key, ranking = _rank(group[chosen] * (2 * block + 1) + side, compared.token[chosen])
    moved = np.arange(len(position))
    moved[chosen] = chosen[ranking]
    order[position] = order[position[moved]]
    agreed = agreed[moved]

    border = chosen[1:][key[1:] != key[:-1]]
    border = border[~head[border]]
    lcp[position[border]] = depth[border] + np.minimum(agreed[border - 1], agreed[border])
    head = head.copy()
    head[border] = True
    return agreed, _Active(position, head, depth)


def _carry_on(
    rows: _Rows, order: IntArray, lcp: IntArray, agreed: IntArray, active: _Active, block: int
) -> _Active:
    """The rows that are still to be separated, deeper. Where only twins are left, their `lcp` is set."""
    position, head = active.position, active.head
    depth = active.depth + agreed + (agreed < block)  # with the token that told them apart
    length = rows.length[order[position]]
    over = length < depth
    twin = over & ~head
    lcp[position[twin]] = length[twin]
    alone = head & np.append(head[1:], True)
    left = ~(over | alone)
    return _Active(position[left], head[left], depth[left])


def _rank(major: IntArray, minor: IntArray) -> tuple[IntArray, IntArray]:
    """Stable ranking by (major, minor >= END), and the sorted keys, equal where both are equal."""
    span = int(minor.max()) + 2
    if (int(major.max()) + 1) * span < 1 << 63:
        key = major * span + (minor + 1)
        ranking = np.argsort(key, kind="stable")
        return key[ranking], ranking
    ranking = np.lexsort((minor, major))
    major, minor = major[ranking], minor[ranking]
    new = np.append(True, (major[1:] != major[:-1]) | (minor[1:] != minor[:-1]))
    return np.cumsum(new), ranking
