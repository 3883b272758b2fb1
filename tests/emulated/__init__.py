"""Stages on a device that is emulated in Python, in place of a GPU."""
