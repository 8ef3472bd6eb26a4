"""The cost of importing, the needs of the core, and the one way that imports point."""

import ast
import functools
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import subspan

SOURCE = Path(subspan.__file__).parent

# Every module, lowest first. A module imports from its own layer and from those below it.
LAYERS = [
    ("errors", "cache", "files", "precision", "registry"),
    ("philox", "coding"),
    ("shuffle",),
    ("kernels",),
    ("families",),
    ("linalg", "distributed"),
    ("subspace",),
    ("layers",),
    ("counts",),
    ("optim",),
    ("adapters",),
    ("checkpoint",),
    ("variants",),
    ("hub",),
    ("training",),
    ("sweeps",),
    ("report",),
    ("bench",),
    ("experiments",),
    ("commands",),
    ("cli",),
    ("__main__",),
]
RANK = {name: rank for rank, layer in enumerate(LAYERS) for name in layer}
CORE_NEEDS = {"numpy", "safetensors", "torch"}
PARTS_NEED = {
    "subspan.kernels.cpu": {"numba", "llvmlite"},
    "subspan.kernels.gpu": {"triton"},
    "subspan.checkpoint.base": {"huggingface_hub"},  # which Transformers' networks come with
}


def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name; of the package itself, none."""
    found = {}
    for path in SOURCE.rglob("*.py"):
        parts = ("subspan", *path.relative_to(SOURCE).with_suffix("").parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    del found["subspan"]  # only names where the public names live
    return found


MODULES = modules()


@functools.cache
def imports(tree: ast.AST) -> frozenset[str]:
    """Dotted names of what a source imports anywhere, as modules of ours where they are that."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                public = subspan._HOME.get(alias.name) if node.module == "subspan" else None
                found.add(public or (full if full in MODULES else str(node.module)))
    return frozenset(found)


def unconditional(tree: ast.Module) -> ast.Module:
    """The code that runs when a module is imported: no functions, nothing under TYPE_CHECKING."""
    kept = [
        node
        for node in tree.body
        if not isinstance(node, (ast.FunctionDef, ast.ClassDef))
        and not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test))
    ]
    return ast.Module(kept, [])


@functools.cache
def trees() -> dict[str, ast.Module]:
    """Every module's source, parsed."""
    return {name: ast.parse(path.read_text()) for name, path in MODULES.items()}


def rank(module: str) -> int:
    """The layer of one of our modules."""
    return RANK[module.split(".")[1]]


def test_every_module_has_a_layer() -> None:
    assert {name.split(".")[1] for name in MODULES} == set(RANK)


def test_imports_point_one_way() -> None:
    upward = {}
    for module, tree in trees().items():
        ours = {name for name in imports(tree) if name.split(".")[0] == "subspan"}
        upward[module] = {name for name in ours - {"subspan"} if rank(name) > rank(module)}
        # Of the package itself only its version: its other names import half of the library.
        if "subspan" in ours:
            assert "from subspan import __version__" in MODULES[module].read_text(), module
    assert {module: names for module, names in upward.items() if names} == {}


def test_no_import_comes_back() -> None:
    graph = {name: imports(unconditional(tree)) & set(MODULES) for name, tree in trees().items()}
    # A package is imported before what is in it; that it then imports its parts is no cycle.
    for package in graph:
        graph[package] = {name for name in graph[package] if not name.startswith(package + ".")}
    TopologicalSorter(graph).prepare()  # raises CycleError


def test_the_core_needs_four_packages() -> None:
    own, more = CORE_NEEDS | {"subspan"} | set(sys.stdlib_module_names), {}
    for module, tree in trees().items():
        if rank(module) < RANK["training"]:
            outside = {name.split(".")[0] for name in imports(tree)}
            more[module] = outside - own - PARTS_NEED.get(".".join(module.split(".")[:3]), set())
    assert {module: names for module, names in more.items() if names} == {}


def run(code: str) -> None:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_importing_subspan_costs_next_to_nothing() -> None:
    run("""
import sys
import subspan
assert dir(subspan) == sorted(subspan.__all__)
loaded = {name.split(".")[0] for name in sys.modules}
assert not loaded & {"torch", "numpy", "numba", "safetensors"}, loaded
assert not [name for name in sys.modules if name.startswith("subspan.")]
""")


@pytest.mark.heavy
def test_importing_the_core_loads_nothing_more_and_numba_waits_for_a_product() -> None:
    run(f"""
import sys
import torch, numpy, safetensors.torch
threads = max(1, torch.get_num_threads() - 1)
torch.set_num_threads(threads)
before = {{name.split(".")[0] for name in sys.modules}}
import subspan
for name in subspan.__all__:
    assert getattr(subspan, name) is not None
from subspan import families, subspace, checkpoint
after = {{name.split(".")[0] for name in sys.modules}}
assert after - before - set(sys.stdlib_module_names) == {{"subspan"}}, after - before
assert not {{"numba", "llvmlite", "triton"}} & after
assert not [name for name in sys.modules if name.startswith("subspan.training")]
p = subspan.projection("hash", out_dim=70_000, in_dim=10)
assert "numba" not in sys.modules
p.matvec(torch.ones(10))
assert "numba" in sys.modules
subspan.SubspaceModel(torch.nn.Linear(8, 8), 4)(torch.ones(1, 8)).sum().backward()
now = {{name.split(".")[0] for name in sys.modules}}
assert not {{"bitsandbytes", "torchao", "transformers"}} & now  # of networks without them
assert "subspan.kernels.gpu" not in sys.modules
# Numba's threads are OpenMP's, as torch's are: starting them must leave torch's number alone.
assert torch.get_num_threads() == threads, torch.get_num_threads()
import numba
assert numba.get_num_threads() == min(threads, {70_000 >> 15})
""")


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'subspan' has no attribute 'Projections'"):
        _ = subspan.Projections
