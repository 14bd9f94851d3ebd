"""Faults at random times under answers of all kinds: `make test-chaos`, `python -m tests.chaos`."""
