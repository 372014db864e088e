"""A recipe as TOML, with a comment on the meaning of every key: what `saerelay init` prints, and a run's `run.toml`."""

import json
from typing import Any

from saerelay.planning.recipe import Recipe


def annotated_toml(recipe: Recipe) -> str:
    """Write the recipe as TOML with a comment on the meaning of every key: the output of `saerelay init`."""
    lines = ['# A recipe for `saerelay train run.toml --out runs/a`. Counts may be written 250_000 or "250k".', ""]
    for name, section in recipe:
        summary = (type(section).__doc__ or "").splitlines()[0]
        lines.append(f"# {summary}")
        lines.append(f"[{name}]")
        for key, value, description in section.described():
            if key == "legs":
                lines.append(f"# {description}")
                continue
            assignment = f"{key} = {_toml_value(value)}"
            lines.append(f"{assignment:<33} # {description}")
        lines.append("")
    for leg in recipe.plan.legs:
        given = leg.model_dump(exclude_defaults=True, exclude_none=True)  # the same for a leg read from plan.json
        lines.append("[[plan.legs]]")
        lines += [f"{key} = {_toml_value(value)}" for key, value in given.items()]
        lines.append("")
    return "\n".join(lines)


def _toml_value(value: Any) -> str:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 10_000:
        return f"{value:_}"
    if isinstance(value, tuple):
        value = list(value)
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")  # TOML wants DEL escaped, too
