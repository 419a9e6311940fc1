"""Two rules of style that ruff has no check for, outside the tests."""

import ast

import pytest

from tests.repository.sources import parsed, python_files

MOST_POSITIONAL = 6


def wide_calls(tree: ast.AST) -> list[int]:
    """Lines of calls with more positional arguments than a reader can match with their names."""
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return [
        call.lineno
        for call in calls
        if len(call.args) > MOST_POSITIONAL
        and not any(isinstance(argument, ast.Starred) for argument in call.args)
    ]


def packed_assignments(tree: ast.AST) -> list[int]:
    """Lines of `a, b = x, y` that are not a swap. `a, b = f()` is no packing: it is one value."""
    return [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Assign)
        and isinstance(node.value, ast.Tuple)
        and any(isinstance(target, ast.Tuple) for target in node.targets)
        and not is_swap(node)
    ]


def is_swap(node: ast.Assign) -> bool:
    """Whether the same names stand on both sides, in another order."""
    sides = [*node.targets, node.value]
    names = [sorted(map(ast.unparse, ast.iter_child_nodes(side))) for side in sides]
    return all(side == names[0] for side in names)


@pytest.mark.parametrize("rule", [wide_calls, packed_assignments])
def test_no_file_breaks_the_rule(rule):
    broken = [f"{name}:{line}" for name in python_files() for line in rule(parsed(name))]
    assert not broken, f"{rule.__name__}: {broken}"


def test_the_rules_find_what_they_are_for():
    assert wide_calls(ast.parse("f(1, 2, 3, 4, 5, 6)\nf(1, 2, 3, 4, 5, 6, 7)\nf(*x)")) == [2]
    code = "a, b = b, a\na, b = f()\nfor a, b in c: pass\na, b = c, d\nself.a, self.b = a, b"
    assert packed_assignments(ast.parse(code)) == [4, 5]
