"""The plan of the house: who may import whom, how long a file may be, what a public name must say.

Everything but the last test reads the source and imports nothing.
"""

import ast
import collections
import functools
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "adabatch_jax"

# Unit (room, top-level module, or "" for the facade) -> the units it may import besides itself.
TOOLS = {"_axes", "_clock", "_dropped", "_protocols", "_tree", "_types", "_validate"}
CORE = {
    **dict.fromkeys(TOOLS, TOOLS),
    "noise": TOOLS,
    "curvature": TOOLS,
    "batch_size": TOOLS | {"noise"},
    "learning_rate": TOOLS | {"noise", "curvature"},
    "optimizers": TOOLS | {"noise", "curvature", "batch_size", "learning_rate"},
}
CORE[""] = set(CORE)
MAY_IMPORT = CORE | {
    "training": set(CORE),
    "cli": {*CORE, "training"},
    "__main__": {"cli"},
}
ONLY_IN_EXTRAS = {
    *("chex", "flax", "grain", "matplotlib", "orbax", "rich", "sklearn", "tyro"),
    *("equinox", "hypothesis", "pytest", "tensorboardX"),
}
NEEDED_BY_TINYGP = {"equinox"}
MAX_LINES = 400


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}
ROOMS = [name for name, path in FILES.items() if path.name == "__init__.py"]


def unit(module):
    return module.split(".")[1] if "." in module else ""


@functools.cache
def tree(module):
    return ast.parse(FILES[module].read_text(encoding="utf-8"))


def absolute(module, node):
    """The module that an `from … import` statement names, with leading dots resolved."""
    if not node.level:
        return node.module
    drop = node.level - (FILES[module].name == "__init__.py")
    package = module.split(".")[: -drop or None]
    return ".".join([*package, *([node.module] if node.module else [])])


@functools.cache
def imports(module):
    """Every module that `module` imports, inside functions too; submodules count as themselves."""
    found = set()
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            source = absolute(module, node)
            names = {f"{source}.{alias.name}" for alias in node.names}
            submodules = names & set(FILES)
            found |= submodules | ({source} if len(submodules) < len(names) else set())
    return found


def ours(module):
    return {name for name in imports(module) if name.split(".")[0] == PACKAGE.name}


@functools.cache
def public_names(module):
    """`__all__` of a module, read from its source."""
    for node in tree(module).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            return tuple(ast.literal_eval(node.value))
    return ()


def definition(module, name):
    """The class or function that `name` means in `module`, followed through re-exports."""
    for node in tree(module).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and node.name == name:
            return node
        if isinstance(node, ast.ImportFrom):
            for alias in node.names:
                if (alias.asname or alias.name) == name:
                    return definition(absolute(module, node), alias.name)
    raise AssertionError(f"{module}: {name} is neither a class, a function nor a re-export")


@pytest.mark.parametrize("module", FILES)
def test_imports_go_one_way(module):
    here = unit(module)
    assert here in MAY_IMPORT, f"{module}: say in MAY_IMPORT what {here} may import"
    wrong = {name for name in ours(module) if unit(name) not in {here, *MAY_IMPORT[here]}}
    assert not wrong, f"{module} must not import {sorted(wrong)}"


def test_rooms_are_entered_by_their_door():
    """What another room needs is re-exported by the room's `__init__`, public or not."""
    wrong = [
        f"{module} imports {name}"
        for module in FILES
        for name in sorted(ours(module))
        if unit(name) in CORE and unit(name) != unit(module)
        if any(part.startswith("_") for part in name.split(".")[2:])
    ]
    assert not wrong, wrong


@pytest.mark.parametrize("module", [name for name in FILES if unit(name) in CORE])
def test_core_needs_no_extras(module):
    wrong = {name for name in imports(module) if name.split(".")[0] in ONLY_IN_EXTRAS}
    assert not wrong, f"{module} imports {sorted(wrong)}: only training may"


def test_no_import_cycles():
    done, path = set(), []

    def visit(module):
        assert module not in path, " -> ".join([*path[path.index(module) :], module])
        if module not in done:
            path.append(module)
            for name in sorted(ours(module) & set(FILES)):
                visit(name)
            done.add(path.pop())

    for module in FILES:
        visit(module)


@pytest.mark.parametrize("module", FILES)
def test_files_are_short(module):
    lines = len(FILES[module].read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_LINES, f"{module} has {lines} lines: one idea each, or two files"


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_have_a_guide(room):
    assert ast.get_docstring(tree(room)), f"{room}: the docstring of a room is its guide"


@pytest.mark.parametrize("name", public_names(PACKAGE.name))
def test_public_names_are_documented(name):
    node = definition(PACKAGE.name, name)
    doc = ast.get_docstring(node) or ""
    assert doc, f"{name} has no docstring"
    assert "Example:" in doc or "Source:" in doc, f"{name}: neither Example nor Source"
    if isinstance(node, ast.FunctionDef):
        a = node.args
        if any([a.posonlyargs, a.args, a.vararg, a.kwonlyargs, a.kwarg]):
            assert "Args:" in doc, f"{name}: its arguments are not described"
        assert ">>>" in doc, f"{name}: no example that runs"


@pytest.mark.parametrize("room", [r for r in ROOMS if unit(r) in CORE and unit(r)])
def test_facade_only_offers_what_a_room_offers(room):
    for node in tree(PACKAGE.name).body:
        if isinstance(node, ast.ImportFrom) and absolute(PACKAGE.name, node) == room:
            hidden = {alias.name for alias in node.names} - set(public_names(room))
            assert not hidden, f"{room} does not offer {sorted(hidden)} itself"


def test_state_fields_are_unique():
    """`optax.tree.get` raises where a field name occurs twice in one optimizer state."""
    owners = collections.defaultdict(list)
    for module in FILES:
        for node in ast.walk(tree(module)):
            if isinstance(node, ast.ClassDef) and node.name.endswith("State"):
                for field in node.body:
                    if isinstance(field, ast.AnnAssign):
                        owners[ast.unparse(field.target)].append(f"{module}.{node.name}")
    twice = {field: classes for field, classes in owners.items() if len(classes) > 1}
    assert owners, "no state class was found"
    assert not twice, twice


def test_core_works_without_the_extras():
    script = f"""
import importlib.abc, sys

class Missing(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {sorted(ONLY_IN_EXTRAS - NEEDED_BY_TINYGP)!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)

sys.meta_path.insert(0, Missing())
import adabatch_jax
assert all(hasattr(adabatch_jax, name) for name in adabatch_jax.__all__)
"""
    run = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert run.returncode == 0, run.stderr
