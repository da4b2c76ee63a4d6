"""The plan of the house: who may import whom, how long a file may be, what a public name must say.

Everything but the last test reads the source and imports nothing.
"""

import ast
import collections
import functools
import pathlib
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "adabatch_jax"

# Unit (room, top-level module, or "" for the facade) -> the units it may import besides itself.
TOOLS = {"_axes", "_clock", "_dropped", "_loss", "_protocols", "_tree", "_types", "_validate"}
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
    "integrations": set(CORE),
    "cli": {*CORE, "training"},
    "__main__": {"cli"},
}
# Inside training/: sub-room, or file at the top -> those that it may import besides itself.
IN_TRAINING: dict[str, set[str]] = {
    "_files": set(),
    "_options": set(),
    "_run_state": set(),
    "data": {"_files"},
    "devices": set(),
    "record": {"_files"},
    "plot": {"_files"},
    "models": {"data"},
    "step": {"data", "devices", "models"},
    "checkpoint": {"_files", "_options", "_run_state", "devices"},
    "spectrum": {"_files", "_options", "checkpoint", "data", "devices", "models", "plot"},
    "_registry": set(),
    "_config_check": {"_options", "_registry"},
    "_config": {"_config_check", "_registry", "data", "models"},
    "_plan": {"_config", "_config_check", "_options", "_registry", "data"},
    "_optimizer": {"_plan", "_registry"},
}
IN_TRAINING["_loop"] = {"_config", "_optimizer", "_plan", "_run_state"}
IN_TRAINING["_loop"] |= {"data", "devices", "models", "record", "step"}
IN_TRAINING["_train"] = {"_config", "_files", "_loop", "_plan", "_run_state"}
IN_TRAINING["_train"] |= {"checkpoint", "data", "devices", "plot", "record", "step"}
IN_TRAINING[""] = set(IN_TRAINING)
# File of integrations/ -> the one library of the extras that it imports.
FRAMEWORK = {"flax": "flax", "nnx": "flax", "equinox": "equinox"}
MAX_FILES_AT_THE_TOP = 12  # of training/
MAX_NAMES_IN_THE_FACADE = 45

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


def unit_in_training(module):
    """The sub-room of training/, or the file at its top; "" for its facade, None outside."""
    parts = module.split(".")[1:]
    return None if parts[:1] != ["training"] else "".join(parts[1:2])


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


def imports_of(modules):
    """(importing module, imported module), both of ours."""
    return [(module, name) for module in modules for name in sorted(ours(module))]


def test_imports_go_one_way():
    assert {unit(module) for module in FILES} <= set(MAY_IMPORT), "say in MAY_IMPORT what it may"
    wrong = [
        f"{module} imports {name}"
        for module, name in imports_of(FILES)
        if unit(name) not in {unit(module), *MAY_IMPORT[unit(module)]}
    ]
    assert not wrong, wrong


TRAINING = [name for name in FILES if unit(name) == "training"]


def test_imports_in_training_go_one_way():
    units = {unit_in_training(module) for module in TRAINING}
    assert units <= set(IN_TRAINING), "say in IN_TRAINING what it may import"
    wrong = [
        f"{module} imports {name}"
        for module, name in imports_of(TRAINING)
        for here in [unit_in_training(module)]
        if unit_in_training(name) not in {here, *IN_TRAINING[here], None}
    ]
    assert not wrong, wrong


def test_sub_rooms_are_entered_by_the_front_door():
    wrong = [
        f"{module} imports {name}"
        for module, name in imports_of(TRAINING)
        if unit_in_training(name) not in (unit_in_training(module), None) and name.count(".") > 2
    ]
    assert not wrong, wrong


def test_sub_rooms_offer_what_they_import():
    """What `__init__.py` of a sub-room takes from its files, other rooms may use."""
    for room in (name for name in ROOMS if unit_in_training(name)):
        taken = {
            alias.asname or alias.name
            for node in tree(room).body
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
        }
        assert taken == set(public_names(room)), room


def test_training_has_few_files_at_its_top():
    top = sorted(path.name for path in (PACKAGE / "training").glob("*.py"))
    assert len(top) <= MAX_FILES_AT_THE_TOP, top


INTEGRATIONS = [name for name in FILES if unit(name) == "integrations"]


def test_an_integration_imports_its_framework_alone():
    found = {
        module.split(".")[-1]: {name.split(".")[0] for name in imports(module)} & ONLY_IN_EXTRAS
        for module in INTEGRATIONS
    }
    assert found == {file: {name} for file, name in FRAMEWORK.items()} | {"integrations": set()}
    wrong = [x for x in imports_of(INTEGRATIONS) if unit(x[1]) == "integrations"]
    assert not wrong, f"and none of the others: {wrong}"


def test_rooms_are_entered_by_their_door():
    """What another room needs is re-exported by the room's `__init__`, public or not."""
    wrong = [
        f"{module} imports {name}"
        for module, name in imports_of(FILES)
        if unit(name) in CORE and unit(name) != unit(module)
        if any(part.startswith("_") for part in name.split(".")[2:])
    ]
    assert not wrong, wrong


def test_core_needs_no_extras():
    wrong = [
        f"{module} imports {name}"
        for module in FILES
        if unit(module) in CORE
        for name in sorted(imports(module))
        if name.split(".")[0] in ONLY_IN_EXTRAS
    ]
    assert not wrong, wrong


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


def test_files_are_short():
    lines = {m: len(path.read_text(encoding="utf-8").splitlines()) for m, path in FILES.items()}
    wrong = {module: number for module, number in lines.items() if number > MAX_LINES}
    assert not wrong, f"one idea each, or two files: {wrong}"


def test_rooms_have_a_guide():
    wrong = [room for room in ROOMS if not ast.get_docstring(tree(room))]
    assert not wrong, f"the docstring of a room is its guide: {wrong}"


CORE_ROOMS = [room for room in ROOMS if unit(room) in CORE and room.count(".") == 1]


def missing_words(room, name):
    node = definition(room, name)
    doc = ast.get_docstring(node) or ""
    if "Example:" not in doc and "Source:" not in doc:
        yield "neither Example nor Source"
    if isinstance(node, ast.FunctionDef):
        a = node.args
        if "Args:" not in doc and any([a.posonlyargs, a.args, a.vararg, a.kwonlyargs, a.kwarg]):
            yield "its arguments are not described"
        if ">>>" not in doc:
            yield "no example that runs"


def test_public_names_are_documented():
    wrong = [
        f"{room}.{name}: {problem}"
        for room in [*CORE_ROOMS, *INTEGRATIONS]
        for name in public_names(room)
        for problem in missing_words(room, name)
    ]
    assert not wrong, wrong


def test_facade_only_offers_what_a_room_offers():
    offered = {name for room in CORE_ROOMS for name in public_names(room)}
    assert set(public_names(PACKAGE.name)) <= offered
    taken = {
        alias.name
        for node in tree(PACKAGE.name).body
        if isinstance(node, ast.ImportFrom) and node.module.startswith(PACKAGE.name)
        for alias in node.names
    }
    assert taken <= offered


def test_the_facade_holds_what_a_user_needs_first():
    assert len(public_names(PACKAGE.name)) <= MAX_NAMES_IN_THE_FACADE


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


def test_importing_everything_does_not_start_the_backend():
    """Whoever calls `jax.distributed.initialize` imports us before."""
    rooms = [f"adabatch_jax.{room}" for room in ("training", "cli")]
    frameworks = [f"adabatch_jax.integrations.{name}" for name in ("flax", "nnx", "equinox")]
    code = f"import {', '.join(rooms + frameworks)}; from jax._src import xla_bridge as bridge; "
    code += "raise SystemExit(bridge.backends_are_initialized())"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
