"""Alternating tuning and merging: tune copies on every task, merge them, repeat."""
