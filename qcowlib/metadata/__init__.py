"""The live structures of one open image: tables, refcounts, mapping, transactions."""
