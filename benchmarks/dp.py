"""What privacy for each sample costs: accuracy, time, memory; whether epsilon is right, and the ledger above all that was used."""

from benchmarks.runner import Options, Results, main

QUESTION = "what does sample-level differential privacy cost, and is its account right?"
PARTS = ("accuracy", "cost", "epsilon", "kills")


def measure(options: Options, results: Results) -> None:
    """Run the parts that were asked for, the quick ones first."""
    if "epsilon" in options.parts:
        from benchmarks.dp_epsilon import measure_epsilon

        measure_epsilon(options, results)
    if "cost" in options.parts:
        from benchmarks.dp_cost import measure_cost

        measure_cost(options, results)
    if "kills" in options.parts:
        from benchmarks.private_kills import measure_kills

        measure_kills(options, results)
    if "accuracy" in options.parts:
        from benchmarks.dp_accuracy import measure_accuracy

        measure_accuracy(options, results)


if __name__ == "__main__":
    main("dp", QUESTION, measure, PARTS)
