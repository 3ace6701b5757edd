"""Imports point one way, at the top of a file, and torch's private API stands in one file."""

import ast
import graphlib
from collections.abc import Iterator
from fnmatch import fnmatch
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

LAYERS = (
    "torch_private diagnostics names layout aliasing nests twin catalog sequence",
    "mesh functional program moves schedule",
    "policy messages",
    "spec constraints balance timeline amounts",
    "rules.table rules.operator peaks",
    "rules.parse rules.factors",
    (
        "rules.attention rules.contraction rules.experts rules.grouped rules.index rules.loss rules.pointwise "
        "rules.random rules.reduction rules.scatter rules.spatial rules.view"
    ),
    "rules.match rules.fit rules.convolution rules.join",
    "survey renumbering",
    "kin",
    "tracing infer plan",
    "summary bodies",
    "recording cotangent balanced placement units report artifact picture",
    "difference page",
    "stages memory",
    "dryrun packed",
    "arguments claims lower fixes positions",
    "explain",
    "exchange hazards batch context typecheck footprint pipelining staging",
    "contextrun",
    "localrun",
    "moments expectation",
    "excerpt residency",
    "inflight",
    "compiler",
    "runtime.agreement runtime.fabric runtime.failure runtime.gather runtime.kernels runtime.optim runtime.rng",
    "runtime.vocab",
    "runtime.pieces runtime.publish",
    "runtime.manifest",
    "runtime.rank_major",
    "runtime.parts",
    "runtime.arguments runtime.boundary runtime.buffers runtime.recipe runtime.state",
    "runtime.context",
    "runtime.attach runtime.init runtime.prefetch runtime.weights",
    "runtime.experts runtime.routing",
    "runtime.apply",
    "runtime.stage",
    "runtime.pipeline",
    "runtime.sharded",
    "runtime.contents runtime.step",
    "runtime.save",
    "runtime.restore",
    "testing.simulate testing.local_call testing.letters",
    "testing.bruteforce testing.plain testing.threads testing.golden testing.strategies testing.totality",
    "testing.trials testing.parity",
    "testing operators",
    "cli.options cli.load",
    "cli.explain cli.target",
    "cli.emit cli.diff",
    "cli.commands",
    "cli",
    "",
    "models models.checkpoints models.data models.experts models.inputs models.launch models.report models.llama.model",
    "models.*.balance models.*.loss models.*.model",
    "models.*.presets models.*.rules",
    "models.*",
    "models.train",
)
"""Lowest first, names below `shardspec` without it; a module imports from the layers below its own only."""

PACKAGES = {"shardspec.rules", "shardspec.runtime"}
"""Empty `__init__` files."""

LATE = {
    ("shardspec.plan", "shardspec.placement"),
    ("shardspec.plan", "shardspec.report"),
    ("shardspec.plan", "shardspec.artifact"),
    ("shardspec.plan", "shardspec.difference"),
    ("shardspec.plan", "shardspec.page"),
    ("shardspec.plan", "shardspec.timeline"),
    ("shardspec.plan", "shardspec.memory"),
    ("shardspec.runtime.sharded", "shardspec.runtime.step"),
}
"""Imports inside a function: methods that are a thin door to a module built on their own class."""


def sources(*folders: str) -> dict[str, ast.Module]:
    """Module name -> its parsed source."""
    found: dict[str, ast.Module] = {}
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            name = ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
            found[name] = ast.parse(path.read_text(), str(path))
    return found


MODULES = sources("shardspec", "models")


def imported(tree: ast.AST, modules: set[str]) -> Iterator[str]:
    """The modules among `modules` that a tree imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                below = f"{node.module}.{alias.name}"
                if below in modules or node.module in modules:
                    yield below if below in modules else node.module


def functions(tree: ast.AST) -> Iterator[ast.AST]:
    yield from (node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))


def late_imports(tree: ast.AST, modules: set[str]) -> set[str]:
    return {name for function in functions(tree) for name in imported(function, modules)}


def top_imports(tree: ast.Module, modules: set[str]) -> set[str]:
    late = {id(node) for function in functions(tree) for node in ast.walk(function)}
    nodes = [node for node in ast.walk(tree) if id(node) not in late and isinstance(node, (ast.Import, ast.ImportFrom))]
    return {name for node in nodes for name in imported(node, modules)}


def level_of(module: str) -> int:
    """The layer that a module stands in: where its name is written, or the first pattern that fits it."""
    full = [
        [name if name.startswith("models") else f"shardspec.{name}".rstrip(".") for name in names.split() or [""]]
        for names in LAYERS
    ]
    exact = [level for level, names in enumerate(full) if module in names]
    fitting = [level for level, names in enumerate(full) if any(fnmatch(module, name) for name in names)]
    assert exact or fitting, f"{module} has no layer: give it one in LAYERS"
    return (exact or fitting)[0]


def test_every_name_in_the_layers_is_a_module():
    names = {f"shardspec.{name}" for names in LAYERS for name in names.split() if not name.startswith("models")}
    assert names <= set(MODULES)


@pytest.mark.parametrize("module", sorted(set(MODULES) - PACKAGES))
def test_a_module_imports_from_lower_layers_only(module):
    level = level_of(module)
    upward = {name for name in top_imports(MODULES[module], set(MODULES)) if level_of(name) >= level}
    assert not upward, f"{module} (layer {level}) imports {sorted(upward)}"


def test_there_is_no_import_cycle():
    graph = {name: top_imports(tree, set(MODULES)) for name, tree in MODULES.items()}
    graphlib.TopologicalSorter(graph).prepare()


def test_no_import_hides_in_a_function_but_the_listed_ones():
    found = {(name, target) for name, tree in MODULES.items() for target in late_imports(tree, set(MODULES))}
    assert found == LATE
    hidden = {
        f"{name}:{node.lineno}"
        for name, tree in MODULES.items()
        if name.startswith("shardspec")
        for function in functions(tree)
        for node in ast.walk(function)
        if isinstance(node, (ast.Import, ast.ImportFrom)) and not set(imported(node, set(MODULES)))
    }
    assert not hidden


# torch's private API


def is_private(name: str) -> bool:
    return name.startswith("_") and not name.startswith("__")


def dotted(node: ast.AST) -> list[str]:
    """The names of an attribute chain that starts at a plain name, or nothing."""
    names: list[str] = []
    while isinstance(node, ast.Attribute):
        names.insert(0, node.attr)
        node = node.value
    return [node.id, *names] if isinstance(node, ast.Name) else []


def torch_names(tree: ast.AST) -> dict[str, list[str]]:
    """Name in a file -> the path below torch that it stands for: imports, and `aten = torch.ops.aten`."""
    known: dict[str, list[str]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                parts = alias.name.split(".")
                if parts[0] == "torch":
                    known[alias.asname or "torch"] = parts if alias.asname else ["torch"]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "torch":
            for alias in node.names:
                known[alias.asname or alias.name] = [*str(node.module).split("."), alias.name]
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            chain = dotted(node.value)
            if chain and chain[0] in known:
                known[node.targets[0].id] = known[chain[0]] + chain[1:]
    return known


def private_uses(tree: ast.AST) -> Iterator[str]:
    """Each name of torch's that begins with one underscore, with its line; `torch.ops` holds operators, not API."""
    known = torch_names(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            paths = [alias.name.split(".") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            paths = [[*str(node.module).split("."), alias.name] for alias in node.names]
        elif isinstance(node, ast.Attribute):
            chain = dotted(node)
            paths = [known[chain[0]] + chain[1:]] if chain and chain[0] in known else []
        elif isinstance(node, ast.Call) and dotted(node.func) == ["getattr"] and isinstance(node.args[1], ast.Constant):
            chain = dotted(node.args[0])
            paths = [known[chain[0]] + chain[1:] + [str(node.args[1].value)]] if chain and chain[0] in known else []
        else:
            continue
        for path in paths:
            if path[0] == "torch" and path[:2] != ["torch", "ops"] and any(map(is_private, path)):
                yield f"line {node.lineno}: {'.'.join(path)}"


@pytest.mark.parametrize("module", sorted(set(MODULES) - {"shardspec.torch_private"}))
def test_torchs_private_api_is_used_in_one_file_only(module):
    assert not sorted(set(private_uses(MODULES[module])))


@pytest.mark.parametrize(
    "line",
    [
        "import torch._dynamo",
        "from torch.utils._pytree import tree_leaves",
        "from torch.distributed.tensor.placement_types import _StridedShard",
        "import torch\ntorch._foreach_norm([])",
        "import torch.distributed as dist\ndist.distributed_c10d._world",
        "from torch import Tensor\nTensor._make_subclass",
        "import torch\nlib = torch.library\nlib._x",
        "import torch\ngetattr(torch, '_C')",
    ],
)
def test_a_private_use_is_seen(line):
    assert list(private_uses(ast.parse(line)))


@pytest.mark.parametrize(
    "line",
    [
        "import torch\ntorch.ops.aten._softmax.default",
        "import torch\naten = torch.ops.aten\naten._to_copy.default",
        "import torch\ntorch.__version__",
        "from torch import nn\nnn.Module()._parameters",
    ],
)
def test_operators_and_attributes_of_objects_are_no_private_use(line):
    assert not list(private_uses(ast.parse(line)))


def test_an_upward_import_and_a_late_one_are_seen():
    tree = ast.parse("from shardspec import compiler\ndef f():\n    from shardspec.plan import Plan")
    names = {"shardspec", "shardspec.compiler", "shardspec.plan"}
    assert top_imports(tree, names) == {"shardspec.compiler"}
    assert late_imports(tree, names) == {"shardspec.plan"}
