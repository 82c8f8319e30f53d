"""Which sequences share a row: best-fit packing, and long documents cut into pieces that fit.

Packing does not look at the order of training: a split is packed once, and each epoch shuffles the rows.
"""

from bisect import bisect_left, insort
from collections import deque

import numpy as np
import numpy.typing as npt


def best_fit(lengths: npt.ArrayLike, capacity: int) -> list[list[int]]:
    """Indices of the sequences of each row, by best-fit decreasing.

    From the longest sequence to the shortest, each goes into the row with the least room that still holds it, equal
    lengths by index, equal rooms first come, first filled; a new row is opened where none holds it. At most 11/9 of
    the fewest possible rows, plus four, in O(n log n). Raises ValueError for lengths outside 1 to `capacity`.
    Source: Ding et al., arXiv 2404.10830, section 3; the bound: Johnson et al., SIAM J. Comput. 3 (1974).
    """
    sizes = np.asarray(lengths, dtype=np.int64)
    if len(sizes) and (sizes.min() < 1 or sizes.max() > capacity):
        raise ValueError(f"lengths of {sizes.min()} to {sizes.max()} tokens do not all fit rows of 1 to {capacity}")
    rows: list[list[int]] = []
    rows_with_room: dict[int, deque[int]] = {}
    rooms: list[int] = []  # the keys of rows_with_room, sorted
    order = np.argsort(-sizes, kind="stable")
    for index, size in zip(order.tolist(), sizes[order].tolist(), strict=True):
        place = bisect_left(rooms, size)
        if place == len(rooms):
            row, room = len(rows), capacity
            rows.append([])
        else:
            room = rooms[place]
            row = rows_with_room[room].popleft()
            if not rows_with_room[room]:
                del rows_with_room[room], rooms[place]
        rows[row].append(index)
        if room > size:
            if room - size not in rows_with_room:
                rows_with_room[room - size] = deque()
                insort(rooms, room - size)
            rows_with_room[room - size].append(row)
    return rows


def pieces(offsets: npt.NDArray[np.int64], capacity: int) -> npt.NDArray[np.int64]:
    """[pieces, 2] where each piece of the documents starts and stops in their stream of tokens, in its order.

    `offsets` [documents + 1] are those of `TokenShards`. A document is cut every `capacity` tokens, and only its last
    piece may be shorter; empty documents have none. Each token is in one piece; the first of each is predicted by
    nothing that the piece holds.
    """
    lengths = np.diff(offsets)
    num_pieces = -(-lengths // capacity)
    document = np.repeat(np.arange(len(lengths)), num_pieces)
    number = np.arange(len(document)) - (np.cumsum(num_pieces) - num_pieces)[document]
    starts = np.asarray(offsets)[document] + number * capacity
    stops = np.minimum(starts + capacity, np.asarray(offsets)[document + 1])
    return np.stack([starts, stops], axis=1)
