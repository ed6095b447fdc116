"""Where a broker is and how to be let in: ``mqtt://`` and ``mqtts://`` URLs, checked before anything is sent."""

import ssl
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, cast
from urllib.parse import SplitResult, parse_qs, unquote, urlsplit

from federation.errors import ConfigError

PLAIN_PORT = 1883
TLS_PORT = 8883

SMALLEST_PACKET_LIMIT = 1024
"""Bytes. A plan or an offer has to fit; a lower ``max_packet`` is a slip of the pen."""

LARGEST_PACKET = 268_435_455
"""Bytes: what the four-byte length of an MQTT packet can express."""

Version = Literal[0, 3, 5]

_EXPECTED = (
    "expected mqtt://[user[:password]@]host[:port] or mqtts://…, optionally ?version=3|5&max_packet=BYTES"
)


@dataclass(frozen=True, kw_only=True)
class BrokerAddress:
    """A broker, checked. Secrets do not show in its repr.

    Attributes:
        host: Name or IP address, without brackets.
        port: TCP port.
        tls: Whether to speak TLS.
        username: MQTT user name.
        password: MQTT password.
        ca_pem: The certificate authorities to trust, PEM text; None trusts those of the system.
        client_cert_file: PEM chain to authenticate with, for mutual TLS.
        client_key_file: Its private key; None if it is in the same file.
        version: 5, 3 (meaning 3.1.1), or 0: find out, by trying 5 first.
        max_packet_bytes: A limit of the broker that it does not announce itself (MQTT 3.1.1 has no way to).
    """

    host: str
    port: int = PLAIN_PORT
    tls: bool = False
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    ca_pem: str | None = field(default=None, repr=False)
    client_cert_file: str | None = None
    client_key_file: str | None = None
    version: Version = 0
    max_packet_bytes: int | None = None

    @classmethod
    def parse(
        cls,
        url: str,
        *,
        username: str | None = None,
        password: str | None = None,
        ca_pem: str | None = None,
        ca_file: str | Path | None = None,
        client_cert_file: str | Path | None = None,
        client_key_file: str | Path | None = None,
    ) -> "BrokerAddress":
        """Read an address such as ``mqtts://pi1:secret@broker.example:8883?version=5``.

        Args:
            url: The address. Special characters in user and password are percent-encoded.
            username: Wins over the one in the URL.
            password: Wins over the one in the URL.
            ca_pem: Certificate authorities as PEM text.
            ca_file: The same, in a file; give one of the two.
            client_cert_file: PEM chain for mutual TLS.
            client_key_file: Its key.

        Raises:
            ConfigError: If anything is off; the text names the value and what was expected, never the password.
        """
        parts, port = _split(url)
        tls = parts.scheme == "mqtts"
        if not tls and (ca_pem or ca_file or client_cert_file or client_key_file):
            raise ConfigError(
                f"certificates are given for {_shown(url)!r}, which does not use TLS: write mqtts:// instead"
            )
        if client_key_file and not client_cert_file:
            raise ConfigError("a client key is given without its certificate: give both")
        version, max_packet_bytes = _options(parts, url)
        user = username if username is not None else _decoded(parts.username)
        secret = password if password is not None else _decoded(parts.password)
        if secret is not None and not user:
            raise ConfigError(f"a password without a user name for {_shown(url)!r}: MQTT wants both")
        return cls(
            host=cast("str", parts.hostname),
            port=port or (TLS_PORT if tls else PLAIN_PORT),
            tls=tls,
            username=user or None,
            password=secret,
            ca_pem=_read_ca(ca_pem, ca_file),
            client_cert_file=str(client_cert_file) if client_cert_file else None,
            client_key_file=str(client_key_file) if client_key_file else None,
            version=version,
            max_packet_bytes=max_packet_bytes,
        )

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'mqtts' if self.tls else 'mqtt'}://{host}:{self.port}"

    def tls_context(self) -> ssl.SSLContext | None:
        """What to verify the broker with and to authenticate by; None without TLS.

        Raises:
            ConfigError: If a certificate or key cannot be read or does not fit.
        """
        if not self.tls:
            return None
        try:
            context = ssl.create_default_context(cadata=self.ca_pem)
        except (ssl.SSLError, ValueError) as error:
            raise ConfigError(f"the CA certificate for {self} is not valid PEM: {error}") from error
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        if self.client_cert_file is not None:
            try:
                # An encrypted key would make OpenSSL ask on the terminal; a daemon has none.
                context.load_cert_chain(self.client_cert_file, self.client_key_file, password="")
            except OSError as error:
                raise ConfigError(
                    f"cannot use the client certificate {self.client_cert_file} with the key "
                    f"{self.client_key_file or 'in the same file'}: {error}"
                ) from error
        return context


def _split(url: str) -> tuple[SplitResult, int | None]:
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        raise ConfigError(f"broker address {_shown(url)!r}: {error}; {_EXPECTED}") from error
    if parts.scheme not in ("mqtt", "mqtts"):
        raise ConfigError(
            f"broker address {_shown(url)!r} does not start with mqtt:// or mqtts://; {_EXPECTED}"
        )
    if not parts.hostname:
        raise ConfigError(f"broker address {_shown(url)!r} names no host; {_EXPECTED}")
    if port == 0:
        raise ConfigError(f"broker address {_shown(url)!r}: port 0 cannot be connected to; {_EXPECTED}")
    if parts.path not in ("", "/") or parts.fragment:
        raise ConfigError(f"broker address {_shown(url)!r} has a path, MQTT knows none; {_EXPECTED}")
    return parts, port


def _options(parts: SplitResult, url: str) -> tuple[Version, int | None]:
    version: Version = 0
    max_packet_bytes: int | None = None
    for key, values in parse_qs(parts.query, keep_blank_values=True).items():
        value = values[-1]
        if key == "version" and value in ("3", "5"):
            version = 3 if value == "3" else 5
        elif (
            key == "max_packet"
            and value.isdecimal()
            and SMALLEST_PACKET_LIMIT <= int(value) <= LARGEST_PACKET
        ):
            max_packet_bytes = int(value)
        else:
            raise ConfigError(
                f"broker address {_shown(url)!r}: option {key}={value} is not understood; known are version=3, "
                f"version=5 and max_packet={SMALLEST_PACKET_LIMIT}…{LARGEST_PACKET}"
            )
    return version, max_packet_bytes


def _read_ca(ca_pem: str | None, ca_file: str | Path | None) -> str | None:
    if ca_file is None:
        return ca_pem or None
    if ca_pem is not None:
        raise ConfigError("the CA certificate is given both as text and as a file: give one")
    try:
        return Path(ca_file).read_text(encoding="ascii")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"cannot read the CA certificate {ca_file}: {error}") from error


def _decoded(text: str | None) -> str | None:
    return None if text is None else unquote(text)


def _shown(url: str) -> str:
    """The address without what stands before the last ``@``, where a password may be."""
    head, separator, tail = url.rpartition("@")
    if not separator:
        return url
    scheme, slashes, _ = head.partition("://")
    return f"{scheme if slashes else ''}{slashes}…@{tail}"


__all__ = ["LARGEST_PACKET", "PLAIN_PORT", "TLS_PORT", "BrokerAddress", "Version"]
