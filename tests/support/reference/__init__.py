"""Slow transcriptions of the papers in NumPy: an independent word on every method."""
