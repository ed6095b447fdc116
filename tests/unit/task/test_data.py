from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from federation.errors import ConfigError
from federation.task.data import open_data, task_from_data
from federation.task.preprocessing import Preprocessing
from federation.wire.messages import TaskSpec

NewTask = Callable[..., TaskSpec]

CATS_AND_DOGS = ("cat", "dog")


def picture(value: int, size: tuple[int, int] = (12, 10), mode: str = "RGB") -> Image.Image:
    """Noise around ``value``: a JPEG of it is long enough to be cut."""
    random = np.random.default_rng(value)
    return Image.fromarray(random.integers(0, 256, (size[1], size[0], 3), np.uint8)).convert(mode)


def make_folder(
    root: Path, classes: tuple[str, ...] = CATS_AND_DOGS, count: int = 3, kind: str = "png"
) -> Path:
    for number, name in enumerate(classes):
        (root / name).mkdir(parents=True)
        for index in range(count):
            picture(10 * number + index).save(root / name / f"{index}.{kind}")
    return root


class _Pairs(torch.utils.data.Dataset[tuple[object, int]]):
    def __init__(self, items: list[tuple[object, int]]) -> None:
        self.items = items

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> tuple[object, int]:
        return self.items[index]


def tensors(*, train: bool, task: TaskSpec | None) -> _Pairs:
    assert task is None or task.channels == 2
    data = _Pairs([(torch.full((2, 4, 5), 0.25 * index), index % 2) for index in range(4 if train else 2)])
    data.classes = CATS_AND_DOGS  # type: ignore[attr-defined]
    return data


def pictures(*, train: bool, task: TaskSpec | None) -> _Pairs:
    assert train
    assert task is not None
    return _Pairs([(picture(index), index % 2) for index in range(4)])


def nothing(*, train: bool, task: TaskSpec | None) -> _Pairs:
    assert train or task
    return _Pairs([])


def strange(*, train: bool, task: TaskSpec | None) -> _Pairs:
    assert train or task
    return _Pairs([("a picture", 0), ("another", 1)])


def out_of_range(*, train: bool, task: TaskSpec | None) -> _Pairs:
    assert train or task
    return _Pairs([(picture(0), 0), (picture(1), 7)])


def failing(*, train: bool, task: TaskSpec | None) -> _Pairs:
    raise LookupError(f"no camera for {train} {task}")


def test_digits_are_split_alike_every_time_and_hold_every_class(new_task: NewTask) -> None:
    task = new_task(size=(8, 8))
    train, again = open_data("digits", task, train=True), open_data("digits", task, train=True)
    test = open_data("digits", task, train=False)

    assert (len(train), len(test)) == (1437, 360)
    assert np.array_equal(train.labels, again.labels)
    assert set(test.labels) == set(range(10))
    rows = np.arange(len(train))
    assert torch.equal(train.batch(rows)[0], again.batch(rows)[0])
    seen = {image.numpy().tobytes() for image in train.batch(rows)[0]}
    overlap = [image for image in test.batch(np.arange(360))[0] if image.numpy().tobytes() in seen]
    assert len(overlap) == 0


def test_a_batch_is_normalised_as_on_a_device(tmp_path: Path, new_task: NewTask) -> None:
    make_folder(tmp_path)
    task = new_task(channels=3, size=(8, 9), labels=CATS_AND_DOGS)
    data = open_data(f"imagefolder:{tmp_path}", task, train=True)

    images, labels = data.batch(np.array([4, 0]))

    assert images.dtype == torch.float32
    assert images.shape == (2, 3, 8, 9)
    assert labels.dtype == torch.int64
    assert labels.tolist() == [1, 0]
    assert data.labels.dtype == np.int64
    with Image.open(tmp_path / "dog" / "1.png") as image:
        assert np.array_equal(images[0].numpy(), Preprocessing.of(task).apply(image))


@pytest.mark.parametrize("kind", ["png", "jpg"])
def test_a_set_beyond_the_memory_limit_gives_the_same_batches(
    tmp_path: Path, new_task: NewTask, kind: str
) -> None:
    make_folder(tmp_path, kind=kind)
    task = new_task(channels=3, labels=CATS_AND_DOGS)
    held = open_data(f"imagefolder:{tmp_path}", task, train=True)
    lazy = open_data(f"imagefolder:{tmp_path}", task, train=True, memory_limit_mb=0)
    rows = np.array([5, 2, 3])

    assert held.in_memory
    assert not lazy.in_memory
    assert torch.equal(held.batch(rows)[0], lazy.batch(rows)[0])
    assert torch.equal(held.batch(rows)[1], lazy.batch(rows)[1])


def test_an_image_that_goes_away_later_is_named(tmp_path: Path, new_task: NewTask) -> None:
    make_folder(tmp_path)
    data = open_data(f"imagefolder:{tmp_path}", new_task(labels=CATS_AND_DOGS), train=True, memory_limit_mb=0)
    (tmp_path / "cat" / "2.png").unlink()

    with pytest.raises(ConfigError, match=r"cat/2\.png cannot be read"):
        data.batch(np.array([2]))


def test_grey_palette_and_transparent_images_become_the_tasks_channels(
    tmp_path: Path, new_task: NewTask
) -> None:
    make_folder(tmp_path, count=1)
    for mode in ("L", "P", "RGBA", "1", "LA"):
        picture(3, mode=mode).save(tmp_path / "cat" / f"{mode}.png")

    for channels in (1, 3):
        data = open_data(
            f"imagefolder:{tmp_path}", new_task(channels=channels, labels=CATS_AND_DOGS), train=True
        )
        assert data.batch(np.arange(len(data)))[0].shape == (7, channels, 28, 28)


def test_labels_are_mapped_by_name_and_some_may_be_missing(tmp_path: Path, new_task: NewTask) -> None:
    make_folder(tmp_path)
    data = open_data(f"imagefolder:{tmp_path}", new_task(labels=("dog", "fox", "cat")), train=True)

    assert data.labels.tolist() == [2, 2, 2, 0, 0, 0]


def test_hidden_and_foreign_files_are_no_images(tmp_path: Path, new_task: NewTask) -> None:
    make_folder(tmp_path)
    (tmp_path / ".cache").mkdir()
    (tmp_path / "cat" / "._0.png").write_bytes(b"junk")
    (tmp_path / "cat" / "notes.txt").write_text("a good cat")
    (tmp_path / "cat" / "more").mkdir()
    picture(9).save(tmp_path / "cat" / "more" / "LAST.PNG")

    assert len(open_data(f"imagefolder:{tmp_path}", new_task(labels=CATS_AND_DOGS), train=True)) == 7


def test_a_folder_of_splits_gives_the_split_that_is_asked_for(tmp_path: Path, new_task: NewTask) -> None:
    make_folder(tmp_path / "train", count=4)
    make_folder(tmp_path / "val", count=2)
    task = new_task(labels=CATS_AND_DOGS)

    assert len(open_data(f"imagefolder:{tmp_path}", task, train=True)) == 8
    assert len(open_data(f"imagefolder:{tmp_path}", task, train=False)) == 4


def test_shares_of_a_set_are_disjoint_and_together_the_whole(new_task: NewTask) -> None:
    task = new_task(size=(8, 8))
    shares = [
        open_data(f"digits@dirichlet(0.5),agent={agent}/3,seed=4", task, train=True) for agent in (1, 2, 3)
    ]
    whole = open_data("digits", task, train=True)

    assert sum(map(len, shares)) == len(whole)
    counts = sum(np.bincount(part.labels, minlength=10) for part in shares)
    assert np.array_equal(counts, np.bincount(whole.labels, minlength=10))


def test_only_the_share_is_decoded(tmp_path: Path, new_task: NewTask) -> None:
    make_folder(tmp_path, count=1)
    (tmp_path / "cat" / "0.png").write_bytes(b"not mine")
    task = new_task(labels=CATS_AND_DOGS)
    outcomes = []
    for agent in (1, 2):
        try:
            outcomes.append(len(open_data(f"imagefolder:{tmp_path}@iid,agent={agent}/2", task, train=True)))
        except ConfigError:
            outcomes.append(0)

    assert sorted(outcomes) == [0, 1]


def test_a_plugin_gives_tensors_as_they_are(new_task: NewTask) -> None:
    task = new_task(channels=2, size=(4, 5), labels=("dog", "cat"))
    data = open_data(f"{__name__}:tensors", task, train=True)

    images, labels = data.batch(np.array([3]))

    assert len(data) == 4
    assert labels.tolist() == [0]
    assert torch.allclose(images, torch.full((1, 2, 4, 5), (0.75 - 0.5) / 0.5))


@pytest.mark.parametrize("limit", [0, 512])
def test_a_plugin_gives_pictures(new_task: NewTask, limit: int) -> None:
    task = new_task(channels=3, labels=CATS_AND_DOGS)
    data = open_data(f"{__name__}:pictures", task, train=True, memory_limit_mb=limit)

    assert data.batch(np.array([1, 2]))[0].shape == (2, 3, 28, 28)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("imagefolder:{root}/absent", ["absent does not exist", "Check the path"]),
        ("imagefolder:{root}/emtpy", ["does not exist", "did you mean 'empty'?"]),
        ("imagefolder:{root}/empty", ["empty has no class folders", "folder named after it"]),
        ("imagefolder:{root}/hollow", ["hollow/dog holds no images", "remove the folder"]),
        ("imagefolder:{root}/single", ["one class only, 'cat'", "--allow-single-class"]),
        ("imagefolder:{root}/strangers", ["class 'bird' is not in the federation's task", "cat, dog"]),
        ("imagefolder:{root}/good@iid,agent=1/7", ["6 samples", "7 agents", "share would be empty"]),
        ("imagefolder:{root}/good@iid,agent=4/3", ["agent=4/3 is not one of"]),
        ("imagefolder", ["does not say where: write imagefolder:PATH"]),
        ("imagefolder:", ["does not say where"]),
        ("mnist", ["write mnist:PATH"]),
        ("digits:{root}", ["write just digits"]),
        ("imagfolder:{root}", ["unknown data 'imagfolder'", "did you mean 'imagefolder'?"]),
        ("minst:data", ["unknown data 'minst'", "did you mean 'mnist'?"]),
        ("no.such:data", ["cannot import 'no.such'"]),
        (f"{__name__}:nothing", ["holds no samples"]),
        (f"{__name__}:strange", ["sample 0 is str, not a PIL image or a float tensor"]),
        (f"{__name__}:out_of_range", ["label 7 is not one of its 2 classes"]),
        (f"{__name__}:failing", ["failed", "no camera"]),
    ],
)
def test_unusable_data_is_refused_with_its_reason(
    tmp_path: Path, new_task: NewTask, spec: str, words: list[str]
) -> None:
    make_folder(tmp_path / "good")
    (tmp_path / "empty").mkdir()
    make_folder(tmp_path / "hollow", ("cat",))
    (tmp_path / "hollow" / "dog").mkdir()
    make_folder(tmp_path / "single", ("cat",))
    make_folder(tmp_path / "strangers", ("bird", "cat"))

    with pytest.raises(ConfigError) as caught:
        open_data(spec.format(root=tmp_path), new_task(labels=CATS_AND_DOGS), train=True)

    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_single_class_is_taken_where_it_is_allowed(tmp_path: Path, new_task: NewTask) -> None:
    make_folder(tmp_path, ("cat",))
    task = new_task(labels=CATS_AND_DOGS)

    assert len(open_data(f"imagefolder:{tmp_path}", task, train=True, allow_single_class=True)) == 3


def test_a_plugin_tensor_of_another_size_is_refused(new_task: NewTask) -> None:
    with pytest.raises(ConfigError, match=r"\[2, 4, 5\] where the task wants \[2, 6, 6\]"):
        open_data(f"{__name__}:tensors", new_task(channels=2, size=(6, 6), labels=CATS_AND_DOGS), train=True)


@pytest.mark.parametrize("kind", ["png", "jpg", "bmp", "webp", "gif"])
@pytest.mark.parametrize("limit", [0, 512])
@pytest.mark.parametrize("damage", ["truncated", "not an image", "empty"])
def test_a_damaged_image_is_named_at_opening(
    tmp_path: Path, new_task: NewTask, kind: str, limit: int, damage: str
) -> None:
    make_folder(tmp_path, kind=kind)
    bad = tmp_path / "dog" / f"1.{kind}"
    whole = bad.read_bytes()
    bad.write_bytes({"truncated": whole[: len(whole) // 2], "not an image": b"x" * 99, "empty": b""}[damage])

    with pytest.raises(
        ConfigError, match=rf"dog/1\.{kind} cannot be read: .*Remove it, or copy it here again"
    ):
        open_data(
            f"imagefolder:{tmp_path}", new_task(labels=CATS_AND_DOGS), train=True, memory_limit_mb=limit
        )


def test_a_set_that_is_neither_here_nor_to_be_had_says_where_it_belongs(
    tmp_path: Path, new_task: NewTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.setenv(variable, "http://127.0.0.1:9")  # refuses: the network is away
    for variable in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(variable, raising=False)

    with pytest.raises(ConfigError, match=r"expected in .*/d/MNIST/raw: copy them there"):
        open_data(f"mnist:{tmp_path}/d", new_task(), train=True)
    with pytest.raises(ConfigError, match=r"expected in .*/d/fer2013"):
        open_data(f"fer2013:{tmp_path}/d", new_task(), train=True)


def write_mnist(root: Path, *, count: int) -> Path:
    """Files as MNIST's (IDX: a type code, the dimensions big-endian, the bytes)."""
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    labels = (np.arange(count) % 10).astype(np.uint8)
    images = np.random.default_rng(0).integers(0, 256, (count, 28, 28), np.uint8)
    for part in ("train", "t10k"):
        sizes = (count).to_bytes(4, "big"), (28).to_bytes(4, "big")
        head = b"\0\0\x08\x03" + sizes[0] + sizes[1] * 2
        (raw / f"{part}-images-idx3-ubyte").write_bytes(head + images.tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(b"\0\0\x08\x01" + sizes[0] + labels.tobytes())
    return root


def test_mnist_opens_from_its_files(tmp_path: Path, fedge_data: Path | None) -> None:
    folder = fedge_data / "mnist" if fedge_data else write_mnist(tmp_path, count=60)
    samples = 60_000 if fedge_data else 60
    data = open_data(f"mnist:{folder}@shards(2),agent=1/5", task_from_data("mnist", "cnn"), train=True)

    assert len(data) == samples // 5
    assert data.batch(np.arange(12))[0].shape == (12, 1, 28, 28)


def test_mnist_in_another_shape_is_converted(tmp_path: Path, new_task: NewTask) -> None:
    folder = write_mnist(tmp_path, count=20)
    data = open_data(f"mnist:{folder}", new_task(channels=3, size=(14, 14)), train=False)

    assert data.batch(np.arange(20))[0].shape == (20, 3, 14, 14)


def test_damaged_mnist_files_are_refused(tmp_path: Path, new_task: NewTask) -> None:
    folder = write_mnist(tmp_path, count=20)
    images = folder / "MNIST" / "raw" / "train-images-idx3-ubyte"
    images.write_bytes(images.read_bytes()[:5000])

    with pytest.raises(ConfigError, match="is not whole on the disk"):
        open_data(f"mnist:{folder}", new_task(), train=True)


@pytest.mark.parametrize(
    ("name", "shape"), [("mnist", (1, 28, 28)), ("digits", (1, 8, 8)), ("cifar10:/nowhere", (3, 32, 32))]
)
def test_the_task_of_a_known_set_needs_no_data(name: str, shape: tuple[int, int, int]) -> None:
    task = task_from_data(name, "resnet18")

    assert (task.channels, task.height, task.width) == shape
    assert len(task.labels) == 10
    assert task.model == "resnet18"


def test_the_constants_of_digits_are_its_statistics() -> None:
    task = task_from_data("digits", "cnn")
    images, _ = (data := open_data("digits", task, train=True)).batch(np.arange(len(data)))

    assert abs(float(images.mean())) < 0.02
    assert abs(float(images.std()) - 1) < 0.02


def test_the_task_of_a_folder_follows_its_images(tmp_path: Path) -> None:
    spec = f"imagefolder:{make_folder(tmp_path)}@iid,agent=1/2"
    small = task_from_data(spec, "cnn")
    forced = task_from_data(spec, "cnn", height=40, width=50, channels=1)
    picture(7, size=(30, 30)).save(tmp_path / "cat" / "larger.png")
    mixed = task_from_data(spec, "cnn")

    assert (small.channels, small.height, small.width) == (3, 10, 12)
    assert small.labels == CATS_AND_DOGS
    assert small.mean == (0.485, 0.456, 0.406)
    assert (forced.channels, forced.height, forced.width) == (1, 40, 50)
    assert forced.mean == (0.449,)
    assert (mixed.height, mixed.width) == (224, 224)


def test_the_task_of_a_grey_folder_is_grey(tmp_path: Path) -> None:
    for name in CATS_AND_DOGS:
        (tmp_path / name).mkdir()
        picture(1, mode="L").save(tmp_path / name / "a.png")

    assert task_from_data(f"imagefolder:{tmp_path}", "cnn").channels == 1


def test_the_task_of_a_plugin_follows_its_tensors() -> None:
    task = task_from_data(f"{__name__}:tensors", "cnn")

    assert (task.channels, task.height, task.width, task.labels) == (2, 4, 5, CATS_AND_DOGS)


def test_no_task_is_made_of_one_class(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no task can be made .* it has the classes cat"):
        task_from_data(f"imagefolder:{make_folder(tmp_path, ('cat',))}", "cnn")
