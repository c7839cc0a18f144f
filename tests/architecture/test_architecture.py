"""The architecture, checked on the source: the direction of imports, the docstrings, and the cost of the import."""

import ast
import functools
import inspect
import os
import re
import subprocess
import sys
from collections import ChainMap
from pathlib import Path

import pytest

import cellstack
from cellstack import keras as keras_integration
from cellstack import layers
from cellstack import train as training
from cellstack.nodes import NODES

SOURCE = Path(cellstack.__file__).parent
MODULES = sorted(SOURCE.rglob("*.py"))
MODULES_OF_FORMATS = sorted((SOURCE / "formats").rglob("*.py"))

# Which of our parts each part may import. The graph of imports has no cycles.
BELOW = {
    "cells": set(),
    "spec": {"cells"},
    "views": {"spec"},
    "bfloat16": set(),
    "_kernel": set(),
    "reference_cells": {"spec", "bfloat16"},
    "reference": {"spec", "reference_cells"},
    "reference_mlstm": {"spec"},
    "layout": {"cells", "spec"},
    "without_kernel": {"spec", "reference", "reference_mlstm"},
    "native": {"spec", "_kernel", "without_kernel"},
    "nodes": {"cells", "spec", "bfloat16", "reference", "native", "layout"},
    "graph": {"spec", "nodes"},
    "arguments": {"spec", "nodes"},
    "network": {"spec", "bfloat16", "native", "nodes", "graph", "arguments"},
    "streaming": {"spec", "native", "nodes", "arguments"},  # a network is given to it
    "formats": {"cells", "spec", "views", "bfloat16", "layout", "nodes", "graph", "network", "streaming"},
    "inspect": {
        "cells",
        "spec",
        "views",
        "reference",
        "reference_mlstm",
        "nodes",
        "graph",
        "arguments",
        "network",
        "formats",
    },
    "layers": {"cells", "spec", "views", "native"},
    "recognition": {"spec", "nodes", "formats", "layers"},  # compares torch modules with graphs of cells
    "integrations": {"spec"},  # imports keras and layers by name, depending on the model
    "keras": {"cells", "spec", "layers"},
    "train": {"cells", "spec", "layers", "nodes", "network", "formats", "inspect"},
    "": {"spec", "nodes", "network", "streaming", "formats"},  # cellstack/__init__.py
    "serve": {"", "spec", "formats", "inspect", "streaming"},
    "scale": {"spec", "network", "nodes", "streaming", "formats", "train"},
    "cli": {"spec", "nodes", "formats", "train", "serve", "scale", ""},
    "sklearn": {"spec", "train"},
    "adapters": {"sklearn", "layers", "formats"},
    "__main__": {"cli"},
}

# Methods that call a part that depends on theirs: they import it only when they are called.
ON_CALL = {
    ("network", "streaming"),
    ("network", "formats"),
    ("network", "inspect"),
    ("network", "train"),
    ("inspect", "train"),
}

# Which parts of formats/ each part of formats/ may import. Adapters are independent of each other.
BELOW_FORMATS = {
    "files": set(),
    "draft": set(),
    "scaling": {"draft"},
    "simplify": {"draft", "scaling"},
    "build": {"draft", "simplify"},
    "lines": set(),
    "state": {"files"},
    "worker": set(),
    "keras": {"files", "build"},
    "onnx": {"files", "build", "draft", "simplify"},
    "xlstm": {"build"},
    "tirex": {"files", "build", "xlstm"},
    "pytorch": {"files", "build", "xlstm", "tirex"},
    "json": {"files", "build", "pytorch"},  # a PyTorch state dict in another container
    "c": {"files", "build"},
    "safetensors_weights": {"pytorch", "xlstm", "tirex"},  # a PyTorch state dict in another container
    "safetensors": {"files", "safetensors_weights"},
    "folders": {"files", "xlstm", "tirex", "safetensors_weights"},
    "": {"files"},  # formats/__init__.py, which imports its adapters by name
    "runtimes": {"", "build", "onnx", "c", "safetensors", "worker"},
    "verify": {"files", "runtimes"},
    "compiled": {"build", "onnx", "pytorch", "runtimes"},
}

# Which packages outside the standard library each part may import; torch only in the parts that are about it.
OUTSIDE = {"numpy"}
OUTSIDE_ALSO = {
    "formats": {"safetensors"},
    "inspect": {"safetensors"},
    "layers": {"torch"},
    "recognition": {"torch"},
    "views": {"torch"},
    "keras": {"keras", "torch"},
    "train": {"torch", "tqdm", "matplotlib"},
    "sklearn": {"sklearn"},
    "adapters": {"aeon", "livekit", "pandas", "pipecat", "sb3_contrib", "sklearn", "sktime", "torch"},
    "scale": {"pyarrow", "tqdm"},
    "serve": {"google", "grpc", "prometheus_client", "starlette", "uvicorn", "websockets"},
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


def part_of(path):
    inside = path.relative_to(SOURCE)
    first = inside.parts[0]
    return "" if inside.name == "__init__.py" and len(inside.parts) == 1 else first.removesuffix(".py")


@functools.cache
def imports_of(path):
    """Return every import in a file: the imported name, whether it is in a function, and its line."""
    found = []

    def visit(node, on_call):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.Import):
            found.extend((alias.name, on_call, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}:{node.lineno}: imports are absolute here"
            found.extend((f"{node.module}.{alias.name}", on_call, node.lineno) for alias in node.names)
        on_call = on_call or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        for inner in ast.iter_child_nodes(node):
            if isinstance(inner, (ast.stmt, ast.ExceptHandler, ast.match_case)):  # an expression has no import
                visit(inner, on_call)

    visit(ast.parse(path.read_text(encoding="utf-8")), False)
    return found


@functools.cache
def parts_imported(path):
    found = []
    for name, on_call, line in imports_of(path):
        if name.split(".")[0] == "cellstack":
            second = name.split(".")[1] if "." in name else ""
            known = (SOURCE / second).is_dir() or (SOURCE / f"{second}.py").exists() or second == "_kernel"
            found.append((second if known else "", on_call, line))
    return found


def test_imports_run_one_way():
    wrong = []
    for path in MODULES:
        part = part_of(path)
        assert part in BELOW, f"{part}: add it to BELOW"
        for other, on_call, line in parts_imported(path):
            if other not in BELOW[part] | {part} and not (on_call and (part, other) in ON_CALL):
                wrong.append(f"{path}:{line}: {part} may not import {other or 'cellstack'}")
    assert wrong == []


def test_imports_within_formats_run_one_way():
    wrong = []
    for path in MODULES_OF_FORMATS:
        part = part_of_formats(path)
        assert part in BELOW_FORMATS, f"{part}: add it to BELOW_FORMATS"
        for other, line in formats_imported(path):
            if other not in BELOW_FORMATS[part] | {part}:
                wrong.append(f"{path}:{line}: {part} may not import {other or 'formats'}")
    assert wrong == []


def part_of_formats(path):
    inside = path.relative_to(SOURCE / "formats")
    return "" if inside.parts == ("__init__.py",) else inside.parts[0].removesuffix(".py")


def formats_imported(path):
    for name, _, line in imports_of(path):
        if name == "cellstack.formats" or name.startswith("cellstack.formats."):
            second = (*name.split(".")[2:], "")[0]
            known = (SOURCE / "formats" / second).is_dir() or (SOURCE / "formats" / f"{second}.py").exists()
            yield (second if known else ""), line


def test_the_tables_allow_only_imports_that_exist():
    needed, needed_on_call = {part: set() for part in BELOW}, set()
    for path in MODULES:
        for other, on_call, _ in parts_imported(path):
            pair = (part_of(path), other)
            if pair[0] != other:
                needed_on_call |= {pair} & ON_CALL if on_call else set()
                needed[pair[0]] |= set() if on_call and pair in ON_CALL else {other}
    assert needed == BELOW
    assert needed_on_call == ON_CALL
    within = {part: set() for part in BELOW_FORMATS}
    for path in MODULES_OF_FORMATS:
        within[part_of_formats(path)] |= {other for other, _ in formats_imported(path)} - {part_of_formats(path)}
    assert within == BELOW_FORMATS


@pytest.mark.parametrize("table", [BELOW, BELOW_FORMATS], ids=["cellstack", "formats"])
def test_the_table_has_no_cycle(table):
    seen, done = set(), set()

    def visit(part):
        assert part not in seen, f"a cycle through {part}"
        if part not in done:
            seen.add(part)
            for other in table[part] - {part}:
                visit(other)
            seen.remove(part)
            done.add(part)

    for part in table:
        visit(part)


def test_layers_and_networks_are_independent():
    assert "layers" not in BELOW["formats"]
    assert not BELOW["layers"] & {"network", "formats", "train"}


def test_packages_are_imported_only_where_allowed():
    wrong = []
    for path in MODULES:
        part = part_of(path)
        everywhere = OUTSIDE | OUTSIDE_ALSO.get(part, set())
        for name, on_call, line in imports_of(path):
            package = name.split(".")[0]
            allowed = everywhere | (ON_CALL_ALSO.get(part, set()) if on_call else set())
            if package not in allowed | sys.stdlib_module_names | {"cellstack"}:
                wrong.append(f"{path}:{line}: {part or 'cellstack'} may not import {package}")
    assert wrong == []


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


def test_dir_shows_the_public_names_and_nothing_else():
    code = (
        "import sys, cellstack as cs\nfrom cellstack import train\n"
        "print(*dir(cs)); print(*dir(train)); print('torch' in sys.modules)\n"
        "print(cs.layers.LSTM.__name__); print(*dir(cs.layers)); print(*dir(cs.inspect)); print(*dir(cs.sklearn))\n"
        "print(*sorted(set(dir(cs)) - set(cs.__all__)))"
    )
    names, train, torch, lstm, *parts, more = run_python(code)
    assert names.split() == sorted([*cellstack.__all__, "__version__", "layers", "train"])
    assert train.split() == sorted(training.__all__)
    assert (torch, lstm) == ("False", "LSTM")
    assert parts == [" ".join(sorted(package.__all__)) for package in (layers, cellstack.inspect, cellstack.sklearn)]
    assert more == "__version__ layers sklearn train"  # an integration is shown once it is imported
    assert dir(keras_integration) == sorted(keras_integration.__all__)


@pytest.mark.parametrize(
    ("package", "code", "message"),
    [
        ("torch", "from cellstack import layers", "cellstack.layers needs torch: pip install 'cellstack[torch]'"),
        ("torch", "import cellstack; cellstack.layers", "cellstack.layers needs torch: pip install 'cellstack[torch]'"),
        ("torch", "from cellstack.train import fit", "cellstack.train.fit needs torch: pip install 'cellstack[torch]'"),
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


def test_help_works_without_torch():
    code = "print(*(len(pydoc.render_doc(module)) for module in (cellstack, cellstack.train)))"
    (sizes,) = run_python(f"import sys; sys.modules['torch'] = None\nimport pydoc, cellstack, cellstack.train\n{code}")
    assert min(map(int, sizes.split())) > 10_000


def test_no_torch_free_module_imports_torch():
    with_torch = ("layers", "recognition", "keras", "train", "adapters", "cli", "__main__")
    own = [path for path in MODULES if part_of(path) not in with_torch and path != SOURCE / "views" / "torch.py"]
    names = [".".join(("cellstack", *path.relative_to(SOURCE).with_suffix("").parts)) for path in own]
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
    assert 12 <= len(cellstack.__all__) <= 30
    assert list(cellstack.__all__) == sorted(cellstack.__all__)
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*", cellstack.__version__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        cellstack.nothing  # noqa: B018


def test_the_version_is_in_one_place():
    root = SOURCE.parent.parent
    if not (root / "pyproject.toml").exists():
        pytest.skip("the package is installed without its source tree")
    number = re.search(r'^version = "(.+)"$', (root / "pyproject.toml").read_text(), re.MULTILINE)
    assert number is not None
    assert number[1] == cellstack.__version__
    for path in MODULES:
        assert f'"{number[1]}"' not in path.read_text(encoding="utf-8"), f"{path.name} contains the version too"


def test_no_machine_specific_paths():
    pattern = re.compile(r"[\s\"'(](/(?:home|root|tmp|work|Users)\b\S*)")
    found = {str(path): pattern.findall(path.read_text(encoding="utf-8")) for path in MODULES}
    assert {path: paths for path, paths in found.items() if paths} == {}
