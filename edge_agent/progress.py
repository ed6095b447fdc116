"""How far this device has come, kept on its disk: what an older plan would be a replay of."""

from pathlib import Path

import msgspec

from federation.errors import ConfigError
from federation.files import write_whole


class Progress(msgspec.Struct, frozen=True):
    """The newest plan that this device has seen.

    Attributes:
        run: Of that plan; empty before the first.
        round: Of that plan.
        done: Whether the device's part in that round is over.
        retired: Runs that were over before it.
    """

    run: str = ""
    round: int = 0
    done: bool = False
    retired: tuple[str, ...] = ()


def read_progress(path: Path) -> Progress:
    """Read it; nothing seen where there is no file.

    Raises:
        ConfigError: If the file is damaged.
    """
    try:
        return msgspec.json.decode(path.read_bytes(), type=Progress)
    except FileNotFoundError:
        return Progress()
    except msgspec.DecodeError as error:
        raise ConfigError(f"{path} is damaged ({error}): delete it") from error


def write_progress(path: Path, progress: Progress) -> None:
    """Write it whole.

    Raises:
        ConfigError: If the disk is full.
    """
    write_whole(path, msgspec.json.encode(progress))
