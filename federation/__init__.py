"""What every member of a federation must agree on: the wire, the task, configuration, errors, logs."""

__version__ = "0.1.0"  # the only place: what is installed is asked with modules that take 4 MB of a small device
