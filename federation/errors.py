"""Errors, grouped by who must act on them, and the codes with which an update is refused."""

from enum import IntEnum, StrEnum
from typing import ClassVar


class ExitCode(IntEnum):
    """Exit status of every fedge command."""

    OK = 0
    USAGE = 2
    BROKER = 3
    BUDGET = 4
    VERIFICATION = 5


class Rejection(StrEnum):
    """Why something that came over the wire was refused; used in receipts, logs, metrics and docs alike."""

    MALFORMED = "malformed"
    BAD_SIGNATURE = "bad_signature"
    UNKNOWN_AGENT = "unknown_agent"
    WRONG_FEDERATION = "wrong_federation"
    WRONG_SENDER = "wrong_sender"
    WRONG_RUN = "wrong_run"
    STALE_ROUND = "stale_round"
    FUTURE_ROUND = "future_round"
    LATE = "late"
    NOT_IN_COHORT = "not_in_cohort"
    DUPLICATE = "duplicate"
    WRONG_BASE = "wrong_base"
    WRONG_ENCODING = "wrong_encoding"
    WRONG_LENGTH = "wrong_length"
    WRONG_HASH = "wrong_hash"
    MISSING_TENSOR = "missing_tensor"
    EXTRA_TENSOR = "extra_tensor"
    WRONG_SHAPE = "wrong_shape"
    NON_FINITE = "non_finite"
    NORM_TOO_LARGE = "norm_too_large"
    BAD_SAMPLE_COUNT = "bad_sample_count"
    MISSING_SPENT = "missing_spent"
    WRONG_SPENT = "wrong_spent"


class ReleaseFault(StrEnum):
    """Why a device did not take up a release, or gave it up again; used in reports, logs and docs alike."""

    MALFORMED = "malformed"
    BAD_SIGNATURE = "bad_signature"
    WRONG_FEDERATION = "wrong_federation"
    EXPIRED = "expired"
    DOWNGRADE = "downgrade"
    INCOMPATIBLE = "incompatible"
    QUARANTINED = "quarantined"
    NO_SPACE = "no_space"
    WRONG_HASH = "wrong_hash"
    BROKEN = "broken"
    WRONG_SHAPE = "wrong_shape"
    WRONG_ANSWER = "wrong_answer"
    NON_FINITE = "non_finite"
    TOO_SLOW = "too_slow"
    TOO_BIG = "too_big"
    CRASHED = "crashed"
    ERRORS = "errors"


class FedgeError(Exception):
    """Base of all errors that fedge raises on purpose. Its text is meant for the person who must act."""

    exit_code: ClassVar[ExitCode] = ExitCode.USAGE


class ConfigError(FedgeError):
    """The operator must act: a setting, a file, a data set or an argument is wrong."""


class PeerError(FedgeError):
    """A peer sent something unacceptable: refuse it and go on.

    Attributes:
        code: The reason, as it is sent back in a receipt.
    """

    exit_code = ExitCode.VERIFICATION

    def __init__(self, code: Rejection, detail: str) -> None:
        super().__init__(f"{code.value}: {detail}")
        self.code = code
        self.detail = detail


class TransportError(FedgeError):
    """The broker or the link failed: retry."""

    exit_code = ExitCode.BROKER


class BrokerRefusedError(TransportError):
    """The broker answered and said no (wrong password, banned client): retrying will not help."""


class VerificationError(FedgeError):
    """Something that was to be used does not match what was promised: a parity check, a hash, a signature."""

    exit_code = ExitCode.VERIFICATION


class ReleaseError(FedgeError):
    """A release cannot be used: keep the current model.

    Attributes:
        fault: The reason, as it is reported to the aggregator.
        detail: For people.
    """

    exit_code = ExitCode.VERIFICATION

    def __init__(self, fault: ReleaseFault, detail: str) -> None:
        super().__init__(f"{fault.value}: {detail}")
        self.fault = fault
        self.detail = detail


class NonFiniteError(VerificationError):
    """A model answered with NaN or infinity."""


class BudgetExhaustedError(FedgeError):
    """The privacy budget is spent: stop taking part."""

    exit_code = ExitCode.BUDGET
