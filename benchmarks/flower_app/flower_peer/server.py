"""The server's side: Flower's own FedAvg; a line is written whenever a round is over."""

import json
import time
from pathlib import Path

from flwr.app import ArrayRecord, Context, MetricRecord, RecordDict
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from .training import build

app = ServerApp()


@app.main()  # type: ignore[untyped-decorator]  # Flower is in an environment of its own
def main(grid: Grid, context: Context) -> None:
    """Run all rounds."""
    config = context.run_config
    devices, marks = int(config["devices"]), Path(str(config["marks"]))
    longest = [0.0]

    def keep_longest(replies: list[RecordDict], weighted_by: str) -> MetricRecord:
        del weighted_by
        if len(replies) != devices:
            raise RuntimeError(f"{len(replies)} of {devices} devices answered")
        longest[0] = max(float(reply["metrics"]["train-s"]) for reply in replies)
        return MetricRecord({"longest-train-s": longest[0]})

    def mark(number: int, arrays: ArrayRecord) -> None:
        del arrays
        with marks.open("a") as file:
            file.write(json.dumps({"round": number, "at": time.time(), "longest_train_s": longest[0]}) + "\n")

    strategy = FedAvg(
        fraction_evaluate=0.0,
        min_train_nodes=devices,
        min_available_nodes=devices,
        train_metrics_aggr_fn=keep_longest,
    )
    model = build(str(config["model"]), int(config["side"]))
    strategy.start(
        grid,
        ArrayRecord(model.state_dict()),
        num_rounds=int(config["rounds"]),
        evaluate_fn=mark,  # called once before the first round and at the end of each
    )
