"""What is looked at before a model is released: its golden set, its labels, and how it does beside the stable release."""

from dataclasses import dataclass
from pathlib import Path

from aggregator.config import AggregatorConfig
from aggregator.releases.records import StoredRelease
from export.gates import ask
from export.pictures import DEFAULT_MEASURED, Pictures, read_pictures
from federation.errors import ConfigError, ReleaseError, VerificationError
from federation.release import GOLDEN_FILE, MODEL_FILE
from federation.task.engine import Engine
from federation.task.golden import check_answers, read_golden
from federation.task.model_card import ModelCard
from federation.wire.messages import TaskSpec
from federation.wire.release import ModelFormat, ReleaseMetrics


@dataclass(frozen=True, slots=True)
class Order:
    """What is to be released.

    Attributes:
        folder: A release folder of ``model-export onnx``, or the model in it; None exports a checkpoint.
        round: Whose checkpoint; None is the newest.
        format: Tried first; None is the setting ``release.format``.
        data: Data spec of the pictures; None is ``release.data``, or else ``task.holdout``.
        max_drop: Percentage points that the format may cost; None is ``release.max_drop``.
        notes: For people.
        other_labels: Whether the model may know other classes than the stable release.
        gated: Whether a model that is worse than the stable release by more than ``release.max_regression`` is refused.
    """

    folder: Path | None = None
    round: int | None = None
    format: ModelFormat | None = None
    data: str | None = None
    max_drop: float | None = None
    notes: str = ""
    other_labels: bool = False
    gated: bool = False


def data_of(config: AggregatorConfig, order: Order) -> str | None:
    """The pictures that count for a release; None where nobody named any."""
    return order.data or config.release.data or config.task.holdout or None


@dataclass(frozen=True, slots=True)
class Comparison:
    """A model beside the stable release, on the same pictures.

    Attributes:
        now: Top-1 of the model, in [0, 1]; None without pictures that have labels.
        before: The same of the stable release; None if there is none, it knows other classes, or its files are gone.
        samples: Pictures.
    """

    now: float | None = None
    before: float | None = None
    samples: int = 0


def examine(folder: Path, federation: str, source: Path) -> ModelCard:
    """Load the very file, as a device will, and ask it the golden set.

    Args:
        folder: In release-folder layout.
        federation: Whose model it must be.
        source: For messages.

    Raises:
        ConfigError: If the file is no model of fedge's, or another federation's.
        VerificationError: If its answers are not those of the golden set.
    """
    model = folder / MODEL_FILE
    try:
        engine = Engine(model)
        golden = read_golden(folder / GOLDEN_FILE)
        check_answers(golden, [engine.predict(frame) for frame in golden.frames])
    except (ReleaseError, VerificationError) as error:
        raise VerificationError(f"{source} cannot be released: {error}; export it again") from error
    if engine.card.requirements is None:
        raise ConfigError(f"{source} does not say what it needs to run: export it again with this fedge")
    if engine.card.provenance.federation != federation:
        raise ConfigError(
            f"{source} is a model of federation {engine.card.provenance.federation!r}, this is {federation!r}: "
            "release it there"
        )
    return engine.card


def same_labels(card: ModelCard, stable: StoredRelease, order: Order, remarks: list[str]) -> bool:
    """Whether both know the same classes. Whoever reads predictions by name must hear of it if not.

    Raises:
        ConfigError: If they do not, and the order does not allow it.
    """
    former = set(Engine(stable.folder / MODEL_FILE).card.labels)
    labels = set(card.labels)
    if former == labels:
        return True
    gone, new = sorted(former - labels), sorted(labels - former)
    said = f"it knows other classes than release {stable.number}: {len(gone)} gone ({_few(gone)}), {len(new)} new ({_few(new)})"
    if not order.other_labels:
        raise ConfigError(f"not released: {said}. If that is meant, add --other-labels")
    remarks.append(said)
    return False


def compare(model: Path, card: ModelCard, stable: StoredRelease | None, data: str | None) -> Comparison:
    """Measure a model and the stable release on the same pictures.

    Args:
        model: The file.
        card: Of it.
        stable: None if there is nothing to compare with.
        data: Data spec; None if there is none.

    Raises:
        ConfigError: If the pictures cannot be read.
        VerificationError: If a model answers with NaN.
    """
    if data is None:
        return Comparison()
    pictures = _pictures(data, card)
    if pictures.labels is None:
        return Comparison()
    before = None
    if stable is not None:
        former = Engine(stable.folder / MODEL_FILE)
        # In the size that the other model takes, with the numbers that its classes have there.
        before = _accuracy(former, _pictures(data, former.card))
    return Comparison(_accuracy(Engine(model), pictures), before, len(pictures))


def check_regression(found: Comparison, stable: StoredRelease | None, max_regression: float) -> None:
    """Let no model pass by itself that is much worse than the stable release, or cannot be compared with it.

    Args:
        found: Measured.
        stable: None before the first release: then everything passes.
        max_regression: Percentage points that it may be below.

    Raises:
        VerificationError: It says why.
    """
    if stable is None:
        return
    if found.now is None or found.before is None:
        raise VerificationError(
            f"not released by itself: it cannot be compared with release {stable.number}, since neither release.data nor "
            "task.holdout names pictures with labels, or that release's files are gone"
        )
    lost = 100 * (found.before - found.now)
    if lost > max_regression:
        raise VerificationError(
            f"not released by itself: {found.now:.2%} right, {lost:.2f} points below release {stable.number} "
            f"({found.before:.2%}) on the same {found.samples} pictures; release.max_regression allows {max_regression:g}"
        )


def metrics_of(card: ModelCard, found: Comparison, remarks: list[str]) -> ReleaseMetrics | None:
    """Of an exported folder. What its format has cost is known for float32 (nothing), and from the hold-out evaluation."""
    if found.now is None:
        return None
    holdout, weights = card.provenance.metrics, card.provenance.weights
    if weights is ModelFormat.FP32:
        drop = 0.0
    elif holdout is not None and holdout.samples == found.samples:
        drop = 100 * (holdout.accuracy - found.now)
    else:
        remarks.append(
            f"{found.now:.2%} right of {found.samples} pictures; the manifest does not say so, since what {weights.value} has "
            "cost is not known of an exported folder"
        )
        return None
    return ReleaseMetrics(
        accuracy=found.now,
        samples=found.samples,
        drop_points=drop,
        loss=None if holdout is None else holdout.loss,
    )


_SHOWN = 5


def _few(names: list[str]) -> str:
    return ", ".join(names[:_SHOWN]) + (", ..." if len(names) > _SHOWN else "") if names else "none"


def _pictures(data: str, card: ModelCard) -> Pictures:
    """Chosen alike for every model."""
    recipe = card.preprocessing
    task = TaskSpec(
        model=card.provenance.model,
        labels=card.labels,
        channels=recipe.channels,
        height=recipe.height,
        width=recipe.width,
        mean=recipe.mean,
        std=recipe.std,
    )
    return read_pictures(data, task, train=False, limit=DEFAULT_MEASURED)


def _accuracy(engine: Engine, pictures: Pictures) -> float:
    labels = pictures.labels
    assert labels is not None, "asked for where there are labels"
    return ask(engine, pictures.pixels).accuracy(labels)
