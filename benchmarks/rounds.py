"""What a federation learns, and what a round costs beyond training: accuracy, overhead, memory.

Everything runs as real processes on this machine: `aggregator serve` with its embedded broker, `edge-agent run`.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from aggregator.versions import WHOLE
from benchmarks.fleets import Fleet, Round, Run, train_together
from benchmarks.memory import agent_memory, aggregator_memory, inference_memory
from benchmarks.processes import Children
from benchmarks.runner import Options, Results, main, middle, say
from benchmarks.timeline import SPANS, spans

QUESTION = "what does a federation learn, and what does a round cost beyond training?"
PARTS = ("accuracy", "overhead", "aggregator-memory", "agent-memory", "infer-memory")

AGENTS = 5

CLASSIC = {"epochs": 5, "batch_size": 10, "learning_rate": 0.01, "momentum": 0.5}
"""The settings of the classic FedAvg-on-MNIST examples in PyTorch: E = 5, B = 10 (McMahan et al. 2017), SGD at
0.01 with momentum 0.5, as in AshwinRJ/Federated-Learning-PyTorch and shaoxiongji/federated-learning."""

ONE_STEP = {"max_steps": 1, "batch_size": 2}
"""Training so short that its noise does not hide the rest of the round."""

ACCURACY_TIMEOUT_S = 3600.0
OVERHEAD_TIMEOUT_S = 900.0


@dataclass(frozen=True, slots=True)
class Data:
    """The images that there are.

    Attributes:
        spec: For ``--data``.
        suffix: Put behind keys that would mean something else on MNIST; empty on MNIST.
    """

    spec: str
    suffix: str

    def shares(self, partition: str, of: int) -> list[str]:
        """One share for each agent, out of ``of``."""
        return [f"{self.spec}@{partition},agent={number}/{of}" for number in range(1, AGENTS + 1)]


def find_data() -> Data:
    """MNIST below ``FEDGE_DATA``, or else scikit-learn's digits under other keys."""
    folder = os.environ.get("FEDGE_DATA", "")
    mnist = Path(folder).expanduser().resolve() / "mnist"
    if folder and mnist.is_dir():
        return Data(f"mnist:{mnist}", "")
    say(
        f"no MNIST: {'FEDGE_DATA is not set' if not folder else f'{mnist} is not a folder'}. Set FEDGE_DATA to a folder "
        "with mnist/MNIST/raw in it. The built-in digits (1,797 images of 8x8) are used instead; accuracy, overhead "
        "and memory on them go under keys that end in _digits, for they are other figures"
    )
    return Data("digits", "_digits")


def measure(options: Options, results: Results) -> None:
    """Run the parts that were asked for."""
    data = find_data()
    with Children(options.folder / "logs") as children:
        if "accuracy" in options.parts:
            accuracy(children, options, data, results)
        if "overhead" in options.parts:
            overhead(children, options, data, results)
        if "aggregator-memory" in options.parts:
            aggregator_memory(children, options, results)
        if "agent-memory" in options.parts:
            agent_memory(children, options, data.spec, data.suffix, results)
        if "infer-memory" in options.parts:
            inference_memory(children, options, data.spec, data.suffix, results)


def accuracy(children: Children, options: Options, data: Data, results: Results) -> None:
    """The classic example, IID and with two classes per agent."""
    if options.quick:
        rounds, train, of = 3, CLASSIC | {"epochs": 1}, 5 * AGENTS
        scope = "--quick: a fifth of the images, 3 rounds x 1 epoch"
    else:
        rounds, train, of = 10, CLASSIC, AGENTS
        scope = "all training images, 10 rounds x 5 epochs"
    settings = f"SGD {train['learning_rate']:g}, batch {train['batch_size']}, momentum {train['momentum']:g}"
    for key, partition in (("top1", "iid"), ("top1_shards2", "shards(2)")):
        say(f"accuracy, {partition}: cnn, {AGENTS} agents, {scope}, {settings}")
        # The classic run is in float32; what encodings cost is the question of benchmarks.wire.
        exact = {"up_encoding": "float32", "down_encoding": WHOLE}
        run = Run("cnn", data.spec, rounds, AGENTS, holdout=data.spec, train=train, settings=exact)
        done = train_together(
            children, options.folder / key, run, data.shares(partition, of), ACCURACY_TIMEOUT_S
        )
        for each in done:
            assert each.row.accuracy is not None
            say(
                f"    round {each.row.round}: {each.row.accuracy:.2%}, {each.seconds:.1f} s, "
                f"longest training {each.longest_training_s:.1f} s"
            )
        best_of_last = done[-1].row.accuracy
        assert best_of_last is not None
        results.add(
            key + data.suffix,
            100 * best_of_last,
            "%",
            f"hold-out top-1 after the last round, one run; {partition}; {scope}; {settings}",
        )
        if partition == "iid":
            results.add(
                "overhead_classic_s" + data.suffix,
                middle(beyond_training(done)),
                "s",
                "as overhead_s, in this run; evaluation excluded",
            )
            results.add(
                "period_s" + data.suffix,
                middle(each.seconds for each in done[1:]),
                "s",
                "opening to closing of a round of this run",
            )


def overhead(children: Children, options: Options, data: Data, results: Results) -> None:
    """A round of one training step: what is left is ours."""
    for key, model, rounds in (
        ("", "cnn", 12 if options.quick else 40),
        ("_11m", "resnet18", 4 if options.quick else 12),
    ):
        say(f"overhead, {model}: {AGENTS} agents, one training step a round, no evaluation, {rounds} rounds")
        folder = options.folder / f"overhead{key}"
        run = Run(model, data.spec, rounds, AGENTS, train=ONE_STEP)
        fleet = Fleet(children, folder, run)
        agents = fleet.join(data.shares("iid", AGENTS))
        server = fleet.serve()
        done = fleet.finish(server, OVERHEAD_TIMEOUT_S)
        children.stop(server, *agents)
        how = "opening of a round -> opening of the next, less its longest local training; median over all but the first round"
        results.add(f"overhead{key}_s{data.suffix}", middle(beyond_training(done)), "s", how)
        results.add(
            f"overhead{key}_first_s{data.suffix}",
            done[0].seconds - done[0].longest_training_s,
            "s",
            "the first round, opening -> closing, less its longest local training, in which the models are built",
        )
        parts = spans(server.log, [agent.log for agent in agents], range(2, rounds + 1))
        for name, seconds in parts.items():
            results.add(f"overhead{key}_{name}_s{data.suffix}", seconds, "s", f"part of it: {SPANS[name]}")


def beyond_training(rounds: list[Round]) -> list[float]:
    """For each round but the first: opening to the next one's opening (the last: to its closing), less training.

    Evaluation, which comes between a closing and the next opening, is taken off too.
    """
    values = []
    for each, following in zip(rounds[1:], [*rounds[2:], None], strict=True):
        between = 0.0
        if following is not None:
            assert each.row.closed_at is not None
            between = following.row.opened_at - each.row.closed_at - (each.row.evaluate_s or 0.0)
        values.append(each.seconds + between - each.longest_training_s)
    return values


if __name__ == "__main__":
    main("rounds", QUESTION, measure, PARTS)
