"""The ledger: what is written stays, what was changed is refused, and a power cut costs nothing."""

import os
from pathlib import Path

import pytest
from structlog.testing import capture_logs

from privacy.accounting import Spend
from privacy.errors import LedgerError
from privacy.ledger import CLOCK_TOLERANCE_S, Ledger, Owner, read_entries
from privacy.ledger_format import Entry, ledger_key

NOW = 1_800_000_000.0
RUN = "ab" * 8
SPEND = Spend(1.1, 0.01, 100)


def owner(device: str = "pi1", federation: str = "clinic", secret: bytes = b"s" * 32) -> Owner:
    return Owner(federation, device, ledger_key(secret, federation, device))


def pay(ledger: Ledger, round_: int, now: float = NOW) -> Entry:
    return ledger.reserve(
        SPEND,
        now=now,
        run=RUN,
        round_=round_,
        attempt=1,
        model="cd" * 32,
        clip_norm=1.0,
        delta=1e-5,
        data="digits",
    )


def written(folder: Path, rounds: int) -> Path:
    ledger = Ledger.open(folder, owner(), clock=lambda: NOW)
    for number in range(1, rounds + 1):
        pay(ledger, number)
    ledger.close()
    return folder


def reopened(folder: Path, by: Owner | None = None) -> tuple[Entry, ...]:
    ledger = Ledger.open(folder, by or owner(), clock=lambda: NOW)
    ledger.close()
    return ledger.entries


def refusal(folder: Path, by: Owner | None = None) -> str:
    with pytest.raises(LedgerError) as caught:
        reopened(folder, by)
    with pytest.raises(LedgerError) as read:
        read_entries(folder, by or owner(), clock=lambda: NOW)
    assert str(read.value) == str(caught.value)
    return str(caught.value)


def test_entries_survive_and_go_on(tmp_path: Path) -> None:
    written(tmp_path / "ledger", 3)
    ledger = Ledger.open(tmp_path / "ledger", owner(), clock=lambda: NOW)
    entry = pay(ledger, 4)
    ledger.close()
    assert [kept.round for kept in reopened(tmp_path / "ledger")] == [1, 2, 3, 4]
    assert (entry.number, entry.spend, entry.delta, entry.data) == (4, SPEND, 1e-5, "digits")
    assert read_entries(tmp_path / "ledger", owner(), clock=lambda: NOW) == ledger.entries


def test_head_changes_with_every_entry(tmp_path: Path) -> None:
    ledger = Ledger.open(tmp_path, owner(), clock=lambda: NOW)
    heads = {ledger.head}
    for number in range(1, 4):
        pay(ledger, number)
        heads.add(ledger.head)
    ledger.close()
    assert len(heads) == 4


def test_a_ledger_that_never_was_reads_as_empty(tmp_path: Path) -> None:
    assert read_entries(tmp_path / "none", owner()) == ()
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("name", ["entries", "head"])
def test_every_flipped_bit_is_refused(tmp_path: Path, name: str) -> None:
    file = written(tmp_path / "ledger", 1) / name
    whole = file.read_bytes()
    for place in range(len(whole)):
        for bit in range(8):
            changed = bytearray(whole)
            changed[place] ^= 1 << bit
            file.write_bytes(changed)
            with pytest.raises(LedgerError):
                read_entries(file.parent, owner(), clock=lambda: NOW)
    file.write_bytes(whole)
    assert len(reopened(file.parent)) == 1


def test_a_flipped_bit_says_what_to_do(tmp_path: Path) -> None:
    file = written(tmp_path / "ledger", 3) / "entries"
    file.write_bytes(file.read_bytes().replace(b'"steps":100', b'"steps":101', 1))
    message = refusal(file.parent)
    assert "line 2" in message
    assert "can no longer be proven" in message
    assert "--max-epsilon" in message


def test_every_torn_write_is_repaired_and_counts_nothing(tmp_path: Path) -> None:
    folder = written(tmp_path / "ledger", 1)
    before = (folder / "head").read_bytes(), (folder / "entries").read_bytes()
    ledger = Ledger.open(folder, owner(), clock=lambda: NOW)
    pay(ledger, 2)
    ledger.close()
    line = (folder / "entries").read_bytes()[len(before[1]) :]
    for length in range(1, len(line)):  # the power fails in the middle of the append: the head is the old one
        (folder / "head").write_bytes(before[0])
        (folder / "entries").write_bytes(before[1] + line[:length])
        assert len(read_entries(folder, owner(), clock=lambda: NOW)) == 1
        with capture_logs() as logs:
            assert [entry.round for entry in reopened(folder)] == [1]
        assert [(event["event"], event["torn_bytes"]) for event in logs] == [("ledger_repaired", length)]
        assert (folder / "entries").read_bytes() == before[1]


def test_a_line_whose_head_was_not_written_counts(tmp_path: Path) -> None:
    folder = written(tmp_path / "ledger", 1)
    head = (folder / "head").read_bytes()
    ledger = Ledger.open(folder, owner(), clock=lambda: NOW)
    pay(ledger, 2)
    ledger.close()
    (folder / "head").write_bytes(head)
    with capture_logs() as logs:
        assert [entry.round for entry in reopened(folder)] == [1, 2]
    assert [event["event"] for event in logs] == ["ledger_entry_kept"]
    with capture_logs() as logs:
        assert len(reopened(folder)) == 2
    assert not logs


def test_a_crash_between_the_first_two_files_begins_anew(tmp_path: Path) -> None:
    folder = written(tmp_path / "ledger", 0)
    (folder / "head").unlink()
    assert reopened(folder) == ()
    assert (folder / "head").exists()


def test_a_reserve_after_a_repair_continues_the_chain(tmp_path: Path) -> None:
    folder = written(tmp_path / "ledger", 1)
    with (folder / "entries").open("ab") as file:
        file.write(b"0123")
    ledger = Ledger.open(folder, owner(), clock=lambda: NOW)
    pay(ledger, 2)
    ledger.close()
    assert [entry.number for entry in reopened(folder)] == [1, 2]


def test_lines_that_were_cut_off_are_missed(tmp_path: Path) -> None:
    folder = written(tmp_path / "ledger", 3)
    lines = (folder / "entries").read_bytes().splitlines(keepends=True)
    (folder / "entries").write_bytes(b"".join(lines[:-1]))
    assert "was shortened" in refusal(folder)


def test_a_head_from_a_backup_is_refused(tmp_path: Path) -> None:
    folder = written(tmp_path / "ledger", 1)
    head = (folder / "head").read_bytes()
    written(folder, 3)
    (folder / "head").write_bytes(head)
    assert "comes from a backup" in refusal(folder)


@pytest.mark.parametrize(
    ("gone", "said"), [("entries", "with the entries is gone"), ("head", "with the head is gone")]
)
def test_a_missing_file_is_refused(tmp_path: Path, gone: str, said: str) -> None:
    folder = written(tmp_path / "ledger", 1)
    (folder / gone).unlink()
    assert said in refusal(folder)


def test_swapped_lines_are_refused(tmp_path: Path) -> None:
    folder = written(tmp_path / "ledger", 3)
    opening, first, second, third = (folder / "entries").read_bytes().splitlines(keepends=True)
    (folder / "entries").write_bytes(opening + second + first + third)
    assert "line 2" in refusal(folder)


@pytest.mark.parametrize(
    ("by", "said"),
    [
        (owner(device="pi2"), "'pi1' in federation 'clinic'"),
        (owner(federation="farm"), "'pi1' in federation 'clinic'"),
        (owner(secret=b"t" * 32), "another identity of this device"),
    ],
)
def test_somebody_elses_ledger_is_refused(tmp_path: Path, by: Owner, said: str) -> None:
    assert said in refusal(written(tmp_path / "ledger", 1), by)


def test_an_entry_from_the_future_is_refused(tmp_path: Path) -> None:
    ledger = Ledger.open(tmp_path / "ledger", owner(), clock=lambda: NOW)
    pay(ledger, 1, now=NOW + CLOCK_TOLERANCE_S + 3600)
    ledger.close()
    message = refusal(tmp_path / "ledger")
    assert "by 25.0 hours" in message
    assert "timedatectl" in message


def test_a_second_process_is_refused(tmp_path: Path) -> None:
    ledger = Ledger.open(tmp_path, owner(), clock=lambda: NOW)
    with pytest.raises(LedgerError, match="in use by another process"):
        Ledger.open(tmp_path, owner(), clock=lambda: NOW)
    pay(ledger, 1)
    assert len(read_entries(tmp_path, owner(), clock=lambda: NOW)) == 1  # reading needs no lock
    ledger.close()
    assert len(reopened(tmp_path)) == 1


def test_a_full_disk_pays_for_nothing(tmp_path: Path) -> None:
    folder = written(tmp_path / "ledger", 1)
    ledger = Ledger.open(folder, owner(), clock=lambda: NOW)
    ledger._file = os.open("/dev/full", os.O_WRONLY)
    with pytest.raises(OSError, match="No space left"):
        pay(ledger, 2)
    assert [entry.round for entry in reopened(folder)] == [1]


def test_no_key_is_in_the_files(tmp_path: Path) -> None:
    folder = written(tmp_path / "ledger", 1)
    for file in folder.iterdir():
        assert owner().key not in file.read_bytes()
        assert owner().key.hex().encode() not in file.read_bytes()
