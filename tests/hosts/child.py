"""One SGLang release, in a process of its own: activate ours, import the importers, drive the host's own code.

    python child.py RELEASE OUT.json        with the release on PYTHONPATH and MLA_PATCH=1

Judges nothing: it writes down what it saw, and the tests eligibility.
"""

import importlib
import json
import logging
import os
import sys
import time
from pathlib import Path
from typing import Any

sys.path.pop(0)  # this folder: a host must not find our modules by their plain names

import mla_patch
import mla_patch.startup

mla_patch.startup.start()  # PYTHONPATH overlays may come with no start-up file

FEATURE = "kv_indices"


def feature(name: str = FEATURE) -> dict:
    return next((row for row in mla_patch.report()["features"] if row["name"] == name), {})


def holders(builders: dict) -> dict[str, dict]:
    """Every name that the reviewed data lists: what is bound to it, "ours", "host's" or "nothing"."""
    from mla_patch.patcher import is_ours

    seen = {}
    for builder, era in builders.items():
        for module in (era["home"], *era["importers"]):
            row = {"module": module, "builder": builder, "error": None}
            try:
                value = getattr(importlib.import_module(module), builder, None)
                row["holds"] = "nothing" if value is None else "ours" if is_ours(value) else "host's"
            except Exception as problem:
                row |= {"holds": None, "error": f"{type(problem).__name__}: {problem}".splitlines()[0]}
            seen[f"{module}:{builder}"] = row
    return seen


def drive(outputs: dict | None = None) -> dict[str, dict]:
    """Every route that the release has; ``outputs``, from an earlier drive, are compared entry by entry."""
    from mla_patch.drive import sglang as sglang_trial

    batch = sglang_trial.make_batch("cpu")
    seen = {}
    for route in sglang_trial.routes():
        before, start = feature().get("served", 0), time.perf_counter()
        trial = sglang_trial.run(route, batch)
        row = {"builder": trial.builder, "entries": trial.out.numel(), "wrong": trial.wrong}
        row |= {"served": feature().get("served", 0) - before, "seconds": round(time.perf_counter() - start, 2)}
        if outputs is not None:
            row["differs"] = int((trial.out != outputs[route]).sum()) if route in outputs else None
        seen[route] = row | {"out": trial.out}
    return seen


# Query heads: a whole block of 16, a part of one, and, for two ranks that gather theirs, one and a part. Few, since the
# interpreter runs a program for each in the merges of both kernels; tests/kernels/decode/test_decode.py has other
# numbers.
HEADS = {"e5m2": 16, "float16": 9, "e4m3": 3, "e4m3 k_scale 0.5": 3}
FEW = 3


class Decodes:
    """A decode step over every kind of cache, and what each arm makes of the same stored latents."""

    def __init__(self) -> None:
        from mla_patch.drive import sglang as sglang_trial

        self.error = sglang_trial.relative_error
        self.trials = {cache: sglang_trial.DecodeTrial(cache, heads=HEADS[cache]) for cache in sglang_trial.CACHES}

    def run(self, *caches: str) -> dict[str, dict]:
        seen = {}
        for cache in caches or self.trials:
            trial = self.trials[cache]
            before, start = feature("decode").get("served", 0), time.perf_counter()
            out = trial.decode()
            row = {"error": self.error(out, trial.expected()), "served": feature("decode").get("served", 0) - before}
            row |= {"stored": trial.factor(), "prefix": trial.prefix_scales}
            seen[cache] = row | {"seconds": round(time.perf_counter() - start, 2)}
        return seen

    def ranks(self) -> dict[str, dict]:
        """Each of two ranks' step, where the release has decode context parallelism: out and log-sum-exp."""
        from mla_patch.drive import sglang as sglang_trial

        seen = {}
        for cache in ("float16", "e4m3 k_scale 0.5") if sglang_trial.has_ranks() else ():
            trial, row = self.trials[cache], {"error": 0.0, "lse": 0.0, "empty": []}
            before = feature("decode").get("served", 0)
            for rank in range(2):
                (out, lse), (want, wanted) = trial.decode_rank(rank, 2), trial.expected_rank(rank, 2)
                keys = wanted.isfinite().all(-1)  # a request of one token has none on the other rank
                row["error"] = max(row["error"], self.error(out[keys], want[keys]))
                row["lse"] = max(row["lse"], float((lse - wanted)[keys].abs().max()))
                row["empty"] += [float(out[~keys].nan_to_num(7.0).abs().sum()), *set(lse[~keys].flatten().tolist())]
            seen[cache] = row | {"served": feature("decode").get("served", 0) - before, "type": str(out.dtype)}
        return seen


def company() -> dict[str, dict]:
    """One request's decode and token ids alone and beside three others, as a rule and under deterministic inference."""
    from mla_patch.drive import sglang as sglang_trial

    seen, length = {}, 130
    for deterministic in (False, True):
        trial = sglang_trial.DecodeTrial("float16", heads=FEW, lens=(length, 33, 200, 64), deterministic=deterministic)
        before, indices = feature("decode"), feature()["served"]
        beside, ids = trial.decode()[0], trial.backend.forward_metadata.kv_indices[:length].clone()
        alone, own_ids = trial.alone(0), trial.backend.forward_metadata.kv_indices[:length]
        after, had = feature("decode"), before["declined"]
        seen["deterministic" if deterministic else "as a rule"] = {
            "decode": {
                "differs": int((beside != alone).sum()), "served": after["served"] - before["served"],
                "declined": {why: n - had.get(why, 0) for why, n in after["declined"].items() if n > had.get(why, 0)},
                "error": sglang_trial.relative_error(alone, trial.expected()[0]),
            },
            "kv_indices": {"differs": int((ids != own_ids).sum()), "served": feature()["served"] - indices},
        }  # fmt: skip
    return seen


def late() -> dict[str, Any]:
    """Backends that were built while the host was as it is, then activation, twice."""
    from mla_patch.drive import sglang as sglang_trial
    from mla_patch.patcher import is_ours

    mla_patch.restore()
    mla_patch.startup._get_session().patcher.runs["decode@sglang"].made.clear()  # as if ours had never been there
    trials = [sglang_trial.DecodeTrial("float16", heads=FEW, lens=lens) for lens in ((33, 2), (5,))]
    had = [id(trial.backend.decode_attention_fwd) for trial in trials]
    seen: dict[str, Any] = {"steps": []}

    def look(step: str) -> None:
        before = feature("decode")["served"]
        errors = [sglang_trial.relative_error(trial.decode(), trial.expected()) for trial in trials]
        holds = ["ours" if is_ours(kept.__wrapped__) else "host's" for kept in kept_by(trials)]
        same = [id(kept) for kept in kept_by(trials)] == had
        row = feature("decode")
        seen["steps"].append({
            "step": step, "state": row["state"], "reason": row["reason"], "served": row["served"] - before,
            "error": max(errors), "holds": holds, "as it was": same,
        })  # fmt: skip

    look("built")
    for step in (mla_patch.apply, mla_patch.restore) * 2:
        step("decode")
        look(step.__name__)
    # somebody's wrapper around what one of them keeps
    kept = trials[1].backend.decode_attention_fwd
    trials[1].backend.decode_attention_fwd = lambda *args, **kwargs: kept(*args, **kwargs)
    mla_patch.apply("decode")
    row = feature("decode")
    seen["wrapped"] = {"state": row["state"], "reason": row["reason"]}
    seen["wrapped"]["as it was"] = id(trials[0].backend.decode_attention_fwd) == had[0]
    return seen


def splits() -> dict[str, Any]:
    """Is one split of the host's enough for ours; and how many it has for MLA on 132 multiprocessors, told one."""
    from mla_patch.drive import sglang as sglang_trial

    trial = sglang_trial.DecodeTrial("e4m3", heads=FEW, lens=(130, 1))
    outs = []
    for count in (8, 1):
        trial.backend.max_kv_splits = count
        outs.append(trial.decode())
    backend = importlib.import_module("sglang.srt.layers.attention.triton_backend")
    cap = getattr(backend, "_mla_decode_kv_splits_cap", lambda flag, cores, context: flag)
    return {"equal": bool((outs[0] == outs[1]).all()), "told 1": cap(1, 132, 8192)}


def kept_by(trials: list[Any]) -> list[Any]:
    return [trial.backend.decode_attention_fwd for trial in trials]


def warm(trial) -> dict:
    """What the release's own backend and pool tell a warm-up, which is then made, as when a backend has been built."""
    from types import SimpleNamespace

    from mla_patch.compat.sglang.decode import decode_warmup
    from mla_patch.hooks.sglang import decode as sglang_decode
    from mla_patch.hooks.sglang.edits.warmup import warm_up

    runner = SimpleNamespace(token_to_kv_pool=trial.pool, device="cpu", dtype=trial.q.dtype)
    warm_up(sglang_decode.warm, trial.backend, runner, decode_warmup)  # a failure would be in the log
    seen = decode_warmup(trial.backend, runner)
    return {name: str(getattr(seen, name)) for name in seen.__slots__}


def decode_holder() -> str:
    """What the one module that defines SGLang's decode holds under that name."""
    from mla_patch.drive import sglang as sglang_trial
    from mla_patch.patcher import is_ours

    return "ours" if is_ours(sglang_trial.imported("decode")) else "host's"


def without_tensors(driven: dict[str, dict]) -> dict[str, dict]:
    return {route: {key: value for key, value in row.items() if key != "out"} for route, row in driven.items()}


def main(release: str, out: str) -> None:
    logging.basicConfig(level=logging.WARNING)
    start = time.perf_counter()
    data = json.loads(Path(__file__).with_name("importers.json").read_text())
    builders = {name: era for name, eras in data.items() for era in eras if release in era["releases"]}
    from mla_patch.drive import sglang as sglang_trial

    seen: dict = {"release": release, "stubbed": sglang_trial.prepare()}
    seen["holders"] = holders(builders)
    seen["imported after"] = round(time.perf_counter() - start, 1)
    ours = drive()
    seen["ours"] = without_tensors(ours)
    decodes = Decodes()
    decoded = {
        "ours": decodes.run(), "holders": [decode_holder()], "warm": warm(decodes.trials["e5m2"]),
        "ranks": {"ours": decodes.ranks()},
    }  # fmt: skip
    seen["features"] = mla_patch.report()["features"]
    decoded["company"] = company()

    mla_patch.restore(FEATURE)
    seen["holders restored"] = holders(builders)
    seen["host"] = without_tensors(drive({route: row["out"] for route, row in ours.items()}))

    mla_patch.apply(FEATURE)
    seen["holders applied again"] = holders(builders)
    again = drive({route: row["out"] for route, row in ours.items()})
    seen["again"] = without_tensors(again)

    mla_patch.restore("decode")
    decoded["holders"].append(decode_holder())
    decoded["host"] = decodes.run()
    decoded["ranks"]["host"] = decodes.ranks()
    mla_patch.apply("decode")
    decoded["holders"].append(decode_holder())
    decoded["again"] = decodes.run("float16", "e4m3 k_scale 0.5")
    decoded["splits"] = splits()
    decoded["late"] = late()
    mla_patch.apply()
    # the breaker, in the middle of a request
    mla_patch.startup._get_session().patcher.runs["decode@sglang"].switch.trip("a test")
    decoded["tripped"] = decodes.run("e4m3 k_scale 0.5")
    seen["decode"] = decoded | {"tripped state": feature("decode")["state"]}

    import torch

    seen["compiled"] = mla_patch.report()["compiled"]
    seen["cuda initialized"] = torch.cuda.is_initialized()
    seen["seconds"] = round(time.perf_counter() - start, 1)
    Path(out).write_text(json.dumps(seen, indent=1))


if __name__ == "__main__":
    main(*sys.argv[1:])
    sys.stdout.flush()
    os._exit(0)  # what a release leaves running at exit is not on trial
