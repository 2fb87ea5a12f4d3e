"""For scripts that drive a release without a GPU: tensors that its backends make on "cuda" by name."""

from __future__ import annotations

from typing import Any


def install() -> None:
    """Let torch's constructors make on the CPU what is asked for on "cuda", and no pinned memory."""
    import torch

    for name in ("empty", "zeros", "full", "ones", "arange", "tensor"):
        setattr(torch, name, _on_the_cpu(getattr(torch, name)))


def _on_the_cpu(make: Any) -> Any:
    def made(*args: Any, **kwargs: Any) -> Any:
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "cpu"
        kwargs.pop("pin_memory", None)
        return make(*args, **kwargs)

    return made
