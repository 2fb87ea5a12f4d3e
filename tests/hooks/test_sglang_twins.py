"""Shadow checks of SGLang's calls: ours gets outputs of its own, and nothing else of the call changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mla_patch.compat.sglang.decode import DecodeCall
from mla_patch.compat.sglang.kv_indices import TokenIndicesCall
from mla_patch.compat.sglang.release import REVIEWED
from mla_patch.hooks.sglang import decode as sglang_decode
from mla_patch.hooks.sglang import kv_indices as sglang_kv_indices


def decode_call(has_mla: bool = True) -> DecodeCall:
    generator = torch.Generator().manual_seed(0)
    k = torch.randn(8, 1, 576, generator=generator, dtype=torch.float16)
    return DecodeCall(
        torch.randn(2, 16, 576, generator=generator, dtype=torch.float16), k, k[..., :512],
        torch.full((2, 16, 512), torch.nan, dtype=torch.float16), torch.tensor([0, 3, 5], dtype=torch.int32),
        torch.tensor([1, 2, 3, 4, 5]), torch.zeros(2, 16, 4, 512), torch.zeros(2, 16, 4),
        torch.ones(2, dtype=torch.int32), 4, 0.1, 1.0, 1.0, has_mla=has_mla,
    )  # fmt: skip


def token_call(out: torch.Tensor) -> TokenIndicesCall:
    table = torch.arange(40, dtype=torch.int32).view(2, 20)
    lens = torch.tensor([3, 2])
    indptr = torch.tensor([0, 3, 5], dtype=torch.int32)
    return TokenIndicesCall((2,), table, torch.tensor([1, 0]), lens, indptr, None, out, 20, None)


@pytest.mark.parametrize(
    "call, shadow_clone, serve",
    [
        (decode_call(), sglang_decode.shadow_clone, sglang_decode.serve),
        (token_call(torch.full((7,), -1)), sglang_kv_indices.shadow_clone, sglang_kv_indices.serve_token_indices),
    ],
    ids=["decode", "token ids"],
)
def test_ours_writes_to_an_output_of_its_own(call: Any, shadow_clone: Any, serve: Any) -> None:
    before = call.out.clone()
    ours, pairs = shadow_clone(call)
    assert [(host is call.out, own is ours.out) for host, own in pairs] == [(True, True)]
    assert all(getattr(ours, name) is getattr(call, name) for name in type(call).__slots__ if name != "out")
    torch.testing.assert_close(ours.out, before, equal_nan=True)  # so that what nobody writes is equal
    serve(ours)
    torch.testing.assert_close(call.out, before, equal_nan=True, rtol=0, atol=0)
    serve(call)
    assert torch.equal(call.out, ours.out) and not torch.equal(call.out, before)


def test_scratch_that_the_caller_reads_is_not_filled_beside_the_host() -> None:
    with pytest.raises(ValueError, match="the caller reads the split scratch"):
        sglang_decode.shadow_clone(decode_call(has_mla=False))


def test_tables_that_cannot_be_copied() -> None:
    with pytest.raises(ValueError, match="4194305 entries, at most 4194304"):
        sglang_kv_indices.shadow_clone(token_call(torch.empty((1 << 22) + 1, dtype=torch.int8)))
    with pytest.raises(ValueError, match="not contiguous"):
        sglang_kv_indices.shadow_clone(token_call(torch.empty(8, 8)[:, :4]))


def test_every_entry_point_of_every_release_can_be_shadowed() -> None:
    for feature in (sglang_decode.FEATURE, sglang_kv_indices.FEATURE):
        for version in (*REVIEWED, None):
            targets = [target for target in feature.targets(version) if target.kind != "edit"]
            assert targets and all(target.shadow_clone is not None for target in targets)
            assert feature.steps is not None and len(feature.steps(version)) == (3 if version is None else 2)
