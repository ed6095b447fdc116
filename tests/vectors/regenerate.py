"""Write the wire vectors anew: ``python tests/vectors/regenerate.py``, only when a format changes on purpose."""

import json
from pathlib import Path

from samples import lossy_frames, vectors

FILE = Path(__file__).with_name("wire.json")
FRAMES = Path(__file__).with_name("frames.json")


def main() -> None:
    """Overwrite ``wire.json`` and ``frames.json``."""
    FILE.write_text(json.dumps(vectors(), indent=1) + "\n")
    FRAMES.write_text(json.dumps(lossy_frames(), indent=1) + "\n")


if __name__ == "__main__":
    main()
