"""Tests of the command qcow, side by side with the stock qemu-img."""
