"""Imports point down only, and nothing global is touched: read from the source, for every file there is."""

import ast
import importlib.util
from pathlib import Path

import pytest

PACKAGE = Path(next(iter(importlib.util.find_spec("sk_ebm").submodule_search_locations)))
TREES = {path.stem: ast.parse(path.read_text()) for path in sorted(PACKAGE.glob("*.py"))}
every_module = pytest.mark.parametrize("module", TREES)

# From the bottom up: a module imports only from layers below its own. One that is not listed is a leaf.
LAYERS = [
    {"_types", "_draws", "_progress", "_version", "_parallel"},
    {
        "_bounds",
        "_kernels",
        "_log_normalizer",
        "_energy",
        "_flow",
        "_support",
        "_mixture",
        "_stacking",
        "_folds",
        "_independence",
        "_calibration",
        "_persistence",
    },
    {"_student_t", "_model", "_rows", "_support", "_bases"},
    {"_mixture_search", "_kernel_density"},
    {"_selection"},
    {"_sampler"},
    {"_training", "_flow_fitting", "_base_flows"},
    {"_fitting"},
    {"_density"},
    {"_proportions"},
    {"_display"},
    {"__init__"},
]
LAYER = {module: height for height, layer in enumerate(LAYERS) for module in layer}

# Who alone may import a package.
ONLY_IN = {
    "normflows": {"_flow"},
    "sklearn": {"_density", "_proportions", "_display"},
    "scipy": {"_density", "_proportions", "_calibration", "_display"},
    "matplotlib": {"_display"},
}
FORBIDDEN_CALLS = {
    "print",
    "random.seed",
    "numpy.random.seed",
    "torch.seed",
    "torch.set_num_threads",
    "torch.set_num_interop_threads",
    "torch.set_default_dtype",
    "torch.set_default_device",
    "torch.set_default_tensor_type",
    "torch.set_float32_matmul_precision",
}
DRAWS = {
    f"torch.{name}"
    for name in ("rand", "randn", "randint", "randperm", "multinomial", "normal", "bernoulli", "poisson")
}
DRAWS |= {"torch._standard_gamma"}


def imports(nodes):
    """Yield (local name, dotted name) of every import among `nodes`."""
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from ((alias.asname or alias.name.split(".")[0], alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            origin = node.module if not node.level else ".".join(filter(None, ["sk_ebm", node.module]))
            yield from ((alias.asname or alias.name, f"{origin}.{alias.name}") for alias in node.names)


def internal_imports(module):
    """Return the modules of the package that `module` imports, also inside functions."""
    dotted = [name.split(".") for _, name in imports(ast.walk(TREES[module]))]
    return {parts[1] if parts[1] in TREES else "__init__" for parts in dotted if parts[0] == "sk_ebm"}


def calls(module):
    """Yield (dotted name with import aliases resolved, call) of every call in `module`."""
    aliases = dict(imports(ast.walk(TREES[module])))
    for call in ast.walk(TREES[module]):
        if isinstance(call, ast.Call):
            first, *rest = ast.unparse(call.func).split(".")
            yield ".".join([aliases.get(first, first), *rest]), call


def import_time_nodes(tree):
    """Yield the nodes of a module that run when it is imported."""
    for node in ast.iter_child_nodes(tree):
        yield node
        if not isinstance(node, (ast.FunctionDef, ast.Lambda)):
            yield from import_time_nodes(node)


def test_package_was_found():
    assert set().union(*LAYERS[:3]) <= set(TREES)


@every_module
def test_imports_point_down(module):
    upward = {name for name in internal_imports(module) if LAYER.get(name, 0) >= LAYER.get(module, 0)}
    assert not upward, f"{module} may not import {upward}: give it a layer above them in LAYERS, or turn the arrow"


def test_imports_have_no_cycle():
    remaining = {module: internal_imports(module) for module in TREES}
    while remaining:
        ready = {module for module, needs in remaining.items() if not needs & set(remaining)}
        assert ready, f"cycle among {sorted(remaining)}"
        remaining = {module: needs for module, needs in remaining.items() if module not in ready}


@every_module
@pytest.mark.parametrize("package", ONLY_IN)
def test_package_is_imported_only_where_it_belongs(module, package):
    names = {name.split(".")[0] for _, name in imports(ast.walk(TREES[module]))}
    assert package not in names or module in ONLY_IN[package]


@pytest.mark.parametrize("module", ["_kernels", "_log_normalizer"])
def test_kernels_know_no_network(module):
    assert not [name for _, name in imports(ast.walk(TREES[module])) if name.startswith("torch.")]


@every_module
def test_nothing_global_is_set_and_nothing_printed(module):
    assert not FORBIDDEN_CALLS & {name for name, _ in calls(module)}


@every_module
def test_every_draw_takes_a_generator(module):
    draws = [call for name, call in calls(module) if name in DRAWS or name.startswith(("numpy.random.r", "random."))]
    assert all("generator" in {keyword.arg for keyword in call.keywords} for call in draws)


@every_module
def test_import_time_is_free_of_cuda_and_matplotlib(module):
    names = {name for _, name in imports(import_time_nodes(TREES[module]))}
    names |= {ast.unparse(node) for node in import_time_nodes(TREES[module]) if isinstance(node, ast.Attribute)}
    assert not [name for name in names if name.startswith(("torch.cuda", "matplotlib"))]
