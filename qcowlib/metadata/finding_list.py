"""Findings gathered with a limit: single lines for the first ones, exact numbers for all.

A damaged image can hold millions of equal facts, a hostile one billions. The first `limit` become findings of their
own; what is left over is one finding for each code at the end, which counts the rest.
"""

from __future__ import annotations

from collections import Counter

from qcowlib.findings import Finding, Severity

DEFAULT_LIMIT = 100_000


class FindingList:
    """A growing list of findings.

    Args:
        limit: findings that are kept one by one.
    """

    def __init__(self, limit: int = DEFAULT_LIMIT) -> None:
        self._limit = limit
        self._items: list[Finding] = []
        self._rest: Counter[tuple[str, Severity, bool]] = Counter()

    @property
    def room(self) -> int:
        """How many more findings are kept one by one."""
        return max(0, self._limit - len(self._items))

    def add(
        self,
        code: str,
        text: str,
        severity: Severity = Severity.CORRUPTION,
        *,
        host_offset: int | None = None,
        guest_offset: int | None = None,
        repairable: bool = False,
        count: int = 1,
    ) -> None:
        """Add one fact (with `count` for one that stands for several)."""
        if self.room:
            self._items.append(Finding(code, severity, text, host_offset, guest_offset, repairable, count))
        else:
            self._rest[code, severity, repairable] += count

    def add_rest(
        self, code: str, count: int, severity: Severity = Severity.CORRUPTION, *, repairable: bool = False
    ) -> None:
        """Add facts that are only counted."""
        if count:
            self._rest[code, severity, repairable] += count

    def result(self) -> list[Finding]:
        """All findings in the order in which they were added, then what was only counted."""
        rest = [
            Finding(code, severity, f"{count} more of the kind '{code}'", repairable=repairable, count=count)
            for (code, severity, repairable), count in self._rest.items()
        ]
        return self._items + rest

    def __bool__(self) -> bool:
        return bool(self._items or self._rest)
