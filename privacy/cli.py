"""``privacy``: plan a deployment's privacy before it starts, audit its training afterwards."""

from typing import NoReturn

import typer

from federation.cli import new_app, run
from privacy.commands.audit_options import audit_command
from privacy.commands.plan_options import plan_command

app: typer.Typer = new_app("Plan privacy before a deployment, audit it afterwards.")
app.command("plan")(plan_command)
app.command("audit")(audit_command)


def main() -> NoReturn:
    """Entry point of the console script."""
    run(app)


if __name__ == "__main__":
    main()
