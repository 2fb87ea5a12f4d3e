"""docs/support-matrix.md, written from runs of real releases.

python tests/hosts/matrix.py             print it for the releases of HOSTS
python tests/hosts/matrix.py --write     run every known release and write the file
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import hosts
import tokenspeed_runs

PATH = hosts.HERE.parents[1] / "docs" / "support-matrix.md"

_HEAD = """\
# Support matrix

Written by `python tests/hosts/matrix.py --write` from runs of real SGLang releases, each in a process of its own with
`MLA_PATCH=1 MLA_PATCH_DECODE=on`, on a CPU under Triton's interpreter; do not edit. "Holders" are the modules in which
a replaced name is bound: how many hold ours, of how many there are. "Served" are the host's backends that were driven,
each with the result of the host's own kernel, entry by entry, except where a fault of the host's is named. For
`decode`, they are the latent caches that the host's Triton backend stored in its own pool and ours read from there,
with a relative error below 0.004.

| SGLang | feature | state | holders | served | fault of the host's own |
|---|---|---|---|---|---|
"""
_FOOT = """
Releases before 0.5.1 are outside every feature's range and were run with `MLA_PATCH_SKIP_VERSION_CHECK=1`.

`sched_meta` (0.5.3 - 0.5.23) needs FlashMLA, which no CPU has: 0.5.3, 0.5.4, 0.5.5, 0.5.9, 0.5.11, 0.5.12, 0.5.13,
0.5.22 and 0.5.23 were run over a stand-in with the wrappers' parameters (`tests/hosts/test_flash_mla.py`). In each, the
module and `flashmla_backend` hold ours, the release's own sparse decode is served by ours, every call reaches the
provider that `mla-patch explain sched_meta` names, and each backend that calls FlashMLA has what it can ask of ours
compiled. 0.5.3 and 0.5.4 take FlashMLA from the package `flash_mla`, which does not know the descales that they pass
for e4m3 caches: their dense decode of those is served by ours. In 0.5.12 DeepSeek V4 attends through ours, over that
package and without it.

`sparse_prefill` (0.5.5 - 0.5.23) was run on 0.5.12, 0.5.13, 0.5.15, 0.5.18 - 0.5.21 and 0.5.23
(`tests/hosts/test_sparse_prefill.py`): a made-up DeepSeek V4, with layers of all three kinds, prefilled in three
chunks through the release's own `DeepseekV4AttnBackend`, some requests without new tokens, and V3.2's sparse
attention with 20 heads. From 0.5.13 to 0.5.20 ours is taken by default, on 0.5.12 and from 0.5.21 with
`MLA_PATCH_SPARSE_PREFILL=on`: there kernel by kernel in the release's own route. Everywhere the relative error
against float64 is below 0.004. The same prompts through all of these on an H200 (2026-11-21, driver 580.159.04,
torch 2.11, Triton 3.6), with 64 heads, where FlashMLA's wheel attends, and 20, which ours serves: `test_on_a_gpu`
there.

`decode` of FlashAttention-3, FlashInfer MLA and FlashMLA was run on 0.5.1, 0.5.3, 0.5.5, 0.5.7, 0.5.9, 0.5.11, 0.5.13,
0.5.15, 0.5.16, 0.5.18, 0.5.20, 0.5.22 and 0.5.23 (`tests/hosts/test_backends.py`): each backend built by its own
constructor over the release's own pool, its attention kernel stood in for in float64. Steps with metadata made
eagerly, at a capture's lengths and at a replay with others and a padded request, draft steps of one token,
FlashInfer's also under graphs, and calls through `HybridAttnBackend` and `HybridLinearAttnBackend`, with e4m3 and
float16 caches. Everywhere the relative error against float64 is below 0.001, and the pool has the bytes that the
release's own method leaves.

`kv_cast` (0.5.1 - 0.5.23) was run on 0.5.1, 0.5.5, 0.5.9, 0.5.11, 0.5.13, 0.5.16, 0.5.18, 0.5.22 and 0.5.23
(`tests/hosts/test_kv_cast.py`): both backends built by their own constructors, over stand-ins for FlashAttention-3 and
FlashInfer. Prompts with a prefix, target verify, draft extend and a tree of drafts gave the bits that the release's own
method gave, with metadata made eagerly and with metadata captured at one length and replayed at others. No packed step
allocated or wrote as much as a layer's pool.
"""

_TOKENSPEED = """
## tokenspeed

The backend that the feature `tokenspeed` adds, under the name that `--attention-backend` takes for it: which of the
host's own steps its kernels served, in a process of its own for each release, on a CPU, with a stand-in for the package
`tokenspeed_mla` that computes in float64 and checks every argument. What is missing the host's backend leaves to
FlashInfer. The TokenSpeed kernels themselves have not been run: they need a GPU of compute capability 10.x.

| SGLang | state | `--attention-backend` | served |
|---|---|---|---|
"""


def rows(seen: dict) -> list[str]:
    """One line for each feature in one release."""
    release = seen["release"]
    holding = [row["holds"] == "ours" for row in seen["holders"].values()]
    by_source = sum(row["error"] is not None for row in seen["holders"].values())
    holders = f"{sum(holding)} of {len(holding)}" + (f", {by_source} by source" if by_source else "")
    served: dict[str, list[str]] = {}
    for route, row in seen["ours"].items():
        if row["served"] and not row["wrong"]:
            backend, _, method = route.partition(" ")
            served.setdefault(backend.removesuffix("_backend"), []).append(method)
    faults = "; ".join(f"{route}: {what}" for (r, route), what in hosts.FAULTS.items() if r == release)
    lines = []
    for row in seen["features"]:
        if row["name"] in ("tokenspeed", "sched_meta", "sparse_prefill", "kv_cast"):
            continue  # one has a table of its own, the others runs of their own
        state = f"{row['state']} ({row['reason']})" if row["reason"] else row["state"]
        methods = "; ".join(f"{backend} {', '.join(names)}" for backend, names in served.items())
        cells = (holders, methods, faults)
        if row["name"] == "decode":
            right = [cache for cache, one in seen["decode"]["ours"].items() if one["served"] and one["error"] < 4e-3]
            fault = "scales are read that were never stored; ours leaves them out" if release in hosts.MISREAD else ""
            cells = (f"{seen['decode']['holders'][:1].count('ours')} of 1", f"triton {', '.join(right)}", fault)
        lines.append("| " + " | ".join((release, row["name"], state, *cells)) + " |")
    return lines


def page(releases: tuple[str, ...]) -> str:
    lines = []
    with tempfile.TemporaryDirectory() as kept:
        for release in releases:
            print(f"SGLang {release}", file=sys.stderr)
            lines += rows(hosts.run(release, Path(kept)))
    return _HEAD + "\n".join(lines) + "\n" + _FOOT + tokenspeed(releases)


def tokenspeed(releases: tuple[str, ...]) -> str:
    """The page's second table."""
    with tempfile.TemporaryDirectory() as kept:
        asked = [release for release in releases if release in hosts.REVIEWED]
        runs = {release: tokenspeed_runs.run(release, Path(kept), "package") for release in asked}
    return _TOKENSPEED + "\n".join(tokenspeed_runs.row(*one) for one in runs.items()) + "\n"


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        PATH.write_text(page(hosts.KNOWN), encoding="utf-8")
    else:
        print(page(hosts.chosen()))
