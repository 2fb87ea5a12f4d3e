"""Runs of ``tokenspeed_child.py``, one process for each release, told again when asked again; what they mean."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import hosts
from packaging.version import Version

from mla_patch.compat import sglang_fetch

EXAMPLE = hosts.HERE.parents[1] / "examples" / "mla_kernels"
PLUGIN = {
    "METADATA": "Metadata-Version: 2.1\nName: mla-kernels\nVersion: 0.1\n",
    "entry_points.txt": "[mla_patch]\nmla_kernels = mla_kernels\n",
}


STEPS = ("decode", "verify", "draft extend", "draft extend, padded", "prompts", "prefix chunks")


def name_in(release: str) -> str:
    return "tokenspeed_mla" if Version(release) < Version("0.5.12") else "tokenspeed_mla_patch"


def environment(release: str, *path: Path, **more: str) -> dict[str, str]:
    env = {name: value for name, value in os.environ.items() if not name.startswith(("MLA_PATCH", "SGLANG_"))}
    env.pop("PYTHONDONTWRITEBYTECODE", None)
    places = [*path, hosts.HERE / "standin", *sglang_fetch.fetch(release)]
    own = {"CUDA_VISIBLE_DEVICES": "", "MLA_PATCH": "1", "TRITON_INTERPRET": "1"}
    return env | own | {"PYTHONPATH": os.pathsep.join(map(str, places))} | more


def run(release: str, kept: Path, by: str) -> dict:
    """What a process of its own saw (see ``tokenspeed_child.py``), its kernels by the package or by the example."""
    answer = kept / f"tokenspeed-{release}-{by}.json"
    with open(kept / f"tokenspeed-{release}-{by}.lock", "w", encoding="utf-8") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several test workers ask
        if answer.exists():
            return json.loads(answer.read_text())
        path, more = [], {"BACKEND": name_in(release), "MLA_PATCH_TOKENSPEED": "on"}
        if by == "example":
            info = kept / "installed" / "mla_kernels-0.1.dist-info"
            info.mkdir(parents=True, exist_ok=True)
            for file, text in PLUGIN.items():
                (info / file).write_text(text)
            path = [info.parent, EXAMPLE]
            more |= {"MLA_PATCH_TOKENSPEED_DECODE": "triton", "MLA_PATCH_TOKENSPEED_PREFILL": "torch"}
        command = [sys.executable, *hosts._PYTHON_OPTIONS.get(release, []), str(hosts.HERE / "tokenspeed_child.py")]
        done = subprocess.run(
            [*command, release, str(answer)], env=environment(release, *path, **more), cwd=kept, capture_output=True,
            text=True, timeout=300,
        )  # fmt: skip
        if not answer.exists():
            raise RuntimeError(f"SGLang {release}: ended with {done.returncode}\n{done.stdout}{done.stderr}")
    return json.loads(answer.read_text())


def steps_of(release: str) -> set[str]:
    """What the release's TRT-LLM MLA backend does itself; the rest is FlashInfer's."""
    steps = {"decode"}
    if Version(release) >= Version("0.5.2"):
        steps.add("prompts")
    if Version(release) >= Version("0.5.3"):
        steps |= {"prefix chunks", "verify"}
    if Version(release) >= Version("0.5.4"):
        steps |= {"draft extend"} if release == "0.5.7" else {"draft extend", "draft extend, padded"}
    return steps


NATIVE = [one for one in hosts.REVIEWED if Version("0.5.12") <= Version(one) < Version("0.5.23")]


def row(release: str, seen: dict) -> str:
    """One line of docs/support-matrix.md."""
    served = [step for step in STEPS if step in seen and seen[step]["served"]]
    state = f"native; asked for: {seen['feature']['state']}" if release in NATIVE else seen["feature"]["state"]
    return f"| {release} | {state} | `{name_in(release)}` | {'; '.join(served)} |"
