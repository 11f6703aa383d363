"""The options of a new image: what they are, their defaults, and the rules between them, in qemu-img's words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypedDict

from qcowlib.addresses import Geometry
from qcowlib.errors import OptionError
from qcowlib.format.constants import (
    COMPRESSION_ZLIB,
    COMPRESSION_ZSTD,
    DEFAULT_CLUSTER_BITS,
    MAX_CLUSTER_BITS,
    MIN_CLUSTER_BITS,
    MIN_EXTENDED_L2_CLUSTER_BITS,
)
from qcowlib.image.drivers import KNOWN_FORMATS
from qcowlib.units import INT64_MAX, round_up

SECTOR_SIZE = 512
PREALLOCATION_MODES = ("off", "metadata", "falloc", "full")
# The longest disk that QEMU's block layer admits.
_MAX_LENGTH = INT64_MAX & ~((1 << 30) - 1)
VERSIONS = {"0.10": 2, "v2": 2, "1.1": 3, "v3": 3}
_COMPRESSION_TYPES = {"zlib": COMPRESSION_ZLIB, "zstd": COMPRESSION_ZSTD}
_ENCRYPTION_FORMATS = ("luks", "aes", "qcow")


class CreationOptions(TypedDict, total=False):
    """Keyword options of `create_image`; those that qemu-img takes with `-o`, with its defaults.

    Keys:
        preallocation: "off" (default), "metadata", "falloc" or "full". raw: "off", "falloc" or "full".
        nocow: turn copy-on-write of the host's file system off for the new file (btrfs).
        compat: "1.1" (version 3, default) or "0.10" (version 2).
        cluster_size: bytes, a power of two from 512 to 2 MiB; default 65536.
        refcount_bits: width of a refcount, a power of two up to 64; default 16.
        extended_l2: L2 entries with 32 subclusters per cluster.
        lazy_refcounts: refcounts may be written late, under the dirty bit.
        compression_type: "zlib" (default) or "zstd", for clusters that are written compressed.
        data_file: name of the external data file; a relative one starts at the process's directory, as for QEMU. It is
            created, or emptied.
        data_file_raw: the data file is always a valid raw image of the disk.
        encrypt_format: "luks", or the outdated "aes"; None (default) for none.
        encrypt_passphrase: the passphrase, as text (UTF-8) or bytes.
        encrypt_cipher_alg, encrypt_cipher_mode, encrypt_ivgen_alg, encrypt_ivgen_hash_alg, encrypt_hash_alg: LUKS
            parameters; default "aes-256", "xts", "plain64", none, "sha256".
        encrypt_iter_time_ms: time to spend on deriving a key, in milliseconds; default 2000.
    """

    preallocation: str
    nocow: bool
    compat: str
    cluster_size: int
    refcount_bits: int
    extended_l2: bool
    lazy_refcounts: bool
    compression_type: str
    data_file: str | None
    data_file_raw: bool
    encrypt_format: str | None
    encrypt_passphrase: str | bytes | None
    encrypt_cipher_alg: str
    encrypt_cipher_mode: str
    encrypt_ivgen_alg: str
    encrypt_ivgen_hash_alg: str | None
    encrypt_hash_alg: str
    encrypt_iter_time_ms: int


RAW_OPTIONS = frozenset({"preallocation", "nocow"})


@dataclass(frozen=True)
class Encryption:
    """How a new image is encrypted.

    Attributes:
        format: "luks" or "aes".
        passphrase: its bytes.
        luks: keyword arguments of `create_luks`.
    """

    format: str
    passphrase: bytes
    luks: LuksParameters


class LuksParameters(TypedDict):
    """Parameters of a new LUKS header."""

    cipher_alg: str
    cipher_mode: str
    ivgen_alg: str
    ivgen_hash_alg: str | None
    hash_alg: str
    iter_time_ms: int


@dataclass(frozen=True)
class Qcow2Options:
    """The options of a new qcow2 image, checked; the terms are those of `CreationOptions`."""

    version: int
    geometry: Geometry
    lazy_refcounts: bool
    compression_type: int
    preallocation: str
    nocow: bool
    backing_file: str | None
    backing_fmt: str | None
    data_file: str | None
    data_file_raw: bool
    encryption: Encryption | None


def refuse_unknown(options: CreationOptions, known: frozenset[str]) -> None:
    """Refuse an option that the format does not have.

    Raises:
        OptionError: it names the first one.
    """
    for name in options:
        if name not in known:
            raise OptionError(f"Invalid parameter '{name}'")


def qcow2_options(options: CreationOptions, backing_file: str | None, backing_fmt: str | None) -> Qcow2Options:
    """Check the options of a qcow2 image and the rules between them.

    Raises:
        OptionError: a value or a combination is invalid; texts and order are qemu-img's.
    """
    refuse_unknown(options, frozenset(CreationOptions.__annotations__))
    if backing_file == "":
        raise OptionError("Expected backing file name, got empty string")
    version = _one_of("version", options.get("compat", "1.1"), VERSIONS)
    compression_type = _one_of("compression-type", options.get("compression_type", "zlib"), _COMPRESSION_TYPES)
    preallocation = options.get("preallocation", "off")
    _one_of("preallocation", preallocation, dict.fromkeys(PREALLOCATION_MODES, True))
    if backing_fmt is not None:
        _one_of("backing-fmt", backing_fmt, dict.fromkeys(KNOWN_FORMATS, True))
    encryption = encryption_of(options)
    extended_l2 = options.get("extended_l2", False)
    if extended_l2 and version < 3:
        raise _needs_version_3("Extended L2 entries are")
    cluster_bits = cluster_bits_of(options.get("cluster_size", 1 << DEFAULT_CLUSTER_BITS), extended_l2)
    if backing_file is not None and preallocation != "off" and not extended_l2:
        raise OptionError("Backing file and preallocation can only be used at the same time if extended_l2 is on")
    if backing_fmt is not None and backing_file is None:
        raise OptionError("Backing format cannot be used without backing file")
    if options.get("lazy_refcounts", False) and version < 3:
        raise _needs_version_3("Lazy refcounts")
    refcount_order = _refcount_order(options.get("refcount_bits", 16), version)
    data_file, data_file_raw = _data_file(options, version, backing_file)
    if compression_type != COMPRESSION_ZLIB and version < 3:
        raise _needs_version_3("Non-zlib compression type is")
    return Qcow2Options(
        version=version,
        geometry=Geometry(cluster_bits, refcount_order, extended_l2),
        lazy_refcounts=options.get("lazy_refcounts", False),
        compression_type=compression_type,
        # What can be read from the data file alone must be mapped one to one.
        preallocation="metadata" if data_file_raw and preallocation == "off" else preallocation,
        nocow=options.get("nocow", False),
        backing_file=backing_file,
        backing_fmt=backing_fmt,
        data_file=data_file,
        data_file_raw=data_file_raw,
        encryption=encryption,
    )


def checked_size(size: int) -> int:
    """The size rounded up to whole sectors.

    Args:
        size: wanted size of the disk in bytes.

    Raises:
        OptionError: negative or too large.
    """
    if not 0 <= size <= INT64_MAX:
        raise OptionError(f"Invalid image size specified. Must be between 0 and {INT64_MAX}.")
    size = round_up(size, SECTOR_SIZE)
    if size > INT64_MAX:
        raise OptionError("Could not resize image: Image size cannot be negative")
    require_length(size, "Could not resize image: ")
    return size


def require_length(size: int, prefix: str = "") -> None:
    """Refuse a disk that is longer than QEMU's block layer admits; `prefix` stands before its text."""
    if size > _MAX_LENGTH:
        raise OptionError(f"{prefix}offset({size}) exceeds maximum({_MAX_LENGTH})")


def _one_of(name: str, value: str, allowed: dict[str, int]) -> int:
    if value not in allowed:
        raise OptionError(f"Parameter '{name}' does not accept value '{value}'")
    return allowed[value]


def _needs_version_3(what: str) -> OptionError:
    return OptionError(f"{what} only supported with compatibility level 1.1 and above (use version=v3 or greater)")


def cluster_bits_of(cluster_size: int, extended_l2: bool) -> int:
    """log2 of a cluster size.

    Raises:
        OptionError: it is not one that the format, or QEMU with extended L2 entries, admits.
    """
    bits = cluster_size.bit_length() - 1
    if cluster_size != 1 << max(bits, 0) or not MIN_CLUSTER_BITS <= bits <= MAX_CLUSTER_BITS:
        smallest, largest = 1 << MIN_CLUSTER_BITS, 1 << (MAX_CLUSTER_BITS - 10)
        raise OptionError(f"Cluster size must be a power of two between {smallest} and {largest}k")
    if extended_l2 and bits < MIN_EXTENDED_L2_CLUSTER_BITS:
        smallest = 1 << MIN_EXTENDED_L2_CLUSTER_BITS
        raise OptionError(f"Extended L2 entries are only supported with cluster sizes of at least {smallest} bytes")
    return bits


def _refcount_order(refcount_bits: int, version: int) -> int:
    order = refcount_bits.bit_length() - 1
    if not 1 <= refcount_bits <= 64 or refcount_bits != 1 << order:
        raise OptionError("Refcount width must be a power of two and may not exceed 64 bits")
    if version < 3 and refcount_bits != 16:
        raise OptionError(
            "Different refcount widths than 16 bits require compatibility level 1.1 or above "
            "(use version=v3 or greater)"
        )
    return order


def _data_file(options: CreationOptions, version: int, backing_file: str | None) -> tuple[str | None, bool]:
    data_file, raw = options.get("data_file"), options.get("data_file_raw", False)
    if raw and data_file is None:
        raise OptionError("data-file-raw requires data-file")
    if raw and backing_file is not None:
        raise OptionError("Backing file and data-file-raw cannot be used at the same time")
    if data_file is not None and version < 3:
        raise _needs_version_3("External data files are")
    if data_file == "":
        raise OptionError("Expected data file name, got empty string")
    return data_file, raw


def encryption_of(options: CreationOptions) -> Encryption | None:
    """The options that begin with "encrypt_"; None where none is given.

    Raises:
        OptionError: one of them is missing or invalid.
    """
    encrypt_format = options.get("encrypt_format")
    if encrypt_format is None:
        if any(name.startswith("encrypt_") and value is not None for name, value in options.items()):
            raise OptionError("Parameter 'encrypt.format' is missing")
        return None
    _one_of("format", encrypt_format, dict.fromkeys(_ENCRYPTION_FORMATS, True))
    passphrase = options.get("encrypt_passphrase")
    if passphrase is None:
        raise OptionError("Parameter 'encrypt.key-secret' is required for cipher")
    return Encryption(
        format="luks" if encrypt_format == "luks" else "aes",
        passphrase=passphrase.encode() if isinstance(passphrase, str) else passphrase,
        luks=LuksParameters(
            cipher_alg=options.get("encrypt_cipher_alg", "aes-256"),
            cipher_mode=options.get("encrypt_cipher_mode", "xts"),
            ivgen_alg=options.get("encrypt_ivgen_alg", "plain64"),
            ivgen_hash_alg=options.get("encrypt_ivgen_hash_alg"),
            hash_alg=options.get("encrypt_hash_alg", "sha256"),
            iter_time_ms=options.get("encrypt_iter_time_ms", 2000),
        ),
    )
