"""Mutants of a source file: each has one small fault, such as < for <=, that a test of it should notice.

Of the tools there are, mutmut leaves out every class with a decorator, and so all dataclasses; cosmic-ray edits the
files of the checkout, and starts a process for each mutant.
"""

import ast
from collections.abc import Iterator
from typing import Any

SWAPPED: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.And: ast.Or, ast.Or: ast.And,
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.LShift: ast.RShift,
    ast.BitOr: ast.BitAnd, ast.BitAnd: ast.BitOr, ast.Pow: ast.Mult,
}  # fmt: skip

NAMES = {
    "min": "max", "max": "min", "any": "all", "all": "any", "floor": "ceil", "minimum": "maximum", "maximum": "minimum",
}  # fmt: skip


def mutants_of(source: str) -> Iterator[tuple[str, ast.Module]]:
    """Yield (name, tree) of every mutant. The tree is the same object each time: use it before you ask for the next.

    The name is the function, what was there and what is there now; it stays the same while that line does.
    """
    tree = ast.parse(source)
    names: dict[str, int] = {}
    for where, parent, field, place in _places(tree, ""):
        node = _get(parent, field, place)
        if not where and isinstance(node, ast.Constant) and isinstance(node.value, int | float):
            continue  # a limit's exact number is no promise
        for changed in _changed(node):
            name = f"{where}: {_text(parent, node)} -> {_text(parent, changed)}"
            names[name] = names.get(name, 0) + 1
            _put(parent, field, place, ast.copy_location(changed, node))
            yield name if names[name] == 1 else f"{name} #{names[name]}", ast.fix_missing_locations(tree)
            _put(parent, field, place, node)


Place = tuple[str, ast.AST, str, int | None]  # function, parent, its field, and the index if that is a list


def _places(parent: ast.AST, where: str) -> Iterator[Place]:
    """Yield every place of a node; imports, types, decorators and f-strings (messages) are left out."""
    for field, value in ast.iter_fields(parent):
        if field in ("annotation", "returns", "decorator_list", "args") and not isinstance(parent, ast.Call):
            continue
        for place, node in enumerate(value) if isinstance(value, list) else [(None, value)]:
            if not isinstance(node, ast.AST) or isinstance(node, ast.Import | ast.ImportFrom | ast.JoinedStr):
                continue
            if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
                continue
            inside = where
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                inside = f"{where}.{node.name}".lstrip(".")
            yield inside, parent, field, place
            yield from _places(node, inside)


def _changed(node: ast.AST) -> Iterator[ast.AST]:
    """Yield what could have been written in a node's place by mistake."""
    if type(node) in SWAPPED:
        yield SWAPPED[type(node)]()
    elif isinstance(node, ast.Name) and node.id in NAMES:
        yield ast.Name(NAMES[node.id], ast.Load())
    elif isinstance(node, ast.Attribute) and node.attr in NAMES:
        yield ast.Attribute(node.value, NAMES[node.attr], ast.Load())
    elif isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.Not | ast.USub | ast.Invert):
        yield node.operand
    elif isinstance(node, ast.If | ast.While | ast.IfExp) and not isinstance(node.test, ast.Compare | ast.UnaryOp):
        yield _with(node, test=ast.UnaryOp(ast.Not(), node.test))
    elif isinstance(node, ast.comprehension) and node.ifs:
        yield _with(node, ifs=[])
    elif isinstance(node, ast.Return) and not isinstance(node.value, ast.Constant | None):
        yield ast.Return(ast.Constant(None))
    elif isinstance(node, ast.AugAssign | ast.Raise | ast.Continue) or _is_call(node):
        yield ast.Pass()
    elif isinstance(node, ast.Constant):
        yield from (ast.Constant(value) for value in _other_values(node.value))


def _other_values(value: Any) -> list[Any]:
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int | float):
        return [value + 1]
    if isinstance(value, str | bytes) and value and len(value.split()) == 1:  # a key or a name, no message
        return [value[:-1]]
    return []


def _is_call(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Call)


def _with(node: ast.AST, **fields: Any) -> ast.AST:
    return type(node)(**{name: getattr(node, name, None) for name in node._fields} | fields)


def _text(parent: ast.AST, node: ast.AST) -> str:
    """Return a node as source, of a statement its first line; an operator is its name."""
    if isinstance(node, ast.cmpop | ast.operator | ast.boolop):
        return f"{type(node).__name__} in {ast.unparse(parent).splitlines()[0]}"
    return ast.unparse(node).splitlines()[0]


def _get(parent: ast.AST, field: str, place: int | None) -> ast.AST:
    found: Any = getattr(parent, field)
    node: ast.AST = found if place is None else found[place]
    return node


def _put(parent: ast.AST, field: str, place: int | None, node: ast.AST) -> None:
    if place is None:
        setattr(parent, field, node)
    else:
        getattr(parent, field)[place] = node
