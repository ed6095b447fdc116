"""One question, one command: ``python -m benchmarks.NAME [--quick] [--json FILE]``."""
