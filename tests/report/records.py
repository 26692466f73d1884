"""Records that went wrong somewhere."""

import copy
from typing import Any


def with_value(run: dict[str, Any], *path: Any, value: object) -> dict[str, Any]:
    """Returns a copy of a record that holds the value at this place."""
    data = copy.deepcopy(run)
    inner: Any = data
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return data
