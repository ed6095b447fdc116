import pytest

from federation.errors import ConfigError
from federation.wire.link import BrokerAddress


def test_plain_url_gets_the_default_port() -> None:
    address = BrokerAddress.parse("mqtt://broker.example")
    assert (address.host, address.port, address.tls, address.version) == ("broker.example", 1883, False, 0)
    assert address.username is None
    assert address.tls_context() is None


def test_tls_url_with_everything() -> None:
    address = BrokerAddress.parse("mqtts://pi%401:p%3Aw%2F@[::1]:8884/?version=5&max_packet=4096")
    assert (address.host, address.port, address.tls, address.version) == ("::1", 8884, True, 5)
    assert (address.username, address.password, address.max_packet_bytes) == ("pi@1", "p:w/", 4096)
    assert str(address) == "mqtts://[::1]:8884"
    assert BrokerAddress.parse("mqtts://h").port == 8883


def test_arguments_win_over_the_url() -> None:
    address = BrokerAddress.parse("mqtt://a:b@h", username="u", password="p")
    assert (address.username, address.password) == ("u", "p")


def test_secrets_do_not_show() -> None:
    address = BrokerAddress.parse("mqtts://u:hunter2@h", ca_pem="PEM")
    assert "hunter2" not in repr(address) + str(address)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("localhost:1883", "does not start with mqtt://"),
        ("http://h", "does not start with mqtt://"),
        ("", "does not start with mqtt://"),
        ("mqtt://", "names no host"),
        ("mqtt://u:hunter2@", "names no host"),
        ("mqtt://u:hunter2@h:port", "Port could not be cast"),
        ("mqtt://h:70000", "out of range"),
        ("mqtt://h:0", "port 0"),
        ("mqtt://[::1", "Invalid IPv6 URL"),
        ("mqtt://u:hunter2@h/path", "has a path"),
        ("mqtt://h?version=4", "option version=4"),
        ("mqtt://h?max_packet=12", "option max_packet=12"),
        ("mqtt://h?retries=3", "option retries=3"),
        ("mqtt://:hunter2@h", "without a user name"),
    ],
)
def test_a_bad_url_says_what_was_expected(url: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        BrokerAddress.parse(url)
    assert said in str(caught.value)
    assert "hunter2" not in str(caught.value)


def test_certificates_demand_tls() -> None:
    with pytest.raises(ConfigError, match="write mqtts://"):
        BrokerAddress.parse("mqtt://h", ca_pem="PEM")


def test_a_missing_ca_file_is_named() -> None:
    with pytest.raises(ConfigError, match=r"/nowhere/ca\.pem"):
        BrokerAddress.parse("mqtts://h", ca_file="/nowhere/ca.pem")


def test_a_broken_ca_or_client_certificate_is_a_config_error() -> None:
    with pytest.raises(ConfigError, match="CA certificate"):
        BrokerAddress.parse("mqtts://h", ca_pem="no PEM at all").tls_context()
    with pytest.raises(ConfigError, match=r"/nowhere/client\.pem"):
        BrokerAddress.parse("mqtts://h", client_cert_file="/nowhere/client.pem").tls_context()
