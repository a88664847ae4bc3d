"""How much memory can still be had."""

from __future__ import annotations

from pathlib import Path

import psutil
import torch

GROUPS, GROUPS_MOUNT = Path("/proc/self/cgroup"), Path("/sys/fs/cgroup")
"""Linux's list of the process's control groups, a line ``number:controllers:path`` each, and where they are."""


def free(device: torch.device) -> int:
    """Bytes that can still be had where the device computes; on the host no more than its control groups allow."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return min([int(psutil.virtual_memory().available), *_group_rooms()])


def _group_rooms() -> list[int]:
    """Bytes left to each of the process's control groups that has a limit, of version 1 or 2, and to those above.

    Pages that the kernel keeps of files only for as long as nobody wants the memory count as free.
    """
    rooms = []
    for line in GROUPS.read_text().splitlines() if GROUPS.exists() else ():
        _, controllers, path = line.split(":", 2)
        if controllers and "memory" not in controllers.split(","):
            continue
        root, names = GROUPS_MOUNT, ("memory.max", "memory.current", "inactive_file")
        if controllers:
            root, names = root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        group = root / path.lstrip("/")
        for folder in (group, *group.parents):
            try:
                most, used = (folder / names[0]).read_text().strip(), int((folder / names[1]).read_text())
                statistics = (folder / "memory.stat").read_text().split()
            except OSError:  # above the groups; or a container sees its own group as the root, and the path misleads
                continue
            kept = int(statistics[statistics.index(names[2]) + 1])
            rooms += [] if most == "max" else [max(0, int(most) - used + kept)]
    return rooms
