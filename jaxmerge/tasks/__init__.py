"""Data sets with frozen heads: what a model is tuned on and judged by."""
