"""Mutants that no test can notice, and why."""

EXPLAINED: dict[str, dict[str, str]] = {}
