"""The options of `privacy audit`."""

from pathlib import Path
from typing import Annotated

import typer

from federation.errors import ConfigError, ExitCode
from federation.logs import configure
from privacy.commands.findings import Findings, as_json

OFF = "off"


def audit_command(
    data: Annotated[
        str, typer.Option(help="mnist:PATH, digits, imagefolder:PATH, ...; what the devices trained on, with --checkpoint.")
    ],
    *,
    epsilon: Annotated[
        str, typer.Option(help="Train a fresh run privately with this target, or `off`. With --checkpoint: what is claimed.")
    ] = OFF,
    delta: Annotated[float, typer.Option(help="At which epsilon is stated.")] = 1e-5,
    clip_norm: Annotated[float, typer.Option(min=1e-6, help="L2 norm to which the gradient of a sample is clipped.")] = 1.0,
    model: Annotated[str, typer.Option(help="Of a fresh run: cnn, a torchvision model, or package.module:factory.")] = "cnn",
    checkpoint: Annotated[
        Path | None, typer.Option(help="Attack this checkpoint, or the newest of this state folder, instead of a fresh run.")
    ] = None,
    number: Annotated[int | None, typer.Option("--round", min=0, help="Of a state folder.")] = None,
    holdout: Annotated[str, typer.Option(help="With --checkpoint: data that no device had. Default: the test split of --data.")] = "",
    epochs: Annotated[int, typer.Option(min=0, max=1000, help="Of a fresh run; 0 takes the default.")] = 0,
    batch_size: Annotated[int, typer.Option(min=0, max=65536, help="Of a fresh run; 0 takes the default.")] = 0,
    learning_rate: Annotated[float, typer.Option("--lr", min=0, help="Of a fresh run; 0 takes the default.")] = 0.0,
    pictures: Annotated[int, typer.Option(min=0, help="Ordinary ones, half of them trained on; 0: up to 2,000.")] = 0,
    canaries: Annotated[int, typer.Option(min=0, help="Mislabelled ones, half of them trained on; 0: up to 1,000.")] = 0,
    gradient_canaries: Annotated[int, typer.Option(min=0, help="Of a private run; 0 leaves them out.")] = 1000,
    reference: Annotated[bool, typer.Option(help="Train a second model to calibrate the attack by.")] = True,
    shown: Annotated[int, typer.Option("--inversions", min=0, max=10, help="Pictures to recover from gradients; 0: none.")] = 5,
    seed: Annotated[int, typer.Option(min=0, help="Of coins, labels and first weights.")] = 0,
    output: Annotated[Path, typer.Option("--output", "-o", help="Report to write.")] = Path("privacy-audit.html"),
    figures: Annotated[Path | None, typer.Option("--json", help="Write the figures here too.")] = None,
) -> None:  # fmt: skip
    """Attack a training and report what can be told from it. Exit code 5 if more was shown than is promised."""
    from privacy.commands.audit import Request, audit

    configure(level="warning")
    target = _epsilon(epsilon)
    if checkpoint is None and (number is not None or holdout):
        raise ConfigError("--round and --holdout belong to --checkpoint: name one, or leave them away")
    found = audit(
        Request(
            data=data,
            model=model,
            checkpoint=checkpoint,
            round=number,
            holdout=holdout,
            epsilon=target,
            delta=delta,
            clip_norm=clip_norm,
            epochs=epochs,
            batch_size=batch_size,
            learning_rate=learning_rate,
            pictures=pictures,
            canaries=canaries,
            gradient_canaries=gradient_canaries,
            reference=reference,
            shown=shown,
            seed=seed,
        )
    )
    conclude(found, output, figures)


def conclude(findings: Findings, output: Path, figures: Path | None) -> None:
    """Write and say what was found.

    Raises:
        typer.Exit: With the code of a failed verification, if more was shown than is promised.
    """
    from privacy.commands.audit import write

    write(findings, output, figures)
    typer.echo(_summary(findings))
    typer.echo(f"wrote {output}" + (f" and {figures}" if figures else ""))
    if findings.exceeded:
        raise typer.Exit(ExitCode.VERIFICATION)


def _epsilon(text: str) -> float:
    if text == OFF:
        return 0.0
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 < value <= 1e6:  # noqa: PLR2004 - anything above is no protection
        raise ConfigError(
            f"--epsilon {text} is neither {OFF!r} nor a positive number: write --epsilon 3, say"
        )
    return value


def _summary(findings: Findings) -> str:
    from privacy.commands.report import verdict

    _, headline, text = verdict(findings)
    rows = [headline, text, ""]
    shown = as_json(findings)["attacks"]
    assert isinstance(shown, dict)
    for attack in findings.attacks:
        bound = "" if attack.bound is None else f", epsilon at least {attack.bound.epsilon:.2f}"
        found = attack.membership
        rows.append(
            f"{attack.title:<31} AUC {found.auc.value:.3f}, {found.tpr.value:.1%} of members at 1 % false alarms{bound}"
        )
    return "\n".join(rows)
