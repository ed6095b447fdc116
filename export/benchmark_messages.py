"""What a benchmark and its workers say to each other: JSON lines on stdin and stdout."""

from msgspec import Struct


class Load(Struct, frozen=True, kw_only=True, tag=True):
    """Load a model and run it a few times.

    Attributes:
        path: An ONNX file, or a checkpoint.
        threads: CPU threads.
        frame: Height and width of the frames to measure with; None takes the model's own size if it is grey, else a camera's.
        tuned: Of a checkpoint: prepare frames by hand instead of with torchvision's transforms.
    """

    path: str
    threads: int
    frame: tuple[int, int] | None
    tuned: bool = False


class Burst(Struct, frozen=True, kw_only=True, tag=True):
    """Measure for so many seconds, half of them the whole path, half the model alone."""

    seconds: float


class Score(Struct, frozen=True, kw_only=True, tag=True):
    """Classify labelled images.

    Attributes:
        data: A data spec; its test split is taken.
        limit: Images, spread evenly over the set; 0 takes all.
    """

    data: str
    limit: int


class Loaded(Struct, frozen=True, kw_only=True, tag=True):
    """A model is ready.

    Attributes:
        runtime: ``onnxruntime 1.31.1``, say.
        format: Of the weights, with ``fused`` if preprocessing is in the graph.
        model: Name of the architecture.
        frame: Height, width and channels of the frames that it is measured with.
        bytes: Of the file.
    """

    runtime: str
    format: str
    model: str
    frame: tuple[int, int, int]
    bytes: int


class Latencies(Struct, frozen=True, kw_only=True, tag=True):
    """Of one burst, milliseconds a frame.

    Attributes:
        whole: From a raw frame to a label.
        model: The model alone, on an input of its own size; a fused graph has preprocessing and top-k in it.
        rss_mb: Resident memory after it, MiB.
        peak_mb: The most that it ever was.
    """

    whole: list[float]
    model: list[float]
    rss_mb: float
    peak_mb: float


class Scored(Struct, frozen=True, kw_only=True, tag=True):
    """Images classified, and how many of them rightly."""

    images: int
    right: int


class Failed(Struct, frozen=True, kw_only=True, tag=True):
    """Why a request could not be met, for people."""

    message: str
    exit_code: int


Request = Load | Burst | Score
Answer = Loaded | Latencies | Scored | Failed
