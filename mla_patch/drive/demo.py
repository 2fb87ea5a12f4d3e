"""The demonstration: the host's own backends build their KV indices and decode, with our kernels and with the host's.

Runs in an interpreter of its own (``mla-patch demo`` starts it) and prints lines of JSON.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

LENGTHS = (40_000, 8_192, 12_345, 1, 4_097, 640)  # requests; the longest is what one program per request waits for
WIDTH = 65_536  # of the table of slots
FEATURE, DECODE = "kv_indices@sglang", "decode@sglang"
CACHES = ("float16", "e4m3")
ERROR = 0.004  # relative, against the definition in float64: what our decode may have
HEADS = 16


def main() -> int:
    from mla_patch.session import find_host
    from mla_patch.startup import start

    start()  # does nothing where the start-up file has done it
    host = find_host("sglang")
    for message in with_host(host.version) if host is not None else without_host():
        print("demo " + json.dumps(message), flush=True)
    return 0


def with_host(version: str | None) -> Iterator[dict[str, Any]]:
    """Drive the installed SGLang; messages of progress, then the result."""
    steps = 3 + 2 * len(CACHES)
    yield {"step": "importing SGLang", "at": 0, "of": steps}
    import torch

    import mla_patch
    from mla_patch.drive import sglang as trial

    device = "cuda" if torch.cuda.is_available() else "cpu"
    stubs = trial.prepare()
    batch = trial.make_batch(device, LENGTHS, WIDTH)
    wanted = [one for one in trial.routes() if one in ("triton_backend decode", "flashmla_backend decode")]
    rows: list[dict[str, Any]] = []
    for at, route in enumerate(wanted, 1):
        yield {"step": f"{route}, ours and the host's", "at": at, "of": steps}
        ours = trial.run(route, batch)
        row = row_of(mla_patch.report(), FEATURE)
        mla_patch.restore(FEATURE)
        theirs = trial.run(route, batch)
        mla_patch.apply(FEATURE)
        equal = torch.equal(ours.out, theirs.out) and not ours.wrong
        rows.append({"route": route, "builder": ours.builder, "equal": equal})
    if row["served"] < len(wanted):
        raise SystemExit(f"{FEATURE} served {row['served']} of {len(wanted)} calls: {row}")
    yield {"step": "timing", "at": 1 + len(wanted), "of": steps}
    for one in rows:
        home = next(target["module"] for target in row["targets"] if target["name"] == one["builder"])
        stand_in = getattr(sys.modules[home], one["builder"])
        for side, kernel in {"host": stand_in.__wrapped__, "ours": stand_in}.items():
            one[f"us_{side}"] = time_us(trial.launch(kernel, one["builder"], batch), device)
    for at, cache in enumerate(CACHES, 2 + len(wanted)):
        yield {"step": f"triton_backend forward_decode, {cache} cache", "at": at, "of": steps}
        decoded = decode(trial.DecodeTrial(cache, device, HEADS, decode_lengths(device)), cache, device)
        rows.append(decoded)
    told = row_of(mla_patch.report(), DECODE)
    if told["served"] < len(CACHES):
        raise SystemExit(f"{DECODE} served {told['served']} of {len(CACHES)} steps: {told}")
    notes = [f"decode: relative error against float64 on the stored bytes; our kernel must stay below {ERROR}"]
    notes += [f"replaced by stand-ins, because this machine lacks them: {', '.join(stubs)}"] if stubs else []
    targets, served = [*row["targets"], *told["targets"]], row["served"] + told["served"]
    yield {"result": result(f"SGLang {version}", device, targets, served, rows, notes)}


def decode(step: Any, cache: str, device: str) -> dict[str, Any]:
    """One decode step through the host's ``TritonAttnBackend.forward_decode``, by ours and by the host's kernel."""
    import mla_patch
    from mla_patch.drive.sglang import relative_error

    row: dict[str, Any] = {"route": f"triton_backend forward_decode, {cache}", "builder": "decode_attention_fwd"}
    row |= {"error": {}, "us_host": None, "us_ours": None}
    for side, switch in {"host": mla_patch.restore, "ours": mla_patch.apply}.items():
        switch(DECODE)  # asked for: also where ours would stand aside on this GPU
        row["error"][side] = round(relative_error(step.decode(), step.expected()), 6)
        if device == "cuda":
            row[f"us_{side}"] = time_us(step.again(), device)
    return row | {"equal": row["error"]["ours"] <= ERROR}


def decode_lengths(device: str) -> tuple[int, ...]:
    """The interpreter takes a second for a few hundred tokens."""
    return LENGTHS if device == "cuda" else (1, 97, 130)


def without_host() -> Iterator[dict[str, Any]]:
    """No engine here: our kernels against their definitions."""
    import torch

    from mla_patch.compat import interpreter
    from mla_patch.compat.triton import interpreted
    from mla_patch.drive import sglang as trial
    from mla_patch.kernels.indices import kv as k

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if interpreted():
        interpreter.quicken()
    batch = trial.make_batch(device, LENGTHS, WIDTH)
    rows = []
    indptr = torch.tensor([0, *LENGTHS], device=device).cumsum(0).to(torch.int32)
    ids = torch.full((sum(LENGTHS),), -1, device=device, dtype=torch.int64)
    table = torch.full((len(LENGTHS), -(-max(LENGTHS) // 64)), -1, device=device, dtype=torch.int32)
    builders: list[tuple[str, torch.Tensor, Callable[[], Any], torch.Tensor]] = [
        ("build_token_indices", ids, lambda: k.build_token_indices(batch.table, batch.rows, batch.lens, indptr, ids),
         k.token_indices_ref(batch.table, batch.rows, batch.lens, indptr, ids)),
        ("build_page_table", table, lambda: k.build_page_table(batch.table, batch.rows, batch.lens, table),
         k.page_table_ref(batch.table, batch.rows, batch.lens, table)),
    ]  # fmt: skip
    for at, (name, out, build, want) in enumerate(builders):
        yield {"step": name, "at": at, "of": len(builders) + len(CACHES)}
        us = time_us(build, device)
        equal = torch.equal(out, want)
        rows.append({"route": "definition", "builder": name, "equal": equal, "us_host": None, "us_ours": us})
    for at, cache in enumerate(CACHES, len(builders)):
        yield {"step": f"mla_decode, {cache} cache", "at": at, "of": len(builders) + len(CACHES)}
        rows.append(decode_alone(cache, device))
    notes = ["no engine is installed: our kernels were compared with their definitions; `make demo` fetches SGLang"]
    yield {"result": result(None, device, [], 0, rows, notes)}


def decode_alone(cache: str, device: str) -> dict[str, Any]:
    """`mla_decode` over a made-up pool of ``cache``, against its definition."""
    import torch

    from mla_patch.drive.sglang import CACHES as DTYPES
    from mla_patch.drive.sglang import expected_token_ids, make_batch, relative_error
    from mla_patch.kernels.decode import mla_decode, mla_decode_ref

    lens = decode_lengths(device)
    batch = make_batch(device, lens, width=max(256, -(-max(lens) // 64) * 64), page=64)
    rng = torch.Generator().manual_seed(0)
    q = torch.randn(len(lens), HEADS, 576, generator=rng).to(device, torch.float16)
    pool = torch.randn(int(batch.table.max()) + 1, 1, 576, generator=rng).to(device, torch.float16).to(DTYPES[cache][0])
    indptr = torch.tensor([0, *lens], device=device).cumsum(0).to(torch.int32)
    ids, out = expected_token_ids(batch, lens), torch.full_like(q[..., :512], torch.nan)
    mla_decode(q, pool, out, indptr, ids, sm_scale=0.0417)
    error = round(relative_error(out, mla_decode_ref(q, pool, indptr, ids, sm_scale=0.0417)), 6)
    us = time_us(lambda: mla_decode(q, pool, out, indptr, ids, sm_scale=0.0417), device) if device == "cuda" else None
    return {
        "route": "definition", "builder": f"mla_decode, {cache}", "equal": error <= ERROR,
        "error": {"host": None, "ours": error}, "us_host": None, "us_ours": us,
    }  # fmt: skip


def result(
    host: str | None, device: str, targets: list[Any], served: int, rows: list[dict[str, Any]], notes: list[str]
) -> dict[str, Any]:
    import torch

    name = torch.cuda.get_device_name() if device == "cuda" else "the CPU, through Triton's interpreter"
    if device == "cpu":
        notes = [*notes, "times in the interpreter say nothing about a GPU"]
    us = {side: sum(row[f"us_{side}"] or 0 for row in rows) or None for side in ("host", "ours")}
    return {
        "host": host, "device": name, "targets": targets, "served": served, "equal": all(row["equal"] for row in rows),
        "us": us, "routes": rows, "notes": notes,
    }  # fmt: skip


def row_of(report: dict[str, Any], feature: str) -> dict[str, Any]:
    """A feature's row of a process report."""
    return next(row for row in report["features"] if f"{row['name']}@{row['host']}" == feature)


def time_us(call: Callable[[], Any], device: str) -> float:
    """Median time of one call, on the device where there is one."""
    call()
    if device == "cuda":
        from triton.testing import do_bench_cudagraph

        return round(do_bench_cudagraph(call, rep=20, return_mode="median") * 1e3, 2)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return round(statistics.median(times) * 1e6, 1)


if __name__ == "__main__":
    raise SystemExit(main())
