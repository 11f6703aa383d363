"""What a new image must know of its backing file: that it is there, its format, and its size."""

from __future__ import annotations

from dataclasses import dataclass

from qcowlib.errors import ChainError, EncryptionError, OptionError, QcowError
from qcowlib.image.create_target import same_file
from qcowlib.image.interface import BlockImage
from qcowlib.image.opening import open_image
from qcowlib.image.policy import OpenPolicy
from qcowlib.image.probe import probe_format
from qcowlib.image.references import Reference, backing_reference
from qcowlib.storage.local import open_local


@dataclass(frozen=True)
class BackingFacts:
    """A backing file, as far as it was looked at.

    Attributes:
        path: local path of its file; None when the name describes no local file.
        format: its format, given or found; None when it was not looked at.
        size: size of its disk in bytes; None when it was not looked at.
    """

    path: str | None
    format: str | None = None
    size: int | None = None


def backing_facts(
    image_path: str, backing_file: str, backing_fmt: str | None, *, check: bool, policy: OpenPolicy | None
) -> BackingFacts:
    """Look at a backing file, without reading its guest data.

    Args:
        image_path: name of the image that is to be made.
        backing_file: the name for its header.
        backing_fmt: the backing file's format; None to find it out.
        check: False opens nothing.
        policy: decides about the files that the backing file names in turn; None does not open them.

    Raises:
        ChainError: it cannot be used.
        OptionError: the new image would replace a file of its own backing chain.
    """
    try:
        reference = backing_reference(backing_file, backing_fmt, image_path)
    except ChainError as error:
        if check:
            raise _unusable(error) from error
        return BackingFacts(None)
    if same_file(image_path, reference.path):
        raise OptionError("Error: Trying to create an image with the same filename as the backing file")
    if not check:
        return BackingFacts(reference.path)
    try:
        with _open(reference, policy) as image:
            names = _chain_names(image)
            facts = BackingFacts(reference.path, image.format, image.size)
    except QcowError as error:
        raise _unusable(error) from error
    if any(same_file(image_path, name) for name in names):
        raise OptionError(f"Error: Trying to replace '{image_path}', which is in the chain of the backing file")
    return facts


def _open(reference: Reference, policy: OpenPolicy | None) -> BlockImage:
    """The backing image, shared with whoever writes it: only its metadata is used, so that no passphrase is needed."""
    if reference.format == "qcow2" and _probed(reference) != "qcow2":
        raise ChainError("Image is not in qcow2 format")
    if policy is not None:
        try:
            return open_image(reference, policy=policy, force_share=True)
        except EncryptionError:
            pass
    return open_image(reference, force_share=True, open_backing=False)


def _probed(reference: Reference) -> str:
    if reference.windows:
        return "qcow2"  # the first bytes of the file say nothing about a slice
    with open_local(reference.path, force_share=True) as storage:
        return probe_format(storage)


def _chain_names(image: BlockImage) -> list[str]:
    names = []
    layer: BlockImage | None = image
    while layer is not None:
        names.append(layer.name)
        layer = layer.backing
    return names


def _unusable(error: QcowError) -> ChainError:
    return ChainError(f"{error}\nCould not open backing image.", stock=f"{error.stock}\nCould not open backing image.")
