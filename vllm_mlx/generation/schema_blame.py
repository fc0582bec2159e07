"""Which keywords of a JSON schema the grammar compiler cannot take, found by asking it about parts of the schema.

The compiler says what is wrong and not where. So the schema is cut down for as long as the complaint stays the same:
first to the innermost subschema, then to the fewest of its keywords. Worker threads; a pure function.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

# Kept in every cut: without them another complaint (a reference to nothing) would take the place of the first.
_FRAME = ("$schema", "$id", "$anchor", "$dynamicAnchor", "$defs", "definitions")
# Characters of schemas that may be asked about for one refusal; a part beyond is not cut down any further.
_MAX_ASKED = 2_000_000


def blamed(
    schema: Mapping[str, Any], complain: Callable[[Mapping[str, Any]], str], subschemas: Callable[..., Any]
) -> tuple[str, tuple[str, ...]]:
    """(path, keywords) of a smallest part of `schema` about which `complain` says the same as about all of it.

    The keywords are empty where the complaint cannot be had again. `subschemas` lists the (keyword, place, schema)
    directly inside one.
    """
    complaint = complain(schema)
    num_asked = 0

    def still(part: Mapping[str, Any]) -> bool:
        nonlocal num_asked
        num_asked += len(json.dumps(part))
        return num_asked < _MAX_ASKED and complain(part) == complaint

    if not complaint:
        return "", ()
    frame = {key: schema[key] for key in _FRAME if key in schema}
    path, inner = "", frame if still(frame) else schema
    while inner is not frame:
        # What is only referred to comes last: it is wrong only if the reference is.
        inside = sorted(subschemas(inner), key=lambda found: found[0] in _FRAME)
        bad = next((found for found in inside if still({**frame, **found[2]})), None)
        if bad is None:
            break
        keyword, place, inner = bad
        path = f"{path}.{keyword}{'' if place is None else f'.{place}'}".lstrip(".")
    needed = {**frame, **inner}
    for keyword in [*(k for k in needed if k not in _FRAME), *frame]:
        if still(less := {k: v for k, v in needed.items() if k != keyword}):
            needed = less
    return path, tuple(k for k in needed if k not in _FRAME) or tuple(needed)
