"""Findings: what a check has to say, as values.

A finding has a stable code, a severity, a place and a text. Nothing is printed and nothing raised on the way.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum


class Severity(Enum):
    """How bad a finding is, in qemu-img's terms."""

    LEAK = "leak"  # space is lost, no data in danger
    CORRUPTION = "corruption"  # data in danger or already wrong
    CHECK_ERROR = "check-error"  # the check itself could not look at something


@dataclass(frozen=True, slots=True)
class Finding:
    """One fact found by a check.

    Attributes:
        code: stable identifier, e.g. "leak", "refcount-too-low", "copied-flag-wrong".
        severity: what kind of fact it is.
        text: one line for people, in qemu-img's words where qemu-img has them.
        host_offset: place in the host file in bytes, if there is one.
        guest_offset: guest range start in bytes, if it concerns guest data.
        repairable: whether refcounts alone can heal it without loss.
        count: how many equal facts this finding stands for (qemu-img's counters).
    """

    code: str
    severity: Severity
    text: str
    host_offset: int | None = None
    guest_offset: int | None = None
    repairable: bool = False
    count: int = 1


@dataclass
class CheckReport:
    """The result of one check.

    Attributes:
        findings: all facts, in the order in which the check met them.
        image_end_offset: end of the last used host cluster in bytes.
        total_clusters: guest clusters of the virtual disk.
        allocated_clusters: guest clusters with data, compressed ones included.
        compressed_clusters: guest clusters that are compressed.
        fragmented_clusters: guest clusters that do not follow their predecessor in the host file.
        stopped: why the check could not be completed ("Invalid argument"); None when it was.
    """

    findings: list[Finding] = field(default_factory=list)
    image_end_offset: int = 0
    total_clusters: int = 0
    allocated_clusters: int = 0
    compressed_clusters: int = 0
    fragmented_clusters: int = 0
    stopped: str | None = None

    def count(self, severity: Severity) -> int:
        """How many facts of this severity there are."""
        return sum(f.count for f in self.findings if f.severity is severity)

    @property
    def corruptions(self) -> int:
        """Number of corruptions, as qemu-img counts them."""
        return self.count(Severity.CORRUPTION)

    @property
    def leaks(self) -> int:
        """Number of leaked clusters."""
        return self.count(Severity.LEAK)

    @property
    def check_errors(self) -> int:
        """Number of things that the check could not look at."""
        return self.count(Severity.CHECK_ERROR)
