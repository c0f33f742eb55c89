"""Random seeds by purpose: every generator of a training gets its own, and a resumed run draws the same."""

import hashlib

import numpy as np


def seed_for(seed: int, name: str, index: int = 0) -> int:
    """The seed of random numbers number `index` for the purpose `name`, 0 .. 2⁶³ - 1.

    A function of the three alone. Purposes and indices are independent of each other, whatever their number.
    """
    purpose = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")
    drawn = np.random.SeedSequence([seed, purpose, index]).generate_state(1, np.uint64)[0]
    return int(drawn >> np.uint64(1))
