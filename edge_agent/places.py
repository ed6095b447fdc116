"""Where a device keeps what must survive."""

from pathlib import Path

MODELS = "models"
"""Folder of releases (``edge_agent.releases.slots``), within the state."""


def default_state(bundle: Path) -> Path:
    """Beside the bundle, so that what belongs to one identity lies together: ``pi1.bundle.json`` -> ``pi1.state``."""
    return bundle.with_name(bundle.name.split(".")[0] + ".state")
