"""From a checkpoint to a model that a device runs."""
