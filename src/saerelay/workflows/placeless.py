"""Remove the paths of this machine from documents made for others: of the model, the text, or a parent."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from saerelay.document import Document
from saerelay.files import leafwise
from saerelay.interop.names import public_adapter, public_name
from saerelay.planning.plan import Plan

AnyDocument = TypeVar("AnyDocument", bound=Document)

_ROOTED = re.compile(r"[/~]|\.{1,2}/|[A-Za-z]:[\\/]|file:/")
_WITHIN_TEXT = re.compile(r"(?<![\w.:/~-])(?:file:/|~?/|\.{1,2}/|[A-Za-z]:\\)[^\s\"'`,;()<>]{2,}")


def without_paths(data: Any) -> Any:
    """Return JSON data with paths cut to their last part: absolute and relative paths, also within a text.

    >>> without_paths({"text": ["/home/me/notes"], "model": "EleutherAI/pythia-70m", "n": 3})
    {'text': ['notes'], 'model': 'EleutherAI/pythia-70m', 'n': 3}
    >>> without_paths(["text in ~/notes (files: 3)", "runs/a/legs/L5", "hf://user/repo/layer_3"])
    ['text in notes (files: 3)', 'L5', 'hf://user/repo/layer_3']
    """
    return leafwise(_without_paths, data)


def _without_paths(leaf: Any) -> Any:
    if not isinstance(leaf, str):
        return leaf
    if _is_path(leaf):
        return _last_part(leaf)
    return _WITHIN_TEXT.sub(lambda found: _last_part(found[0]), leaf)


def _is_path(text: str) -> bool:
    """Whether a whole text looks like a path; user/repo does not, since it may be a name on the hub."""
    if _ROOTED.match(text):
        return True
    parts = text.split("/")
    return len(parts) > 2 and "" not in parts and parts[0] != "refs" and not re.search(r"\s", text)


def _last_part(path: str) -> str:
    return re.split(r"[/\\]", path.rstrip("/\\"))[-1]


def placeless(document: AnyDocument, names: Mapping[str, str]) -> AnyDocument:
    """Return a document without paths; `names` maps things named by a path to their public names.

    Within a text, such as "affine from saes/layer_6", only names with a slash are looked for: others may be words.
    """
    paths = sorted((name for name in names if "/" in name), key=len, reverse=True)
    within_text = re.compile(rf"(?<!\S)({'|'.join(map(re.escape, paths))})(?!\S)") if paths else None

    def shown(leaf: Any) -> Any:
        if not isinstance(leaf, str):
            return leaf
        if leaf in names:
            return names[leaf]
        pieces = within_text.split(leaf) if within_text else [leaf]
        return "".join(names[piece] if piece in names else _without_paths(piece) for piece in pieces)

    data = leafwise(shown, document.to_data())
    return type(document).from_data(data, source=type(document).__name__)


def placeless_plan(plan: Plan) -> Plan:
    """Return a plan without paths, in which outside parents are named by the last part of their path."""
    names = public_names(plan)
    externals = {}
    for reference, external in plan.externals.items():
        model = public_name(external.model) if external.model else ""
        externals[names[reference]] = external.changed(path="", model=model)
    legs = [leg.changed(parent=names.get(leg.parent, leg.parent)) if leg.hop else leg for leg in plan.legs]
    public = without_paths(plan.recipe.model_dump(mode="json"))
    return plan.changed(
        recipe=type(plan.recipe).model_validate(public),
        facts=plan.facts.changed(name=names[plan.facts.name], adapter=public_adapter(plan.facts.adapter)),
        legs=legs,
        externals=externals,
    )


def public_names(plan: Plan) -> dict[str, str]:
    """Return the public names of a plan's model and of the parents outside it.

    A parent's name keeps a slash, which distinguishes it from legs of the plan; parents with equal names get numbers.
    """
    names = {plan.facts.name: public_name(plan.facts.name)}
    for reference in plan.externals:
        name = reference if reference.startswith("hf:/") else f"./{Path(reference).name}"
        taken = [other for other in names.values() if other == name or other.startswith(f"{name}-")]
        names[reference] = f"{name}-{len(taken) + 1}" if taken else name
    return names
