"""What can go wrong with a promise of privacy. The texts are meant for the person who must act."""

from enum import Enum
from pathlib import Path


class PrivacyError(Exception):
    """Base of all errors that this package raises on purpose."""


class TermsError(PrivacyError):
    """What was asked for cannot be done privately: a setting or the data does not fit."""


class OverBudgetError(PrivacyError):
    """It would cost more than may be spent.

    Attributes:
        spent: Epsilon so far.
        limit: Of epsilon.
    """

    def __init__(self, message: str, *, spent: float, limit: float) -> None:
        super().__init__(message)
        self.spent = spent
        self.limit = limit


class LedgerError(PrivacyError):
    """A ledger is not what it should be: nothing may be spent on its word."""


_UNPROVEN = "No image and no model is lost, but what this device has spent can no longer be proven, so it trains no more privately"
_BEGIN_ANEW = (
    "If an undamaged copy that is as new as the last round exists, put it back. If not: read what was spent in "
    "`aggregator status`, move the folder away, and lower --max-epsilon by that much"
)


class LedgerRefusal(Enum):
    """Why a ledger is refused: what happened, what is lost, what to do."""

    DAMAGED = ("is damaged: {detail} is not what this device wrote", _UNPROVEN, _BEGIN_ANEW)
    SHORTENED = ("was shortened: {detail}", _UNPROVEN, _BEGIN_ANEW)
    OLD_HEAD = ("goes on after its head: {detail}, so the head comes from a backup", _UNPROVEN, _BEGIN_ANEW)
    ANOTHERS = (
        "is that of {detail}",
        "Nothing is lost if the folder was copied by mistake",
        "Put this device's own ledger back, or move the folder away if it never had one",
    )
    OLD_IDENTITY = (
        "was written under another identity of this device, or by somebody who imitates it",
        _UNPROVEN,
        f"After a new enrolment: {_BEGIN_ANEW[0].lower()}{_BEGIN_ANEW[1:]}",
    )
    FUTURE = (
        "has an entry from the future, {detail}",
        "Nothing is lost",
        "Set this device's clock (timedatectl); if the clock is right, the ledger is not this device's own",
    )
    IN_USE = (
        "is in use by another process",
        "Nothing is lost",
        "Run one agent per bundle and per state folder, and stop the other one",
    )

    def text(self, folder: Path, detail: str = "") -> str:
        """The whole message.

        Args:
            folder: Of the ledger.
            detail: Where, or by how much.
        """
        happened, lost, remedy = self.value
        return f"the privacy ledger {folder} {happened.format(detail=detail)}. {lost}. {remedy}"
