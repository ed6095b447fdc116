"""The rules of the house, read from the source itself: who imports whom, where torch may be, what files are called."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]

ALLOWED: dict[str, set[str]] = {
    "federation": set(),
    "privacy": set(),
    "export": {"federation"},
    "edge_agent": {"federation", "privacy"},
    "aggregator": {"federation", "privacy", "export"},
}
"""Package -> packages of ours that it may import besides itself."""

COMMANDS_OF_PRIVACY = (Path("privacy/cli.py"), Path("privacy/commands"))
"""What may import ``federation`` too (docs/adr/0009); and nothing may import these, so that the mathematics stays by itself."""

ABOVE = {"trial", "benchmarks", "tests"}
"""They may import every package, and no package imports them."""

TORCH = {"torch", "torchvision", "opacus"}
NOT_ON_A_DEVICE = TORCH | {"onnx", "onnxscript", "rich", "scipy", "sklearn"}
"""What a device that only runs models does not have."""

PICKLES = {"pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
NAMELESS = {"utils", "util", "common", "base", "helpers", "helper", "misc"}

SOURCES = sorted(path for package in ALLOWED for path in (REPOSITORY / package).rglob("*.py"))

each_source = pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(REPOSITORY)))


def imported(nodes: Iterator[ast.AST]) -> set[str]:
    """Full names of the modules that these nodes import; for ``from a import b`` both ``a`` and ``a.b``."""
    names: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative imports hide where a name comes from"
            assert node.module is not None
            names.add(node.module)
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def roots(names: set[str]) -> set[str]:
    return {name.partition(".")[0] for name in names}


def at_import(tree: ast.AST) -> Iterator[ast.AST]:
    """What runs when the module is imported: not the bodies of functions, not ``if TYPE_CHECKING``."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            yield from (inner for branch in node.orelse for inner in (branch, *at_import(branch)))
            continue
        yield node
        yield from at_import(node)


def parsed(path: Path) -> ast.Module:
    return ast.parse(path.read_text(), str(path))


def test_the_walk_sees_what_python_would_import() -> None:
    tree = ast.parse(
        "import a.b\n"
        "from typing import TYPE_CHECKING\n"
        "if TYPE_CHECKING:\n    import types_only\nelse:\n    import c\n"
        "try:\n    import d\nexcept ImportError:\n    from e import f\n"
        "class K:\n    import g\n    def method(self):\n        import late\n"
    )
    assert roots(imported(at_import(tree))) == {"a", "typing", "c", "d", "e", "g"}
    assert {"types_only", "late"} <= roots(imported(ast.walk(tree)))


def test_every_package_is_there() -> None:
    assert {path.relative_to(REPOSITORY).parts[0] for path in SOURCES} == set(ALLOWED)


@each_source
def test_imports_run_one_way(path: Path) -> None:
    package = path.relative_to(REPOSITORY).parts[0]
    ours = roots(imported(ast.walk(parsed(path)))) & (set(ALLOWED) | ABOVE)
    more = {"federation"} if of_privacys_commands(path) else set()
    assert ours <= {package} | ALLOWED[package] | more


def of_privacys_commands(path: Path) -> bool:
    return any(path.relative_to(REPOSITORY).is_relative_to(place) for place in COMMANDS_OF_PRIVACY)


@each_source
def test_nothing_leans_on_the_commands_of_privacy(path: Path) -> None:
    if not of_privacys_commands(path):
        names = imported(ast.walk(parsed(path)))
        assert not [
            name for name in names if name.split(".")[:2] in (["privacy", "cli"], ["privacy", "commands"])
        ]


@each_source
def test_only_one_module_speaks_mqtt(path: Path) -> None:
    if "paho" in roots(imported(ast.walk(parsed(path)))):
        assert path.relative_to(REPOSITORY).parts[:2] == ("federation", "wire")


@each_source
def test_torch_waits_until_a_function_needs_it(path: Path) -> None:
    tree = parsed(path)
    assert not roots(imported(at_import(tree))) & TORCH
    if path.is_relative_to(REPOSITORY / "federation" / "wire"):
        assert not roots(imported(ast.walk(tree))) & TORCH


def test_inference_needs_the_base_install_only() -> None:
    """Follow what is imported, also within functions, through our own modules."""
    modules = {".".join(path.relative_to(REPOSITORY).with_suffix("").parts): path for path in SOURCES}
    start = [
        name
        for name in modules
        if name.startswith(("edge_agent.inference", "edge_agent.releases", "federation.task.engine"))
    ]
    seen: dict[str, str] = dict.fromkeys(start, "")
    queue = list(start)
    while queue:
        name = queue.pop()
        names = imported(ast.walk(parsed(modules[name])))
        assert not roots(names) & NOT_ON_A_DEVICE, f"{name}, imported by {seen[name]}"
        for found in names & modules.keys() - seen.keys():
            seen[found] = name
            queue.append(found)
    assert len(seen) > len(start), "the walk left the package"


@each_source
def test_nothing_unpickles(path: Path) -> None:
    tree = parsed(path)
    assert not roots(imported(ast.walk(tree))) & PICKLES
    loads = [
        node.func
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)
    ]
    assert not [call for call in loads if ast.unparse(call) in {"torch.load", "np.load", "numpy.load"}]


def test_releases_know_of_the_frames_only_how_they_go() -> None:
    sources = [path for path in SOURCES if path.is_relative_to(REPOSITORY / "edge_agent" / "releases")]
    found = {name for path in sources for name in imported(ast.walk(parsed(path)))}
    known = {
        name.removeprefix("edge_agent.inference.").partition(".")[0]
        for name in found
        if name.startswith("edge_agent.inference.")
    }
    assert known == {"health"}


def test_every_file_is_called_after_what_it_holds() -> None:
    folders = [REPOSITORY / name for name in (*ALLOWED, *ABOVE) if (REPOSITORY / name).is_dir()]
    named = [path for folder in folders for path in (folder, *folder.rglob("*")) if path.stem in NAMELESS]
    assert not named
