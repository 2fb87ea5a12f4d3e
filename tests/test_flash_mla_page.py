"""docs/flash-mla.md: its table is the hook's, and its example runs."""

import re

from scratch import ROOT

from mla_patch.hooks.sglang_sched_meta import PREFILL_PROVIDERS, PROVIDERS

TEXT = (ROOT / "docs" / "flash-mla.md").read_text(encoding="utf-8")


def test_the_table_is_the_hooks():
    table = TEXT.split("| --- | --- |\n", 1)[1].split("\n\n", 1)[0]
    told = [tuple(cell.strip().replace("`", "") for cell in line.strip("|").split("|")) for line in table.splitlines()]
    assert [who for who, _ in told] == [row.provider for row in PROVIDERS]
    assert [when for _, when in told[:-1]] == [row.when for row in PROVIDERS[:-1]]


def test_the_table_of_sparse_prefill_is_the_hooks():
    table = TEXT.rsplit("| --- | --- |\n", 1)[1].split("\n\n", 1)[0]
    told = [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in table.splitlines()]
    assert told == [(row.provider, row.when) for row in PREFILL_PROVIDERS]


def test_the_example_runs(run_python):
    (code,) = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)
    done = run_python(code, env={"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}, check=True)
    assert done.stdout == "torch.Size([2, 1, 20, 512]) torch.Size([2, 20, 1])\n"
