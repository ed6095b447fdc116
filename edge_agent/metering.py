"""What this device moves, and how far it is: the bytes of a round, the share of a transfer."""

from federation.wire.messages import ObjectRef, RoundTraffic, Traffic


class RoundMeter:
    """Takes the difference of the link's counters over the device's part in each round.

    Attributes:
        last: Of the last round that the device has had a part in; None before the first.
    """

    def __init__(self) -> None:
        self.last: RoundTraffic | None = None
        self._here: tuple[str, int] | None = None
        self._began = Traffic()

    def observe(self, here: tuple[str, int] | None, traffic: Traffic) -> bool:
        """Say where the device stands; call it after every step.

        Args:
            here: Run and round that it is at work for; None between rounds.
            traffic: The counters of its link.

        Returns:
            Whether that ended a round: ``last`` is new.
        """
        if here == self._here:
            return False
        ended = self._here
        if ended is not None:
            moved = traffic.since(self._began)
            if self.last is not None and (self.last.run, self.last.round) == ended:
                moved = moved.plus(self.last.moved)  # a second attempt, after the device declined the first
            self.last = RoundTraffic(run=ended[0], round=ended[1], moved=moved)
        self._here, self._began = here, traffic
        return ended is not None


class UploadShare:
    """How much of an update has gone: what was asked for so far, less what still waits."""

    def __init__(self) -> None:
        self._sha256 = ""
        self._asked: set[int] = set()
        self.total = 0

    @property
    def asked(self) -> int:
        """Chunks asked for, each counted once."""
        return len(self._asked)

    def sent(self, waiting: int) -> int:
        """Chunks that have gone, while so many wait in the link."""
        return max(0, self.asked - waiting)

    def share(self, waiting: int) -> float:
        """The same as a share of all, 0-1; 0 before the first."""
        return self.sent(waiting) / self.total if self.total else 0.0

    def begin(self, ref: ObjectRef) -> bool:
        """This update is on its way. Returns whether it is another one than before."""
        if ref.sha256 == self._sha256:
            return False
        self._sha256, self.total = ref.sha256, ref.chunks
        self._asked.clear()
        return True

    def ask(self, indices: tuple[int, ...]) -> None:
        """Chunks are asked for, for the first time or again."""
        self._asked.update(indices)
