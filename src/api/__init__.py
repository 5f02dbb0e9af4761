"""Speaks HTTP: one folder or module per surface, one dispatcher in front of them all."""
