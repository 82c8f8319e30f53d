"""Facts about this machine and this process."""

from llmtrain.plan import machine

_MB = 10**6


def test_memory_that_was_given_up_is_not_the_process_s():
    before = machine.resident_bytes()
    blocks = [bytearray(b"x" * 60_000) for _ in range(3_000)]  # from the heap: below malloc's threshold for mapping
    last = blocks[-1]  # on top of the heap, which by itself shrinks from its top only
    del blocks
    kept = machine._status("VmRSS") - before
    assert kept > 150 * _MB, "the control: without asking, malloc keeps them"
    assert machine.resident_bytes() - before < 20 * _MB
    assert len(last) == 60_000


def test_a_probe_times_a_product_of_small_matrices():
    """0.113 GFLOP, at 1 GFLOP/s to 11 TFLOP/s."""
    assert 1e-5 < machine.Probe().product_seconds() < 0.1
