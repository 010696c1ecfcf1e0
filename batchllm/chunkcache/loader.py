"""Reads chunks from the store ahead of their use, in a thread of its own.

In the order of the plan; of the nodes that the next step uses, layer by layer: the model computes one layer while the
next is decoded and turned to its place.

The files of a node are read and their checksums compared before its first layer is decoded, and before the scheduler is
told what the node need not compute: damage is found while it can still be computed instead.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from batchllm.chunkcache.chunk_file import Bytes, DamagedChunk
from batchllm.chunkcache.codecs import Codec, codec_named
from batchllm.chunkcache.host_tier import HostTier
from batchllm.chunkcache.key_rotation import PlacedKeys
from batchllm.chunkcache.node_chunks import NodeChunks, Part
from batchllm.executor.kv_buffers import LayerKv


class LoadEvent(NamedTuple):
    """What the loader or the model's thread did from `begin` to `end`, in seconds of time.perf_counter."""

    what: str  # read or decode, by the loader; compute, or wait for the loader, by the model's thread
    node: int  # -1: of all nodes of a step
    layer: int  # -1: of all layers
    begin: float
    end: float


@dataclass
class LoaderStats:
    read_bytes: int = 0  # from disk
    load_seconds: float = 0.0  # in which the loader worked
    wait_seconds: float = 0.0  # in which the model waited for it
    parts: int = 0
    peak_bytes: int = 0  # decoded and not yet written, at most


class LoadingNode:
    """The stored KV of one node on its way. Whoever waits for a part of it waits here."""

    def __init__(self, node: int, parts: Sequence[Part]):
        self.node, self.wanted = node, list(parts)
        self.parts: list[Part] = []  # that are good, once `checked`
        self.bad: list[tuple[Part, str]] = []
        self.sections: list[Sequence[Bytes]] = []
        self.layers: list[tuple[Tensor, Tensor] | None] = []
        self.checked = threading.Event()
        self.ready: list[threading.Event] = []
        self.failure: BaseException | None = None
        self.num_bytes = 0
        # Of the loader:
        self.fetched = False  # the next step uses it
        self.num_decoded = 0  # layers
        self.places: PlacedKeys | None = None

    def positions(self) -> Tensor:
        return torch.cat([torch.arange(part.begin, part.end) for part in self.parts])


@dataclass
class KvShapes:
    """Of the model whose chunks are loaded."""

    layers: Sequence[LayerKv]
    dtype: torch.dtype
    codecs: dict[str, Codec] = field(default_factory=dict)

    def codec(self, name: str) -> Codec:
        if name not in self.codecs:
            self.codecs[name] = codec_named(name, self.dtype)
        return self.codecs[name]

    def token_bytes(self) -> int:
        values = sum(layer.heads * (layer.key_dim + layer.value_dim) for layer in self.layers)
        return values * self.dtype.itemsize


class ChunkLoader:
    """Loads for one plan. `ahead_bytes` bounds what is decoded and not yet used, but for one node at a time."""

    def __init__(
        self,
        nodes: NodeChunks,
        tier: HostTier,
        first_access: dict[int, int],
        rotation: PlacedKeys,
        shapes: KvShapes,
        ahead_bytes: int,
        trace: list[LoadEvent] | None = None,
    ):
        """`rotation`: of every position of the longest prompt."""
        self.stats = LoaderStats()
        self.trace = trace
        self._nodes, self._tier, self._first_access = nodes, tier, first_access
        self._rotation, self._shapes, self._ahead_bytes = rotation, shapes, ahead_bytes
        self._ahead = deque(first_access)
        self._urgent: deque[LoadingNode] = deque()
        self._started: dict[int, LoadingNode] = {}
        self._decoding: list[LoadingNode] = []  # read, with layers left to decode
        self._held_bytes = 0
        self._closed = False
        self._change = threading.Condition()
        self._thread = threading.Thread(target=self._work, name="chunk loader", daemon=True)
        self._thread.start()

    def fetch(self, node: int) -> LoadingNode:
        """The node, its files checked. Earlier nodes that were loaded ahead and never fetched are given up."""
        with self._change:
            for passed in [number for number in self._started if number < node]:
                self._give_up(self._started.pop(passed))
            loading = self._started.pop(node, None)
            while self._ahead and self._ahead[0] <= node:
                self._ahead.popleft()
            if loading is None:
                loading = LoadingNode(node, self._nodes.parts(node))
                self._urgent.append(loading)
            loading.fetched = True
            self._change.notify_all()
        self._wait(loading.checked, loading, -1)
        return loading

    def layer(self, loading: LoadingNode, layer: int) -> tuple[Tensor, Tensor]:
        """(K at its positions, V) [tokens of all parts, heads, dim] of one layer."""
        self._wait(loading.ready[layer], loading, layer)
        found = loading.layers[layer]
        assert found is not None
        return found

    def release(self, loading: LoadingNode) -> None:
        """All its layers have been used."""
        with self._change:
            self._give_up(loading)
            self._change.notify_all()

    def _give_up(self, loading: LoadingNode) -> None:
        self._held_bytes -= loading.num_bytes
        self._end_decoding(loading)

    def _end_decoding(self, loading: LoadingNode) -> None:
        if loading in self._decoding:
            self._decoding.remove(loading)

    def close(self) -> None:
        """Stops the thread, wherever it is."""
        with self._change:
            self._closed = True
            self._change.notify_all()
        self._thread.join()

    def note(self, what: str, node: int, layer: int, begin: float) -> float:
        """Adds to the trace; returns the seconds since `begin`."""
        end = time.perf_counter()
        if self.trace is not None:
            self.trace.append(LoadEvent(what, node, layer, begin, end))
        return end - begin

    def _wait(self, event: threading.Event, loading: LoadingNode, layer: int) -> None:
        if not event.is_set():
            begin = time.perf_counter()
            event.wait()
            self.stats.wait_seconds += self.note("wait", loading.node, layer, begin)
        if loading.failure is not None:
            raise loading.failure

    # ---- the thread

    @torch.inference_mode()
    def _work(self) -> None:
        while (task := self._next()) is not None:
            do, loading = task
            try:
                do(loading)
            except BaseException as failure:  # the model's thread raises it
                loading.failure = failure
                loading.checked.set()
                for event in loading.ready:
                    event.set()
                with self._change:
                    self._end_decoding(loading)

    def _next(self) -> tuple[Callable[[LoadingNode], None], LoadingNode] | None:
        """What to do next: read what the scheduler waits for, decode a layer, or read the next node of the plan, if
        there is room. None: closed."""
        with self._change:
            while not self._closed:
                if self._urgent:
                    loading = self._urgent.popleft()
                    self._hold(loading)
                    return self._read, loading
                if self._decoding:
                    return self._decode, self._most_needed()
                if self._ahead:
                    loading = LoadingNode(self._ahead[0], self._nodes.parts(self._ahead[0]))
                    if not self._held_bytes or self._held_bytes + self._size(loading) <= self._ahead_bytes:
                        self._started[self._ahead.popleft()] = loading
                        self._hold(loading)
                        return self._read, loading
                self._change.wait()
            return None

    def _most_needed(self) -> LoadingNode:
        """Of the nodes of the next step the one with fewest layers, else the first one of later steps."""
        fetched = [loading for loading in self._decoding if loading.fetched]
        return min(fetched, key=lambda loading: loading.num_decoded) if fetched else self._decoding[0]

    def _hold(self, loading: LoadingNode) -> None:
        loading.num_bytes = self._size(loading)
        self._held_bytes += loading.num_bytes
        self.stats.peak_bytes = max(self.stats.peak_bytes, self._held_bytes)

    def _size(self, loading: LoadingNode) -> int:
        return sum(part.end - part.begin for part in loading.wanted) * self._shapes.token_bytes()

    def _read(self, loading: LoadingNode) -> None:
        begin = time.perf_counter()
        access = self._first_access.get(loading.node)
        for index, part in enumerate(loading.wanted):
            try:
                sections = self._sections(part)
            except (DamagedChunk, OSError) as problem:
                loading.bad.append((part, str(problem)))
                continue
            loading.parts.append(part)
            loading.sections.append(sections)
            if access is not None:
                self._tier.use(part.variant.number, access + index, sections)
        self._first_access.pop(loading.node, None)  # a node that comes back is no access of the plan
        layers = len(self._shapes.layers)
        loading.layers = [None] * layers
        loading.ready = [threading.Event() for _ in range(layers)]
        if loading.parts:
            loading.places = self._rotation.select(loading.positions())
            with self._change:
                self._decoding.append(loading)
        self.stats.load_seconds += self.note("read", loading.node, -1, begin)
        self.stats.parts += len(loading.parts)
        loading.checked.set()

    def _decode(self, loading: LoadingNode) -> None:
        """Its next layer."""
        begin, layer = time.perf_counter(), loading.num_decoded
        loading.layers[layer] = self._decoded(loading, layer)
        loading.ready[layer].set()
        loading.num_decoded += 1
        self.stats.load_seconds += self.note("decode", loading.node, layer, begin)
        if loading.num_decoded == len(loading.layers):
            with self._change:
                self._end_decoding(loading)

    def _sections(self, part: Part) -> Sequence[Bytes]:
        """The KV of every layer as it is stored, checked."""
        held = self._tier.get(part.variant.number)
        if held is not None:
            return held
        file = self._nodes.lookup.store.open(part.variant.name, part.variant.tokens)
        if file is None:
            raise DamagedChunk(
                f"{self._nodes.lookup.store.folder.chunk(part.variant.name)}: is gone or damaged"
            )
        wanted = [(layer.heads, layer.key_dim, layer.value_dim) for layer in self._shapes.layers]
        if [file.layer_shape(index) for index in range(file.num_layers)] != wanted:
            raise DamagedChunk(f"{file.path}: its layers do not have the shapes of this model's")
        sections = [file.layer(index).copy() for index in range(file.num_layers)]
        self.stats.read_bytes += sum(section.nbytes for section in sections)
        return sections

    def _decoded(self, loading: LoadingNode, layer: int) -> tuple[Tensor, Tensor]:
        assert loading.places is not None
        shape, dtype = self._shapes.layers[layer], self._shapes.dtype
        keys, values = [], []
        for part, sections in zip(loading.parts, loading.sections):
            codec, count = self._shapes.codec(part.variant.codec), len(part.variant.tokens)
            data = torch.from_numpy(sections[layer])
            end = codec.num_bytes(count, shape.heads, shape.key_dim, "key")
            tokens = slice(part.first, part.end - part.chunk.begin)
            keys.append(codec.decode(data[:end], count, shape.heads, shape.key_dim, "key", dtype)[tokens])
            values.append(
                codec.decode(data[end:], count, shape.heads, shape.value_dim, "value", dtype)[tokens]
            )
        return loading.places.apply(layer, torch.cat(keys)), torch.cat(values)
