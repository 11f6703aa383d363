"""Compression and encryption: buffers in, buffers out."""
