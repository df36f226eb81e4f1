"""Haiku networks: they map symbols `[B, T, F]` to logits `[B, T, K]`."""
