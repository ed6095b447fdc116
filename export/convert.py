"""From a checkpoint to an ONNX file that a device can run, checked against torch before it exists."""

import contextlib
import hashlib
import importlib.util
import io
import logging
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec import Struct

import federation
from export.parity import DEFAULT_TOLERANCE, Parity, check_parity
from federation.errors import ConfigError
from federation.files import write_whole
from federation.task.checkpoint import CheckpointInfo, read_checkpoint, read_metrics
from federation.task.model_card import ModelCard, Provenance
from federation.task.models import build, load_arrays
from federation.task.preprocessing import Preprocessing

if TYPE_CHECKING:
    import onnx
    from torch import nn

    from federation.wire.messages import TaskSpec

DEFAULT_OPSET = 20
"""The dynamo exporter's own default; onnxruntime 1.17 and later run it."""

OLDEST_OPSET = 18
"""The dynamo exporter writes 18 and converts from there; it promises nothing below."""

INPUT_NAME = "image"
OUTPUT_NAME = "logits"

_MAX_PROTOBUF_BYTES = 2**31 - 1
_GRAPH_ALLOWANCE_BYTES = 16 * 2**20
"""For everything in the file that is not weights."""

_TRACED_BATCH = 2
"""torch.export treats a dimension of 1 as a constant, which would fix the batch."""

_GIT_TIMEOUT_S = 10


class ExportReport(Struct, frozen=True, kw_only=True):
    """What was exported.

    Attributes:
        path: The ONNX file.
        size_bytes: Of the file.
        sha256: Hex SHA-256 of the file.
        opset: Of the default ONNX domain.
        info: What the checkpoint was.
        card: What was written into the file's metadata.
        parity: How far onnxruntime is from torch.
    """

    path: Path
    size_bytes: int
    sha256: str
    opset: int
    info: CheckpointInfo
    card: ModelCard
    parity: Parity


def export_onnx(
    checkpoint: Path,
    output: Path,
    *,
    opset: int = DEFAULT_OPSET,
    tolerance: float = DEFAULT_TOLERANCE,
    images: Path | None = None,
) -> ExportReport:
    """Export a checkpoint to one self-contained ONNX file with a dynamic batch.

    The graph takes float32 ``image`` ``[N, channels, height, width]``, normalised, and gives float32 ``logits``
    ``[N, labels]``. The file appears whole or not at all, and only after onnxruntime agreed with torch.

    Args:
        checkpoint: As ``federation.task.checkpoint`` writes it.
        output: Replaced if it exists; its folder must exist.
        opset: ONNX operator set, 18 or later.
        tolerance: Largest difference of a logit, relative to the largest logit.
        images: Real pictures for the parity check, besides random ones: a file or a folder.

    Raises:
        ConfigError: If the checkpoint cannot be read, the model cannot be exported or is too large, the output
            cannot be written, or torch or onnx is not installed.
        VerificationError: If weights are not finite, or onnxruntime and torch disagree.
    """
    _require("torch", "onnx", "onnxscript")
    if not output.parent.is_dir():
        raise ConfigError(f"the folder {output.parent} for the exported model does not exist: create it")
    info, arrays = read_checkpoint(checkpoint)
    weights_bytes = sum(array.nbytes for array in arrays.values())
    if weights_bytes > _MAX_PROTOBUF_BYTES - _GRAPH_ALLOWANCE_BYTES:
        raise ConfigError(
            f"the weights are {weights_bytes / 2**30:.2f} GiB, one ONNX file holds at most 2 GiB: "
            "choose a smaller model"
        )
    model = build(info.task, seed=0)
    load_arrays(model, arrays)
    model.eval()

    card = ModelCard(
        labels=info.task.labels,
        preprocessing=Preprocessing.of(info.task),
        provenance=_provenance(checkpoint, info),
    )
    content = _to_onnx(model, info.task, card, opset).SerializeToString()
    parity = check_parity(content, model, card.preprocessing, tolerance=tolerance, images=images)
    write_whole(output, content)
    return ExportReport(
        path=output,
        size_bytes=len(content),
        sha256=hashlib.sha256(content).hexdigest(),
        opset=opset,
        info=info,
        card=card,
        parity=parity,
    )


def default_output(info: CheckpointInfo) -> Path:
    """``MODEL-round-N.onnx`` in the current folder; of a plug-in's name only the factory's."""
    name = re.sub(r"[^A-Za-z0-9_.-]", "-", info.task.model.rpartition(":")[2])
    return Path(f"{name}-round-{info.round}.onnx")


def _require(*packages: str) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ConfigError(f"export needs {', '.join(missing)}: pip install 'fedge[aggregator]'")


def _to_onnx(model: "nn.Module", task: "TaskSpec", card: ModelCard, opset: int) -> "onnx.ModelProto":
    import onnx
    import torch

    example = torch.zeros(_TRACED_BATCH, task.channels, task.height, task.width)
    try:
        with _quiet():
            program = torch.onnx.export(
                model,
                (example,),
                dynamo=True,
                dynamic_shapes=({0: "N"},),
                opset_version=opset,
                input_names=[INPUT_NAME],
                output_names=[OUTPUT_NAME],
                verbose=False,
            )
            assert program is not None  # the dynamo exporter always returns one
            proto: onnx.ModelProto = program.model_proto
        _strip(proto.graph)
        for key, value in card.properties().items():
            proto.metadata_props.add(key=key, value=value)
        onnx.checker.check_model(proto)
    except (torch.onnx.errors.OnnxExporterError, RuntimeError, onnx.checker.ValidationError) as error:
        reason = str(error).strip().partition("\n")[0][:300]
        raise ConfigError(
            f"model {task.model!r} cannot be exported to ONNX opset {opset}: {reason}. Try another --opset; "
            "a plug-in model must avoid control flow that depends on the data"
        ) from error
    return proto


def _strip(graph: "onnx.GraphProto") -> None:
    """Drop what only the exporter's own machine needs.

    The exporter notes stack traces with file paths at every node, and lists initializers among the intermediate
    values, which onnxruntime's quantizer cannot bear.
    """
    del graph.value_info[:]
    for part in (graph, *graph.node, *graph.input, *graph.output, *graph.initializer):
        del part.metadata_props[:]
        part.ClearField("doc_string")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Hold back what the exporter prints, and show it only when it fails."""
    said = io.StringIO()
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except BaseException:
        sys.stderr.write(said.getvalue())
        raise
    finally:
        logger.setLevel(level)


def _provenance(checkpoint: Path, info: CheckpointInfo) -> Provenance:
    with checkpoint.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return Provenance(
        federation=info.federation,
        round=info.round,
        checkpoint_sha256=digest,
        model=info.task.model,
        fedge_version=federation.__version__,
        git_sha=_git_sha(),
        metrics=read_metrics(checkpoint),
        exported_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _git_sha() -> str | None:
    """The commit of this source, where it lies at the root of a checkout and git is there to ask."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    try:
        # No tag matches, so that the answer is always a hash.
        command = ["git", "-C", str(root), "describe", "--always", "--abbrev=40", "--dirty", "--exclude=*"]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=_GIT_TIMEOUT_S)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()
