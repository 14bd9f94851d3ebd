"""Whole hosts: Debian under systemd-nspawn, on a network of their own. `make test-fleet`."""
