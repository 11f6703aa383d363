"""qcow map: where the data of an image is, as qemu-img's table or JSON."""

from __future__ import annotations
