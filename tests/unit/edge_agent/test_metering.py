"""edge_agent.metering: the bytes of a round, the share of an upload."""

from edge_agent.metering import RoundMeter, UploadShare
from federation.wire.messages import RoundTraffic, Traffic
from federation.wire.transfer import make_ref

RUN = "0123456789abcdef"


def at(sent: int, received: int = 0) -> Traffic:
    return Traffic(
        sent_bytes=sent,
        received_bytes=received,
        sent_payload_bytes=sent // 2,
        received_payload_bytes=received // 2,
    )


def of(number: int, moved: Traffic) -> RoundTraffic:
    return RoundTraffic(run=RUN, round=number, moved=moved)


def test_a_round_has_moved_what_the_counters_rose_by() -> None:
    meter = RoundMeter()
    assert not meter.observe(None, at(100, 10))
    assert not meter.observe((RUN, 1), at(200, 20))
    assert not meter.observe((RUN, 1), at(500, 50))
    assert meter.observe(None, at(900, 1020))
    assert meter.last == of(1, at(700, 1000))
    assert not meter.observe(None, at(5000, 5000)), "what is moved between rounds is for none"
    assert not meter.observe((RUN, 2), at(6000, 6000))
    assert meter.observe(None, at(6010, 6040))
    assert meter.last == of(2, at(10, 40))


def test_a_newer_round_ends_the_one_before() -> None:
    meter = RoundMeter()
    meter.observe((RUN, 1), at(0))
    assert meter.observe((RUN, 2), at(70))
    assert meter.last == of(1, at(70))
    assert meter.observe(None, at(80))
    assert meter.last == of(2, at(10))


def test_a_second_attempt_adds_to_the_first() -> None:
    meter = RoundMeter()
    for began, ended in ((0, 100), (200, 240)):
        meter.observe((RUN, 1), at(began))
        assert meter.observe(None, at(ended))
    assert meter.last == of(1, at(140))


def test_the_share_of_an_upload_counts_each_chunk_once() -> None:
    upload = UploadShare()
    assert upload.share(0) == 0.0
    first, second = make_ref(bytes(400), 100), make_ref(bytes(800), 100)
    assert upload.begin(first)
    upload.ask((0, 1))
    assert not upload.begin(first)
    upload.ask((1, 2))
    assert (upload.asked, upload.total, upload.sent(0), upload.share(0)) == (3, 4, 3, 0.75)
    assert (upload.sent(2), upload.share(2)) == (1, 0.25)
    assert upload.sent(4) == 0, "chunks of an update before this one still wait"
    assert upload.begin(second)
    assert (upload.asked, upload.total, upload.share(0)) == (0, 8, 0.0)
