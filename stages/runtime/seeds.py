"""Seeds of random generators."""

import hashlib


def mix_seed(*parts: object) -> int:
    """Return a 63-bit seed from the repr of any parts, the same in every process."""
    return int.from_bytes(hashlib.sha256(repr(parts).encode()).digest()[:8], "big") >> 1
