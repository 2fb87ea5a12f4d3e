"""What Linux tells of processes: whether one lives, when it began, and where its number means something."""

from __future__ import annotations

import os

HIDDEN = 0  # a process that lives, and whose beginning cannot be seen


def start_ticks(pid: int) -> int | None:
    """When a living process began, in the kernel's ticks since boot: its number alone comes again.

    None: there is no such process here, or it has ended and nobody has asked for its status yet.
    """
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            fields = file.read().rpartition(")")[2].split()
        return None if fields[0] in "ZX" else int(fields[19])
    except (OSError, IndexError, ValueError):
        return HIDDEN if _exists(pid) else None


def _exists(pid: int) -> bool:
    """Whether there is such a process, where /proc does not tell: hidepid hides others' from it, and macOS has none."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # somebody else's
        return True
    return True


def start_time(pid: int) -> float | None:
    """When a living process began, in seconds since 1970, to about a second; None: it cannot be told."""
    ticks = start_ticks(pid)
    if not ticks:
        return None
    try:
        with open("/proc/stat", encoding="utf-8") as file:
            booted = next(int(line.split()[1]) for line in file if line.startswith("btime "))
        return booted + ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, StopIteration):
        return None


def pid_space() -> str:
    """Names the set of processes in which this process's number is its own: one boot of a machine, one container.

    Empty where it cannot be told. Two machines may have one name, so a host's name does not do.
    """
    try:
        with open("/proc/sys/kernel/random/boot_id", encoding="utf-8") as file:
            return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""
