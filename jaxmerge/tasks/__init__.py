"""Data sets with frozen heads: what a model is tuned and scored on."""
