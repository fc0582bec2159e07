"""`vllm-mlx cache ls|clear|verify`: what is in a disk cache, for people. No MLX; the folder must be free.

Exit codes: 0 done, 1 the folder cannot be used or holds damaged blocks.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path

from vllm_mlx.engine.disk_folder import BlockFolder

GIB = 2**30


def run(action: str, path: str, model: str | None) -> int:
    """Do one of the three; raises FolderFault, one sentence, where the folder cannot be used."""
    place = Path(path).expanduser()
    if not place.is_dir():
        print(f"vllm-mlx: there is no folder {place}.", file=sys.stderr)
        return 1
    folder = BlockFolder(place, limit_bytes=1 << 62)
    folder.open("")
    try:
        return {"ls": _list, "clear": _clear, "verify": _verify}[action](folder, model)
    finally:
        folder.close()


def _list(folder: BlockFolder, model: str | None) -> int:
    for usage in folder.usage():
        if model is None or model in usage.model:
            used = time.strftime("%Y-%m-%d %H:%M", time.localtime(usage.last_used))
            blocks = f"{usage.num_blocks} blocks ({usage.num_states} states)"
            print(f"{usage.nbytes / GIB:9.3f} GiB  {blocks:<30} last used {used}  {usage.model}")
    print(f"{folder.nbytes / GIB:9.3f} GiB  {folder.num_blocks} blocks in all")
    return 0


def _clear(folder: BlockFolder, model: str | None) -> int:
    freed = 0
    for usage in folder.usage():
        if model is None or model in usage.model:
            freed += folder.clear(usage.model)
    print(f"{freed / GIB:.3f} GiB freed")
    return 0


def _verify(folder: BlockFolder, model: str | None) -> int:
    num_damaged = 0
    for name, reason in folder.damaged():
        num_damaged += 1
        folder.discard(name)
        print(f"removed {name}: {reason}")
    print(f"{folder.num_blocks} blocks are whole, {num_damaged} were damaged")
    return 1 if num_damaged else 0
