"""Whom this device takes for its neighbours in secure aggregation: a pinned roster, or whoever came first.

The aggregator hands out its devices' keys. One that lies could make up a whole cohort around a device and read its
update. A roster that the operator has carried to the device by hand rules that out; without one the device keeps the
first key of each name that it is shown, and a lie must begin before the device's first round.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path

from federation.errors import PeerError, Rejection
from federation.roster import read_roster, write_roster


class Identities:
    """The public keys of the federation's devices.

    Args:
        federation: Its name.
        seen: File of those that were seen first (``STATE/roster``); used and written only without a pinned roster.
        pinned: File of all that may take part (``aggregator roster``); None trusts the first use.

    Raises:
        ConfigError: If a file cannot be read.
    """

    def __init__(self, federation: str, *, seen: Path, pinned: Path | None = None) -> None:
        self._federation, self._seen, self._pinned = federation, seen, pinned
        if pinned is not None:
            self._keys = read_roster(pinned, federation)
        else:
            self._keys = read_roster(seen, federation) if seen.exists() else {}

    def check_names(self, names: Iterable[str]) -> None:
        """Check that all of a cohort may be in it, also those whose keys this device is not shown.

        Raises:
            PeerError: ``unknown_agent``, if there is a pinned roster without one of them.
        """
        if self._pinned is None:
            return
        strangers = sorted(set(names) - self._keys.keys())
        if strangers:
            raise PeerError(
                Rejection.UNKNOWN_AGENT,
                f"{', '.join(strangers[:3])} not in the roster {self._pinned} of this device: if the operator has enrolled "
                "new devices, bring it the new roster",
            )

    def check(self, keys: Mapping[str, bytes]) -> None:
        """Check the keys of neighbours, and keep those that are seen for the first time.

        Args:
            keys: Name to Ed25519 public key, 32 bytes.

        Raises:
            PeerError: ``bad_signature``, if a key is another one than is known.
            ConfigError: If they cannot be kept.
        """
        for name, key in keys.items():
            if self._keys.get(name, key) != key:
                where = self._pinned or self._seen
                raise PeerError(
                    Rejection.BAD_SIGNATURE,
                    f"the key of {name!r} is another one than in {where}: if the device was enrolled anew, bring this one "
                    "the new roster, or remove the line",
                )
        self.check_names(keys)
        if not keys.keys() <= self._keys.keys():
            known = {**self._keys, **keys}
            write_roster(self._seen, self._federation, known)
            self._keys = known
