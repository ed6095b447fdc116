"""What goes wrong in secure aggregation, by who must act."""


class RefusedError(Exception):
    """A message that no honest peer sends, or not now: refuse it and go on. The state has not changed."""


class UnrecoverableError(Exception):
    """The shares at hand do not give the secret that was committed to."""
