"""From a passphrase to a key: PBKDF2, its cost, and LUKS' anti-forensic splitter.

Source: RFC 8018 (PBKDF2); LUKS on-disk format 1.2.1, "Anti-forensic splitter"; number of iterations as QEMU's
crypto/pbkdf.c chooses it.
"""

from __future__ import annotations

import hashlib
import os
import time

from qcowlib.errors import EncryptionError

#: Hash functions that a LUKS header of QEMU can name, with the bytes of their digests.
DIGEST_LENGTHS = {"md5": 16, "sha1": 20, "sha224": 28, "sha256": 32, "sha384": 48, "sha512": 64, "ripemd160": 20}

# A shorter measurement is enough for a factor, and a creation should not take a second longer for it.
_BENCHMARK_SECONDS = 0.1
_BENCHMARK_ITERATIONS = 1 << 13


def digest(name: str, data: bytes) -> bytes:
    """Hash of `data`; `name` is one of `DIGEST_LENGTHS`.

    Raises:
        EncryptionError: this Python has no such hash function.
    """
    try:
        return hashlib.new(name, data).digest()
    except ValueError as error:
        raise _unavailable(name) from error


def pbkdf2(name: str, secret: bytes, salt: bytes, iterations: int, length: int) -> bytes:
    """`length` bytes of key from a secret, with HMAC of the hash function `name`.

    Raises:
        EncryptionError: this Python has no such hash function.
    """
    try:
        return hashlib.pbkdf2_hmac(name, secret, salt, iterations, length)
    except ValueError as error:
        raise _unavailable(name) from error


def pbkdf2_cost(name: str, iterations: int, length: int) -> int:
    """HMAC computations of a `pbkdf2` call: every digest's worth of key takes all iterations."""
    return iterations * -(-length // DIGEST_LENGTHS[name])


def iterations_per_second(name: str, length: int) -> int:
    """Iterations of `pbkdf2` for `length` bytes of key that this machine does in a second of processor time."""
    iterations = _BENCHMARK_ITERATIONS
    while True:
        start = time.thread_time()
        pbkdf2(name, b"passphrase", bytes(32), iterations, length)
        elapsed = time.thread_time() - start
        if elapsed >= _BENCHMARK_SECONDS:
            return int(iterations / elapsed)
        iterations *= 2 if elapsed > _BENCHMARK_SECONDS / 4 else 4


def split(name: str, key: bytes, stripes: int) -> bytes:
    """Inflate a key to `stripes` times its length, so that all of it is needed to get the key back."""
    stripe = len(key)
    material = os.urandom(stripe * (stripes - 1))
    diffused = _diffuse_stripes(name, material, stripe)
    return material + _xor(diffused, key)


def merge(name: str, material: bytes, stripes: int) -> bytes:
    """The key that `split` was given."""
    stripe = len(material) // stripes
    body = stripe * (stripes - 1)
    return _xor(_diffuse_stripes(name, material[:body], stripe), material[body:])


def _diffuse_stripes(name: str, material: bytes, stripe: int) -> bytes:
    """All stripes folded into one: each is added to the hash of those before it."""
    state = bytes(stripe)
    size = DIGEST_LENGTHS[name]
    pieces = [(number.to_bytes(4, "big"), number * size) for number in range(-(-stripe // size))]
    for start in range(0, len(material), stripe):
        mixed = _xor(state, material[start : start + stripe])
        # Cut because the last piece may be shorter than its digest.
        state = b"".join(digest(name, number + mixed[at : at + size]) for number, at in pieces)[:stripe]
    return state


def _xor(left: bytes, right: bytes) -> bytes:
    return (int.from_bytes(left, "big") ^ int.from_bytes(right, "big")).to_bytes(len(left), "big")


def _unavailable(name: str) -> EncryptionError:
    return EncryptionError(f"Hash algorithm '{name}' is not available in this Python")
