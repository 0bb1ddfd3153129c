# SPDX-License-Identifier: Apache-2.0
"""Everything of vLLM that the plugin leans on is there and looks as the plugin expects.

The sources are read and not imported, so any vLLM can be asked: the package directory (of an unpacked wheel, say) that
``VLLM_SOURCE`` names, else the installed one.
"""

from __future__ import annotations

import ast
import os
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import pytest

from vllm_medusa.compat.symbols import FIELDS, NAMES, SIGNATURES

PACKAGE = Path(__file__).parents[3] / "vllm_medusa"


def source() -> Path:
    if given := os.environ.get("VLLM_SOURCE"):
        return Path(given)
    spec = find_spec("vllm")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


@cache
def path_of(module: str) -> Path | None:
    base = source().joinpath(*module.split(".")[1:])
    candidates = (base.with_suffix(".py"), base / "__init__.py")
    return next((path for path in candidates if path.exists()), None)


@cache
def tree_of(module: str) -> ast.Module:
    path = path_of(module)
    assert path is not None, f"there is no module {module}"
    return ast.parse(path.read_text(encoding="utf-8"))


def names_of(module: str) -> dict[str, ast.AST]:
    """The names that a module binds outside functions and classes, in any branch."""
    found: dict[str, ast.AST] = {}

    def visit(statements: list[ast.stmt]) -> None:
        for node in statements:
            match node:
                case ast.FunctionDef() | ast.ClassDef() | ast.AsyncFunctionDef():
                    found[node.name] = node
                case ast.Import() | ast.ImportFrom():
                    found.update({alias.asname or alias.name.split(".")[0]: node for alias in node.names})
                case ast.Assign():
                    found.update({target.id: node for target in node.targets if isinstance(target, ast.Name)})
                case ast.AnnAssign(target=ast.Name(id=name)):
                    found[name] = node
                case ast.If() | ast.Try():
                    visit([*node.body, *node.orelse])
                    visit([statement for handler in getattr(node, "handlers", []) for statement in handler.body])

    visit(tree_of(module).body)
    return found


def definition(module: str, name: str) -> tuple[str, ast.AST]:
    """Follow imports to where a name is defined."""
    found = names_of(module).get(name)
    assert found is not None, f"{module} has no {name}"
    if isinstance(found, ast.ImportFrom):
        origin = found.module or ""
        if found.level:
            base = module.split(".")
            is_package = path_of(module) is not None and path_of(module).name == "__init__.py"  # type: ignore[union-attr]
            base = base[: len(base) - found.level + is_package]
            origin = ".".join([*base, *filter(None, [origin])])
        [original] = [alias.name for alias in found.names if (alias.asname or alias.name) == name]
        if origin.startswith("vllm") and name in names_of(origin):
            return definition(origin, original)
    return module, found


def members(module: str, name: str) -> dict[str, ast.AST]:
    """What a class and its bases in vLLM define: methods, fields, and attributes that any method sets."""
    module, found = definition(module, name)
    assert isinstance(found, ast.ClassDef), f"{module}:{name} is no class"
    collected: dict[str, ast.AST] = {}
    for base in reversed(found.bases):
        root = base.value if isinstance(base, ast.Subscript) else base
        if isinstance(root, ast.Name) and root.id in names_of(module):
            where, parent = definition(module, root.id)
            if isinstance(parent, ast.ClassDef):
                collected.update(members(where, parent.name))
    for node in ast.walk(found):
        match node:
            case ast.Attribute(value=ast.Name(id="self"), attr=attribute, ctx=ast.Store()):
                collected.setdefault(attribute, node)
            case ast.AnnAssign(target=ast.Name(id=field)):
                collected[field] = node
    collected.update({node.name: node for node in found.body if isinstance(node, ast.FunctionDef)})
    for node in found.body:
        if isinstance(node, ast.Assign):
            collected.update({target.id: node for target in node.targets if isinstance(target, ast.Name)})
    return collected


def imports_of_the_plugin() -> list[tuple[str, str]]:
    """Every ``from vllm... import ...`` of the package, wherever it stands."""
    found: set[tuple[str, str]] = set()
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
                found.update((node.module or "", alias.name) for alias in node.names)
    return sorted(found)


@pytest.mark.parametrize(("module", "name"), imports_of_the_plugin())
def test_what_the_plugin_imports_is_there(module: str, name: str) -> None:
    assert path_of(module) is not None, f"there is no module {module}"
    if path_of(f"{module}.{name}") is None and "__getattr__" not in names_of(module):
        definition(module, name)


@pytest.mark.parametrize("where", SIGNATURES)
def test_a_function_takes_what_the_plugin_expects(where: str) -> None:
    module, _, qualified = where.partition(":")
    owner, _, method = qualified.rpartition(".")
    found = members(module, owner).get(method) if owner else definition(module, method)[1]
    assert isinstance(found, ast.FunctionDef), f"there is no function {where}"
    arguments = found.args
    names = [argument.arg for argument in arguments.posonlyargs + arguments.args]
    names += [f"*{arguments.vararg.arg}"] if arguments.vararg else []
    names += [argument.arg for argument in arguments.kwonlyargs]
    names += [f"**{arguments.kwarg.arg}"] if arguments.kwarg else []
    expected = SIGNATURES[where]
    if expected.endswith(", ..."):
        known = expected.split(", ")[:-1]
        assert len(names) - len(known) <= len(arguments.defaults), f"{where} asks for more than {known}"
        names, expected = names[: len(known)], ", ".join(known)
    assert ", ".join(names) == expected


@pytest.mark.parametrize("where", FIELDS)
def test_a_class_has_the_fields_that_the_plugin_uses(where: str) -> None:
    module, _, name = where.partition(":")
    assert set(FIELDS[where].split()) - members(module, name).keys() == set()


@pytest.mark.parametrize("module", NAMES)
def test_a_module_has_the_names_that_the_plugin_reaches_for(module: str) -> None:
    assert set(NAMES[module].split()) - names_of(module).keys() == set()


def test_the_cpu_worker_makes_its_runner_where_ours_replaces_it() -> None:
    init_device = members("vllm.v1.worker.cpu_worker", "CPUWorker")["init_device"]
    made = [node.value for node in ast.walk(init_device) if isinstance(node, ast.Assign | ast.AnnAssign)]
    assert [call.func.id for call in made if isinstance(call, ast.Call) and hasattr(call.func, "id")].count(
        "CPUModelRunner"
    )
    # V2's class is imported when it is needed, so a name replaced in its own module is the one that is found.
    imports = [node for node in ast.walk(init_device) if isinstance(node, ast.ImportFrom)]
    found = [(node.module, alias.name) for node in imports for alias in node.names]
    assert ("vllm.v1.worker.cpu.model_runner", "CPUModelRunner") in found


def test_the_checks_can_fail() -> None:
    with pytest.raises(AssertionError, match="has no nothing"):
        definition("vllm.v1.outputs", "nothing")
    assert "nothing" not in members("vllm.v1.outputs", "SamplerOutput")
    assert path_of("vllm.nothing") is None
