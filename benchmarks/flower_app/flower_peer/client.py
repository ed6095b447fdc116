"""The device's side: Flower starts it in a new process for every message."""

import time
from pathlib import Path

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from .training import build, read, train

app = ClientApp()


@app.train()  # type: ignore[untyped-decorator]  # Flower is in an environment of its own
def fit(message: Message, context: Context) -> Message:
    """Train the global model on this device's images."""
    began = time.monotonic()
    torch.set_num_threads(1)
    config = context.run_config
    model = build(str(config["model"]), int(config["side"]))
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    images, labels = read(Path(str(context.node_config["images"])))
    loss = train(
        model,
        images,
        labels,
        batch_size=int(config["batch-size"]),
        epochs=int(config["epochs"]),
        learning_rate=float(config["learning-rate"]),
        momentum=float(config["momentum"]),
    )
    metrics = {"num-examples": len(labels), "train-s": time.monotonic() - began, "loss": loss}
    content = RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": MetricRecord(metrics)})
    return Message(content=content, reply_to=message)
