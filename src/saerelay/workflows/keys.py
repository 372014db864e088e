"""The keys of a recipe as Python keyword arguments, whatever their section (for `suites` and `tensors`)."""

import difflib
from collections.abc import Collection
from typing import Any

from saerelay.errors import RecipeError
from saerelay.planning.recipe import Recipe
from saerelay.spec import Spec


def sectioned(keys: dict[str, Any], sections: Collection[str]) -> dict[str, Any]:
    """Sort keys of a recipe into its sections; a whole section may also be given as a dict.

    >>> sectioned({"k": 32, "lr": 1e-3, "data": {"context": 64}}, ("dictionary", "train", "data"))
    {'dictionary': {'k': 32}, 'train': {'lr': 0.001}, 'data': {'context': 64}}

    Raises RecipeError for a key of no section, or of several sections, which has to be given by section.
    """
    found: dict[str, Any] = {}
    owners: dict[str, list[str]] = {}
    for section in sections:
        part = Recipe.part(section, {})
        assert issubclass(part, Spec)
        for key in part.all_keys():
            owners.setdefault(key, []).append(section)
    for key, value in keys.items():
        if key in sections and isinstance(value, dict):
            found.setdefault(key, {}).update(value)
            continue
        owned_by = owners.get(key, [])
        if not owned_by:
            similar = difflib.get_close_matches(key, owners, n=1, cutoff=0.5)
            hint = f'did you mean "{similar[0]}"?' if similar else f"valid keys: {', '.join(sorted(owners))}"
            raise RecipeError(f'unknown key "{key}"; {hint}')
        if len(owned_by) > 1:
            ways = " or ".join(f'{section}={{"{key}": ...}}' for section in owned_by)
            raise RecipeError(f'"{key}" is a key of {" and ".join(owned_by)}; write {ways}')
        found.setdefault(owned_by[0], {})[key] = value
    return found
