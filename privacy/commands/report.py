"""The audit's report: one HTML file that needs nothing else."""

from collections.abc import Iterator
from html import escape
from importlib.resources import files

from privacy.audit.bounds import CONFIDENCE
from privacy.audit.membership import Interval
from privacy.commands.figures import epsilon_bars, histogram, png, roc
from privacy.commands.findings import Findings, Picture

NEARLY_GUESSING = 0.55
"""AUC below which a single sample is as good as unrecognisable, on the mean."""

LEARNED_LITTLE = 0.3
"""Accuracy below which attacks on the finished model cannot be expected to find anything."""


def html(findings: Findings) -> str:
    """The whole page. Every text from outside, labels and paths among them, is escaped."""
    style = files("privacy.commands").joinpath("report.css").read_text()
    subject = findings.subject
    return "".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            '<meta name="viewport" content="width=device-width, initial-scale=1">',
            f"<title>Privacy audit: {escape(subject.title)}</title><style>{style}</style></head><body><main>",
            (
                f'<header><small>fedge privacy audit</small><h1>{escape(subject.title)}</h1><p class="soft">{escape(findings.made)}, '
                f"{findings.seconds:.0f} s of attacks and training</p></header>"
            ),
            _verdict(findings),
            *_tiles(findings),
            *_bounds(findings),
            *_tested(findings),
            *_attacks(findings),
            *_pictures(findings),
            *_limits(findings),
            (
                f"<footer>fedge {escape(findings.version)}. Methods: Steinke, Nasr, Jagielski 2023 (one-run audit); Carlini et al. "
                "2022 (membership at low false positives); Zhu et al. 2019 and Geiping et al. 2020 (gradient inversion).</footer>"
            ),
            "</main></body></html>\n",
        ]
    )


def verdict(findings: Findings) -> tuple[str, str, str]:
    """The result in plain words: kind (``good``, ``warn``, ``bad``), headline and explanation."""
    claimed, bound = findings.subject.epsilon, findings.bound
    strongest = max((attack.membership.auc.value for attack in findings.attacks), default=0.5)
    if findings.exceeded:
        assert bound is not None
        return (
            "bad",
            f"The protection is broken: at least epsilon {bound.epsilon:.2f} was shown, {claimed:g} is claimed.",
            (
                f"With {CONFIDENCE:.0%} confidence the training gives away more than it promises. Do not release this model "
                "as private; look for what trains without clipping or noise, or for data that is used outside the accounting."
            ),
        )
    if claimed is not None and bound is None:
        return _verdict_without_coins(claimed, strongest)
    if claimed is not None:
        shown = "no leak" if bound is None or not bound.epsilon else f"epsilon {bound.epsilon:.2f} at least"
        text = (
            f"They showed {shown}. A guarantee is a proof about every attack; an audit is a few attacks. It can refute the "
            "promise, and here it did not."
        )
        accuracy = findings.subject.accuracy
        if accuracy is not None and accuracy < LEARNED_LITTLE:
            text += (
                f" But the model is right on {accuracy:.0%} of new pictures only: what has learned little can give little away. "
                "Audit a training that learns, too."
            )
        return "good", f"The attacks found nothing that contradicts epsilon {claimed:.3g}.", text
    if (bound is not None and bound.epsilon > 0) or strongest > NEARLY_GUESSING:
        shown = "" if bound is None or not bound.epsilon else f" (epsilon is at least {bound.epsilon:.2f})"
        return (
            "warn",
            f"Without protection the model tells who was in its training data{shown}.",
            (
                "That is what any model does that has learned its samples well. If these pictures are personal, train with "
                "differential privacy."
            ),
        )
    return (
        "warn",
        "These attacks found little, and nothing is promised.",
        "Without differential privacy a better attack may find more: this is no guarantee.",
    )


def _verdict_without_coins(claimed: float, strongest: float) -> tuple[str, str, str]:
    """Of a model that was trained before: no bound follows from any attack, however well it does."""
    if strongest > NEARLY_GUESSING:
        return (
            "warn",
            f"The model seems to tell who was in its training data, although epsilon {claimed:.3g} is claimed.",
            (
                "Either the claim is wrong, or members and strangers differ for another reason. Audit a fresh run with the same settings: "
                "there coins decide, and a bound follows."
            ),
        )
    return (
        "good",
        f"The attacks found nothing that contradicts epsilon {claimed:.3g}.",
        "They did hardly better than guessing. That proves nothing about other attacks: audit a fresh run for a bound.",
    )


def _verdict(findings: Findings) -> str:
    kind, headline, text = verdict(findings)
    return f'<div class="verdict {kind}"><strong>{escape(headline)}</strong><p>{escape(text)}</p></div>'


def _tiles(findings: Findings) -> Iterator[str]:
    subject, bound = findings.subject, findings.bound
    strongest = max(findings.attacks, key=lambda attack: attack.membership.auc.value)
    tiles = [
        ("none" if subject.epsilon is None else f"{subject.epsilon:.3g}", "epsilon that is promised"),
        (
            "not tested" if bound is None else f"{bound.epsilon:.2f}",
            "epsilon that the attacks prove at least",
        ),
        (f"{strongest.membership.auc.value:.3f}", f"best AUC ({strongest.title}); 0.5 is guessing"),
        (_percent(strongest.membership.tpr.value), "members found at 1% false alarms; 1% is guessing"),
    ]
    if subject.accuracy is not None:
        tiles.append((f"{subject.accuracy:.1%}", "accuracy on pictures never seen"))
    yield '<div class="tiles">'
    yield from (
        f'<div class="tile"><b>{escape(value)}</b><span>{escape(text)}</span></div>' for value, text in tiles
    )
    yield "</div>"


def _bounds(findings: Findings) -> Iterator[str]:
    shown = [(attack.title, attack.bound.epsilon) for attack in findings.attacks if attack.bound is not None]
    if not shown:
        return
    claimed = findings.subject.epsilon
    yield (
        "<h2>What was proven</h2>" if claimed is None else "<h2>What was proven against what is promised</h2>"
    )
    beyond = (
        ""
        if claimed is None
        else "A bar beyond the line would refute the promise; a bar short of it is normal. "
    )
    yield (
        f"<p>Each bar is an epsilon that the training exceeds, at delta {findings.subject.delta:g}; all of them hold together with "
        f"{CONFIDENCE:.0%} confidence. {beyond}One run shows only part of what a perfect attacker with many runs could.</p>"
    )
    yield f'<div class="card">{epsilon_bars(shown, claimed)}</div>'


def _tested(findings: Findings) -> Iterator[str]:
    yield '<h2>What was tested</h2><div class="card"><table>'
    yield from (
        f"<tr><th>{escape(name)}</th><td>{escape(value)}</td></tr>"
        for name, value in findings.subject.facts.items()
    )
    yield "</table></div>"


def _attacks(findings: Findings) -> Iterator[str]:
    yield "<h2>The attacks</h2>"
    for attack in findings.attacks:
        found = attack.membership
        rows = [
            ("AUC", _interval(found.auc, "{:.3f}"), "how often a member scores above a stranger; 0.5 is guessing"),
            ("TPR at 1% FPR", _interval(found.tpr, "{:.1%}"), "members that are found almost surely; 1% is guessing"),
        ]  # fmt: skip
        if attack.bound is not None:
            bound = attack.bound
            text = f"{bound.correct} of {bound.guesses} guesses right, {bound.canaries} canaries"
            rows.append(("Epsilon at least", f"{bound.epsilon:.2f}", text))
        table = "".join(
            f'<tr><th>{escape(name)}</th><td><b>{escape(value)}</b><br><span class="soft">{escape(text)}</span></td></tr>'
            for name, value, text in rows
        )
        yield (
            f'<div class="card attack"><div><h3>{escape(attack.title)}</h3><p>{escape(attack.how)}</p>'
            f'<p class="soft">The attacker: {escape(attack.attacker)} {found.members} members, {found.strangers} strangers.</p>'
            f"<table>{table}</table></div><div>{roc(found.curve, 'ROC curve of ' + attack.title)}"
            f"{histogram(attack.scores, attack.member, 'scores of ' + attack.title)}</div></div>"
        )


def _pictures(findings: Findings) -> Iterator[str]:
    if not findings.pictures:
        return
    yield "<h2>Can pictures be recovered from what a device sends?</h2>"
    yield (
        "<p>Whoever sees the gradient of a single picture can search for a picture that would give the same one. Below, the search "
        "is run on real pictures and on this model. The figure under each is its correlation with the original: 1 is the "
        "same picture, 0 is unrelated.</p>"
    )
    for picture in findings.pictures:
        yield f'<div class="card"><h3>{escape(picture.title)}</h3><p>{escape(picture.text)}</p><div class="strip">'
        yield from _strip(picture, findings.labels)
        yield "</div></div>"


def _strip(picture: Picture, labels: tuple[str, ...]) -> Iterator[str]:
    for number, image in enumerate(picture.images):
        caption = f"{picture.similarity[number]:.2f}" if picture.similarity else labels[number]
        yield (
            f'<figure><img alt="{escape(picture.title)}: {escape(labels[number])}" src="{png(image)}">'
            f"<figcaption>{escape(caption)}</figcaption></figure>"
        )


def _limits(findings: Findings) -> Iterator[str]:
    lines = [
        (
            "An audit gives lower bounds. That an attack fails does not show that every attack fails: only the proof behind a "
            "promised epsilon does, and only as long as the data was used nowhere else."
        ),
        (
            "The bound speaks about the training that was run here, with this data, model and these settings. Other settings "
            "need their own audit."
        ),
        (
            "It says nothing about the link, the broker, the devices' disks, or who may see single updates: for that see the "
            "protocol's page and, for updates, secure aggregation."
        ),
        (
            "Facts about all samples together, which is what a model is trained for, are not protected by differential privacy "
            "and not attacked here."
        ),
    ]
    if findings.bound is None:
        lines.insert(
            1,
            "Members and strangers were not chosen by coins here, so no bound on epsilon follows: a difference between the two "
            "sets of pictures would look like a leak. Audit a fresh run for a bound.",
        )
    yield "<h2>What this does not show</h2><ul>"
    yield from (f"<li>{escape(line)}</li>" for line in lines)
    yield "</ul>"


def _interval(interval: Interval, form: str) -> str:
    return f"{form.format(interval.value)} ({form.format(interval.low)} to {form.format(interval.high)})"


def _percent(value: float) -> str:
    return f"{value:.1%}"
