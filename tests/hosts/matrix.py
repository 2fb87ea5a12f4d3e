"""docs/support-matrix.md, written from runs of real releases.

python tests/hosts/matrix.py             print it for the releases of HOSTS
python tests/hosts/matrix.py --write     run every known release and write the file
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where generated lies

import generated
import hosts
import tokenspeed_runs

PATH = hosts.HERE.parents[1] / "docs" / "support-matrix.md"

_HEAD = """\
# Support matrix

What was run on which SGLang release. Do not edit this page: `python tests/hosts/matrix.py --write` writes it from runs
of real releases. Each release runs in a process of its own, with `MLA_PATCH=1 MLA_PATCH_DECODE=on`, on a CPU in
Triton's interpreter.

- **holders**: the modules that bind a replaced name. "15 of 15" means that all 15 modules hold our object.
- **served**: the engine's backends that were driven. Each gave the result of the engine's own kernel, entry by entry,
  unless the last column names a fault of the engine. For `decode`, this column names the latent caches that the
  engine's Triton backend stored in its own pool and from which our kernel read, with a relative error below 0.004.

| SGLang | feature | state | holders | served | fault of the engine's kernel |
|---|---|---|---|---|---|
"""
_FOOT = """
Releases before 0.5.1 are outside the range of every feature. They ran with `MLA_PATCH_SKIP_VERSION_CHECK=1`.

## sched_meta (0.5.3 - 0.5.23)

This feature needs FlashMLA, which no CPU has. It ran on 0.5.3, 0.5.4, 0.5.5, 0.5.9, 0.5.11, 0.5.12, 0.5.13, 0.5.22 and
0.5.23, over a stand-in with the parameters of the wrappers (`tests/hosts/test_flash_mla.py`). On each release:

- The module and `flashmla_backend` hold our objects, and our kernels serve the release's own sparse decode.
- Every call reaches the provider that `mla-patch explain sched_meta` names.
- For each backend that calls FlashMLA, the kernels that it can reach are compiled.

On 0.5.3 and 0.5.4, FlashMLA comes from the package `flash_mla`, which does not accept the descales that these releases
pass for e4m3 caches. Our kernels serve that dense decode. On 0.5.12, DeepSeek V4 attends with our kernels, with that
package and without it.

## sparse_prefill (0.5.5 - 0.5.23)

It ran on 0.5.12, 0.5.13, 0.5.15, 0.5.18 - 0.5.21 and 0.5.23 (`tests/hosts/test_sparse_prefill.py`). A made-up DeepSeek
V4 with layers of all three kinds is prefilled in three chunks through the release's own `DeepseekV4AttnBackend`. Some
requests have no new tokens. V3.2's sparse attention runs with 20 heads.

- On 0.5.13 - 0.5.20, our route serves by default. On 0.5.12, it serves with `MLA_PATCH_SPARSE_PREFILL=on`. From 0.5.21
  on, that flag puts our kernels into the release's own route.
- The relative error against float64 is below 0.004 everywhere.
- The same prompts ran through all of these on an H200 (2026-11-21, driver 580.159.04, torch 2.11, Triton 3.6): with 64
  heads, where FlashMLA's wheel attends, and with 20 heads, which our kernel serves (`test_on_a_gpu` in the same file).

## decode behind fa3, flashinfer and flashmla (0.5.1 - 0.5.23)

It ran on 0.5.1, 0.5.3, 0.5.5, 0.5.7, 0.5.9, 0.5.11, 0.5.13, 0.5.15, 0.5.16, 0.5.18, 0.5.20, 0.5.22 and 0.5.23
(`tests/hosts/test_backends.py`). Each backend is built by its own constructor over the release's own pool. A float64
stand-in takes the place of its attention kernel. The runs cover:

- steps with metadata made eagerly, made for a capture, and replayed with other lengths and a padded request
- draft steps of one token, for FlashInfer also in graphs
- calls through `HybridAttnBackend` and `HybridLinearAttnBackend`
- e4m3 and float16 caches

The relative error against float64 is below 0.001 everywhere, and the pool has the bytes that the release's own method
leaves.

## kv_cast (0.5.1 - 0.5.23)

It ran on 0.5.1, 0.5.5, 0.5.9, 0.5.11, 0.5.13, 0.5.16, 0.5.18, 0.5.22 and 0.5.23 (`tests/hosts/test_kv_cast.py`). Both
backends are built by their own constructors, over stand-ins for FlashAttention-3 and FlashInfer. Prompts with a prefix,
target verify, draft extend and a tree of drafts give the same bits as the release's own method. Metadata are made
eagerly, or captured at one length and replayed at others. No packed step allocates or writes as much as a layer's pool.
"""

_TOKENSPEED = """
## tokenspeed (0.5.1 - 0.5.23)

The table shows which of the engine's own steps the kernels of the added backend served, under the name that
`--attention-backend` takes for it. Each release runs in a process of its own, on a CPU. A stand-in for the package
`tokenspeed_mla` computes in float64 and checks every argument. Steps that a row does not list are those that the
engine's backend leaves to FlashInfer. The TokenSpeed kernels themselves have not run: they need a GPU of compute
capability 10.x.

| SGLang | state | `--attention-backend` | served |
|---|---|---|---|
"""


_ENTRY_POINTS = """
## Where the entry points live

As read from the wheel of each release (`tests/hosts/reviewed.json`). Edits are not in this table, and neither are
entry points outside the engine's own package.

<!-- entry points: written by `python tests/generated.py --write` -->
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
            fault = "it applies scales that were never stored; our edit drops them" if release in hosts.MISREAD else ""
            cells = (f"{seen['decode']['holders'][:1].count('ours')} of 1", f"triton {', '.join(right)}", fault)
        lines.append("| " + " | ".join((release, row["name"], state, *cells)) + " |")
    return lines


def page(releases: tuple[str, ...]) -> str:
    lines = []
    with tempfile.TemporaryDirectory() as kept:
        for release in releases:
            print(f"SGLang {release}", file=sys.stderr)
            lines += rows(hosts.run(release, Path(kept)))
    found = f"{_ENTRY_POINTS}{generated.entry_point_table()}\n<!-- /entry points -->\n"
    return _HEAD + "\n".join(lines) + "\n" + _FOOT + tokenspeed(releases) + found


def tokenspeed(releases: tuple[str, ...]) -> str:
    """The page's second table."""
    with tempfile.TemporaryDirectory() as kept:
        runs = {release: tokenspeed_runs.run(release, Path(kept), "package") for release in releases}
    return _TOKENSPEED + "\n".join(tokenspeed_runs.row(*one) for one in runs.items()) + "\n"


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        PATH.write_text(page(hosts.REVIEWED), encoding="utf-8")
    else:
        print(page(hosts.chosen()))
