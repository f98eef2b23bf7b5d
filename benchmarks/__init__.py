"""Every stage against a plain reference of the same work: `python -m benchmarks STAGE`, or `make bench`."""
