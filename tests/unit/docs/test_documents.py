"""The documents say what is there: links resolve, commands and options exist, codes, fields and settings are complete."""

import re
import runpy
import shlex
from collections.abc import Iterator
from pathlib import Path
from types import MappingProxyType

import msgspec
import pytest
import typer

import aggregator.cli
import edge_agent.cli
import export.cli
import privacy.cli
from aggregator.accounts import Account, rights
from aggregator.config import AggregatorConfig
from federation.bundle import Bundle
from federation.config import describe
from federation.errors import ExitCode, Rejection, ReleaseFault
from federation.wire import masking, messages, predictions, release
from federation.wire.encodings import ENCODINGS, RAW, ZERO, encoding_named
from federation.wire.signing import Envelope
from federation.wire.topics import Topics

ROOT = Path(__file__).parents[3]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "deploy").rglob("*.md")])
PROTOCOL = (ROOT / "docs" / "protocol.md").read_text()

APPS = MappingProxyType(
    {
        "aggregator": typer.main.get_group(aggregator.cli.app),
        "edge-agent": typer.main.get_group(edge_agent.cli.app),
        "model-export": typer.main.get_group(export.cli.app),
        "privacy": typer.main.get_group(privacy.cli.app),
    }
)
COMMAND = re.compile(r"\b(aggregator|edge-agent|model-export|privacy) +[a-z].*")
LINK = re.compile(r"\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ +(.+)$", re.MULTILINE)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`([^`\n]+)`")


def anchors(page: Path) -> set[str]:
    """As GitHub makes them: lower case, punctuation dropped, blanks to hyphens."""
    headings = HEADING.findall(FENCE.sub("", page.read_text()))
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(text: str) -> Iterator[str]:
    """Our commands in shell blocks and in inline code."""
    for language, block in FENCE.findall(text):
        if language in ("sh", "shell", "bash"):
            yield from (found[0] for line in block.splitlines() if (found := COMMAND.match(line)))
    yield from (code for code in INLINE.findall(FENCE.sub("", text)) if COMMAND.fullmatch(code))


def check(command: str) -> None:
    """Fail unless the subcommand and each option exist."""
    program, subcommand, *words = shlex.split(command, comments=True)
    app = APPS[program]
    assert subcommand in app.commands, f"{command}: no subcommand {subcommand!r}"
    known = {name for parameter in app.commands[subcommand].params for name in parameter.opts}
    for word in words:
        if word.startswith("-") and word != "-":
            assert word.partition("=")[0] in known, f"{command}: no option {word!r}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_relative_links_resolve(page: Path) -> None:
    broken = []
    for link in LINK.findall(FENCE.sub("", page.read_text())):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_commands_exist(page: Path) -> None:
    for command in commands(page.read_text()):
        check(command)


def test_the_readme_shows_each_program() -> None:
    shown = {command.split()[0] for command in commands((ROOT / "README.md").read_text())}
    assert shown == set(APPS)


@pytest.mark.parametrize(
    "wrong", ["aggregator srve", "edge-agent run x.json --dta y", "model-export onnx x --out y"]
)
def test_a_command_that_does_not_exist_is_found(wrong: str) -> None:
    with pytest.raises(AssertionError, match=r"no subcommand|no option"):
        check(next(commands(f"```sh\n{wrong}\n```\n")))


def test_make_targets_of_the_readme_exist() -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"\bmake ([a-z]+)", (ROOT / "README.md").read_text())) <= targets


def test_every_setting_is_described_and_the_page_is_current() -> None:
    assert [setting.key for setting in describe(AggregatorConfig) if not setting.text] == []
    page = runpy.run_path(str(ROOT / "docs" / "generate.py"))["page"]()
    assert (ROOT / "docs" / "configuration.md").read_text() == page, "run: python docs/generate.py"


def test_the_protocol_names_every_code_and_encoding() -> None:
    table = PROTOCOL.partition("Codes of refusals")[2].partition("## 10.")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == {code.value for code in Rejection}
    faults = PROTOCOL.partition("| `fault` | when |\n|---|---|\n")[2].partition("\n\n")[0]
    named = {code for row in faults.splitlines() for code in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert named == {fault.value for fault in ReleaseFault}
    schemes = PROTOCOL.partition("| scheme | parameters |")[2].partition("\n\n")[0]
    sent = {ZERO.name, RAW.name}
    for family in ENCODINGS.values():
        sent |= {scheme.name for scheme in encoding_named(family.example).schemes}
    assert set(re.findall(r"^\| `(\w+)` \|", schemes, re.MULTILINE)) == sent
    families = PROTOCOL.partition("| encoding | schemes")[2].partition("\n\n")[0]
    forms = {family.form for family in ENCODINGS.values()}
    assert set(re.findall(r"^\| `([\w:]+)` \|", families, re.MULTILINE)) == forms


@pytest.mark.parametrize(
    "kind",
    [
        Envelope,
        messages.ObjectRef,
        messages.TaskSpec,
        messages.TrainSpec,
        messages.RoundPlan,
        messages.IdlePlan,
        messages.TrainMetrics,
        messages.UpdateOffer,
        messages.Decline,
        messages.Credit,
        messages.Receipt,
        messages.Capabilities,
        messages.Telemetry,
        messages.AgentState,
        messages.AggregatorState,
        Bundle,
        release.Requirements,
        release.ReleaseMetrics,
        release.ReleasePrivacy,
        release.ReleaseDelta,
        release.Release,
        release.Manifest,
        release.ReleaseReport,
        predictions.PredictionMessage,
        predictions.ModelState,
        masking.Member,
        *masking.MaskingMessage.__subclasses__(),
    ],
    ids=lambda kind: kind.__name__,
)
def test_the_protocol_names_every_field(kind: type[msgspec.Struct]) -> None:
    missing = [
        field.name
        for field in msgspec.structs.fields(kind)
        if f"`{field.name}`" not in PROTOCOL and f'"{field.name}"' not in PROTOCOL
    ]
    assert missing == []


def test_the_protocols_rights_are_those_that_the_enrolment_grants() -> None:
    topics = Topics("f")
    account = Account(
        name="pi1", role="agent", public_key="", bcrypt_hash="", mosquitto_hash="", enrolled_at=0.0
    )
    row = next(line for line in PROTOCOL.splitlines() if line.startswith("| agent `{id}` |"))
    publish, subscribe = (re.findall(r"`([^`]+)`", cell) for cell in row.split("|")[2:4])
    granted = rights(account, topics)

    def plain(filters: tuple[str, ...]) -> set[str]:
        named = (text.replace(f"-{topics.federation}-", "-{federation}-") for text in filters)
        return {text.removeprefix(f"{topics.prefix}/").replace("pi1", "{id}") for text in named}

    assert (set(publish), set(subscribe)) == (plain(granted.publish), plain(granted.subscribe))


def test_every_exit_code_is_documented() -> None:
    section = (ROOT / "docs" / "operations.md").read_text().partition("## Exit codes")[2]
    documented = set(re.findall(r"^\| (\d+) \|", section, re.MULTILINE))
    assert {str(int(code)) for code in ExitCode} <= documented
