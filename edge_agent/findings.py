"""What a check of this device found, and how a series of findings is told to a person or a program."""

from collections.abc import Iterable
from enum import StrEnum

from msgspec import Struct

from federation.errors import ExitCode


class Level(StrEnum):
    """How a check came out."""

    OK = "ok"
    WARN = "warn"
    FAIL = "FAIL"
    SKIP = "skip"


class Finding(Struct, frozen=True, kw_only=True):
    """The outcome of one check.

    Attributes:
        check: What was looked at, in a word or two.
        level: How it came out.
        found: What was found; for a skipped check, why it was.
        remedy: What to do about it; empty when there is nothing to do.
        exit_code: Of the command, if this is its first failure.
    """

    check: str
    level: Level
    found: str
    remedy: str = ""
    exit_code: ExitCode = ExitCode.USAGE

    @property
    def failed(self) -> bool:
        """Whether the agent cannot work until this is mended."""
        return self.level is Level.FAIL


class Report(Struct, frozen=True, kw_only=True):
    """All findings, for ``--json``.

    Attributes:
        ok: Whether nothing failed.
        exit_code: Of the command.
        findings: In the order of the checks.
    """

    ok: bool
    exit_code: ExitCode
    findings: tuple[Finding, ...]


def report(findings: Iterable[Finding]) -> Report:
    """Sum up: the exit code is that of the first failure, 0 when there is none."""
    found = tuple(findings)
    code = next((finding.exit_code for finding in found if finding.failed), ExitCode.OK)
    return Report(ok=code is ExitCode.OK, exit_code=code, findings=found)


def skipped(checks: Iterable[str], because: str) -> list[Finding]:
    """Findings for checks that could not be made."""
    return [Finding(check=check, level=Level.SKIP, found=because) for check in checks]


def render(finding: Finding) -> str:
    """One line for a terminal, and one more for the remedy."""
    line = f"{finding.level.value:<4}  {finding.check:<12}  {finding.found}"
    return f"{line}\n{'':<6}{'':<12}  -> {finding.remedy}" if finding.remedy else line


__all__ = ["Finding", "Level", "Report", "render", "report", "skipped"]
