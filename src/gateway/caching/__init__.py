"""Answers of raw models that are given again to the same request: rules, keys, stores, and calls that are shared."""
