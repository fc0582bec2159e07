"""Rebuild tests/data/json_schema_suite/schemas.json from the official JSON-Schema-Test-Suite.

The suite (MIT licence) is carried by the source distribution of the `jsonschema` package, in its folder `json`:

    pip download --no-deps --no-binary jsonschema jsonschema
    tar xzf jsonschema-*.tar.gz
    python tools/import_json_schema_suite.py jsonschema-*/json

Only the schemas are kept, each once, with the draft, the file and the description they come from.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

DRAFTS = ("draft2020-12", "draft7")
TARGET = Path(__file__).parent.parent / "tests" / "data" / "json_schema_suite"


def read_schemas(suite: Path) -> list[dict[str, object]]:
    schemas: list[dict[str, object]] = []
    seen: set[str] = set()
    for draft in DRAFTS:
        for path in sorted((suite / "tests" / draft).glob("*.json")):
            for group in json.loads(path.read_text(encoding="utf-8")):
                text = json.dumps(group["schema"], sort_keys=True)
                if text not in seen:
                    seen.add(text)
                    name = f"{path.stem}: {group['description']}"
                    schemas.append({"draft": draft, "name": name, "schema": group["schema"]})
    return schemas


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    suite = Path(sys.argv[1])
    schemas = read_schemas(suite)
    TARGET.mkdir(parents=True, exist_ok=True)
    lines = ",\n".join(json.dumps(entry) for entry in schemas)
    (TARGET / "schemas.json").write_text(f"[\n{lines}\n]\n", encoding="utf-8")
    shutil.copy(suite / "LICENSE", TARGET / "LICENSE")
    print(f"{len(schemas)} schemas in {TARGET}")


if __name__ == "__main__":
    main()
