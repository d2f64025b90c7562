"""Seeds that are functions of where they are used, so that nothing depends on what ran before."""

import hashlib


def derived_seed(*key: object) -> int:
    """63 bits of a hash of `key`. Hashed, because torch's CPU generator takes the low 32 bits."""
    digest = hashlib.blake2b("/".join(map(str, key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
