import html
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import typer
from typer.testing import CliRunner

from federation.errors import ConfigError, ExitCode
from federation.task.checkpoint import CheckpointInfo, checkpoint_bytes, checkpoint_path
from federation.task.data import open_data, task_from_data
from federation.task.models import build, state_arrays
from federation.wire.messages import TrainSpec
from privacy.audit.bounds import LowerBound
from privacy.audit.membership import membership
from privacy.cli import app
from privacy.commands import report
from privacy.commands.audit_options import conclude
from privacy.commands.findings import Attack, Findings, Picture, Subject
from privacy.commands.fresh import Fresh, Outcome, attack_fresh
from privacy.commands.training import Protection, Samples, fit

EVIL = '<script>alert("1")</script>'
SMALL = ["--pictures", "300", "--canaries", "300", "--gradient-canaries", "300"]


def audit(*arguments: str, code: int = 0) -> str:
    done = CliRunner().invoke(app, ["audit", *arguments], catch_exceptions=False)
    assert done.exit_code == code, done.output
    return done.stdout


def findings(*, claimed: float | None, bound: float | None, labels: tuple[str, ...] = ("a", "b")) -> Findings:
    random = np.random.default_rng(0)
    member = np.arange(400) < 200
    scores = random.normal(size=400) + member
    shown = None if bound is None else LowerBound(bound, 1e-5, 0.95, 400, 80, 70)
    attack = Attack(
        "loss", f"Membership {EVIL}", EVIL, EVIL, membership(scores, member), shown, scores, member
    )
    pictures = random.integers(0, 255, (2, 6, 6, 1), np.uint8)
    return Findings(
        subject=Subject(title=EVIL, facts={EVIL: EVIL}, epsilon=claimed, delta=1e-5, accuracy=0.9),
        attacks=(attack,),
        pictures=(Picture(EVIL, EVIL, pictures, ()), Picture("Recovered", "", pictures, (0.25, 1.0))),
        labels=labels,
        seconds=1.0,
        version="1.2.3",
        made="2026-01-01",
    )


class Page(HTMLParser):
    """Collects tags, attributes and text, and holds that tags are balanced."""

    VOID = ("meta", "img", "br", "rect", "polyline", "line")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += [(name, value or "") for name, value in attrs]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_the_report_stands_by_itself_and_escapes_what_comes_from_outside() -> None:
    text = report.html(findings(claimed=2.0, bound=0.5, labels=(EVIL, '"><b>')))
    page = Page(text)
    assert page.open == []
    assert "script" not in page.tags
    assert "link" not in page.tags
    assert html.escape(EVIL) in text
    loaded = [value for name, value in page.attributes if name in ("src", "href", "style", "xlink:href")]
    assert loaded
    assert all(value.startswith("data:image/png;base64,") for value in loaded)
    assert not re.search(r"https?:|@import|url\(", text)
    assert "prefers-color-scheme: dark" in text


@pytest.mark.parametrize(
    ("claimed", "bound", "kind", "words"),
    [
        (2.0, 0.5, "good", "nothing that contradicts epsilon 2"),
        (2.0, 2.5, "bad", "The protection is broken"),
        (None, 3.4, "warn", "tells who was in its training data"),
        (None, 0.0, "warn", "tells who was in its training data"),
        (2.0, 0.0, "good", "no leak"),
        (2.0, None, "warn", "Either the claim is wrong"),
    ],
)
def test_the_verdict(claimed: float | None, bound: float | None, kind: str, words: str) -> None:
    found = findings(claimed=claimed, bound=bound)
    assert report.verdict(found)[0] == kind
    assert words in html.unescape(report.html(found))
    assert found.exceeded == (kind == "bad")


def attacked(epsilon: float | None, *, spec: TrainSpec, canaries: int = 500) -> Outcome:
    task = msgspec.structs.replace(task_from_data("digits", "cnn"), dp_ready=True)
    return attack_fresh(
        Fresh(
            data=open_data("digits", task, train=True),
            spec=spec,
            protection=None if epsilon is None else Protection(epsilon=epsilon, delta=1e-5, clip_norm=1.0),
            delta=1e-5,
            pictures=300,
            canaries=canaries,
            gradient_canaries=300,
            reference=False,
            seed=1,
        )
    )


def test_a_training_that_remembers_is_found_out() -> None:
    found = attacked(None, spec=TrainSpec(epochs=25, batch_size=32, learning_rate=0.03))
    (mislabelled, loss) = found.attacks
    assert (mislabelled.key, loss.key) == ("mislabelled", "loss")
    assert mislabelled.bound_epsilon > 1
    assert mislabelled.membership.auc.low > 0.7
    assert found.private is None


def test_a_private_training_is_not_accused() -> None:
    found = attacked(1.0, spec=TrainSpec(epochs=3, batch_size=150, learning_rate=0.05))
    assert [attack.key for attack in found.attacks] == ["gradient", "mislabelled", "loss"]
    assert found.epsilon is not None
    assert found.private is not None
    assert max(attack.bound_epsilon for attack in found.attacks) <= found.epsilon <= 1


def test_the_command_writes_report_and_figures(tmp_path: Path) -> None:
    page, figures = tmp_path / "audit.html", tmp_path / "audit.json"
    said = audit(
        "--data", "digits", "--epsilon", "2", "--epochs", "1", *SMALL, "--inversions", "1", "-o", str(page), "--json", str(figures)
    )  # fmt: skip
    found: dict[str, Any] = json.loads(figures.read_text())
    assert found["epsilon_claimed"] <= 2
    assert found["epsilon_lower_bound"] <= 2
    assert set(found["attacks"]) == {"gradient", "mislabelled", "loss", "calibrated"}
    assert found["attacks"]["loss"]["lower_bound"]["canaries"] == 300
    assert len(found["inversion"]) == 3
    assert Page(page.read_text()).tags.count("img") == 4
    assert "nothing that contradicts epsilon 2" in said
    assert str(page) in said


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """A state folder with a checkpoint that knows its training data by heart."""
    task = task_from_data("digits", "cnn")
    data = open_data("digits", task, train=True)
    model = build(task)
    samples = Samples(data, np.arange(len(data)), data.labels)
    fit(model, samples.batch, len(samples), TrainSpec(epochs=6, learning_rate=0.02), np.random.default_rng(0))
    path = checkpoint_path(tmp_path, 3)
    path.parent.mkdir(parents=True)
    info = CheckpointInfo(federation="fleet", round=3, task=task)
    path.write_bytes(checkpoint_bytes(info, state_arrays(model)))
    return tmp_path


def test_a_federations_checkpoint_is_attacked(state: Path, tmp_path: Path) -> None:
    page, figures = tmp_path / "audit.html", tmp_path / "audit.json"
    audit(
        "--data", "digits", "--checkpoint", str(state), "--epochs", "2", "--inversions", "0", "-o", str(page), "--json", str(figures)
    )  # fmt: skip
    found = json.loads(figures.read_text())
    assert set(found["attacks"]) == {"loss", "calibrated"}
    assert found["epsilon_lower_bound"] is None
    assert found["attacks"]["loss"]["auc"]["value"] > 0.5
    assert found["subject"]["accuracy"] > 0.8
    text = html.unescape(page.read_text())
    assert "round 3 of federation fleet" in text
    assert "not chosen by coins" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "digits", "--epsilon", "none"], "neither 'off' nor a positive number"),
        (["--data", "digits", "--epsilon", "0"], "neither 'off' nor a positive number"),
        (["--data", "digits", "--delta", "2"], "must lie between 0 and 1"),
        (["--data", "digits", "--round", "3"], "belong to --checkpoint"),
        (["--data", "digits", "--canaries", "10"], "too few for an attack"),
        (["--data", "digits", "--pictures", "2000"], "pictures are needed and the data has 1437"),
        (["--data", "digits", "--epsilon", "1", "--batch-size", "5000"], "more than the"),
        (["--data", "digits", "--epsilon", "1", "--delta", "0.01"], "not below 1 /"),
        (["--data", "digits", "--checkpoint", "nowhere.safetensors"], "is not a file"),
        (["--data", "digitz"], "unknown data"),
        (["--data", "digits", "--epsilon", "1e-7"], "cannot be kept"),
    ],
)
def test_wrong_arguments_are_refused_with_the_remedy(
    arguments: list[str], message: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=message):
        audit(*arguments, "-o", str(tmp_path / "audit.html"))


def test_a_broken_promise_is_exit_code_5(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(typer.Exit) as ended:
        conclude(findings(claimed=1.0, bound=2.0), tmp_path / "a.html", None)
    assert ended.value.exit_code == ExitCode.VERIFICATION
    assert "The protection is broken" in capsys.readouterr().out
    conclude(findings(claimed=2.0, bound=1.0), tmp_path / "a.html", tmp_path / "a.json")
    assert json.loads((tmp_path / "a.json").read_text())["exceeded"] is False
