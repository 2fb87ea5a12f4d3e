"""Triton's interpreter without the work that no result depends on: about three times as fast.

For processes that exist to run kernels without a GPU: tests, ``mla-patch demo`` and ``mla-patch bench`` on a CPU. It
changes Triton's own module, so nothing calls it in an engine.
"""

from __future__ import annotations

import dataclasses
from typing import Any


def quicken() -> list[str]:
    """Leave out what the interpreter repeats in vain; the names of what was left out, [] where nothing was.

    ``language``    A launch replaces the functions of ``triton.language`` by interpreted ones. Each call of a helper
                    from a kernel looks through all of them once more, although they are replaced already.
    ``overflow``    Each 32-bit sum, difference and product is computed again in 64 bits, for an assertion that the
                    interpreter drops, since its options say ``debug=False``.
    ``types``       Each value looks its NumPy type up in a table that is built for it.

    An interpreter that is not as described is left as it is. Harmless when called again.
    """
    from triton.runtime import interpreter

    done = []
    patch, scope = getattr(interpreter, "_patch_lang", None), getattr(interpreter, "_LangPatchScope", None)
    if patch is not None and scope is not None and not hasattr(patch, "_mla_patch"):
        interpreter._patch_lang = _patched_once(patch, scope)
        done.append("language")
    builder: Any = getattr(interpreter, "interpreter_builder", None)
    options: Any = getattr(builder, "options", None)
    if getattr(options, "sanitize_overflow", False) and getattr(options, "debug", None) is False:
        builder.options = dataclasses.replace(options, sanitize_overflow=False)
        done.append("overflow")
    types = getattr(interpreter, "_get_np_dtype", None)
    if types is not None and not hasattr(types, "_mla_patch"):
        interpreter._get_np_dtype = _by_name(types)
        done.append("types")
    return done


def _patched_once(patch: Any, scope: Any) -> Any:
    import triton.language as tl

    def patch_lang(fn: Any) -> Any:
        seen = [value for value in fn.__globals__.values() if value is tl or value is tl.core]
        # what is interpreted is no builtin; a launch restores all of a module's functions or none
        if seen and not any(tl.core.is_builtin(module.load) for module in seen):
            return scope()
        return patch(fn)

    patch_lang._mla_patch = True  # type: ignore[attr-defined]
    return patch_lang


def _by_name(types: Any) -> Any:
    known: dict[str, Any] = {}

    def np_dtype(dtype: Any) -> Any:
        # the types themselves cannot all be hashed; a name says the element's type and the shape
        if (found := known.get(dtype.name)) is None:
            found = known[dtype.name] = types(dtype)
        return found

    np_dtype._mla_patch = True  # type: ignore[attr-defined]
    return np_dtype
