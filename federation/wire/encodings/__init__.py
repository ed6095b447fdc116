"""How one tensor's values become bytes: the encodings that a plan may name.

An encoding is named by its family, with a parameter where the family has one: ``int8``, ``sq:16``. Only the canonical
form is accepted, so that equal encodings have equal names. All blobs are little-endian. What an encoding loses, and
how many bits a value takes, is stated in its docstring.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from federation.errors import ConfigError
from federation.task.names import did_you_mean
from federation.wire.encodings.grid import Int4, Int8
from federation.wire.encodings.plain import Float16, Float32, Zero
from federation.wire.encodings.protocol import Encoding, Scheme
from federation.wire.encodings.rotated import Rotated1, Rotated2
from federation.wire.encodings.sq import Sq
from federation.wire.encodings.ternary import Ternary
from federation.wire.encodings.topk import TopK

__all__ = ["ENCODINGS", "RAW", "ZERO", "Encoding", "Family", "Scheme", "encoding_named"]

ZERO: Final = Zero()
RAW: Final = Float32()
"""In which a tensor is sent that another encoding would not make smaller."""


@dataclass(frozen=True, slots=True)
class Family:
    """Encodings that differ in one number.

    Attributes:
        name: As agents announce it in their capabilities.
        about: What it is, in one line.
        make: Builds an encoding, from the parameter if there is one.
        parameter: What the parameter is called; empty if there is none.
        least: The smallest parameter.
        most: The largest one.
        usual: One that suits many cases.
    """

    name: str
    about: str
    make: Callable[..., Encoding]
    parameter: str = ""
    least: float = 0.0
    most: float = 0.0
    usual: float = 0.0

    @property
    def form(self) -> str:
        """How its encodings are written: ``sq:STEP``."""
        return f"{self.name}:{self.parameter}" if self.parameter else self.name

    def encoding(self, text: str | None) -> Encoding:
        """Build one of its encodings.

        Args:
            text: What stands behind the colon; None if there is no colon.

        Raises:
            ConfigError: If the parameter is missing, superfluous, out of range or not in its canonical form.
        """
        if not self.parameter:
            if text is not None:
                raise ConfigError(f"encoding {self.name!r} takes no parameter: leave ':{text[:64]}' away")
            return self.make()
        if not text:
            raise ConfigError(
                f"encoding {self.name!r} needs a parameter: write {self.form}, as in {self.example!r}"
            )
        number = _number(text)
        if number is None or not self.least <= number <= self.most:
            raise ConfigError(
                f"encoding '{self.name}:{text[:64]}': {self.parameter} is a number from {self.least:g} to"
                f" {self.most:g}, as in {self.example!r}"
            )
        if text != f"{number:g}":
            raise ConfigError(f"encoding '{self.name}:{text[:64]}': write '{self.name}:{number:g}'")
        return self.make(number)

    @property
    def example(self) -> str:
        """The name of a usual one."""
        return f"{self.name}:{self.usual:g}" if self.parameter else self.name


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


_FAMILIES: Final = (
    Family("float32", "the values themselves; 32 bits a value", Float32),
    Family("float16", "half precision with a scale; 16 bits a value", Float16),
    Family("int8", "stochastic rounding to 255 levels; 8 bits a value", Int8),
    Family("int4", "stochastic rounding to 15 levels, a step for each 128 values; 4.1 bits a value", Int4),
    Family("rotated1", "EDEN: random rotation, one bit a value", Rotated1),
    Family("rotated2", "EDEN: random rotation, two bits a value", Rotated2),
    Family(
        "ternary",
        "EDEN below one bit: signs of the largest SHARE of the rotated values; 0.09 bits a value at 0.01",
        Ternary,
        parameter="SHARE",
        least=0.0005,
        most=0.2,
        usual=0.01,
    ),
    Family(
        "sq",
        "stochastic rounding to a grid of STEP times the RMS, entropy-coded; 0.3 bits a value at 16, 1.3 at 2",
        Sq,
        parameter="STEP",
        least=0.5,
        most=1024,
        usual=16,
    ),
    Family(
        "topk",
        "the SHARE of largest values, with error feedback on the device; 0.16 bits a value at 0.01",
        TopK,
        parameter="SHARE",
        least=0.0005,
        most=0.5,
        usual=0.01,
    ),
)

ENCODINGS: Final[Mapping[str, Family]] = MappingProxyType({family.name: family for family in _FAMILIES})
"""Every family by its name."""


def encoding_named(spec: str) -> Encoding:
    """The encoding that a plan or a setting names.

    Args:
        spec: ``FAMILY`` or ``FAMILY:PARAMETER``, in canonical form.

    Raises:
        ConfigError: If this version of fedge does not know it, or it is not in canonical form.
    """
    name, colon, text = spec.partition(":")
    family = ENCODINGS.get(name)
    if family is None:
        forms = ", ".join(family.form for family in ENCODINGS.values())
        raise ConfigError(
            f"encoding {spec[:64]!r} is not known here{did_you_mean(name[:64], ENCODINGS)} Use one of {forms}"
        )
    return family.encoding(text if colon else None)
