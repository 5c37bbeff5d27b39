"""Adapters of PEFT: what their files say, and the tensors of a base as they leave them."""
