"""On-disk structures: pure bytes <-> values, no I/O and no state."""
