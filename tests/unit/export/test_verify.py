"""``model-export verify``: whatever was changed after signing, it says so and exits with 5."""

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import numpy as np
import pytest
from release_authority import Authority, key_of
from release_folders import REQUIREMENTS, exported

from export.verify import checks, trust
from federation.bundle import Bundle, write_bundle
from federation.errors import ConfigError, ReleaseError, ReleaseFault, VerificationError
from federation.release import GOLDEN_FILE, MANIFEST_FILE, MODEL_FILE
from federation.task.golden import read_golden, write_golden
from federation.wire.release import Manifest, ReleaseMetrics, ReleasePrivacy

DAY_S = 86_400.0


class Signed:
    """A release folder with a manifest, and whoever can forge one."""

    def __init__(self, folder: Path) -> None:
        self.folder = exported(folder / "release")
        self.authority = Authority(issued_at=time.time())
        self.release = self.authority.release(
            3,
            model=(self.folder / MODEL_FILE).read_bytes(),
            golden=(self.folder / GOLDEN_FILE).read_bytes(),
            requirements=REQUIREMENTS,
        )
        self.sign()

    def sign(self, **changes: object) -> None:
        self.write(self.authority.sign(self.manifest(**changes)))

    def manifest(self, **changes: object) -> Manifest:
        return msgspec.structs.replace(self.authority.manifest(self.release), **changes)

    def write(self, envelope: bytes) -> None:
        (self.folder / MANIFEST_FILE).write_bytes(envelope)

    def resign_files(self) -> None:
        """As an owner would who signs what he should not."""
        self.release = self.authority.release(
            3,
            model=(self.folder / MODEL_FILE).read_bytes(),
            golden=(self.folder / GOLDEN_FILE).read_bytes(),
            requirements=REQUIREMENTS,
        )
        self.sign()

    def bundle(self, path: Path, **changes: object) -> Path:
        bundle = Bundle(
            federation=self.authority.federation,
            agent="pi1",
            private_key="11" * 32,
            aggregator_key=self.authority.keys[0],
            broker="mqtt://127.0.0.1:1883",
            username="pi1",
            password="secret",
            release_keys=self.authority.keys,
        )
        write_bundle(path, msgspec.structs.replace(bundle, **changes))
        return path

    def checked(self, *, now: float | None = None, federation: str = "garden") -> list[str]:
        trusted = trust(self.authority.keys, federation)
        return list(checks(self.folder, trusted, now=time.time() if now is None else now))


@pytest.fixture
def signed(tmp_path: Path) -> Signed:
    return Signed(tmp_path)


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    """In a process that has neither torch nor onnx, like a device."""
    code = (
        "import sys\n"
        "class Bare:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in ('torch', 'torchvision', 'onnx', 'onnxscript', 'rich', 'bcrypt'):\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Bare())\n"
        "from export.cli import main\n"
        "main()\n"
    )
    return subprocess.run(
        [sys.executable, "-c", code, "verify", *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_what_was_checked_is_said(signed: Signed, tmp_path: Path) -> None:
    done = run(signed.folder, "--key", signed.bundle(tmp_path / "pi1.bundle.json"))
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines[:-1]] == [
        "signature", "manifest", "expiry", "hashes", "model", "golden",
    ]  # fmt: skip
    assert "the present release key, for federation 'garden'" in lines[0]
    assert lines[-1] == f"{signed.folder} is what it says"


def test_a_failure_is_one_line_and_exit_code_5(signed: Signed) -> None:
    (signed.folder / MODEL_FILE).write_bytes(b"other")
    done = run(signed.folder, "--key", signed.authority.keys[0], "--federation", "garden")
    assert done.returncode == 5
    assert done.stderr.count("\n") == 1
    assert "wrong_hash" in done.stderr
    assert "what it says" not in done.stdout


def test_the_successors_signature_counts(signed: Signed) -> None:
    signed.write(signed.authority.sign(signed.manifest(), key=signed.authority.successor))
    assert f"key {signed.authority.keys[1][:16]}" in signed.checked()[0]


def test_figures_of_the_release_are_shown(signed: Signed) -> None:
    signed.sign(
        release=msgspec.structs.replace(
            signed.release,
            metrics=ReleaseMetrics(accuracy=0.875, samples=8, drop_points=0.0),
            privacy=ReleasePrivacy(epsilon=2.5, delta=1e-5, level="sample"),
        )
    )
    (line,) = (line for line in signed.checked() if line.startswith("model"))
    assert (
        "release 3, round 3, fp32, 3 labels, top-1 87.50%, epsilon 2.5 at delta 1e-05 (sample level)" in line
    )


@pytest.mark.parametrize("place", [0, 40, 200, -70, -1])
def test_a_tampered_manifest(signed: Signed, place: int) -> None:
    envelope = bytearray((signed.folder / MANIFEST_FILE).read_bytes())
    envelope[place] ^= 1
    signed.write(bytes(envelope))
    with pytest.raises(ReleaseError) as refused:
        signed.checked()
    assert refused.value.fault in (
        ReleaseFault.MALFORMED,
        ReleaseFault.BAD_SIGNATURE,
        ReleaseFault.WRONG_FEDERATION,
    )


def test_a_strangers_key(signed: Signed) -> None:
    signed.write(signed.authority.sign(signed.manifest(), key=key_of("stranger")))
    with pytest.raises(ReleaseError) as refused:
        signed.checked()
    assert refused.value.fault is ReleaseFault.BAD_SIGNATURE


def test_another_federation(signed: Signed) -> None:
    with pytest.raises(ReleaseError) as refused:
        signed.checked(federation="kitchen")
    assert refused.value.fault is ReleaseFault.WRONG_FEDERATION


def test_expired(signed: Signed) -> None:
    signed.sign(expires_at=time.time() - DAY_S)
    with pytest.raises(VerificationError, match="has expired on"):
        signed.checked()


@pytest.mark.parametrize("name", [MODEL_FILE, GOLDEN_FILE])
def test_a_tampered_file(signed: Signed, name: str) -> None:
    content = bytearray((signed.folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (signed.folder / name).write_bytes(content)
    with pytest.raises(ReleaseError, match=name) as refused:
        signed.checked()
    assert refused.value.fault is ReleaseFault.WRONG_HASH


@pytest.mark.parametrize("name", [MODEL_FILE, GOLDEN_FILE])
def test_a_missing_file(signed: Signed, name: str) -> None:
    (signed.folder / name).unlink()
    with pytest.raises(ReleaseError, match=name):
        signed.checked()


def _no_model(signed: Signed) -> None:
    (signed.folder / MODEL_FILE).write_bytes(b"not a model")


def _no_golden(signed: Signed) -> None:
    (signed.folder / GOLDEN_FILE).write_bytes(b"not a golden set")


def _other_answers(signed: Signed) -> None:
    golden = read_golden(signed.folder / GOLDEN_FILE)
    frames = tuple(np.full((4, 4), 255 - int(frame.flat[0]), np.uint8) for frame in golden.frames)
    changed = type(golden)(
        frames=frames,
        labels=golden.labels,
        probabilities=golden.probabilities,
        tolerance=golden.tolerance,
    )
    write_golden(signed.folder / GOLDEN_FILE, changed)


def _other_round(signed: Signed) -> None:
    other = exported(signed.folder.parent / "other", number=9)
    (signed.folder / MODEL_FILE).write_bytes((other / MODEL_FILE).read_bytes())


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (_no_model, "not an ONNX model"),
        (_no_golden, "golden"),
        (_other_answers, "wrong_answer"),
        (_other_round, "of round 9, the manifest says 3"),
    ],
)
def test_rightly_signed_and_wrong_all_the_same(
    signed: Signed, spoil: Callable[[Signed], None], said: str
) -> None:
    spoil(signed)
    signed.resign_files()
    with pytest.raises((ReleaseError, VerificationError), match=said):
        signed.checked()


def test_requirements_that_the_model_does_not_have(signed: Signed) -> None:
    signed.sign(
        release=msgspec.structs.replace(
            signed.release, requirements=msgspec.structs.replace(REQUIREMENTS, min_runtime="1.0")
        )
    )
    with pytest.raises(VerificationError, match="the model needs"):
        signed.checked()


def test_a_manifest_that_names_no_release(signed: Signed) -> None:
    signed.sign(release=None)
    with pytest.raises(VerificationError, match="names no release"):
        signed.checked()


def test_an_unsigned_folder(signed: Signed) -> None:
    (signed.folder / MANIFEST_FILE).unlink()
    with pytest.raises(VerificationError, match="is not a signed release"):
        signed.checked()


def test_whom_to_trust_must_be_clear(signed: Signed, tmp_path: Path) -> None:
    key = signed.authority.keys[0]
    with pytest.raises(ConfigError, match="add --federation"):
        trust([key], None)
    with pytest.raises(ConfigError, match="neither a bundle nor a key"):
        trust(["nowhere.bundle.json"], "garden")
    with pytest.raises(ConfigError, match="not 64 hex digits"):
        trust(["g" * 64], "garden")
    with pytest.raises(ConfigError, match="pins no release keys"):
        trust([str(signed.bundle(tmp_path / "old.json", release_keys=()))], None)
    with pytest.raises(ConfigError, match="of federation 'garden', not 'kitchen'"):
        trust([str(signed.bundle(tmp_path / "new.json"))], "kitchen")
