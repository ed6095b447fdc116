"""What can go wrong with a promise of privacy. The texts are meant for the person who must act."""


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
