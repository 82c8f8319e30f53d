"""The order of the data: which item stands at a global position, without a list of the order."""

from hashlib import blake2b

ROUNDS = 8


def shuffled(position: int, num_items: int, seed: int) -> int:
    """The item (0 to num_items - 1) at a global position; each epoch is a permutation of its own.

    Epoch is position // num_items. Time and memory do not depend on `position` or `num_items`: a Feistel network, keyed
    by seed and epoch, permutes the smallest power of four that holds `num_items` (at least 16, as two bits mix
    badly), and is applied again while the result is too large (cycle walking).
    Source: Black and Rogaway, Ciphers with Arbitrary Finite Domains, CT-RSA 2002, methods 2 and 3.
    """
    assert position >= 0, "positions count from 0"
    assert num_items > 0, "an order needs items"
    epoch, item = divmod(position, num_items)
    key = blake2b(f"{seed} {epoch}".encode(), digest_size=16).digest()
    half_bits = max(2, ((num_items - 1).bit_length() + 1) // 2)
    while (item := _feistel(item, half_bits, key)) >= num_items:
        pass
    return item


def _feistel(value: int, half_bits: int, key: bytes) -> int:
    """A keyed permutation of the numbers of 2 * half_bits bits."""
    mask = (1 << half_bits) - 1
    left, right = value >> half_bits, value & mask
    for number in range(ROUNDS):
        digest = blake2b(right.to_bytes(8, "little"), digest_size=8, key=key, salt=bytes([number])).digest()
        left, right = right, left ^ (int.from_bytes(digest, "little") & mask)
    return left << half_bits | right
