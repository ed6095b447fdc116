"""Error feedback: what an encoding left out of an update is kept, and added to the next one.

Only for encodings that need it (``Encoding.stateful``). Stich et al. 2018 (Sparsified SGD with memory, algorithm 1)::

    sent = encode(update + residual)        residual = update + residual - decode(sent)

::

    FOLDER/residual         in effect: it belongs to the last update that the aggregator took
    FOLDER/next-{sha256}    written before the update of that digest, in effect once a receipt accepts it

If a receipt refuses the update, the former residual stays in effect. If there is none (the round closed meanwhile),
nobody knows whether the update counted: both are dropped, since what is lost is late at worst, but what is sent twice is
wrong.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
import structlog
from msgspec import Meta
from numpy.typing import NDArray

from federation.errors import PeerError
from federation.files import sync_folder, write_whole
from federation.wire.codec import decode, encode, schema_of
from federation.wire.messages import decode_msgpack

log = structlog.get_logger()

Arrays = dict[str, NDArray[np.float32]]

_EXACT = "float32"


class FeedbackKey(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a residual belongs to; it is added to no update of another key.

    Attributes:
        run: The run.
        model: The task's model.
        encoding: That left it out.
        private: Whether the training was private. What a residual of a private training holds was never accounted for
            outside it, and that of another training would carry its data past the noise: neither may cross.
    """

    run: str
    model: str
    encoding: str
    private: bool


class _Kept(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file.

    Attributes:
        key: What the residual belongs to.
        residual: A float32 frame.
    """

    key: FeedbackKey
    residual: Annotated[bytes, Meta(max_length=2**40)]


class Feedback:
    """The residual of one device.

    Args:
        folder: In the agent's state; made when there is something to keep.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._residual = folder / "residual"
        for leftover in folder.glob(".*"):  # power loss in the middle of a write
            leftover.unlink()

    def corrected(self, update: Mapping[str, NDArray[np.float32]], key: FeedbackKey) -> Arrays:
        """Add the residual to an update, if there is one for this key and these shapes; drop it if it is for others.

        Args:
            update: New minus base model.
            key: Of this round.

        Returns:
            New arrays.
        """
        residual = self._read(update, key)
        if residual is None:
            return {name: array.copy() for name, array in update.items()}
        return {name: array + residual[name] for name, array in update.items()}

    def stage(self, sha256: str, key: FeedbackKey, residual: Mapping[str, NDArray[np.float32]]) -> None:
        """Keep what an update leaves out, before the update itself is written.

        Args:
            sha256: Of the encoded update.
            key: Of this round.
            residual: Corrected update minus what is decoded of it.

        Raises:
            ConfigError: If the disk is full, or the residual is not finite.
        """
        self._folder.mkdir(parents=True, exist_ok=True)
        frame = encode(residual, _EXACT, np.random.default_rng())
        write_whole(self._next(sha256), msgspec.msgpack.encode(_Kept(key, frame)))

    def settle(self, sha256: str, *, accepted: bool) -> None:
        """Take a receipt into account; a repeated one changes nothing.

        Args:
            sha256: Of the update.
            accepted: What the receipt says.
        """
        staged = self._next(sha256)
        if not staged.exists():
            return
        if accepted:
            staged.replace(self._residual)
        else:
            staged.unlink()
        sync_folder(self._folder)

    def drop(self, reason: str) -> None:
        """Forget the residual that is in effect.

        Args:
            reason: For the log.
        """
        if self._residual.exists():
            self._residual.unlink()
            log.info("residual_dropped", reason=reason)

    def abandon(self) -> None:
        """Drop an update's residual that no receipt has settled, and with it the former one that went into the update."""
        unsettled = list(self._folder.glob("next-*"))
        if unsettled:
            for path in (*unsettled, self._residual):
                path.unlink(missing_ok=True)
            log.info("residual_dropped", reason="nobody knows whether the update that it went into was taken")

    def _next(self, sha256: str) -> Path:
        return self._folder / f"next-{sha256}"

    def _read(self, update: Mapping[str, NDArray[np.float32]], key: FeedbackKey) -> Arrays | None:
        if not self._residual.exists():
            return None
        try:
            kept = decode_msgpack(self._residual.read_bytes(), _Kept)
            if kept.key == key:
                return decode(kept.residual, schema_of(update), _EXACT)
            reason = "it belongs to another run, model, encoding or privacy"
        except PeerError as error:  # other shapes, a damaged disk
            reason = str(error)
        self.drop(reason)
        return None
