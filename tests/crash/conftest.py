"""Counters in small chunks: even small images have several, and most of the time is not spent in clearing them."""

import pytest

from qcowlib.metadata import reference_counts


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference_counts, "MIN_CHUNK_BITS", 10)
    monkeypatch.setattr(reference_counts, "_SLAB_BYTES", 1 << 14)
