"""Files: nothing that another user has put in the way is written through, waited for or read without end."""

import os
import socket
import stat
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from deadline import within

from mla_patch import files

OTHER = 12345  # a user who is neither root nor this process's
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a file to another user")


@pytest.fixture(autouse=True)
def in_time() -> Iterator[None]:
    with within(20):
        yield


@pytest.fixture
def open_umask() -> Iterator[None]:
    """The worst that a container may have."""
    before = os.umask(0)
    yield
    os.umask(before)


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.lstat().st_mode)


# directories


def made(mode: int, owner: int | None = None) -> Callable[[Path], None]:
    def make(path: Path) -> None:
        path.mkdir()
        path.chmod(mode)
        if owner is not None:
            os.chown(path, owner, owner)

    return make


def linked(mode: int, owner: int | None = None) -> Callable[[Path], None]:
    """A link to a directory of ours with this mode; ``owner``: of the link."""

    def make(path: Path) -> None:
        made(mode)(path.with_name("behind"))
        path.symlink_to("behind")
        if owner is not None:
            os.chown(path, owner, owner, follow_symlinks=False)

    return make


DIRECTORIES = {
    "private": (made(0o700), None),
    "readable by others": (made(0o755), None),
    "missing": (lambda path: None, None),
    "a link of ours": (linked(0o700), None),
    "its group writes": (made(0o770), "mode 0770 lets its group write to it: `chmod go-w "),
    "others write": (made(0o703), "mode 0703 lets everybody write to it: `chmod go-w "),
    "sticky": (made(0o1777), "mode 1777 lets everybody write to it: use a directory below it"),
    "a link to a shared one": (linked(0o777), "mode 0777 lets everybody write to it"),
    "a link to nothing": (lambda path: path.symlink_to("none"), "found a dangling link, expected a directory"),
    "a file": (lambda path: path.write_text(""), "found a file, expected a directory"),
    "a FIFO": (lambda path: os.mkfifo(path), "found a FIFO, expected a directory"),
}
FOREIGN = {
    "another user's": (made(0o755, OTHER), f"it belongs to user {OTHER} (mode 0755) and this process runs as user 0: "),
    "another user's sticky": (made(0o1777, OTHER), "mode 1777 lets everybody write to it: use a directory below it"),
    "another user's link": (linked(0o700, OTHER), f"found a link that user {OTHER} made, expected a directory"),
}
ROWS = [pytest.param(*row, id=name) for name, row in DIRECTORIES.items()]
ROWS += [pytest.param(*row, id=name, marks=as_root) for name, row in FOREIGN.items()]


@pytest.mark.parametrize("make, problem", ROWS)
def test_a_directory_is_ours_or_refused(make: Callable[[Path], None], problem: str | None, tmp_path: Path) -> None:
    path = tmp_path / "reports"
    make(path)
    found = files.directory_problem(path)
    if problem is None:
        assert found is None
        files.replace(path / "x", "text")
        files.create(path / "y", b"data")
        os.close(files.open_ours(path / "z", os.O_WRONLY))
        assert sorted(os.listdir(path)) == ["x", "y", "z"]
        assert {mode_of(path / name) for name in "xyz"} == {0o600}
        return
    assert found is not None and found.startswith(problem)
    for write in (
        lambda: files.replace(path / "x", "text"),
        lambda: files.create(path / "x", b"data"),
        lambda: files.open_ours(path / "x", os.O_WRONLY),
        lambda: files.rename(path / "x", "y"),
    ):
        with pytest.raises(OSError):
            write()
    assert [name for folder, _, names in os.walk(tmp_path) for name in names if name not in ("reports",)] == []


def test_a_missing_directory_is_made_for_us_alone(tmp_path: Path, open_umask: None) -> None:
    path = tmp_path / "a" / "b" / "c"
    assert files.directory_problem(path) is None and not path.exists()
    files.replace(path / "x", "text")
    assert [mode_of(one) for one in (path, path.parent, path.parent.parent)] == [0o700] * 3
    assert mode_of(path / "x") == 0o600


@pytest.mark.parametrize("place", ["below a file", "below a link to a file"])
def test_a_directory_that_cannot_be(place: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "link").symlink_to("file")
    path = tmp_path / ("file" if place == "below a file" else "link") / "deep"
    assert files.directory_problem(path) == "Not a directory"
    with pytest.raises(NotADirectoryError):
        files.replace(path / "x", "text")


def as_user(user: int, what: Callable[[], object]) -> str:
    """What ``what`` returns in a child process of that user."""
    source, sink = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            if os.geteuid() == 0:
                os.setgroups([])
                os.setgid(user)
                os.setuid(user)
            os.write(sink, repr(what()).encode())
        finally:
            os._exit(0)
    os.close(sink)
    with open(source, "rb") as pipe:
        os.waitpid(child, 0)
        return pipe.read().decode()


def test_a_directory_that_may_not_be_written() -> None:
    """Asked as a user that is not root, who may write everywhere."""
    with tempfile.TemporaryDirectory() as folder:  # pytest's own are closed to others
        os.chmod(folder, 0o711)
        path = Path(folder, "mine")
        path.mkdir(mode=0o500)
        if os.geteuid() == 0:
            os.chown(path, OTHER, OTHER)
        told = as_user(OTHER, lambda: files.directory_problem(path))
        assert told == repr("this process may not write to it")
        told = as_user(OTHER, lambda: files.directory_problem(path / "deep"))
        assert told == repr(f"it cannot be created: this process may not write to {path}")


# writing


def a_link(path: Path) -> None:
    path.with_name("victim").write_text("precious")
    path.symlink_to("victim")


def a_fifo(path: Path) -> None:
    os.mkfifo(path)


def a_socket(path: Path) -> None:
    before = os.getcwd()
    os.chdir(path.parent)  # a socket's path has at most 107 characters
    try:
        socket.socket(socket.AF_UNIX).bind(path.name)
    finally:
        os.chdir(before)


def a_directory(path: Path) -> None:
    path.mkdir()


IN_PLACE = pytest.mark.parametrize("put", [a_link, a_fifo, a_socket, a_directory], ids=lambda put: put.__name__)


@pytest.fixture
def ours(tmp_path: Path) -> Path:
    path = tmp_path / "reports"
    path.mkdir(mode=0o700)
    return path


@IN_PLACE
def test_what_is_in_place_gives_way_and_is_not_written_through(put: Callable[[Path], None], ours: Path) -> None:
    path = ours / "x.json"
    put(path)
    if put is a_directory:
        with pytest.raises(IsADirectoryError):
            files.replace(path, "new")
        assert os.listdir(ours) == ["x.json"]  # and nothing half written
        return
    files.replace(path, "new")
    assert stat.S_ISREG(path.lstat().st_mode) and path.read_text() == "new"
    if put is a_link:
        assert (ours / "victim").read_text() == "precious"


def test_temporary_names_cannot_be_guessed(ours: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = {files.temporary_name("x.json") for _ in range(1000)}
    assert len(names) == 1000 and all(len(name.rpartition(".")[2]) == 16 for name in names)
    # and if somebody does guess one, nothing is written through it
    a_link(ours / "guessed")
    monkeypatch.setattr(files, "temporary_name", lambda name: "guessed")
    for write in (lambda: files.replace(ours / "x", "new"), lambda: files.create(ours / "x", b"new")):
        with pytest.raises(FileExistsError):
            write()
        assert (ours / "victim").read_text() == "precious" and (ours / "guessed").is_symlink()
        assert not (ours / "x").exists()


@IN_PLACE
def test_a_file_is_made_once(put: Callable[[Path], None], ours: Path) -> None:
    put(ours / "x")
    assert files.create(ours / "x", b"new") is False
    assert not (ours / "x").is_file() or put is a_link
    assert put is not a_link or (ours / "victim").read_text() == "precious"
    assert files.create(ours / "y", b"one") is True and files.create(ours / "y", b"two") is False
    assert (ours / "y").read_bytes() == b"one"
    assert not [name for name in os.listdir(ours) if name.startswith(".")]


@IN_PLACE
@pytest.mark.parametrize("flags", [os.O_WRONLY | os.O_APPEND, os.O_RDWR], ids=["append", "both"])
def test_only_a_plain_file_is_appended_to(put: Callable[[Path], None], flags: int, ours: Path) -> None:
    put(ours / "x")
    with pytest.raises(files.Refused, match="expected a plain file"):
        files.open_ours(ours / "x", flags)
    assert put is not a_link or (ours / "victim").read_text() == "precious"


def test_a_fifo_that_somebody_reads_is_refused(ours: Path) -> None:
    a_fifo(ours / "x")
    reader = os.open(ours / "x", os.O_RDONLY | os.O_NONBLOCK)
    try:
        with pytest.raises(files.Refused, match="found a FIFO, expected a plain file"):
            files.open_ours(ours / "x", os.O_WRONLY | os.O_APPEND)
    finally:
        os.close(reader)


@as_root
def test_another_users_file_is_not_appended_to(ours: Path) -> None:
    (ours / "x").write_text("")
    os.chown(ours / "x", OTHER, OTHER)
    with pytest.raises(files.Refused, match=f"x: it belongs to user {OTHER}, expected user 0"):
        files.open_ours(ours / "x", os.O_WRONLY | os.O_APPEND)


def test_a_directory_that_is_exchanged_in_between(ours: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was opened and checked is written to, whatever its name leads to by then."""
    victim = ours.with_name("victim")
    victim.mkdir()
    real = files.temporary_name

    def exchange(name: str) -> str:
        ours.rename(ours.with_name("moved"))
        ours.symlink_to("victim")
        return real(name)

    monkeypatch.setattr(files, "temporary_name", exchange)
    files.replace(ours / "x", "text")
    assert os.listdir(victim) == [] and (ours.with_name("moved") / "x").read_text() == "text"


@pytest.mark.parametrize("mode", [0o700, 0o777], ids=["private", "shared"])
def test_a_page_goes_where_a_person_wants_it(mode: int, tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    folder.chmod(mode)
    (folder / "page.html").write_text("old")
    (folder / "page.html").chmod(0o644)
    files.export(folder / "page.html", "new")
    assert ((folder / "page.html").read_text(), mode_of(folder / "page.html")) == ("new", 0o600)
    with pytest.raises(FileNotFoundError):
        files.export(tmp_path / "none" / "page.html", "new")
    assert os.listdir(folder) == ["page.html"]


@IN_PLACE
def test_a_page_replaces_nothing_but_a_plain_file(put: Callable[[Path], None], tmp_path: Path) -> None:
    put(tmp_path / "x")
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(files.Refused, match=r"x: found a .*, expected a plain file or nothing"):
        files.export(tmp_path / "x", "new")
    assert sorted(os.listdir(tmp_path)) == before
    assert put is not a_link or (tmp_path / "victim").read_text() == "precious"


# reading


def a_link_to_zeros(path: Path) -> None:
    path.symlink_to("/dev/zero")


UNREADABLE = [a_link, a_fifo, a_socket, a_directory, a_link_to_zeros]


@pytest.mark.parametrize("put", UNREADABLE, ids=lambda put: put.__name__)
def test_only_a_plain_file_is_read(put: Callable[[Path], None], tmp_path: Path) -> None:
    put(tmp_path / "x")
    with pytest.raises(files.Refused, match=r"x: found a .*, expected a plain file"):
        files.read(tmp_path / "x", 1000)


def test_a_device_is_not_read() -> None:
    with pytest.raises(files.Refused, match="/dev/zero: found a device, expected a plain file"):
        files.read(Path("/dev/zero"), 1000)


def test_reading_stops_at_a_size(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"0123456789")
    assert files.read(tmp_path / "x", 10) == b"0123456789"
    with pytest.raises(files.Refused, match="x: more than 9 bytes"):
        files.read(tmp_path / "x", 9)
    os.truncate(tmp_path / "x", 1 << 40)  # takes no room on the disk
    with pytest.raises(files.Refused, match="x: more than 1000 bytes"):
        files.read(tmp_path / "x", 1000)


@pytest.mark.parametrize(
    "text, problem",
    [
        (b"", "Expecting value"),
        (b"\xff\xfe{}", "can't decode"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[" * 40 + b"]" * 40, "nested more than 32 deep"),
        (b'{"a":' * 40 + b"1" + b"}" * 40, "nested more than 32 deep"),
        (b"9" * 5000, "a number of 5000 digits, expected at most 30"),
        (b"[NaN]", "NaN, expected a finite number"),
        (b"[-Infinity]", "-Infinity, expected a finite number"),
        (b"1e999", "1e999, expected a finite number"),
    ],
    ids=["empty", "not UTF-8", "deep", "lists", "objects", "long number", "NaN", "infinity", "overflow"],
)
def test_what_is_no_json_of_ours(text: bytes, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        files.parse(text)


def test_json_of_ours() -> None:
    assert files.parse(b'{"a": [1, -2.5e3, null, true, "\\u00e9"]}') == {"a": [1, -2500.0, None, True, "\u00e9"]}
    assert str(files.parse("[NaN, Infinity]", finite=False)) == "[nan, inf]"
