"""The simulated heap, by hand and against the allocator that this process runs under."""

from llmtrain.plan.heap import BACKWARD, GRAPH_FREED, Heap

KIB = 1024


def high_water(*events: tuple[object, int]) -> int:
    heap = Heap()
    heap.replay(events)
    return heap.high_water


def test_a_block_is_larger_than_was_asked_for_by_its_head_and_alignment():
    assert high_water(("a", 1000)) == 1008 + 96


def test_large_blocks_are_mapped_in_pages_and_given_back():
    one = (200 * KIB + 96 + 4095) // 4096 * 4096
    assert high_water(("a", 200 * KIB)) == one
    assert high_water(("a", 200 * KIB), ("a", 0), ("b", 150 * KIB)) == one  # below the threshold now: from the heap


def test_a_hole_is_too_small_for_its_like_while_autograd_records():
    three = [("a", 50 * KIB), ("b", 50 * KIB), ("a", 0), ("c", 50 * KIB)]
    assert high_water(*three) > 150 * KIB  # c does not fit where a was
    assert high_water(BACKWARD, *three) < 110 * KIB  # the edges are free again: it does


def test_all_merges_once_the_graph_is_gone():
    step = [("a", 50 * KIB), ("b", 50 * KIB), BACKWARD, ("a", 0), ("b", 0), GRAPH_FREED]
    assert high_water(*step) == high_water(*step * 5)


def test_what_lives_is_never_more_than_the_heap():
    events = [(number % 7, 0 if number % 14 >= 7 else 1000 * (1 + number % 11)) for number in range(500)]
    live: dict[object, int] = {}
    most = 0
    for block, size in events:
        live[block] = size
        most = max(most, sum(live.values()))
    assert high_water(*events) >= most
