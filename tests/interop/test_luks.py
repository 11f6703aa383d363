"""Encrypted images both ways: what stock QEMU writes we decrypt, what we encrypt stock QEMU opens.

The images are taken apart and put together by hand here, so that these tests depend on nothing but the codecs.
"""

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from qcowlib.codecs.legacy_aes import LegacyAes
from qcowlib.codecs.luks import create_luks, luks_area_length, open_luks
from qcowlib.codecs.luks_info import inspect_luks
from qcowlib.codecs.sector_cipher import ClusterCipher
from qcowlib.errors import EncryptionError
from tests import oracle

CLUSTER = 65536
OFFSET_MASK = 0x00FFFFFFFFFFFE00
CRYPTO_HEADER = 0x0537BE77


def number(data: bytes, offset: int, size: int) -> int:
    return int.from_bytes(data[offset : offset + size], "big")


def crypto_area(data: bytes) -> tuple[int, int]:
    """Offset and length of the header area, from the header extension (version 3, or 2 with a 72-byte header)."""
    at = number(data, 100, 4) if number(data, 4, 4) == 3 else 72
    while True:
        magic, length = number(data, at, 4), number(data, at + 4, 4)
        if magic == CRYPTO_HEADER:
            return number(data, at + 8, 8), number(data, at + 16, 8)
        assert magic != 0
        at += 8 + (length + 7) // 8 * 8


def unlock(data: bytes, passphrase: bytes) -> ClusterCipher:
    offset, length = crypto_area(data)
    area = data[offset : offset + length]
    return open_luks(lambda at, size: area[at : at + size], passphrase, length=length, host_offset=offset)


def guest_content(data: bytes, cipher: ClusterCipher) -> bytes:
    """Active layer of an image with standard clusters only."""
    size, l1 = number(data, 24, 8), number(data, 40, 8)
    content = bytearray(size)
    for guest in range(0, size, CLUSTER):
        l2 = number(data, l1 + guest // (CLUSTER // 8 * CLUSTER) * 8, 8) & OFFSET_MASK
        entry = number(data, l2 + guest // CLUSTER % (CLUSTER // 8) * 8, 8) if l2 else 0
        host = entry & OFFSET_MASK
        if host and not entry & 1:
            stored = data[host : host + CLUSTER].ljust(CLUSTER, b"\0")
            content[guest : guest + CLUSTER] = cipher.decrypt(stored, guest if cipher.by_guest_offset else host)
    return bytes(content)


def handmade_image(clusters: dict[int, bytes], area: bytes, cipher: ClusterCipher) -> bytes:
    """A qcow2 file of 64 clusters with the header area and some guest clusters (index -> 64 KiB)."""
    area_clusters = -(-len(area) // CLUSTER)
    first_data = 5 + area_clusters
    total = first_data + len(clusters)
    fields = [(0x514649FB, 4), (3, 4), (0, 8), (0, 4), (16, 4), (64 * CLUSTER, 8), (2, 4), (1, 4), (3 * CLUSTER, 8)]
    fields += [(CLUSTER, 8), (1, 4), (0, 4), (0, 8), (0, 8), (0, 8), (0, 8), (4, 4), (104, 4)]
    fields += [(CRYPTO_HEADER, 4), (16, 4), (5 * CLUSTER, 8), (len(area), 8), (0, 8)]
    header = b"".join(value.to_bytes(size, "big") for value, size in fields)
    refcount_table = (2 * CLUSTER).to_bytes(8, "big")
    refcount_block = b"\0\1" * total
    l1_table = (1 << 63 | 4 * CLUSTER).to_bytes(8, "big")
    l2_table = bytearray(CLUSTER)
    body = b""
    for position, (index, content) in enumerate(clusters.items()):
        host = (first_data + position) * CLUSTER
        l2_table[index * 8 : index * 8 + 8] = (1 << 63 | host).to_bytes(8, "big")
        body += cipher.encrypt(content, index * CLUSTER if cipher.by_guest_offset else host)
    tables = (header, refcount_table, refcount_block, l1_table, bytes(l2_table))
    return b"".join(part.ljust(CLUSTER, b"\0") for part in tables) + area.ljust(area_clusters * CLUSTER, b"\0") + body


def secrets(passphrase: str, name: str = "s") -> tuple[str, str]:
    return "--object", f"secret,id={name},data={passphrase}"


def image_options(path: Path, name: str = "s") -> str:
    return f"driver=qcow2,file.filename={path},encrypt.key-secret={name}"


def qemu_content(path: Path, passphrase: str) -> bytes:
    raw = path.with_suffix(".content")
    oracle.qemu_img("convert", *secrets(passphrase), "--image-opts", image_options(path), "-O", "raw", raw)
    return raw.read_bytes()


def write_patterns(path: Path, passphrase: str) -> bytes:
    """Write some ranges with qemu-io; the content that must be there then."""
    expected = bytearray(4 << 20)
    commands = []
    for offset, length, byte in ((0, 512, 0x11), (65536, 131072, 0x22), (1 << 20, 4096, 0x33), (3999744, 1024, 0x44)):
        expected[offset : offset + length] = bytes([byte]) * length
        commands += ["-c", f"write -P {byte} {offset} {length}"]
    done = oracle.run("qemu-io", *secrets(passphrase), *commands, "--image-opts", image_options(path))
    assert "failed" not in done.stdout
    return bytes(expected)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cipher-alg": "aes-128", "cipher-mode": "cbc", "ivgen-alg": "essiv", "hash-alg": "sha1"},
        {"cipher-alg": "aes-192", "ivgen-alg": "plain", "ivgen-hash-alg": "sha512", "hash-alg": "ripemd160"},
    ],
    ids=lambda options: "-".join(options.values()) or "default",
)
def test_qemu_creates_and_writes(options: dict[str, str], tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    chosen = "".join(f",encrypt.{name}={value}" for name, value in options.items())
    create = f"encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10{chosen}"
    oracle.qemu_img("create", "-q", *secrets("secret"), "-f", "qcow2", "-o", create, path, "4M")
    expected = write_patterns(path, "secret")
    data = path.read_bytes()
    cipher = unlock(data, b"secret")
    assert cipher.by_guest_offset is False
    assert guest_content(data, cipher) == expected
    with pytest.raises(EncryptionError, match=r"^Invalid password, cannot unlock any keyslot$"):
        unlock(data, b"Secret")
    offset, length = crypto_area(data)
    assert length == luks_area_length(options.get("cipher-alg", "aes-256"), options.get("cipher-mode", "xts"))
    assert info_as_qemu_prints_it(data[offset : offset + 592]) == qemu_info(path)


def info_as_qemu_prints_it(area: bytes) -> dict[str, Any]:
    """`inspect_luks` in the keys of `qemu-img info --output=json`."""
    info = inspect_luks(area)
    slots = [{name: value for name, value in vars(slot).items() if value is not None} for slot in info.slots]
    fields = {name: value for name, value in vars(info).items() if value is not None}
    return {"format": "luks"} | dashed(fields | {"slots": [dashed(slot) for slot in slots]})


def dashed(fields: dict[str, Any]) -> dict[str, Any]:
    return {name.replace("_", "-"): value for name, value in fields.items()}


def qemu_info(path: Path) -> dict[str, Any]:
    encrypt: dict[str, Any] = oracle.image_info(path)["format-specific"]["data"]["encrypt"]
    return encrypt


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"cipher_alg": "aes-128"},
        {"cipher_alg": "aes-192"},
        {"cipher_mode": "cbc"},
        {"cipher_mode": "ctr"},
        {"cipher_mode": "ecb"},
        {"cipher_alg": "aes-128", "cipher_mode": "cbc", "ivgen_alg": "plain"},
        {"cipher_mode": "cbc", "ivgen_alg": "essiv"},
        {"cipher_alg": "aes-128", "cipher_mode": "ctr", "ivgen_alg": "essiv", "ivgen_hash_alg": "sha256"},
        {"ivgen_alg": "essiv", "ivgen_hash_alg": "md5"},
        {"ivgen_hash_alg": "sha1"},
        {"cipher_alg": "cast5-128", "cipher_mode": "cbc"},
        {"cipher_alg": "cast5-128", "cipher_mode": "ecb"},
        {"cipher_alg": "cast5-128", "cipher_mode": "ctr"},
        {"cipher_alg": "cast5-128", "cipher_mode": "cbc", "ivgen_alg": "essiv", "ivgen_hash_alg": "md5"},
        *({"hash_alg": name} for name in ("md5", "sha1", "sha224", "sha384", "sha512", "ripemd160")),
    ],
    ids=lambda options: "-".join(options.values()) or "default",
)
def test_qemu_opens_what_we_create(options: dict[str, str], tmp_path: Path) -> None:
    area, cipher = create_luks(b"secret", iter_time_ms=0, **options)
    clusters = {n: hashlib.shake_128(bytes([n])).digest(CLUSTER) for n in (0, 5, 63)}
    path = tmp_path / "a.qcow2"
    path.write_bytes(handmade_image(clusters, area, cipher))
    oracle.qemu_img("check", *secrets("secret"), "--image-opts", image_options(path))
    assert info_as_qemu_prints_it(area) == qemu_info(path)
    content = qemu_content(path, "secret")
    expected = b"".join(clusters.get(n, bytes(CLUSTER)) for n in range(64))
    assert content == expected
    wrong = oracle.run(
        "qemu-io", *secrets("other"), "-c", "read 0 512", "--image-opts", image_options(path), check=False
    )
    assert "Invalid password, cannot unlock any keyslot" in wrong.stderr
    # What QEMU writes with our key reads back here, through the header and through the cipher that made it.
    oracle.run("qemu-io", *secrets("secret"), "-c", "write -P 0x5a 1M 64k", "--image-opts", image_options(path))
    data = path.read_bytes()
    expected = expected[: 1 << 20] + b"\x5a" * CLUSTER + expected[(1 << 20) + CLUSTER :]
    assert guest_content(data, unlock(data, b"secret")) == expected
    assert guest_content(data, cipher) == expected


def test_qemu_adds_and_erases_key_slots_in_our_header(tmp_path: Path) -> None:
    area, cipher = create_luks(b"first", iter_time_ms=0)
    path = tmp_path / "a.qcow2"
    path.write_bytes(handmade_image({1: b"\x77" * CLUSTER}, area, cipher))
    amend: Callable[..., object] = lambda *options: oracle.qemu_img(  # noqa: E731
        "amend",
        *secrets("first"),
        *secrets("second", "t"),
        "-o",
        ",".join(options),
        "--image-opts",
        image_options(path),
    )
    amend("encrypt.state=active", "encrypt.new-secret=t", "encrypt.keyslot=5", "encrypt.iter-time=10")
    data = path.read_bytes()
    for passphrase in (b"first", b"second", b"second\0and what follows a NUL"):
        assert guest_content(data, unlock(data, passphrase))[CLUSTER : 2 * CLUSTER] == b"\x77" * CLUSTER
    amend("encrypt.state=inactive", "encrypt.old-secret=s")
    data = path.read_bytes()
    assert guest_content(data, unlock(data, b"second"))[CLUSTER : 2 * CLUSTER] == b"\x77" * CLUSTER
    with pytest.raises(EncryptionError, match="Invalid password"):
        unlock(data, b"first")
    assert [slot.active for slot in inspect_luks(data[slice(*area_bounds(data))]).slots] == [False] * 5 + [
        True,
        False,
        False,
    ]


def area_bounds(data: bytes) -> tuple[int, int]:
    offset, length = crypto_area(data)
    return offset, offset + length


def test_a_cipher_that_only_qemu_has(tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    create = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10,encrypt.cipher-alg=serpent-256"
    oracle.qemu_img("create", "-q", *secrets("secret"), "-f", "qcow2", "-o", create, path, "1M")
    data = path.read_bytes()
    assert info_as_qemu_prints_it(data[slice(*area_bounds(data))]) == qemu_info(path)
    with pytest.raises(EncryptionError, match="'serpent-256' is not available"):
        unlock(data, b"secret")


@pytest.mark.parametrize("passphrase", ["secret", "longer than sixteen bytes"])
def test_legacy_aes_both_ways(passphrase: str, tmp_path: Path) -> None:
    path = tmp_path / "a.qcow2"
    create = "encrypt.format=aes,encrypt.key-secret=s"
    oracle.qemu_img("create", "-q", *secrets(passphrase), "-f", "qcow2", "-o", create, path, "4M")
    expected = write_patterns(path, passphrase)
    cipher = LegacyAes(passphrase.encode())
    data = path.read_bytes()
    assert guest_content(data, cipher) == expected
    # The other way round: replace the cluster at guest 64 KiB by bytes that we encrypt.
    l2 = number(data, number(data, 40, 8), 8) & OFFSET_MASK
    host = number(data, l2 + 8, 8) & OFFSET_MASK
    ours = hashlib.shake_128(b"ours").digest(CLUSTER)
    path.write_bytes(data[:host] + cipher.encrypt(ours, CLUSTER) + data[host + CLUSTER :])
    assert qemu_content(path, passphrase) == expected[:CLUSTER] + ours + expected[2 * CLUSTER :]


@pytest.mark.corpus
def test_corpus_content(corpus: Path, manifest: dict[str, Any], tmp_path: Path) -> None:
    entries = [entry for entry in manifest["images"] if entry["group"] == "encryption"]
    assert entries
    for entry in entries:
        path = Path(shutil.copy(corpus / entry["file"], tmp_path))
        data = path.read_bytes()
        encrypt = entry["answers"]["info"]["json"]["format-specific"]["data"]["encrypt"]
        for passphrase in (entry["secret"], entry.get("secret2")):
            if passphrase is None:
                continue
            if encrypt["format"] == "aes":
                cipher: ClusterCipher = LegacyAes(passphrase.encode())
            else:
                cipher = unlock(data, passphrase.encode())
                assert info_as_qemu_prints_it(data[slice(*area_bounds(data))]) == encrypt
            answer = entry["answers"]["content"]
            content = guest_content(data, cipher)
            assert (len(content), hashlib.sha256(content).hexdigest()) == (answer["virtual_size"], answer["sha256"])
