"""Fetch a real SGLang release, and what it needs to be imported on a CPU, without installing any of it.

Everything goes into folders of a cache, to be put on ``PYTHONPATH`` beside the environment's own torch and
Triton. Standard library and pip only. ``compat.sglang_trial`` stands in for what is not fetched.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# SGLang's wheels name one Python and one platform, though what is used here is Python source
_ANY_MACHINE = (
    *("--python-version", "3.12", "--implementation", "cp"),
    *("--platform", "manylinux_2_34_x86_64", "--platform", "manylinux_2_28_x86_64", "--platform", "any"),
)

_OLDER_MACHINE = ("--platform", "manylinux2014_x86_64")  # of the kernel packages, beside the above

# Every package that a reviewed release imports on its way to the attention backends, with its own needs: pip
# resolves nothing. torch, Triton, NumPy, packaging and typing_extensions are the environment's.
_COMMON = (
    "aiohappyeyeballs==2.7.1",
    "aiohttp==3.14.5",
    "aiosignal==1.4.0",
    "annotated-doc==0.0.7",
    "annotated-types==0.8.0",
    "anyio==4.16.0",
    "apache-tvm-ffi==0.1.11",
    "async-timeout==5.0.1 ; python_version < '3.11'",
    "attrs==26.1.0",
    "certifi==2026.10.18",
    "charset-normalizer==3.5.2",
    "compressed-tensors==0.20.0",
    "dill==0.4.1",
    "distro==1.9.0",
    "einops==0.8.2",
    "exceptiongroup==1.3.1 ; python_version < '3.11'",
    "fastapi==0.165.0",
    "frozenlist==1.8.0",
    "gguf==0.19.0",
    "h11==0.16.0",
    "httpcore==1.0.9",
    "httpx==0.28.1",
    "idna==3.20",
    "jiter==0.19.0",
    "loguru==0.7.3",
    "msgspec==0.22.0",
    "multidict==7.2.1",
    "openai==2.6.1",
    "opentelemetry-api==1.45.2",
    "orjson==3.13.0",
    "partial-json-parser==0.2.1.1.post7",
    "pillow==13.0.0",
    "propcache==0.5.4",
    "psutil==7.2.2",
    "pybase64==1.5.1",
    "pydantic==2.14.3",
    "pydantic-core==2.50.4",
    "pyyaml==6.0.3",
    "pyzmq==27.3.0",
    "regex==2026.11.15",
    "requests==2.34.2",
    "safetensors==0.8.0",
    "sentencepiece==0.2.3",
    "sniffio==1.3.1",
    "starlette==1.10.0",
    "tqdm==4.70.1",
    "typing-inspection==0.4.5",
    "urllib3==2.8.0",
    "xgrammar==0.2.1",
    "yarl==1.25.1",
)

# (first release, what it pins or close to it), newest first: SGLang patches transformers' insides
_HUB_2 = ("huggingface_hub==2.4.0", "httpcore2==2.16.2", "httpx2==2.16.2", "truststore==0.10.5")
_TRANSFORMERS = (
    ("0.5.22", ("transformers==5.19.0", "tokenizers==0.23.3", *_HUB_2)),
    ("0.5.15", ("transformers==5.12.1", "tokenizers==0.22.2", "huggingface_hub==1.5.0")),
    ("0.5.10", ("transformers==5.6.0", "tokenizers==0.22.2", "huggingface_hub==1.5.0")),
    ("0", ("transformers==4.57.1", "tokenizers==0.22.1", "huggingface_hub==0.36.0")),
)


def cache_dir() -> Path:
    """Where releases are kept: ``HOSTS_CACHE``, else a folder of its own under the user's cache."""
    return Path(os.environ.get("HOSTS_CACHE") or Path.home() / ".cache" / "mla-patch-hosts")


def fetch(version: str, cache: Path | None = None) -> list[Path]:
    """The folders to put on ``PYTHONPATH`` for SGLang ``version``, the release first; fetched where missing.

    Raises:
        RuntimeError: pip could not get something; says what pip said.
    """
    cache = cache or cache_dir()
    pins = next(pins for first, pins in _TRANSFORMERS if _key(version) >= _key(first))
    return [
        _folder(cache, f"sglang-{version}", [f"sglang=={version}"], _ANY_MACHINE),
        _folder(cache, _named("common", _COMMON), _COMMON),
        _folder(cache, _named(pins[0].replace("==", "-"), pins), pins),
    ]


def fetch_package(name: str, version: str, cache: Path | None = None) -> Path:
    """The folder with one package's wheel as it is, without what it needs."""
    return _folder(cache or cache_dir(), f"{name}-{version}", [f"{name}=={version}"], _ANY_MACHINE)


def fetch_triton(version: str, cache: Path | None = None) -> Path:
    """The folder with one release of Triton for the Python that runs."""
    return _folder(cache or cache_dir(), f"triton-{version}-{sys.implementation.cache_tag}", [f"triton=={version}"])


def fetch_files(name: str, version: str, wanted: str, cache: Path | None = None) -> Path:
    """A folder with those files of one package's wheel whose paths match ``wanted``, a regular expression.

    For wheels that are hundreds of megabytes of which few are wanted: the rest is not kept.
    """
    cache = cache or cache_dir()

    def fill(fresh: Path) -> None:
        with tempfile.TemporaryDirectory(dir=cache, prefix=".wheel-") as wheels:
            _pip("download", ["--dest", wheels], [f"{name}=={version}"], [*_ANY_MACHINE, *_OLDER_MACHINE])
            with zipfile.ZipFile(next(Path(wheels).glob("*.whl"))) as wheel:
                wheel.extractall(fresh, [one for one in wheel.namelist() if re.search(wanted, one)])

    return _filled(cache, f"{name}-{version}-{hashlib.sha256(wanted.encode()).hexdigest()[:8]}", fill)


def _key(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split(".") if part.isdigit())


def _named(name: str, pins: Sequence[str]) -> str:
    """A folder's name: other pins or another Python make another folder."""
    digest = hashlib.sha256("\n".join(pins).encode()).hexdigest()[:8]
    return f"{name}-{sys.implementation.cache_tag}-{digest}"


def _folder(cache: Path, name: str, requirements: Sequence[str], options: Sequence[str] = ()) -> Path:
    """``cache/name`` with the wheels of ``requirements`` unpacked in it."""

    def fill(fresh: Path) -> None:
        _pip("install", ["--no-compile", "--target", str(fresh)], requirements, options)

    return _filled(cache, name, fill)


def _filled(cache: Path, name: str, fill: Callable[[Path], None]) -> Path:
    """``cache/name``, filled where it is missing; complete, or not there at all."""
    folder = cache / name
    if folder.is_dir():
        return folder
    with _lock(cache):
        if folder.is_dir():  # another process was first
            return folder
        fresh = Path(tempfile.mkdtemp(dir=cache, prefix=f".{name}-"))
        try:
            fill(fresh)
            fresh.chmod(0o755)
            fresh.rename(folder)
        finally:
            shutil.rmtree(fresh, ignore_errors=True)
    return folder


def _pip(verb: str, target: Sequence[str], requirements: Sequence[str], options: Sequence[str]) -> None:
    command = [sys.executable, "-m", "pip", verb, "--quiet", "--disable-pip-version-check", "--no-cache-dir"]
    command += ["--no-deps", "--only-binary=:all:", *options, *target, *requirements]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        what = requirements[0] if len(requirements) == 1 else f"{len(requirements)} packages"
        raise RuntimeError(f"pip could not fetch {what}:\n{done.stderr.strip()}")


@contextmanager
def _lock(cache: Path) -> Iterator[None]:
    """One process at a time: test workers ask for the same folders at the same moment."""
    cache.mkdir(parents=True, exist_ok=True)
    with open(cache / ".lock", "w", encoding="utf-8") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


# how the folders are called that are made here, whole or by half
_OURS = re.compile(
    r"\.?(wheel|sglang|sglang-kernel|sgl-kernel|sgl-flash-mla|tokenspeed-mla|common|transformers|triton)-[\w.+-]+|\.lock"
)


def clean(cache: Path | None = None) -> dict[str, Any]:
    """Remove what `fetch` has put into the cache, and the cache if it is then empty.

    Links are neither followed nor removed.

    Raises:
        RuntimeError: the cache is a link, or a release is being fetched into it.
        OSError: something cannot be removed.
    """
    cache = cache or cache_dir()
    told: dict[str, Any] = {"directory": str(cache), "removed": [], "bytes": 0, "left": []}
    if cache.is_symlink():
        raise RuntimeError(f"{cache} is a link: remove it, and what it leads to, yourself")
    if not cache.is_dir():
        return told
    with open(cache / ".lock", "w", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RuntimeError(f"{cache}: a release is being fetched into it") from None
        for path in sorted(cache.iterdir()):
            if path.is_symlink() or not path.is_dir() or not _OURS.fullmatch(path.name):
                told["left"] += [path.name] if path.name != ".lock" else []
                continue
            told["bytes"] += _size(path)
            shutil.rmtree(path)
            told["removed"].append(path.name)
        if not told["left"]:
            (cache / ".lock").unlink()
            cache.rmdir()
    return told


def _size(folder: Path) -> int:
    return sum(os.lstat(os.path.join(where, name)).st_size for where, _, names in os.walk(folder) for name in names)


if __name__ == "__main__":
    for release in sys.argv[1:]:
        print(os.pathsep.join(map(str, fetch(release))))
