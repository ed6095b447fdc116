"""A disk that loses its power: at any step, and with any part of what was not synced.

The steps of the code under test are real, on a real folder; only ``fsync`` is not passed on, but recorded. So at the cut it is
known what is durable: of a file its content at its last ``fsync``, of a folder its entries at the folder's. All else may or may
not be there, each for itself: more than what journalling file systems lose, and about what those without a journal may.
"""

import os
import stat
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self
from unittest.mock import patch

STEPS = (
    "fsync",
    "replace",
    "rename",
    "symlink",
    "link",
    "unlink",
    "mkdir",
    "rmdir",
    "pwrite",
    "posix_fallocate",
)
"""Functions of ``os`` that change a disk, or make sure that it has changed."""

Entry = tuple[str, int | str]
"""A file or a folder by its inode, a symbolic link by its target."""

Choose = Callable[[str], bool]
"""Whether a change that was not synced, described by its argument, has happened."""


class PowerCut(BaseException):
    """Not an ``Exception``: no handler of the code under test may go on."""


class Disk:
    """Counts the steps below a folder while it is entered, and cuts the power before one of them.

    Args:
        root: All that is there at the beginning is durable.
        cut_at: Number of the step that does not happen any more, nor any after it; None lets all happen, and only counts.

    Attributes:
        steps: What has happened, by name.
    """

    def __init__(self, root: Path, cut_at: int | None = None) -> None:
        self.steps: Counter[str] = Counter()
        self._root, self._cut_at = root, cut_at
        self._dead = False
        self._pins: dict[int, int] = {}  # an inode that is held open is never given to another file
        self._folders: dict[int, dict[str, Entry]] = {}
        self._contents: dict[int, bytes] = {}
        self._patches = [patch.object(os, name, self._guarded(name)) for name in STEPS]
        for folder, _, files in os.walk(root) if cut_at is not None else ():
            self._sync_folder(Path(folder))
            for path in (Path(folder) / name for name in files):
                if not path.is_symlink():
                    self._contents[path.stat().st_ino] = path.read_bytes()

    def __enter__(self) -> Self:
        for one in self._patches:
            one.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for one in self._patches:
            one.stop()

    def close(self) -> None:
        """Let the inodes go."""
        for pin in self._pins.values():
            os.close(pin)
        self._pins.clear()

    def after_cut(self, target: Path, choose: Choose) -> None:
        """Write what is there when the power comes back to a new folder."""
        self._restore(self._root.stat().st_ino, self._where(), target, choose)

    def _guarded(self, name: str) -> Callable[..., Any]:
        real = getattr(os, name)

        def step(*arguments: Any, **options: Any) -> Any:
            if self._cut_at is not None:
                self._pin_all()
            if self._dead or self.steps.total() == self._cut_at:
                self._dead = True
                raise PowerCut
            self.steps[name] += 1
            if name != "fsync":
                return real(*arguments, **options)
            return None if self._cut_at is None else self._sync(*arguments)

        return step

    def _sync(self, handle: int) -> None:
        status = os.fstat(handle)
        if stat.S_ISDIR(status.st_mode):
            self._sync_folder(Path(f"/proc/self/fd/{handle}").readlink())
        else:
            self._contents[status.st_ino] = os.pread(handle, status.st_size, 0)

    def _sync_folder(self, folder: Path) -> None:
        self._folders[folder.stat().st_ino] = entries(folder)

    def _pin_all(self) -> None:
        for inode, path in self._where().items():
            if inode not in self._pins:
                self._pins[inode] = os.open(path, os.O_PATH | os.O_NOFOLLOW)

    def _where(self) -> dict[int, Path]:
        found = {self._root.stat().st_ino: self._root}
        for folder, folders, files in os.walk(self._root):
            for path in (Path(folder) / name for name in (*folders, *files)):
                if not path.is_symlink():
                    found[path.stat().st_ino] = path
        return found

    def _restore(self, inode: int, where: dict[int, Path], target: Path, choose: Choose) -> None:
        target.mkdir()
        before = self._folders.get(inode, {})
        now = entries(where[inode]) if inode in where else before
        for name in sorted(before.keys() | now.keys()):
            old, new = before.get(name), now.get(name)
            entry = new if old == new or choose(f"entry {name}") else old
            match entry:
                case ("link", str(link)):
                    (target / name).symlink_to(link)
                case ("folder", int(number)):
                    self._restore(number, where, target / name, choose)
                case ("file", int(number)):
                    (target / name).write_bytes(self._content(number, choose))

    def _content(self, inode: int, choose: Choose) -> bytes:
        path = Path(f"/proc/self/fd/{self._pins[inode]}") if inode in self._pins else self._where()[inode]
        now, durable = path.read_bytes(), self._contents.get(inode)
        if now == durable or choose("content"):
            return now
        torn = now[: len(now) // 2] if choose("half of the content") else b""
        return torn if durable is None else durable


def entries(folder: Path) -> dict[str, Entry]:
    found: dict[str, Entry] = {}
    for path in folder.iterdir():
        if path.is_symlink():
            found[path.name] = "link", str(path.readlink())
        else:
            found[path.name] = "folder" if path.is_dir() else "file", path.stat().st_ino
    return found
