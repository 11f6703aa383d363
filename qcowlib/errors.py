"""The errors of qcowlib.

    QcowError
     ├── FormatError            the bytes of a file break a rule of the format
     │    ├── UnsupportedFeature     valid, but not something this library can do
     │    └── CorruptMetadata        a table, entry or payload is damaged
     ├── ImageStateError        the operation does not fit the state of the image (read-only, corrupt, closed)
     │    └── ImageLocked            another process holds the image
     ├── ChainError             a backing or data file cannot be used (missing, loop, unusable name)
     │    └── ReferenceDenied        the caller's policy does not allow to open it
     ├── StorageError           the host file failed; `cause` is the OSError
     ├── SnapshotError          a snapshot operation cannot be done (name exists, refcount width too small)
     │    └── NoSuchSnapshot
     ├── BitmapError            an operation on a bitmap cannot be done (name exists, inconsistent)
     │    └── NoSuchBitmap
     ├── EncryptionError        passphrase missing or wrong, unusable cipher
     ├── OptionError            an argument or creation option is invalid
     ├── OutOfRange             a guest range lies outside the image
     └── MissingDependency      an optional package is not installed

Only these leave the library.
"""


class QcowError(Exception):
    """Base of all errors of the library.

    Args:
        message: what failed, in the library's words.
        stock: what qemu-img 7.2 says there, printed by the command line; None: the same as `message`. "{program}" in it
            stands for the program's name.
        errno: QEMU's error number, printed where qemu-img says nothing else; None: the command line prints `stock`.
    """

    def __init__(self, message: str = "", *, stock: str | None = None, errno: int | None = None) -> None:
        self.stock = message if stock is None else stock
        self.errno = errno
        super().__init__(message)


class FormatError(QcowError):
    """Bytes that break a rule of the format.

    Args:
        structure: the structure in the specification's words ("header", "L2 table", "snapshot table").
        host_offset: where in the host file, in bytes; None when the rule concerns no single place.
        rule: the rule that is broken, as a short clause.
        stock, errno: as for `QcowError`.
    """

    def __init__(
        self, structure: str, host_offset: int | None, rule: str, *, stock: str | None = None, errno: int | None = None
    ) -> None:
        self.structure = structure
        self.host_offset = host_offset
        self.rule = rule
        where = "" if host_offset is None else f" at host offset {host_offset:#x}"
        super().__init__(f"{structure}{where}: {rule}", stock=stock, errno=errno)


class UnsupportedFeature(FormatError):
    """A valid feature (or another container format) that cannot be handled."""


class CorruptMetadata(FormatError):
    """Damaged metadata or a damaged payload: the range that needs it cannot be read."""


class ImageStateError(QcowError):
    """The image is in a state that does not allow the operation."""


class ImageLocked(ImageStateError):
    """Another process holds the image in a way that excludes this use.

    Args:
        path: name of the file.
        permission: QEMU's word for the permission that is not to be had ("write", "shared \\"write\\"", ...).
    """

    def __init__(self, path: str, permission: str) -> None:
        self.path = path
        self.permission = permission
        super().__init__(f"Failed to get {permission} lock\nIs another process using the image [{path}]?")


class ChainError(QcowError):
    """A backing file or data file cannot be used."""


class ReferenceDenied(ChainError):
    """The open policy does not allow to open a file that an image names."""


class StorageError(QcowError):
    """The host file could not be opened, read, written or flushed.

    Args:
        name: name of the file.
        action: what was tried ("open", "read", "write", ...).
        cause: the operating system's error.
    """

    def __init__(self, name: str, action: str, cause: OSError) -> None:
        self.name = name
        self.action = action
        self.cause = cause
        super().__init__(f"Could not {action} '{name}': {cause.strerror or cause}", errno=cause.errno)


class SnapshotError(QcowError):
    """A snapshot operation cannot be done; nothing was changed."""


class NoSuchSnapshot(SnapshotError):
    """No snapshot has this id or name."""


class BitmapError(QcowError):
    """An operation on a persistent dirty bitmap cannot be done; nothing was changed."""


class NoSuchBitmap(BitmapError):
    """No bitmap has this name."""


class EncryptionError(QcowError):
    """A passphrase is missing or wrong, or a cipher cannot be used."""


class OptionError(QcowError):
    """An argument or creation option is invalid."""


class OutOfRange(QcowError):
    """A guest range lies outside the image."""


class MissingDependency(QcowError):
    """An optional package is needed for this image."""

    def __init__(self, package: str, extra: str, purpose: str) -> None:
        super().__init__(f"{purpose} needs the package {package}: pip install 'qcowlib[{extra}]'")
