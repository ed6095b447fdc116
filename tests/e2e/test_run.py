"""A whole run with real processes: three agents learn one model from real images, and it comes out as ONNX."""

import json
from pathlib import Path

import pytest
from processes import (
    LEARNING,
    SHARES,
    WHOLE_RUN_S,
    FinishedRun,
    MakeFederation,
    finish,
    run_command,
    same_bits,
    wrong_clock,
)

from federation.task.data import write_samples

pytestmark = [pytest.mark.network, pytest.mark.timeout(WHOLE_RUN_S)]

TEN_YEARS_S = 10 * 365 * 86400


def test_every_round_closes_with_every_agent_and_the_model_gets_better(undisturbed: FinishedRun) -> None:
    report = undisturbed.federation.report()
    assert [(row.round, row.phase, row.attempt) for row in report.rounds] == [
        (n, "closed", 1) for n in (1, 2, 3)
    ]
    assert [(row.delivered, row.cohort) for row in report.rounds] == [(3, 3)] * 3
    assert not report.refusals
    accuracies = [row.accuracy for row in report.rounds]
    assert all(accuracy is not None for accuracy in accuracies)
    assert accuracies[-1] is not None
    assert accuracies[-1] > 0.9
    folder = undisturbed.federation.state / "checkpoints"
    for number in (1, 2, 3):
        assert (folder / f"round-{number:06d}.safetensors").exists()
        assert (
            json.loads((folder / f"round-{number:06d}.json").read_text())["accuracy"]
            == accuracies[number - 1]
        )
    assert not list((undisturbed.federation.state / "updates").iterdir()), (
        "updates are deleted once they count"
    )


def test_the_server_ends_by_itself_and_the_agents_stay_until_they_are_told(undisturbed: FinishedRun) -> None:
    assert undisturbed.server_exit == 0
    assert undisturbed.outlived == tuple(SHARES)
    assert undisturbed.agent_exits == dict.fromkeys(SHARES, 0)


def test_no_agent_trained_a_round_twice(undisturbed: FinishedRun) -> None:
    for process in undisturbed.federation.processes[1:]:
        assert [line["round"] for line in process.logged("training_started")] == [1, 2, 3]
        assert [line["round"] for line in process.logged("model_trained")] == [1, 2, 3]


def test_status_prints_for_people_and_for_programs(undisturbed: FinishedRun) -> None:
    shown = run_command("aggregator.cli", "status", undisturbed.federation.state)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "3/3" in shown.stdout
    assert all(name in shown.stdout for name in SHARES)
    as_json = run_command("aggregator.cli", "status", undisturbed.federation.state, "--json")
    report = json.loads(as_json.stdout)
    assert [row["delivered"] for row in report["rounds"]] == [3, 3, 3]
    assert {row["agent"] for row in report["agents"]} == set(SHARES)


def test_what_each_round_has_moved_is_known_for_each_agent_and_the_server(undisturbed: FinishedRun) -> None:
    report = undisturbed.federation.report()
    for row in report.rounds:
        # Each agent has sent its update, which all were stored, and has said so; acknowledgements come on top.
        assert row.agents_moved.sent_payload_bytes > row.bytes_up
        assert row.agents_moved.sent_bytes > row.agents_moved.sent_payload_bytes
        assert row.agents_moved.received_bytes > row.agents_moved.received_payload_bytes > 0
        assert row.server_moved.received_payload_bytes > row.bytes_up
        assert row.server_moved.sent_bytes > row.server_moved.sent_payload_bytes > 0
    for agent in report.agents:
        assert agent["last_round"]["round"] == report.rounds[-1].round
        assert agent["all_rounds"]["sent_bytes"] > agent["last_round"]["moved"]["sent_bytes"]
        assert agent["telemetry"]["total"]["sent_bytes"] > agent["last_round"]["moved"]["sent_bytes"]
        assert agent["upload"] is None


def test_the_model_comes_out_as_onnx_and_reads_digits_that_no_agent_has_seen(
    undisturbed: FinishedRun, tmp_path: Path
) -> None:
    model = tmp_path / "release" / "model.onnx"
    exported = run_command("export.cli", "onnx", undisturbed.federation.state, "-o", model.parent)
    assert exported.returncode == 0, exported.stderr
    images = write_samples("digits", tmp_path / "unseen", count=20)
    inferred = run_command("edge_agent.cli", "infer", "--model", model, "--source", images, "--json")
    assert inferred.returncode == 0, inferred.stderr
    lines = [json.loads(line) for line in inferred.stdout.splitlines()]
    right = [line for line in lines if "label" in line and line["source"].endswith(f"-{line['label']}.png")]
    assert lines[-1]["summary"]["images"] == 20
    assert len(right) >= 17, lines


def test_another_broker_and_wrong_clocks_give_the_same_bits(
    undisturbed: FinishedRun, make_federation: MakeFederation, tmp_path: Path
) -> None:
    federation = make_federation("mosquitto")
    for name in SHARES:
        federation.enroll(name)
    clocks = {
        "agent-1": wrong_clock(tmp_path, -TEN_YEARS_S),
        "agent-2": wrong_clock(tmp_path, +TEN_YEARS_S),
    }
    server = federation.serve(*LEARNING)
    agents = {
        name: federation.agent(name, data, environment=clocks.get(name)) for name, data in SHARES.items()
    }
    run = finish(federation, server, agents)
    assert (run.server_exit, run.outlived) == (0, tuple(SHARES))
    assert set(run.agent_exits.values()) == {0}
    assert [(row.phase, row.delivered) for row in federation.report().rounds] == [("closed", 3)] * 3
    for number in range(4):
        assert same_bits(federation.tensors(number), undisturbed.federation.tensors(number)), (
            f"round {number}"
        )
