"""Runs: how an admitted request is executed and recorded."""
