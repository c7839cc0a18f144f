"""The architecture, checked on the source: the direction of imports, the docstrings, and the cost of the import."""

import ast
import functools
import inspect
import os
import re
import subprocess
import sys
from collections import ChainMap
from importlib.metadata import metadata
from pathlib import Path

import pytest

import cellstack
from cellstack import keras as keras_integration
from cellstack import layers
from cellstack import train as training
from cellstack.nodes import NODES

SOURCE = Path(cellstack.__file__).parent
ROOT = SOURCE.parent.parent
MODULES = sorted(SOURCE.rglob("*.py"))

# The parts, from the lowest level to the highest: a part may import those of lower levels, and no other of its own. A
# part is a folder of cellstack, a module directly in it ("": `__init__.py`), or a folder of the root, as the last ones.
LEVELS = """
cells
_kernel reference views
native
nodes layers
network keras
streaming
formats
capture inspect onnxruntime
train
scale sklearn
adapters

serve
cli
__main__
benchmarks examples web
"""
# Methods that call a part above theirs, which they import only when they are called.
UPWARD = {
    ("network", "streaming"),
    ("network", "formats"),
    ("network", "inspect"),
    ("network", "train"),
    ("streaming", "inspect"),
}
# The parts of formats/, likewise; "" is `formats/__init__.py`, which imports its adapters by name.
LEVELS_OF_FORMATS = """
files draft lines worker
scaling state
simplify
build
keras onnx c xlstm
tirex
pytorch
json safetensors_weights
safetensors folders

runtimes
verify
"""
BOUNDS = {"parts": 26, "arrows": 100, "upward": 5, "circles": 2}

# Which packages outside the standard library each part may import; torch only in the parts that are about it.
OUTSIDE = {"numpy"}
OUTSIDE_ALSO = {
    "capture": {"torch"},
    "formats": {"safetensors"},
    "layers": {"torch"},
    "onnxruntime": {"onnxruntime"},
    "views": {"torch"},
    "keras": {"keras", "torch"},
    "train": {"torch", "tqdm", "matplotlib"},
    "sklearn": {"sklearn"},
    "adapters": {"pandas", "pipecat", "sb3_contrib", "sklearn", "sktime", "torch"},
    "scale": {"pyarrow", "tqdm"},
    "serve": {"prometheus_client", "starlette", "uvicorn", "websockets"},
    "cli": {"cellstack_bench", "cellstack_demo"},  # of the same wheel, but not the library: a verb each
}
# Which packages each part may also import in a function: optional dependencies, such as those of a file format.
ON_CALL_ALSO = {
    "cli": {"matplotlib", "shtab", "torch", "tqdm"},
    "formats": {"h5py", "onnx", "torch", "yaml"},
    "inspect": {"matplotlib", "anywidget", "traitlets"},
    "scale": {"ray"},
    "train": {"holidays", "pandas", "polars", "sklearn", "threadpoolctl"},
    "sklearn": {"pandas"},
}


def name_of(path):
    """Return the dotted name of a module of ours."""
    names = path.relative_to(ROOT if "src" not in path.parts else SOURCE.parent).with_suffix("").parts
    return ".".join(names[:-1] if names[-1] == "__init__" else names)


FOLDERS = [folder for folder in ("benchmarks", "examples", "web") if (ROOT / folder).is_dir()]
FILES = {name_of(path): path for path in [*MODULES, *(path for one in FOLDERS for path in (ROOT / one).rglob("*.py"))]}


def part_of(name, below="cellstack"):
    """Return the part of a module: of cellstack, or of one of its packages."""
    return name.removeprefix(below).lstrip(".").partition(".")[0]


def level_of(levels):
    """Return the number of each part's level."""
    lines = levels.strip("\n").split("\n")
    return {part: number for number, line in enumerate(lines) for part in line.split() or [""]}


@functools.cache
def imports_of(path):
    """Return every import in a file: the imported name, where it is ("", "types" or "call"), and its line."""
    found = []

    def visit(node, where):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            where = "types"
        if isinstance(node, ast.Import):
            found.extend((alias.name, where, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno}: imports are absolute here"
            found.extend((f"{node.module}.{alias.name}", where, node.lineno) for alias in node.names)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            where = "call"
        for inner in ast.iter_child_nodes(node):
            if isinstance(inner, (ast.stmt, ast.ExceptHandler, ast.match_case)):  # an expression has no import
                visit(inner, where)

    visit(ast.parse(path.read_text(encoding="utf-8")), "")
    return found


def ours(path):
    """Yield the modules of ours that a file imports, and the line of each import."""
    for name, _, line in imports_of(path):
        while name not in FILES and "." in name and name != "cellstack._kernel":
            name = name.rpartition(".")[0]
        if name.startswith("cellstack.") or name == "cellstack":
            yield name, line


def arrows(below="cellstack"):
    """Return which part imports which other one, in which lines: of cellstack and the root, or of a package."""
    found = {}
    for name, path in FILES.items():
        for other, line in ours(path) if below == "cellstack" or name.startswith(below) else ():
            if other.startswith(below) and part_of(name, below) != part_of(other, below):
                found.setdefault((part_of(name, below), part_of(other, below)), []).append(f"{path}:{line}")
    return found


def circles():
    """Return the sets of files that import each other, those in functions and for type checkers included."""
    imported = {name: {other for other, _ in ours(path) if other in FILES} - {name} for name, path in FILES.items()}
    reached = {}
    for name in imported:
        reached[name], new = set(), {name}
        while new:
            new = {other for one in new for other in imported[one]} - reached[name]
            reached[name] |= new
    found = {frozenset(other for other in reached[name] if name in reached[other]) for name in reached}
    return sorted(map(sorted, found - {frozenset()}))


@pytest.mark.long
@pytest.mark.parametrize(
    ("below", "levels"), [("cellstack", LEVELS), ("cellstack.formats", LEVELS_OF_FORMATS)], ids=["cellstack", "formats"]
)
def test_imports_run_one_way(below, levels):
    level = level_of(levels)
    upward = {pair: lines for pair, lines in arrows(below).items() if level[pair[0]] <= level[pair[1]]}
    assert {pair: lines for pair, lines in upward.items() if pair not in UPWARD} == {}
    if below == "cellstack":
        assert set(upward) == UPWARD


def test_the_structure_is_small():
    counts = {
        "parts": len(level_of(LEVELS)),
        "arrows": len(arrows()),
        "upward": len(UPWARD),
        "circles": len(circles()),
    }
    print(", ".join(f"{name}: {count} of at most {BOUNDS[name]}" for name, count in counts.items()))
    print(*(f"a circle of {len(names)} files: {', '.join(names[:12])}" for names in circles()), sep="\n")
    assert {part_of(name) for name in FILES} | {"_kernel"} == set(level_of(LEVELS))
    assert {name: count for name, count in counts.items() if count > BOUNDS[name]} == {}


def test_layers_and_networks_are_independent():
    assert {other for part, other in arrows() if part == "layers"} == {"cells", "native", "views"}
    assert ("formats", "layers") not in arrows()


def test_packages_are_imported_only_where_allowed():
    wrong = []
    for path in MODULES:
        part = part_of(name_of(path))
        everywhere = OUTSIDE | OUTSIDE_ALSO.get(part, set())
        for name, where, line in imports_of(path):
            package = name.split(".")[0]
            allowed = everywhere | (ON_CALL_ALSO.get(part, set()) if where == "call" else set())
            if where != "types" and package not in allowed | sys.stdlib_module_names | {"cellstack"}:
                wrong.append(f"{path}:{line}: {part or 'cellstack'} may not import {package}")
    assert wrong == []


@pytest.mark.long
def test_import_cellstack_is_fast_and_imports_no_framework(tmp_path):
    code = (
        "from time import process_time as now; start = now(); import numpy; middle = now(); import cellstack\n"
        "ratio = (now() - middle) / (middle - start)\n"
        "import sys; print(ratio, *sorted({name.split('.')[0] for name in sys.modules}))"
    )
    # With a bytecode cache, as in an installed package.
    env = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    env |= {"PYTHONPYCACHEPREFIX": str(tmp_path), "OPENBLAS_NUM_THREADS": "1"}  # NumPy's threads spin while they start
    ratios, loaded = [], set()
    for _ in range(6):
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=env)
        ratio, *names = done.stdout.split()
        ratios.append(float(ratio))
        loaded.update(names)
    print(f"import cellstack takes {min(ratios):.2f} times as long as NumPy's import")
    assert not loaded & {"torch", "matplotlib", "tqdm", "keras", "onnx", "h5py", "pandas", "safetensors", "starlette"}
    assert min(ratios) < 2


def run_python(code):
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, check=True)
    return done.stdout.splitlines()


@pytest.mark.long
def test_dir_shows_the_public_names_and_nothing_else():
    code = (
        "import sys, cellstack as cs\nfrom cellstack import train\n"
        "print(*dir(cs)); print(*dir(train)); print('torch' in sys.modules)\n"
        "print(cs.layers.LSTM.__name__); print(*dir(cs.layers)); print(*dir(cs.inspect)); print(*dir(cs.sklearn))\n"
        "print(*sorted(set(dir(cs)) - set(cs.__all__)))"
    )
    names, train, torch, lstm, *parts, more = run_python(code)
    assert names.split() == sorted([*cellstack.__all__, "__version__", "inspect", "layers", "nodes", "train"])
    assert train.split() == sorted(training.__all__)
    assert (torch, lstm) == ("False", "LSTM")
    assert parts == [" ".join(sorted(package.__all__)) for package in (layers, cellstack.inspect, cellstack.sklearn)]
    assert more == "__version__ inspect layers nodes sklearn train"  # an integration is shown once it is imported
    assert dir(keras_integration) == sorted(keras_integration.__all__)


@pytest.mark.parametrize(
    "name",
    [
        "from_keras",
        "from_torch",
        "Activation",
        "Bidirectional",
        "Cell",
        "Dense",
        "GlobalPool",
        "Recurrent",
        "Standardise",
    ],
)
def test_a_name_of_0_1_0_says_what_replaces_it(name):
    with pytest.raises(AttributeError, match=f"module 'cellstack' has no attribute '{name}': use ") as caught:
        getattr(cellstack, name)
    new = str(caught.value).rpartition(": use cellstack.")[2].partition("(")[0]
    assert callable(functools.reduce(getattr, new.split("."), cellstack))
    with pytest.raises(AttributeError, match=r"module 'cellstack' has no attribute 'no_such_name'$"):
        getattr(cellstack, "no_such_name")  # noqa: B009


@pytest.mark.parametrize(
    ("package", "code", "message"),
    [
        ("torch", "from cellstack import layers", "cellstack.layers needs torch: pip install 'cellstack[torch]'"),
        ("torch", "import cellstack; cellstack.layers", "cellstack.layers needs torch: pip install 'cellstack[torch]'"),
        ("torch", "from cellstack.train import fit", "cellstack.train.fit needs torch: pip install 'cellstack[torch]'"),
        (
            "onnxruntime",
            "import cellstack.onnxruntime",
            "cellstack.onnxruntime needs onnxruntime: pip install 'cellstack[onnxruntime]'",
        ),
        ("tqdm", "from cellstack import train; train.fit", "train.fit needs tqdm: pip install 'cellstack[torch]'"),
        ("torch", "import cellstack.keras", "cellstack.keras needs torch: pip install 'cellstack[torch]'"),
        ("keras", "import cellstack.keras", "cellstack.keras needs Keras 3: pip install 'cellstack[torch]' keras"),
        ("torch", "import cellstack.sklearn", "cellstack.sklearn needs torch: pip install 'cellstack[sklearn]'"),
        ("pyarrow", "import cellstack.scale", "cellstack.scale needs pyarrow: pip install 'cellstack[scale]'"),
        (
            "ray",
            "from cellstack.scale.on_ray import run_on_ray; next(run_on_ray(None, (), 'auto'))",
            "scoring on Ray needs ray: pip install 'cellstack[ray]'",
        ),
        ("sklearn", "import cellstack.sklearn", "cellstack.sklearn needs sklearn: pip install 'cellstack[sklearn]'"),
    ],
)
def test_a_missing_package_names_its_extra(package, code, message):
    before = f"import sys; sys.modules[{package!r}] = None"
    program = f"{before}\ntry:\n    {code}\nexcept ModuleNotFoundError as error:\n    print(error.name, error)"
    (said,) = run_python(program)
    assert said.startswith(f"{package} ")
    assert said.endswith(message)


def extras_in_messages():
    """The extras that the texts of all modules tell to install, and the arguments of `check_installed`."""
    for path in [*MODULES, *ROOT.glob("examples/cellstack_demo/*.py"), *ROOT.glob("benchmarks/cellstack_bench/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and path.name != "errors.py":
                for found in re.finditer(r"install ['\"]?cellstack\[", node.value):
                    command = re.match(r"pip install 'cellstack\[(\w+)\]'", node.value[found.start() - len("pip ") :])
                    assert command, f"{path}: {node.value!r}"
                    yield command[1]
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "check_installed":
                yield getattr(node.args[2], "value", "")


@pytest.mark.long
def test_pip_installs_the_extras_that_messages_name_before_a_release_too(tmp_path):
    extras = set(extras_in_messages())
    assert len(extras) > 10
    assert extras <= set(metadata("cellstack").get_all("Provides-Extra") or ())
    # Without an index, pip finds only what is installed: the extra's packages in the metadata of the clone's cellstack.
    command = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-index", "cellstack[holidays]"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert "Requirement already satisfied: cellstack[holidays]" in done.stdout
    assert re.search(r"holidays>=[\d.]+.* \(from cellstack\[holidays\]\)", done.stdout + done.stderr)


def test_help_works_without_torch():
    code = "print(*(len(pydoc.render_doc(module)) for module in (cellstack, cellstack.train)))"
    (sizes,) = run_python(f"import sys; sys.modules['torch'] = None\nimport pydoc, cellstack, cellstack.train\n{code}")
    assert min(map(int, sizes.split())) > 10_000


@pytest.mark.long
def test_no_torch_free_module_imports_torch():
    with_torch = ("capture", "layers", "keras", "train", "adapters", "cli", "__main__", *FOLDERS)
    names = [name for name in FILES if part_of(name) not in with_torch and name != "cellstack.views.torch"]
    code = f"import importlib, sys\nfor name in {names!r}: importlib.import_module(name)\nprint('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


# ── docstrings ──────────────────────────────────────────────────────────────────────────────────────────────────────


def public():
    for name in cellstack.__all__:
        value = getattr(cellstack, name)
        yield name, value
        if inspect.isclass(value):
            own = [vars(one) for one in value.__mro__ if one is value or one.__module__.startswith("cellstack.network")]
            for key, member in ChainMap(*own).items():
                if not key.startswith("_") and (inspect.isfunction(member) or isinstance(member, property)):
                    yield f"{name}.{key}", member


def public_layers():
    for name in layers.__all__:
        value = getattr(layers, name)
        yield f"layers.{name}", value
        if "forward" in vars(value):
            yield f"layers.{name}.forward", value.forward


def public_keras():
    for name in keras_integration.__all__:
        yield f"keras.{name}", getattr(keras_integration, name)


PUBLIC = dict([*public(), *public_layers(), *public_keras()])


@pytest.mark.parametrize("kind", NODES.values(), ids=lambda kind: kind.__name__)
def test_every_method_of_a_node_is_documented(kind):
    for key, member in vars(kind).items():
        if not key.startswith("_") and (inspect.isfunction(member) or isinstance(member, (property, classmethod))):
            assert inspect.getdoc(getattr(kind, key) if isinstance(member, classmethod) else member), f"{kind}.{key}"


@pytest.mark.parametrize("name", PUBLIC)
def test_everything_public_is_documented(name):
    value = PUBLIC[name]
    text = inspect.getdoc(value)
    assert text, f"{name} has no docstring"
    if text.startswith("See `") or not value.__doc__:  # documented in a base class
        return
    if inspect.isfunction(value):
        parameters = [key for key in inspect.signature(value).parameters if key != "self"]
        annotation = inspect.signature(value).return_annotation
        if parameters and not name.startswith(("Standardise.", "Activation.", "Dense.")):
            assert "Args:" in text, f"{name}: Args"
            assert all(re.search(rf"\b{key}\b", text) for key in parameters), f"{name}: {parameters}"
        if parameters and annotation not in (None, "None") and not name.startswith(("Standardise.", "Activation.")):
            assert re.search(r"Returns?\b", text), f"{name}: Returns"
        if name.startswith("layers.") and name.endswith(".forward"):
            assert "Raises:" in text, f"{name}: Raises"
    elif inspect.isclass(value) and "Error" not in name and not name.endswith(("State", "Trace", "Calls")):
        assert "Args:" in text, f"{name}: Args"
        assert "Raises:" in text, f"{name}: Raises"


def test_the_public_api_is_small_and_sorted():
    assert 12 <= len(cellstack.__all__) <= 20
    assert list(cellstack.__all__) == sorted(cellstack.__all__)
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", cellstack.__version__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        cellstack.nothing  # noqa: B018


def test_the_version_is_in_one_place():
    if not (ROOT / "pyproject.toml").exists():
        pytest.skip("the package is installed without its source tree")
    number = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)
    assert number is not None
    assert number[1] == cellstack.__version__
    for path in MODULES:
        assert f'"{number[1]}"' not in path.read_text(encoding="utf-8"), f"{path.name} contains the version too"


def test_no_machine_specific_paths():
    pattern = re.compile(r"[\s\"'(](/(?:home|root|tmp|work|Users)\b\S*)")
    found = {str(path): pattern.findall(path.read_text(encoding="utf-8")) for path in MODULES}
    assert {path: paths for path, paths in found.items() if paths} == {}
