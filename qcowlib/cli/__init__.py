"""The command qcow: one module per command."""
