"""One JSON file of a model folder. Any thread."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ..errors import ModelLoadError


def read_json(path: Path, *, required: bool = True) -> dict[str, Any]:
    """The JSON object in a file; {} for a missing one that is not required."""
    try:
        with path.open(encoding="utf-8") as file:
            value = json.load(file)
    except FileNotFoundError:
        if not required:
            return {}
        raise ModelLoadError(
            f"{path.parent} holds no {path.name}; it is not a model folder, or its download did not finish."
        ) from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ModelLoadError(f"{path} is not valid JSON ({error}); download the file again.") from None
    except OSError as error:
        raise ModelLoadError(f"{path} cannot be read: {error.strerror or error}.") from None
    if not isinstance(value, dict):
        raise ModelLoadError(f"{path} should hold a JSON object; download the file again.")
    return value
