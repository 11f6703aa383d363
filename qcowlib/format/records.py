"""The on-disk records, declared with construct: the only module that calls construct.

A `Record` turns construct's errors into `FormatError`. Tables of entries are declared here too, through `NumpyTable`,
which yields the big-endian array that the rest of the library works on.

Source: qcow2.txt; all numbers are big-endian.
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import construct as c

from qcowlib.errors import FormatError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


# A compiled declaration lets struct's errors through.
_ERRORS = (c.ConstructError, struct.error)


def encode_text(text: str, structure: str) -> bytes:
    """The bytes of a name: UTF-8, surrogate escapes back to the bytes that they stand for.

    Raises:
        FormatError: the text holds half a surrogate pair, which is no text at all.
    """
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        raise FormatError(structure, None, f"the name {text!r} cannot be encoded") from None


def decode_text(stored: bytes) -> tuple[str, bytes]:
    """A stored name as text, and its bytes from the first zero byte on, where the name ends for QEMU."""
    name, zero, rest = stored.partition(b"\0")
    return name.decode("utf-8", "surrogateescape"), zero + rest


class Record:
    """A structure of fixed size: bytes to a dictionary of its fields and back.

    Args:
        fields: construct declarations by field name, in their order on disk.
        repeated: an image may hold many; the parser is compiled at first use (2 ms, then four times as fast).
    """

    def __init__(self, fields: dict[str, c.Construct[Any, Any]], *, repeated: bool = False) -> None:
        self._declaration: c.Construct[Any, Any] = c.Struct(**fields)
        self._names = tuple(fields)
        self._compile = repeated
        self.size: int = self._declaration.sizeof()

    def parse(self, data: bytes, structure: str, host_offset: int | None = None) -> dict[str, Any]:
        """The fields of the record that `data` starts with.

        Args:
            data: at least `size` bytes.
            structure: the specification's word for the record, for the error.
            host_offset: where the record lies, for the error.

        Raises:
            FormatError: `data` is too short.
        """
        try:
            fields = self._ready().parse(data)
        except _ERRORS:
            raise FormatError(structure, host_offset, f"is cut short: {len(data)} of {self.size} bytes") from None
        return {name: fields[name] for name in self._names}

    def build(self, fields: Mapping[str, Any], structure: str) -> bytes:
        """The bytes of a record.

        Raises:
            FormatError: a value does not fit into its field.
        """
        try:
            return self._ready().build(dict(fields))
        except _ERRORS as error:
            raise FormatError(structure, None, f"cannot be written: {str(error).splitlines()[-1]}") from None

    def _ready(self) -> c.Construct[Any, Any]:
        if self._compile:
            self._declaration = self._declaration.compile()
            self._compile = False
        return self._declaration


if TYPE_CHECKING:
    _Adapter = c.Adapter[Any, Any, Any, Any]
else:
    _Adapter = c.Adapter  # cannot be subscripted when it runs


class NumpyTable(_Adapter):
    """A table of equal entries as a one-dimensional numpy array that keeps the order of bytes on disk."""

    def __init__(self, dtype: str) -> None:
        super().__init__(c.GreedyBytes)
        self._dtype = dtype

    def _decode(self, obj: bytes, _context: object, _path: object) -> npt.NDArray[Any]:
        import numpy as np

        return np.frombuffer(obj, dtype=self._dtype)

    def _encode(self, obj: npt.NDArray[Any], _context: object, _path: object) -> bytes:
        return obj.astype(self._dtype, copy=False).tobytes()


_V2_FIELDS: dict[str, c.Construct[Any, Any]] = {
    "magic": c.Bytes(4),
    "version": c.Int32ub,
    "backing_file_offset": c.Int64ub,
    "backing_file_size": c.Int32ub,
    "cluster_bits": c.Int32ub,
    "size": c.Int64ub,
    "crypt_method": c.Int32ub,
    "l1_size": c.Int32ub,
    "l1_table_offset": c.Int64ub,
    "refcount_table_offset": c.Int64ub,
    "refcount_table_clusters": c.Int32ub,
    "nb_snapshots": c.Int32ub,
    "snapshots_offset": c.Int64ub,
}
_V3_FIELDS: dict[str, c.Construct[Any, Any]] = {
    "incompatible_features": c.Int64ub,
    "compatible_features": c.Int64ub,
    "autoclear_features": c.Int64ub,
    "refcount_order": c.Int32ub,
    "header_length": c.Int32ub,
}
HEADER_V2 = Record(_V2_FIELDS)
HEADER_V3 = Record(_V2_FIELDS | _V3_FIELDS)

EXTENSION_HEADER = Record({"magic": c.Int32ub, "length": c.Int32ub})
FEATURE_NAME = Record({"kind": c.Int8ub, "bit": c.Int8ub, "name": c.Bytes(46)})
BITMAPS_EXTENSION = Record(
    {
        "count": c.Int32ub,
        "reserved": c.Int32ub,
        "directory_size": c.Int64ub,
        "directory_offset": c.Int64ub,
    }
)
CRYPTO_EXTENSION = Record({"offset": c.Int64ub, "length": c.Int64ub})

SNAPSHOT_HEADER = Record(
    {
        "l1_table_offset": c.Int64ub,
        "l1_size": c.Int32ub,
        "id_size": c.Int16ub,
        "name_size": c.Int16ub,
        "date_sec": c.Int32ub,
        "date_nsec": c.Int32ub,
        "vm_clock_nsec": c.Int64ub,
        "vm_state_size": c.Int32ub,
        "extra_data_size": c.Int32ub,
    },
    repeated=True,
)

BITMAP_ENTRY = Record(
    {
        "table_offset": c.Int64ub,
        "table_size": c.Int32ub,
        "flags": c.Int32ub,
        "type": c.Int8ub,
        "granularity_bits": c.Int8ub,
        "name_size": c.Int16ub,
        "extra_data_size": c.Int32ub,
    },
    repeated=True,
)

_ENTRY_TABLE = NumpyTable(">u8")


def parse_entry_table(data: bytes) -> npt.NDArray[np.uint64]:
    """An L1, L2, refcount or bitmap table as a '>u8' array; bytes behind the last whole entry are left out."""
    table: npt.NDArray[np.uint64] = _ENTRY_TABLE.parse(data[: len(data) & -8])
    return table


def build_entry_table(table: npt.NDArray[np.uint64]) -> bytes:
    """The bytes of a table of 64-bit entries, whatever the byte order of the array."""
    data: bytes = _ENTRY_TABLE.build(table)
    return data
