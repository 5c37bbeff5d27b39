"""Adapters that PEFT made and merged: one file of arrays, and the script that recorded it."""
