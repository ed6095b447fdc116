"""What every member of a federation must agree on: the wire, the task, configuration, errors, logs."""

from importlib.metadata import version

__version__ = version("fedge")
