"""Groups with one prefix each, as systems without a tree of prefixes need them: for comparison and for reports.

A prompt shares with its group one prefix, a trie node; what it shares beyond that, or with others, is computed again.
With the prefixes S chosen, prompts save the length of the nearest one above them, and each prefix costs its length:

    saved(S) = sum over prompts of D(nearest of S at or above) - sum over S of D(v)        D(v): tokens down to v

`best_groups` finds the S that saves most. `published_groups` is BatchLLM's rule (arXiv 2412.03594): bottom-up, it joins
a grandchild's tokens to the child's where that saves more than computing the child's tokens twice costs.

Both go over the trie's arrays once, children before parents, without recursion.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left
from dataclasses import dataclass

import numpy as np

from batchllm.core import IntArray
from batchllm.planner.prefix_tree import PrefixTree

_Unit = tuple[int, int]  # (tokens of the prefix, trie node)


@dataclass(frozen=True)
class SingleLevelGroups:
    node: IntArray  # [groups] the trie node whose tokens are the prefix
    prefix_tokens: IntArray  # [groups]
    members: IntArray  # [groups] prompts, those that end at the node included; at least two
    group: IntArray  # [trie nodes] of the prompts that end at each node, -1: they share with nobody
    saved_tokens: int


def first_level_groups(tree: PrefixTree, ending: IntArray) -> SingleLevelGroups:
    """Whatever the prompts with one first token have in common. `ending`: prompts that end at each trie node."""
    top = np.flatnonzero(tree.parent < 0)
    return _groups(tree, ending, top[np.searchsorted(top, np.arange(tree.num_nodes), side="right") - 1])


def best_groups(tree: PrefixTree, ending: IntArray) -> SingleLevelGroups:
    """The groups that save most: a dynamic program over (node, prefix shared from above).

    f(v, a), what can be saved below v when the nearest prefix chosen above has a tokens, is the larger of

        G(a) = ending(v) * a + sum over children of f(c, a)          v is not chosen
        G(D(v)) - D(v)                                               v is chosen

    The second does not depend on a, and G grows with a ever faster, so v is chosen up to some a, its limit. As a
    function over whole numbers, f is level up to the limit and consists of straight lines beyond. Only as many lines
    matter as fit between the limit and D(v), fewer than the root of 2 D(v): each takes at least one from G.
    """
    limit = _limits(tree, ending)
    depth: list[int] = tree.end.tolist()
    chosen: list[int] = []  # nearest chosen node at or above
    for node, parent in enumerate(tree.parent.tolist()):
        above = chosen[parent] if parent >= 0 else -1
        shared = depth[above] if above >= 0 else 0
        chosen.append(node if shared < limit[node] else above)
    return _groups(tree, ending, np.array(chosen, dtype=np.int64))


def _limits(tree: PrefixTree, ending: IntArray) -> list[int]:
    """[nodes] a node is chosen where fewer tokens than this are shared from above."""
    weight, nodes = _without_lone_leaves(tree, ending)
    limit = [0] * tree.num_nodes
    depth: list[int] = tree.end.tolist()
    parent: list[int] = tree.parent.tolist()
    curves: dict[int, _Curve] = {}
    for node in nodes:
        curve = curves.pop(node, None) or _Curve()
        curve.add(0, weight[node])
        limit[node] = curve.level(curve.at(depth[node]) - depth[node])
        above = parent[node]
        if above >= 0:
            curve.cut(depth[above])
            curves[above] = curve.plus(curves[above]) if above in curves else curve
    return limit


def _without_lone_leaves(tree: PrefixTree, ending: IntArray) -> tuple[list[int], list[int]]:
    """A leaf in which one prompt ends is never a group: it is counted as if it ended at the parent.

    Returns the prompts that then end at each node, and the other nodes, children before parents.
    """
    lone = (tree.below == np.arange(tree.num_nodes) + 1) & (ending == 1)
    weight = ending.copy()
    np.add.at(weight, tree.parent[lone & (tree.parent >= 0)], 1)
    return weight.tolist(), np.flatnonzero(~lone)[::-1].tolist()


class _Curve:
    """f(v, a) - f(v, 0) over whole a >= 0: straight lines, steeper from one to the next."""

    def __init__(self) -> None:
        self._begin: list[int] = []  # where it gets steeper, ascending ...
        self._rise: list[int] = []  # ... by how much
        self._slope = 0  # sum of the rises
        self._moment = 0  # sum of rise * begin

    def at(self, a: int) -> int:
        """For an a beyond which nothing begins."""
        return self._slope * a - self._moment

    def add(self, begin: int, rise: int) -> None:
        index = bisect_left(self._begin, begin)
        if index < len(self._begin) and self._begin[index] == begin:
            self._rise[index] += rise
        elif rise:
            self._begin.insert(index, begin)
            self._rise.insert(index, rise)
        self._slope += rise
        self._moment += rise * begin

    def cut(self, a: int) -> None:
        """Forgets what begins at `a` or later."""
        while self._begin and self._begin[-1] >= a:
            self._forget(len(self._begin) - 1)

    def plus(self, other: _Curve) -> _Curve:
        """The sum. Neither of the two may be used afterwards."""
        less, more = (self, other) if len(self._begin) < len(other._begin) else (other, self)
        for begin, rise in zip(less._begin, less._rise):
            more.add(begin, rise)
        return more

    def level(self, value: int) -> int:
        """Lifts the curve to at least `value`, takes that as the new zero, and returns the first a that is not
        below it."""
        if value <= 0:
            return 0
        reached = slope = position = passed = 0
        for begin, rise in zip(self._begin, self._rise):
            if reached + slope * (begin - position) > value:
                break
            reached += slope * (begin - position)
            slope, position, passed = slope + rise, begin, passed + 1
        last = position + (value - reached) // slope  # the last whole number that is not above
        step = reached + slope * (last + 1 - position) - value
        for _ in range(passed):
            self._forget(0)
        self.add(last, step)
        self.add(last + 1, slope - step)
        return last + (step < slope)

    def _forget(self, index: int) -> None:
        begin, rise = self._begin.pop(index), self._rise.pop(index)
        self._slope -= rise
        self._moment -= rise * begin


def published_groups(tree: PrefixTree, ending: IntArray) -> SingleLevelGroups:
    """BatchLLM's rule as published, on its tree: every prompt ends in a leaf without tokens.

    Children first, for each grandchild g of a child c: if (leaves(g) - 1) * len(g) > len(c), g becomes a sibling of c
    with c's tokens before its own. A child left with a single child of its own is joined with it. What is a grandchild
    once and stays one is part of its parent's group for good.

    Siblings to be are kept in a heap by depth: a short one is passed by, and only one that is no longer than c can
    fail. By then it has doubled in length since it last could, so each is looked at O(log tokens) times.
    """
    return _groups(tree, ending, _join_bottom_up(tree, ending))


def _join_bottom_up(tree: PrefixTree, ending: IntArray) -> IntArray:
    """[nodes] the trie node whose prefix the prompts that end at each node share, themselves if with nobody.

    A unit is a group to be, named by its node: `size` prompts that share the node's tokens. `into` points from a unit
    to the one it has become part of. Single prompts are units that never become siblings: they are only counted.
    """
    size, nodes = _without_lone_leaves(tree, ending)
    depth: list[int] = tree.end.tolist()
    parent: list[int] = tree.parent.tolist()
    into = np.where((ending == 1) & (tree.parent >= 0), tree.parent, np.arange(tree.num_nodes)).tolist()
    units: dict[int, list[_Unit]] = {}  # by node: a heap of the units right below
    for node in nodes:
        into[node] = node
        heap = units.pop(node, [])
        above = parent[node]
        staying = _not_promoted(heap, size, depth[node], depth[node] - (depth[above] if above >= 0 else 0))
        if len(staying) == 1 and size[node] == 0:
            heapq.heappush(heap, staying[0])  # the only one left is joined with the child
        else:
            for _, unit in staying:
                into[unit] = node
                size[node] += size[unit]
            if size[node] > 1:
                heapq.heappush(heap, (depth[node], node))
            elif size[node] and above >= 0:
                into[node] = above
                size[above] += 1
        units[above] = _merged(units.get(above, []), heap)
    return _follow(np.array(into, dtype=np.int64))


def _not_promoted(heap: list[_Unit], size: list[int], depth: int, length: int) -> list[_Unit]:
    """Takes from the heap the units below a node of this depth that do not become its siblings."""
    looked_at = []
    while heap and heap[0][0] <= depth + length:
        looked_at.append(heapq.heappop(heap))
    staying = []
    for unit in looked_at:
        if (size[unit[1]] - 1) * (unit[0] - depth) > length:
            heapq.heappush(heap, unit)
        else:
            staying.append(unit)
    return staying


def _merged(left: list[_Unit], right: list[_Unit]) -> list[_Unit]:
    """Both heaps in one, the smaller one added to the larger one."""
    if len(left) < len(right):
        left, right = right, left
    for unit in right:
        heapq.heappush(left, unit)
    return left


def _follow(into: IntArray) -> IntArray:
    """Where each pointer ends."""
    while True:
        further = into[into]
        if (further == into).all():
            return into
        into = further


def _groups(tree: PrefixTree, ending: IntArray, prefix: IntArray) -> SingleLevelGroups:
    """`prefix`: [nodes] the node whose tokens the prompts that end at each node share, -1: none."""
    holder = np.where((prefix >= 0) & (ending > 0), prefix, tree.num_nodes)
    members = np.bincount(holder, weights=ending, minlength=tree.num_nodes + 1).astype(np.int64)
    node = np.flatnonzero(members[:-1] >= 2)
    index = np.full(tree.num_nodes + 1, -1, dtype=np.int64)
    index[node] = np.arange(len(node))
    return SingleLevelGroups(
        node=node,
        prefix_tokens=tree.end[node],
        members=members[node],
        group=index[holder],
        saved_tokens=int(((members[node] - 1) * tree.end[node]).sum()),
    )
