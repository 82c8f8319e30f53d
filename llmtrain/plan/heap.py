"""How large glibc's heap grows for a sequence of allocations: what makes a CPU process larger than its tensors.

Blocks of at least the mmap threshold are mapped one by one and given back when freed. Smaller ones are cut from the
heap by best fit, and the heap shrinks at its top only. The threshold begins at 128 KiB and rises to the size of each
mapped block that is freed, up to 32 MiB (malloc(3), M_MMAP_THRESHOLD).

Tensors are aligned to 64 bytes (posix_memalign): malloc searches a hole 96 bytes larger than the block and frees the
edges. While autograd records, those edges are taken at once by its small nodes, which live as long as the graph; so the
hole that a tensor leaves is too small for the next one of the same size. That alone makes the heap up to 1.6 times the
live bytes, and it is simulated here (glibc 2.36, malloc/malloc.c, _int_memalign). Once the graph is gone, all merges.
"""

import bisect
from collections.abc import Iterable

BACKWARD = (-1, 0)
"""Event: autograd records no more."""
GRAPH_FREED = (-2, 0)
"""Event: the graph and its nodes are gone."""

_ALIGNMENT = 64
_EXTRA = _ALIGNMENT + 32
_PAGE = 4096
_FIRST_THRESHOLD = 128 * 1024
_LAST_THRESHOLD = 32 * 2**20
_NODE = 256
"""Edges of up to this many bytes are taken by nodes of the graph."""


class Heap:
    """A simulated heap. `high_water` is the most bytes that were resident at a time."""

    def __init__(self) -> None:
        self.high_water = 0
        self._threshold = _FIRST_THRESHOLD
        self._top = self._mapped = 0
        self._recording = True
        self._free: list[tuple[int, int]] = []  # (size, start) of each hole, sorted
        self._size_at: dict[int, int] = {}  # start of a hole -> its size
        self._start_of: dict[int, int] = {}  # end of a hole -> its start
        self._blocks: dict[object, tuple[int | None, int]] = {}  # start, None where mapped; size
        self._edges: list[tuple[int, int]] = []  # under nodes of the graph

    def replay(self, events: Iterable[tuple[object, int]]) -> None:
        """(block, bytes) allocates, (block, 0) releases; `BACKWARD` and `GRAPH_FREED` mark the phases."""
        for event in events:
            block, size = event
            if event == BACKWARD:
                self._recording = False
            elif event == GRAPH_FREED:
                for start, edge in self._edges:
                    self._add_hole(start, edge)
                self._edges, self._recording = [], True
            elif size:
                self._allocate(block, size)
            elif block in self._blocks:
                self._release(block)

    def _allocate(self, block: object, size: int) -> None:
        if size + _EXTRA >= self._threshold:
            pages = -(-(size + _EXTRA) // _PAGE) * _PAGE
            self._mapped += pages
            self._blocks[block] = (None, pages)
        else:
            self._blocks[block] = self._cut(-(-(size + 8) // 16) * 16)
        self.high_water = max(self.high_water, self._top + self._mapped)

    def _cut(self, chunk: int) -> tuple[int, int]:
        needed = chunk + _EXTRA
        place = bisect.bisect_left(self._free, (needed, 0))
        if place < len(self._free):
            found, start = self._free[place]
            self._remove_hole(start)
        else:
            start = self._start_of.get(self._top, self._top)
            if start != self._top:
                self._remove_hole(start)
            self._top = max(self._top, start + needed)
            found = self._top - start
        aligned = start + -(start + 16) % _ALIGNMENT
        if 0 < aligned - start < 32:  # no room for a chunk of its own
            aligned += _ALIGNMENT
        end = start + found
        if end - aligned - chunk < 32:
            chunk = end - aligned
        for edge, size in ((start, aligned - start), (aligned + chunk, end - aligned - chunk)):
            if 0 < size <= _NODE and self._recording:
                self._edges.append((edge, size))
            elif size:
                self._add_hole(edge, size)
        return aligned, chunk

    def _release(self, block: object) -> None:
        start, size = self._blocks.pop(block)
        if start is None:
            self._mapped -= size
            self._threshold = min(max(self._threshold, size), _LAST_THRESHOLD)
        else:
            self._add_hole(start, size)

    def _add_hole(self, start: int, size: int) -> None:
        """With its free neighbours it becomes one; at the top of the heap it is given back where it is large."""
        end = start + size
        if (before := self._start_of.get(start)) is not None:
            self._remove_hole(before)
            start = before
        if (after := self._size_at.get(end)) is not None:
            self._remove_hole(end)
            end += after
        if end == self._top and end - start > 2 * self._threshold:
            self._top = start
            return
        bisect.insort(self._free, (end - start, start))
        self._size_at[start] = end - start
        self._start_of[end] = start

    def _remove_hole(self, start: int) -> None:
        size = self._size_at.pop(start)
        del self._start_of[start + size]
        self._free.pop(bisect.bisect_left(self._free, (size, start)))
