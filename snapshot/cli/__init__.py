"""The command domsnap."""
