"""torch.compile: how a stand-in keeps Dynamo from taking it for the host's own code. Imports no torch.

Dynamo asks what an object is by isinstance, and a stand-in answers as what it imitates: Dynamo would compile the host's
body and never come by ours. So to Dynamo alone a stand-in says what it is, an object whose call nobody can trace, and
Dynamo breaks the graph there. Where it may not (fullgraph=True, torch.export), a break would be the engine's error:
there the host's code is compiled, and that is recorded.

What is called from a compiled function is compiled as well, frame by frame. Ours is kept out of it: Triton launches
would become parts of a graph, and counts would be constants of it.

to 2.13     `torch._C._dynamo.eval_frame.get_eval_frame_callback` tells whether this thread runs what was compiled;
            `torch._dynamo.eval_frame.skip_code` leaves a function's own frame alone; a translator's `one_graph`
            forbids breaks
from 2.9    so does its `error_on_graph_break`

A torch without the first of these, which is none that we allow, would have ours compiled with whoever calls it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any

_NEAR = 4  # frames from Dynamo's question to the isinstance that asks a stand-in, some of them inspect's


def callback() -> Callable[[], Any]:
    """A function that is false where this thread runs nothing that torch.compile has made; asked at every call."""
    torch = sys.modules.get("torch")
    if torch is None or not hasattr(torch, "compiler"):
        return type(None)
    dynamo = getattr(getattr(torch, "_C", None), "_dynamo", None)
    return getattr(getattr(dynamo, "eval_frame", None), "get_eval_frame_callback", type(None))


def outside(function: Callable[..., Any]) -> Callable[..., Any]:
    """``function``, with neither it nor what it calls compiled."""
    import torch

    return torch.compiler.disable(function)


def leave_alone(module: Any, function: Any) -> None:
    """Keep ``function``'s own frame from being compiled by ``module``, which is torch._dynamo."""
    skip = getattr(getattr(module, "eval_frame", None), "skip_code", None)
    if skip is not None:
        skip(function.__code__)
    function._torchdynamo_disable = True  # where a caller's frame is traced into it


@dataclass(frozen=True)
class Tracer:
    """Who in torch._dynamo traces: ``graph`` is its translator of the whole graph, which ``may_break`` or not."""

    graph: Any
    may_break: bool


def asks(frame: FrameType | None) -> Tracer | None:
    """Who traces, if it is Dynamo that asks, in ``frame`` or just above it."""
    for _ in range(_NEAR):
        if frame is None:
            return None
        if str(frame.f_globals.get("__name__")).startswith("torch._dynamo."):
            break
        frame = frame.f_back
    else:
        return None
    graph, may_break = None, True
    while frame is not None:  # the outermost is of the whole graph, those before it of functions that it inlines
        if frame.f_globals.get("__name__") == "torch._dynamo.symbolic_convert":
            translator = frame.f_locals.get("self")
            if hasattr(translator, "one_graph"):
                graph = translator
            if getattr(translator, "one_graph", False) or getattr(translator, "error_on_graph_break", False):
                may_break = False
        frame = frame.f_back
    return None if graph is None else Tracer(graph, may_break)


def unsupported(reason: str) -> Exception:
    """What Dynamo raises itself where it cannot go on: it breaks the graph."""
    return sys.modules["torch._dynamo.exc"].Unsupported(reason)
