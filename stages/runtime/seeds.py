"""Seeds of random choices."""

import hashlib


def mix_seed(*parts: object) -> int:
    """A 63-bit seed from any printable parts; the same in every process."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1
