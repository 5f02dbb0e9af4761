"""The tests, importable as `tests.support…` from the repository's root."""
