"""Write docs/configuration.md from the settings themselves: ``python docs/generate.py``. A test holds it current."""  # noqa: INP001 - a script, not a package

from pathlib import Path

import msgspec

from aggregator.config import SECRETS, AggregatorConfig
from federation.config import Setting, describe

PAGE = Path(__file__).with_name("configuration.md")

HEAD = """\
# Settings of the aggregator

This page is made by `python docs/generate.py` from the settings in `aggregator/config.py`. Do not edit it.

`aggregator init` writes all settings into a commented TOML file, and `aggregator serve --config FILE` reads it. A setting
comes, in rising order, from its default, the file, the environment (secrets only), and the command line: the common ones have
an option of their own, any other is `--set KEY=VALUE`, for example `--set rounds.quorum=0.7`. `aggregator config` prints what
is in effect. An unknown key is an error that names the nearest known one.

Units stand in the names: `_s` is seconds, `_bytes` is bytes.
"""

TITLES = {
    "": "Top level",
    "task": "`[task]`: what is learned",
    "train": "`[train]`: how an agent trains in one round",
    "rounds": "`[rounds]`: when a round opens, who takes part, when it closes",
    "broker": "`[broker]`: the MQTT broker",
    "privacy.sample": "`[privacy.sample]`: DP-SGD on each device",
    "privacy.client": "`[privacy.client]`: noise added by the aggregator",
    "privacy.secagg": "`[privacy.secagg]`: secure aggregation, and noise added by the devices together",
}


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    table: str | None = None
    for setting in describe(AggregatorConfig):
        head, _, name = setting.key.rpartition(".")
        if head != table:
            table = head
            parts.append(f"\n## {TITLES[head]}\n\n| key | default | meaning |\n|---|---|---|\n")
        parts.append(f"| `{name}` | {_default(setting)} | {_text(setting)} |\n")
    parts.append("\n## Environment\n\n| variable | sets |\n|---|---|\n")
    parts += [f"| `{variable}` | `{key}` |\n" for variable, key in SECRETS.items()]
    return "".join(parts)


def _text(setting: Setting) -> str:
    return setting.text.replace("|", "\\|").replace("``", "`")


def _default(setting: Setting) -> str:
    return f"`{msgspec.json.encode(setting.default).decode()}`"


if __name__ == "__main__":
    PAGE.write_text(page())
