"""SGLang's forward_extend runs over a 16-bit workspace: for one call it sees another pool and other page numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import wrapt

from mla_patch.compat.sglang.backends import pool_of
from mla_patch.compat.sglang.kv_cast import ExtendCall, FlashInferExtend


class _Seen(wrapt.ObjectProxy):
    """An object of the engine as one call sees it: some of its attributes are others."""

    def __init__(self, wrapped: Any, **seen: Any) -> None:
        super().__init__(wrapped)
        self._self_seen = seen

    def __getattr__(self, name: str) -> Any:
        seen = self._self_seen
        return seen[name] if name in seen else getattr(self.__wrapped__, name)


class _Pool(wrapt.ObjectProxy):
    """The pool as one call sees it: what it reads of a layer is in 16 bits already."""

    def __init__(self, wrapped: Any, cast: Callable[[Any], Any]) -> None:
        super().__init__(wrapped)
        self._self_cast = cast

    def get_key_buffer(self, layer_id: int) -> Any:
        return self._self_cast(self.__wrapped__.get_key_buffer(layer_id))


class _Wrapper(wrapt.ObjectProxy):
    """FlashInfer's wrapper with another list of pages while it runs."""

    def __init__(self, wrapped: Any, ids: Any) -> None:
        super().__init__(wrapped)
        self._self_ids = ids

    def run(self, *args: Any, **kwargs: Any) -> Any:
        wrapper = self.__wrapped__
        planned, wrapper._kv_indices_buf = wrapper._kv_indices_buf, self._self_ids
        try:
            return wrapper.run(*args, **kwargs)
        finally:
            wrapper._kv_indices_buf = planned


def _renumbered(call: ExtendCall, places: list[Any]) -> dict[str, Any]:
    """The backend's attributes with ``places`` instead of the ids of ``call.tables()``."""
    backend = call.backend
    if isinstance(call, FlashInferExtend):
        metadata = backend.forward_metadata
        return {"forward_metadata": _Seen(metadata, prefill_wrapper=_Wrapper(metadata.prefill_wrapper, places[0][0]))}
    names = ("forward_metadata", "forward_metadata_spec_decode_expand")
    return {name: _Seen(getattr(backend, name), page_table=place) for name, place in zip(names, places, strict=False)}


def extend(original: Callable[..., Any], call: ExtendCall, cast: Callable[[Any], Any], places: list[Any] | None) -> Any:
    """The host's own method. What it reads of the pool is ``cast(cache)``, in which it finds its pages under the
    numbers in ``places``, one tensor for each of ``call.tables()``, or under their own."""
    batch = call.batch
    view = _Pool(pool_of(call), cast)
    seen = _renumbered(call, places) if places is not None else {}
    if getattr(batch, "token_to_kv_pool", None) is None:
        seen["token_to_kv_pool"] = view
    else:
        batch = _Seen(batch, token_to_kv_pool=view)
    backend = _Seen(call.backend, **seen) if seen else call.backend
    return original(backend, call.q, call.k, call.v, call.layer, batch, *call.args, **call.kwargs)
