"""Measurements that take longer than a test: `edgefm bench`."""
