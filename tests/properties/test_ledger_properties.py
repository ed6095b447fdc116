"""Whatever the power and the disk do: what was used is in the ledger, and what was tampered with is refused."""

import tempfile
from pathlib import Path

from hypothesis import given, settings
from hypothesis import strategies as st

from privacy.accounting import Spend
from privacy.errors import LedgerError
from privacy.ledger import Ledger, Owner
from privacy.ledger_format import Entry, ledger_key

NOW = 1_800_000_000.0
OWNER = Owner("clinic", "pi1", ledger_key(b"s" * 32, "clinic", "pi1"))


def opened(folder: Path) -> Ledger:
    return Ledger.open(folder, OWNER, clock=lambda: NOW)


def pay(ledger: Ledger, round_: int) -> Entry:
    return ledger.reserve(
        Spend(1.1, 0.01, 100),
        now=NOW,
        run="ab" * 8,
        round_=round_,
        attempt=1,
        model="cd" * 32,
        clip_norm=1.0,
        delta=1e-5,
        data="digits",
    )


# Of a reservation, what reaches the disk: all of it, the line but not the head, or so many thousandths of the line.
outcomes = st.lists(st.one_of(st.just("paid"), st.just("no head"), st.integers(0, 999)), max_size=8)


@settings(max_examples=30)
@given(outcomes)
def test_no_crash_loses_what_was_used(outcomes: list[str | int]) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder, used, durable = Path(name), set[int](), set[int]()
        for round_, outcome in enumerate(outcomes, 1):
            ledger = opened(folder)
            entries, head = (folder / "entries").read_bytes(), (folder / "head").read_bytes()
            pay(ledger, round_)
            ledger.close()
            if outcome == "paid":
                used.add(round_)
            else:
                (folder / "head").write_bytes(head)
            if isinstance(outcome, int):
                line = (folder / "entries").read_bytes()[len(entries) :]
                (folder / "entries").write_bytes(entries + line[: len(line) * outcome // 1000])
            else:
                durable.add(round_)
        ledger = opened(folder)
        ledger.close()
        kept = {entry.round for entry in ledger.entries}
        assert used <= kept == durable
        assert [entry.number for entry in ledger.entries] == list(range(1, len(kept) + 1))


@st.composite
def edits(draw: st.DrawFn) -> tuple[str, float, int, bytes]:
    """A file, a place in it as a share, how much goes, and what comes."""
    name = draw(st.sampled_from(["entries", "head"]))
    return name, draw(st.floats(0, 1)), draw(st.integers(0, 2000)), draw(st.binary(max_size=64))


@settings(max_examples=40)
@given(st.lists(edits(), min_size=1, max_size=3))
def test_no_edit_of_the_files_passes(changes: list[tuple[str, float, int, bytes]]) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ledger = opened(folder)
        before = [pay(ledger, round_) for round_ in (1, 2, 3)]
        ledger.close()
        for file, place, gone, come in changes:
            data = (folder / file).read_bytes()
            start = int(place * len(data))
            (folder / file).write_bytes(data[:start] + come + data[start + gone :])
        try:
            again = opened(folder)
        except LedgerError:
            return
        again.close()
        assert list(again.entries) == before, "what stands behind the last entry that counts is a torn write"
