"""What every member of a federation must agree on: the wire, the task, configuration, errors, logs."""

import os

# The only place: what is installed is asked with modules that take 4 MB of a small device. On one line, for the build
# reads it from here.
__version__ = "0.1.0"

# onnxruntime 1.29 and newer give each device a lasting identifier and report models and sessions to their maker. Read when
# it is loaded, which is after this. Who wants that sets the variable to 0.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
