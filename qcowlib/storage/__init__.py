"""Bytes at offsets of one host file; nothing here knows qcow2."""
