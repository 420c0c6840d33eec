"""Numbers of the tree that show where it strains: printed, and nothing enforced.

    python scripts/tree_numbers.py [FOLDER]

FOLDER is a checkout, by default this one. Line widths are those of lines of code that are not
blank.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

FILE_LINES, FUNCTION_LINES = 400, 60
# Names that families give their modules. A file outside of `models/` that says one in its code
# knows a family; what other tools call things in their files is not meant.
NAMES = re.compile(
    r"\b(?:[qkv]_proj|qkv_proj|o_proj|gate_proj|up_proj|gate_up_proj|down_proj|self_attn|lm_head"
    r"|embed_tokens|c_attn|c_proj|c_fc|wte|wpe|Wqkv|Wo|Wi|[qkv]_lin|out_lin|lin[12]|wi_[01]"
    r"|SelfAttention|EncDecAttention|post_attention_layernorm|input_layernorm)\b"
)


def functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Every function and method of a module."""
    return (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))


def parameters(function: ast.FunctionDef | ast.AsyncFunctionDef) -> list[ast.arg]:
    """A function's parameters without `self` and `cls`."""
    a = function.args
    given = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]
    return [p for p in given if p.arg not in ("self", "cls")]


def says_names(tree: ast.AST) -> bool:
    """Whether code, docstrings apart, says the name of a family's module."""
    docs = {
        n.body[0].value
        for n in ast.walk(tree)
        if isinstance(n, ast.Module | ast.ClassDef | ast.FunctionDef)
        and n.body
        and isinstance(n.body[0], ast.Expr)
        and isinstance(n.body[0].value, ast.Constant)
    }
    strings = (n for n in ast.walk(tree) if isinstance(n, ast.Constant) and n not in docs)
    return any(isinstance(n.value, str) and NAMES.search(n.value) for n in strings)


def numbers(root: Path) -> dict[str, str]:
    """What is printed: a sentence -> its number."""
    files = {p: p.read_text(encoding="utf-8") for p in sorted((root / "peft_jax").rglob("*.py"))}
    trees = {p: ast.parse(text) for p, text in files.items()}
    lines = [line for text in files.values() for line in text.splitlines() if line.strip()]
    lengths = [n.end_lineno - n.lineno + 1 for t in trees.values() for n in functions(t)]  # type: ignore[operator]
    args = [p for t in trees.values() for n in functions(t) for p in parameters(n)]
    untyped = [p for p in args if p.annotation is None or ast.unparse(p.annotation) == "Any"]
    named = [
        p for p, t in trees.items() if "models" not in p.relative_to(root).parts and says_names(t)
    ]
    whole = [
        p for p in args if p.annotation is not None and "RunConfig" in ast.unparse(p.annotation)
    ]
    sizes = [len(text.splitlines()) for text in files.values()]
    share = len(untyped) / len(args)
    return {
        "files, lines": f"{len(files)}, {sum(sizes)}",
        f"files over {FILE_LINES} lines": f"{sum(n > FILE_LINES for n in sizes)}",
        f"functions over {FUNCTION_LINES} lines": f"{sum(n > FUNCTION_LINES for n in lengths)}",
        "mean width of a line": f"{sum(map(len, lines)) / len(lines):.1f}",
        "parameters typed Any or not at all": f"{len(untyped)} of {len(args)} ({share:.1%})",
        "functions that take the whole configuration": f"{len(whole)}",
        "files outside models/ with names of families' modules": f"{len(named)}",
        "hasattr and getattr with a default": f"{sum(map(asks, trees.values()))}",
    }


def asks(tree: ast.AST) -> int:
    """How often code asks an object for what it may not have."""
    calls = [n for n in ast.walk(tree) if isinstance(n, ast.Call) and isinstance(n.func, ast.Name)]
    return sum(
        c.func.id == "hasattr" or (c.func.id == "getattr" and len(c.args) == 3)  # type: ignore[attr-defined]
        for c in calls
    )


if __name__ == "__main__":
    where = Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parents[1]
    for what, number in numbers(where).items():
        print(f"{what:55} {number}")
