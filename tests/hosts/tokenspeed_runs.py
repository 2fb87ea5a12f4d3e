"""Runs of ``tokenspeed_child.py``, one process for each release, told again when asked again; what they mean."""

from __future__ import annotations

from pathlib import Path

import hosts
from packaging.version import Version

STEPS = ("decode", "verify", "draft extend", "draft extend, padded", "prompts", "prefix chunks")


def name_in(release: str) -> str:
    return "tokenspeed_mla" if Version(release) < Version("0.5.12") else "tokenspeed_mla_patch"


def environment(release: str) -> dict[str, str]:
    return hosts.environment(release, hosts.HERE / "standin")


def run(release: str, kept: Path, by: str) -> dict:
    """What a process of its own saw (see ``tokenspeed_child.py``), its kernels by the package or by the example."""
    options = hosts.PYTHON_OPTIONS.get(release, ())
    return hosts.kept_by("tokenspeed_child", release, kept, "--provider", by, env=environment(release), options=options)


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


def faults(release: str, seen: dict, by: str, device: str) -> list[str]:
    """What is not as it should be in the steps that a process saw, one line each."""
    found = []
    if missing := steps_of(release) - set(seen):
        found.append(f"no {', '.join(sorted(missing))}")
    for step in (*STEPS, "decode again"):
        row = seen.get(step)
        if row is None:
            continue
        if "failed" in row:
            found.append(f"{step}: {row['failed']}")
            continue
        kinds = {"prompts": [("prefill", True)]}
        # its own tokens, then two chunks of its prefix
        kinds["prefix chunks"] = [("prefill", True), ("prefill", False), ("prefill", False)]
        want = kinds.get(step, [("decode", None)])
        asked = [(call["call"], call.get("causal")) for call in row["calls"]]
        if asked != (want if by == "package" else []):
            found.append(f"{step}: the package was asked for {asked}")
        graph = device == "cuda" and step == "decode again"  # a call before the capture, and that under it
        told = (row["served"], row["captured"])
        if told != ((2, 1) if graph else (len(want), 0)):
            found.append(f"{step}: served {told[0]}, captured {told[1]}")
        # the output's bfloat16, half an ulp of 2**-8 at most; the model's own float32 takes it as it is
        if not row["error"] < 2**-8:
            found.append(f"{step}: error {row['error']}")
        if row["dtype"] != "torch.float32":
            found.append(f"{step}: {row['dtype']}")
    if "no key" in seen.get("prefix chunks", {}) and seen["prefix chunks"]["no key"] != [0.0, -float("inf")]:
        found.append(f"prefix chunks: without a key {seen['prefix chunks']['no key']}")
    return found


NATIVE = [one for one in hosts.REVIEWED if Version("0.5.12") <= Version(one) < Version("0.5.23")]


def row(release: str, seen: dict) -> str:
    """One line of docs/support-matrix.md."""
    served = [step for step in STEPS if step in seen and seen[step]["served"]]
    state = f"native; asked for: {seen['feature']['state']}" if release in NATIVE else seen["feature"]["state"]
    return f"| {release} | {state} | `{name_in(release)}` | {'; '.join(served)} |"
