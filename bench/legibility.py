"""A mirror for the code: how dense is it, beside packages that are known to read well?

    python bench/legibility.py                       # the package by wing, in total, and the anchors
    python bench/legibility.py src/saerelay/lm       # any other folder of Python files, by subfolder
    python bench/legibility.py --json after.json     # the same as JSON, with every module, body, spec and signature
                                                     # that is over its limit

It is a mirror, not a gate: it always exits with 0, and the reader decides. A figure is worth a look, not a workaround;
what can be said as a rule is one of ruff's in pyproject.toml.

Everything is counted in the syntax tree, nothing is imported. Figures are per 1000 lines (blank ones and docstrings
included); long lines are a share of the lines that are not blank.
"""

import argparse
import ast
import io
import json
import tokenize
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

PACKAGE = Path(__file__).parent.parent / "src" / "saerelay"

FIGURES = {
    "conditional": "x if c else y",
    "nested conditional": "a conditional expression inside another one",
    "comprehension": "list, set, dict comprehensions and generator expressions",
    "nested comprehension": "with a second `for`, or inside another comprehension",
    "tuple assignment": "a, b = x, y",
    "dict union": "dict | dict, and |= of anything",
    "dict[str, Any]": "an untyped dictionary in a signature or variable",
    "key look-up": 'document["key"]',
    "comment": "lines with a comment",
    "long line %": "lines of 100 characters and more",
}
"""What is counted, in the order in which it is printed."""

ANCHORS = {
    "nanochat": (8.2, None, 13.8, 0.0, 5.9, 0.0, 0.0, 24, 157, 4.0),
    "httpx": (9.3, None, 6.3, 0.1, 0.5, 0.0, 0.7, 5, 51, 0.1),
    "equinox": (3.9, None, 5.5, 0.0, 0.2, 0.2, 0.5, 2, 61, 0.2),
    "einops": (3.1, None, 13.2, 0.2, 0.3, 0.2, 1.9, 3, 58, 3.5),
    "saev": (3.2, None, 8.8, 0.2, 0.9, 0.0, 0.6, 10, 49, 1.3),
    "torchtitan": (4.5, None, 9.0, None, 0.6, 0.0, 2.3, 11, None, 0.4),
}
"""The same figures of other packages, counted once in fresh clones; None where nobody has counted."""

MAX_MODULE_LINES = 400
MAX_BODY_LINES = 60
MAX_FIELDS = 12
MAX_PARAMETERS = 7
LONG_LINE = 100

Function = ast.FunctionDef | ast.AsyncFunctionDef
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
DICTS = (ast.Dict, ast.DictComp)


@dataclass
class Reflection:
    """What the mirror shows of some files: counts, and what is over a limit."""

    lines: int = 0
    written_lines: int = 0
    """Those that are not blank."""
    files: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    long_modules: dict[str, int] = field(default_factory=dict)
    long_bodies: dict[str, int] = field(default_factory=dict)
    wide_specs: dict[str, int] = field(default_factory=dict)
    wide_signatures: dict[str, int] = field(default_factory=dict)

    def add(self, other: "Reflection") -> None:
        """Count the files of another one as well."""
        self.lines += other.lines
        self.written_lines += other.written_lines
        self.files += other.files
        self.counts += other.counts
        self.long_modules |= other.long_modules
        self.long_bodies |= other.long_bodies
        self.wide_specs |= other.wide_specs
        self.wide_signatures |= other.wide_signatures

    def figures(self) -> dict[str, float]:
        """Each of FIGURES per 1000 lines; of long lines, the percentage."""
        figures = {name: round(1000 * self.counts[name] / max(1, self.lines), 1) for name in FIGURES}
        figures["long line %"] = round(100 * self.counts["long line %"] / max(1, self.written_lines), 1)
        return figures


def reflect(path: Path, name: str) -> Reflection:
    """Count everything in one file, which is called `name` in what is printed."""
    text = path.read_text(encoding="utf-8")
    tree = ast.parse(text)
    lines = text.splitlines()
    written = [line for line in lines if line.strip()]
    result = Reflection(lines=len(lines), written_lines=len(written), files=1)

    result.counts["long line %"] = sum(len(line) >= LONG_LINE for line in lines)
    result.counts["comment"] = n_comments(text)
    count_expressions(tree, result.counts)

    if len(lines) > MAX_MODULE_LINES:
        result.long_modules[name] = len(lines)
    for node in ast.walk(tree):
        if isinstance(node, Function):
            where = f"{name}:{node.lineno} {node.name}"
            if body_lines(node) > MAX_BODY_LINES:
                result.long_bodies[where] = body_lines(node)
            if n_parameters(node) > MAX_PARAMETERS and not is_exempt(node, name):
                result.wide_signatures[where] = n_parameters(node)
        if isinstance(node, ast.ClassDef) and is_record(node) and n_fields(node) > MAX_FIELDS:
            result.wide_specs[f"{name}:{node.lineno} {node.name}"] = n_fields(node)
    return result


def n_comments(text: str) -> int:
    """Lines with a comment, alone or behind code; directives for tools count as well, as they did for the anchors."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return sum(token.type == tokenize.COMMENT for token in tokens)


def count_expressions(tree: ast.Module, counts: Counter[str]) -> None:
    """Count every expression that costs a reader more than its length says."""
    in_annotations = set(annotation_nodes(tree))
    for node in ast.walk(tree):
        match node:
            case ast.IfExp():
                counts["conditional"] += 1
                counts["nested conditional"] += contains(node, (ast.IfExp,))
            case ast.ListComp() | ast.SetComp() | ast.DictComp() | ast.GeneratorExp():
                counts["comprehension"] += 1
                counts["nested comprehension"] += len(node.generators) > 1 or contains(node, COMPREHENSIONS)
            case ast.Assign(targets=[ast.Tuple()], value=ast.Tuple()):
                counts["tuple assignment"] += 1
            case ast.BinOp(op=ast.BitOr()) if node not in in_annotations:
                counts["dict union"] += isinstance(node.left, DICTS) or isinstance(node.right, DICTS)
            case ast.AugAssign(op=ast.BitOr()):
                counts["dict union"] += 1
            case ast.Subscript(slice=ast.Constant(value=str())) if node not in in_annotations:
                counts["key look-up"] += isinstance(node.ctx, ast.Load)
            case ast.Subscript(value=ast.Name(id="dict")):
                counts["dict[str, Any]"] += ast.unparse(node) == "dict[str, Any]"


def annotation_nodes(tree: ast.Module) -> Iterator[ast.AST]:
    """Every node in an annotation: there `A | B` is a type, and a string in brackets no key."""
    for node in ast.walk(tree):
        annotations = [getattr(node, "annotation", None), getattr(node, "returns", None)]
        for annotation in annotations:
            if annotation is not None:
                yield from ast.walk(annotation)


def contains(node: ast.AST, kinds: tuple[type[ast.AST], ...]) -> bool:
    """Whether something of some kinds stands anywhere below a node."""
    return any(isinstance(below, kinds) for below in ast.walk(node) if below is not node)


def body_lines(function: Function) -> int:
    """Lines of a function from the first statement after its docstring to its end."""
    statements = function.body[1:] if ast.get_docstring(function) else function.body
    if not statements or function.end_lineno is None:
        return 0
    return function.end_lineno - statements[0].lineno + 1


def n_parameters(function: Function) -> int:
    """Parameters of a function without self, cls, *args and **kwargs."""
    names = [argument.arg for argument in (*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs)]
    return len(names) - (names[:1] in (["self"], ["cls"]))


def is_exempt(function: Function, name: str) -> bool:
    """Whether a function is a command, whose parameters are options, or a GPU kernel, which takes every pointer."""
    if Path(name).parts[0] == "cli":
        return True
    decorators = " ".join(ast.unparse(decorator) for decorator in function.decorator_list)
    return any(word in decorators for word in (".command", ".callback", "jit"))


def is_record(node: ast.ClassDef) -> bool:
    """Whether a class is a spec, a document, a dataclass or a named tuple."""
    names = [ast.unparse(expression) for expression in (*node.bases, *node.decorator_list)]
    return any(word in name for name in names for word in ("Spec", "Document", "BaseModel", "NamedTuple", "dataclass"))


def n_fields(node: ast.ClassDef) -> int:
    """Annotated fields of a class; class variables are none."""
    annotations = [ast.unparse(item.annotation) for item in node.body if isinstance(item, ast.AnnAssign)]
    return sum(not annotation.startswith("ClassVar") for annotation in annotations)


def by_wing(root: Path) -> dict[str, Reflection]:
    """A reflection for each folder directly below `root`, and one named "ground" for the files beside them."""
    wings = defaultdict[str, Reflection](Reflection)
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        wing = name.parts[0] if len(name.parts) > 1 else "ground"
        wings[wing].add(reflect(path, str(name)))
    return dict(sorted(wings.items()))


def total_of(wings: dict[str, Reflection]) -> Reflection:
    """All wings together."""
    total = Reflection()
    for wing in wings.values():
        total.add(wing)
    return total


def print_table(wings: dict[str, Reflection], total: Reflection) -> None:
    """One row per figure, one column per wing, then the total and the anchors."""
    columns = {name: wing.figures() for name, wing in wings.items()}
    columns["TOTAL"] = total.figures()
    for name, values in ANCHORS.items():
        columns[name] = dict(zip(FIGURES, values, strict=True))

    widths = {name: max(6, len(name)) for name in columns}
    sizes = {name: wing.lines for name, wing in {**wings, "TOTAL": total}.items()}
    print(" " * 20, *(f"{name:>{width}}" for name, width in widths.items()))
    print(f"{'lines':<20}", *(f"{sizes.get(name, ''):>{width}}" for name, width in widths.items()))
    for figure in FIGURES:
        cells = [cell(column[figure]).rjust(widths[name]) for name, column in columns.items()]
        print(f"{figure:<20}", *cells)


def cell(value: float | None) -> str:
    """A figure with one decimal, "-" where it was not counted."""
    return "-" if value is None else f"{value:.1f}"


def print_limits(total: Reflection) -> None:
    """What is over a limit, the largest first."""
    limits = {
        f"modules over {MAX_MODULE_LINES} lines": total.long_modules,
        f"bodies over {MAX_BODY_LINES} lines": total.long_bodies,
        f"specs over {MAX_FIELDS} fields": total.wide_specs,
        f"functions over {MAX_PARAMETERS} parameters (commands and kernels left out)": total.wide_signatures,
    }
    for title, items in limits.items():
        print(f"\n{title}: {len(items)}")
        for name, size in sorted(items.items(), key=lambda item: -item[1]):
            print(f"  {size:>5}  {name}")


def main() -> None:
    """Print the table, and write it as JSON if that is asked for."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("root", type=Path, nargs="?", default=PACKAGE, help="a folder of Python files")
    parser.add_argument("--json", type=Path, help="write all figures, by wing, to this file")
    arguments = parser.parse_args()

    wings = by_wing(arguments.root)
    total = total_of(wings)
    print_table(wings, total)
    print_limits(total)

    if arguments.json:
        everything = {**wings, "TOTAL": total}
        document = {name: {**vars(wing), "figures": wing.figures()} for name, wing in everything.items()}
        arguments.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
