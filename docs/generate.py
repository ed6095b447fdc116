"""Write docs/configuration.md from the settings themselves: ``python docs/generate.py``. A test holds it current."""  # noqa: INP001 - a script, not a package

from collections.abc import Iterator
from pathlib import Path

import msgspec
from msgspec import Struct

from aggregator.config import SECRETS, AggregatorConfig
from edge_agent.config import AgentConfig
from federation.config import Setting, describe

PAGE = Path(__file__).with_name("configuration.md")

HEAD = """\
# Settings

This page is made by `python docs/generate.py` from the settings in `aggregator/config.py` and `edge_agent/config.py`. Do not
edit it.

# The aggregator

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
    "release": "`[release]`: how models reach devices",
    "privacy.sample": "`[privacy.sample]`: DP-SGD on each device",
    "privacy.client": "`[privacy.client]`: noise added by the aggregator",
    "privacy.secagg": "`[privacy.secagg]`: secure aggregation, and noise added by the devices together",
}


AGENT_HEAD = """
# The agent

`edge-agent run BUNDLE --config FILE` and `edge-agent infer --config FILE` read them from a TOML file; flags come on top.
"""

AGENT_TITLES = {
    "": "Top level of the agent's file",
    "privacy": "`[privacy]`: what this device demands and never spends",
    "inference": "`[inference]`: what this device looks at, and with which model",
}


def page() -> str:
    """The whole page."""
    parts = [HEAD, *_tables(AggregatorConfig, TITLES)]
    parts.append("\n## Environment\n\n| variable | sets |\n|---|---|\n")
    parts += [f"| `{variable}` | `{key}` |\n" for variable, key in SECRETS.items()]
    parts += [AGENT_HEAD, *_tables(AgentConfig, AGENT_TITLES)]
    return "".join(parts)


def _tables(kind: type[Struct], titles: dict[str, str]) -> Iterator[str]:
    table: str | None = None
    for setting in describe(kind):
        head, _, name = setting.key.rpartition(".")
        if head != table:
            table = head
            yield f"\n## {titles[head]}\n\n| key | default | meaning |\n|---|---|---|\n"
        yield f"| `{name}` | {_default(setting)} | {_text(setting)} |\n"


def _text(setting: Setting) -> str:
    return setting.text.replace("|", "\\|").replace("``", "`")


def _default(setting: Setting) -> str:
    return f"`{msgspec.json.encode(setting.default).decode()}`"


if __name__ == "__main__":
    PAGE.write_text(page())
