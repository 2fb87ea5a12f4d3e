"""docs/sparse-prefill.md: its table is the hook's, its figures are the code's, and its example runs."""

import re

from scratch import ROOT

from mla_patch.chunk_cache import SparsePrefillChunkCache, workspace_rows
from mla_patch.compat.sglang.v4_chunk import ROW_BYTES
from mla_patch.hooks.sglang.sparse_prefill import FEATURE

TEXT = (ROOT / "docs" / "sparse-prefill.md").read_text(encoding="utf-8")
PROSE = " ".join(TEXT.split())


def test_the_table_is_the_hooks():
    table = TEXT.split("| who | when |\n| --- | --- |\n", 1)[1].split("\n\n", 1)[0]
    told = [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in table.splitlines()]
    assert told == list(FEATURE.providers)


def test_the_figures_are_the_codes():
    told = {
        int(kib): int(n) for n, kib in re.findall(r"(\d{4,5})(?: queries where a block has| with) (\d+) KiB", PROSE)
    }
    assert told == {kib: kib * 1024 // ROW_BYTES for kib in (227, 163, 99)}
    long = ([131072], [8192], 128)
    assert workspace_rows(*long, 0) == 8319 and workspace_rows(*long, 4) == 8319 + 32768
    assert SparsePrefillChunkCache.needed(*long, 4) >> 20 == 40 and "8319 for its windows: 40 MiB" in PROSE


def test_the_example_runs(run_python):
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    done = run_python(code, env={"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}, check=True)
    assert done.stdout == "torch.Size([4, 20, 512]) 16 MiB\n"
