"""How the plugin opens files: what it writes goes where nobody else can bend it, what it reads may be anybody's.

Writing. A directory of ours belongs to this process's user, and neither its group nor others may write to it. It is
made with mode 0700 where it is missing. It is opened once and checked, and all that follows happens in what was opened,
whatever becomes of its name. A symbolic link to the directory is followed if root or this process's user made it. The
directories above are not checked: who owns one can make a report vanish, but cannot make us write over a file.
A file is written under a name that nobody can guess and then renamed, so that readers see the old file or the new one.

Reading. Reports, records and control files may have been put there by somebody else, so a reader follows no link, waits
for no FIFO, and stops at a size. Whose file it is matters only to the control file, which commands an engine.

Standard library only: engines' processes import this.
"""

from __future__ import annotations

import errno
import json
import math
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

REPORT_BYTES = 16 << 20  # a report is some KiB; a command line, the one part without a bound, has at most 2 MiB
RECORD_BYTES = 64 << 20  # one half of a process's rows: 16 MiB, and what one flush adds
MAX_DIGITS = 30  # of a number in JSON: a longer one is no count, and costs quadratic time to read
MAX_DEPTH = 32  # of JSON; what prints it again would run out of stack
TOKEN_BYTES = 8  # of a temporary name

_SAFE = os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY
_KINDS = {
    stat.S_IFDIR: "a directory",
    stat.S_IFLNK: "a link",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}


class Refused(OSError):
    """A file or directory that is not to be trusted; the text says what was found and what was expected."""


# directories


def directory_problem(path: str | os.PathLike[str]) -> str | None:
    """Why no file of ours can go into ``path``, or None; makes nothing. A missing directory is judged by its parent."""
    path = Path(path)
    try:
        os.close(_open_directory(path))
    except FileNotFoundError:
        if os.path.lexists(path):
            return "found a dangling link, expected a directory"
        above = next(one for one in path.absolute().parents if os.path.lexists(one))
        return None if _writable(above) else f"it cannot be created: this process may not write to {above}"
    except OSError as problem:
        return _text(problem)
    return None if _writable(path) else "this process may not write to it"


def open_directory(path: str | os.PathLike[str]) -> int:
    """A descriptor of a directory of ours, made with mode 0700 where it is missing, missing parents included.

    Raises:
        Refused: it is not ours, others may write to it, or it is no directory.
        OSError: it cannot be made or opened.
    """
    path = Path(path)
    for _ in range(2):  # somebody may remove it in between
        try:
            return _open_directory(path)
        except FileNotFoundError:
            _make_directories(path)
    return _open_directory(path)


@contextmanager
def _opened(path: Path) -> Iterator[int]:
    directory = open_directory(path)
    try:
        yield directory
    finally:
        os.close(directory)


def _make_directories(path: Path) -> None:
    """As ``mkdir(parents=True)``, which would leave the parents to the umask."""
    missing = [path]
    while not missing[-1].parent.exists():
        missing.append(missing[-1].parent)
    for one in reversed(missing):
        try:
            os.mkdir(one, 0o700)
        except FileExistsError:
            continue


def _open_directory(path: Path) -> int:
    flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
    try:
        directory = os.open(path, flags | os.O_NOFOLLOW)
    except OSError as problem:
        if problem.errno not in (errno.ELOOP, errno.ENOTDIR):
            raise
        found = os.lstat(path)  # raises NotADirectoryError where a parent is a file
        if not stat.S_ISLNK(found.st_mode):
            raise Refused(f"found {_kind(found.st_mode)}, expected a directory") from None
        if found.st_uid not in (0, os.geteuid()):
            raise Refused(f"found a link that user {found.st_uid} made, expected a directory") from None
        directory = os.open(path, flags)
    try:
        _check_directory(os.fstat(directory), path)
    except BaseException:
        os.close(directory)
        raise
    return directory


def _check_directory(found: os.stat_result, path: Path) -> None:
    mode, me = stat.S_IMODE(found.st_mode), os.geteuid()
    if mode & stat.S_ISVTX and mode & 0o002:  # as /tmp: everybody's on purpose, so nobody is told to change it
        raise Refused(
            f"mode {mode:04o} lets everybody write to it: use a directory below it, such as {path / 'mla-patch'}"
        )
    if found.st_uid != me:
        chown = f", or `chown {me} {path}`" if found.st_uid != 0 else ""  # root's directories are the system's
        raise Refused(
            f"it belongs to user {found.st_uid} (mode {mode:04o}) and this process runs as user {me}: "
            f"use a directory of user {me}{chown}"
        )
    if mode & 0o022:
        who = "everybody" if mode & 0o002 else "its group"
        raise Refused(
            f"mode {mode:04o} lets {who} write to it: `chmod go-w {path}`, or use a directory of this user only"
        )


def _writable(path: Path) -> bool:
    effective = os.access in os.supports_effective_ids
    return os.access(path, os.W_OK | os.X_OK, effective_ids=effective)


# writing


def replace(path: Path, text: str) -> None:
    """Write a file of ours, mode 0600. What had its name, a link or a FIFO included, gives way.

    Raises:
        OSError: the directory is refused, or cannot be written.
    """
    with _opened(path.parent) as directory, _beside(directory, path.name, text.encode("utf-8", "replace")) as name:
        os.replace(name, path.name, src_dir_fd=directory, dst_dir_fd=directory)


def create(path: Path, data: bytes) -> bool:
    """Make a file of ours, mode 0600, whole at once; False where there is one of that name.

    Raises:
        OSError: the directory is refused, or cannot be written.
    """
    with _opened(path.parent) as directory, _beside(directory, path.name, data) as name:
        try:
            os.link(name, path.name, src_dir_fd=directory, dst_dir_fd=directory, follow_symlinks=False)
        except FileExistsError:
            return False
        return True


def export(path: Path, text: str) -> None:
    """Write a file, mode 0600, where the person at the command line wants it: in anybody's directory, which must exist.

    Raises:
        Refused: something other than a plain file has that name.
        OSError: the directory cannot be written.
    """
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            mode = os.stat(path.name, dir_fd=directory, follow_symlinks=False).st_mode
            if not stat.S_ISREG(mode):
                raise Refused(f"{path}: found {_kind(mode)}, expected a plain file or nothing")
        except FileNotFoundError:
            pass
        with _beside(directory, path.name, text.encode("utf-8", "replace")) as name:
            os.replace(name, path.name, src_dir_fd=directory, dst_dir_fd=directory)
    finally:
        os.close(directory)


def rename(path: Path, name: str) -> None:
    """Give a file of ours another name in its directory.

    Raises:
        OSError: the directory is refused, or it cannot be done.
    """
    with _opened(path.parent) as directory:
        os.replace(path.name, name, src_dir_fd=directory, dst_dir_fd=directory)


def open_ours(path: Path, flags: int) -> int:
    """A descriptor of a file in a directory of ours, made with mode 0600 where it is missing. Never waits.

    Raises:
        Refused: the directory is refused, or the file is not a plain one that belongs to this process's user.
        OSError: it cannot be made or opened.
    """
    with _opened(path.parent) as directory:
        file = open_plain(path, flags | os.O_CREAT, dir_fd=directory)
    found = os.fstat(file)
    if found.st_uid != os.geteuid():
        os.close(file)
        raise Refused(f"{path}: it belongs to user {found.st_uid}, expected user {os.geteuid()}")
    return file


def touch(path: Path) -> None:
    """Set a file's times to now, without following a link.

    Raises:
        OSError: it is not there, or is not ours.
    """
    os.utime(path, follow_symlinks=False)


def temporary_name(name: str) -> str:
    """A name beside ``name`` that nobody can guess; hidden, so that no pattern for reports or records finds it."""
    return f".{name}.{os.urandom(TOKEN_BYTES).hex()}"


@contextmanager
def _beside(directory: int, name: str, data: bytes) -> Iterator[str]:
    """The data under a temporary name, which is gone afterwards, whatever happens."""
    temporary = temporary_name(name)
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    descriptor = os.open(temporary, flags, 0o600, dir_fd=directory)  # from here on it is ours to remove
    try:
        with open(descriptor, "wb") as file:
            file.write(data)
        yield temporary
    finally:
        try:
            os.unlink(temporary, dir_fd=directory)
        except OSError:  # renamed, or the disk has failed: the caller is raised the first error
            pass


# reading


def open_plain(path: str | os.PathLike[str], flags: int = os.O_RDONLY, *, dir_fd: int | None = None) -> int:
    """A descriptor of a plain file: follows no link and waits for no FIFO. ``dir_fd``: of its directory.

    Raises:
        Refused: it is something else.
        OSError: it cannot be opened.
    """
    where = os.fspath(path) if dir_fd is None else os.path.basename(path)
    try:
        file = os.open(where, flags | _SAFE, 0o600, dir_fd=dir_fd)
    except OSError as problem:
        kinds = {errno.ELOOP: "a link", errno.ENXIO: "a FIFO or a socket", errno.EISDIR: "a directory"}
        if problem.errno in kinds:
            raise Refused(f"{path}: found {kinds[problem.errno]}, expected a plain file") from None
        raise
    mode = os.fstat(file).st_mode
    if not stat.S_ISREG(mode):
        os.close(file)
        raise Refused(f"{path}: found {_kind(mode)}, expected a plain file")
    return file


def read(path: Path, limit: int) -> bytes:
    """A plain file's content, whoever it belongs to.

    Raises:
        Refused: it is no plain file, or has more than ``limit`` bytes.
        OSError: it cannot be read.
    """
    with open(open_plain(path), "rb") as file:
        data = file.read(limit + 1)
    if len(data) > limit:
        raise Refused(f"{path}: more than {limit} bytes, expected at most that")
    return data


def parse(text: str | bytes, *, finite: bool = True) -> Any:
    """JSON that somebody else may have written. ``finite``: NaN and infinities are refused.

    Raises:
        ValueError: it is no JSON, is nested too deeply, or holds a number that nothing of ours writes.
    """
    try:
        if isinstance(text, bytes):
            text = text.decode("utf-8")
        value = json.loads(
            text,
            parse_int=_whole,
            parse_float=_finite if finite else None,
            parse_constant=_no_number if finite else None,
        )
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    _check_depth(value, MAX_DEPTH)
    return value


def _check_depth(value: Any, left: int) -> None:
    if not left:
        raise ValueError(f"it is nested more than {MAX_DEPTH} deep")
    if isinstance(value, (dict, list)):
        for one in value.values() if isinstance(value, dict) else value:
            if isinstance(one, (dict, list)):
                _check_depth(one, left - 1)


def _whole(text: str) -> int:
    if len(text) > MAX_DIGITS:
        raise ValueError(f"a number of {len(text)} digits, expected at most {MAX_DIGITS}")
    return int(text)


def _finite(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _no_number(text[:MAX_DIGITS])


def _no_number(text: str) -> float:
    raise ValueError(f"{text}, expected a finite number")


def _kind(mode: int) -> str:
    return _KINDS.get(stat.S_IFMT(mode), "a file")


def _text(problem: OSError) -> str:
    return problem.strerror or str(problem)
