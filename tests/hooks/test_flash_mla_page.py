"""docs/flash-mla.md: its tables are the hook's, and its examples run."""

import re

import pytest
from scratch import ROOT

from mla_patch.compat.triton import interpreted
from mla_patch.hooks.sglang.flash_mla_providers import PREFILL_PROVIDERS, PROVIDERS

TEXT = (ROOT / "docs" / "flash-mla.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "at, rows", [pytest.param(0, PROVIDERS, id="decode"), pytest.param(1, PREFILL_PROVIDERS, id="prefill")]
)
def test_the_tables_are_the_hooks(at, rows):
    table = TEXT.split("| who | when |\n| --- | --- |\n")[at + 1].split("\n\n", 1)[0]
    said = [tuple(cell.strip() for cell in line.strip("|").split("|")) for line in table.splitlines()]
    assert said == [(row.provider, row.when) for row in rows]


SPARSE, GRAPH = re.findall(r"```python\n(.*?)```", TEXT, re.DOTALL)


def test_the_example_runs(run_python):
    done = run_python(SPARSE, env={"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}, check=True)
    assert done.stdout == "torch.Size([2, 1, 20, 512]) torch.Size([2, 20, 1])\n"


NO_GRAPHS = """
import contextlib, torch

class Graph:  # of a capture that ran: the second run of the same code, into what the first gave
    def replay(self):
        for kept, now in zip((out, lse), decode()):
            kept.copy_(now)

torch.cuda.CUDAGraph, torch.cuda.graph = Graph, contextlib.nullcontext
"""


def test_the_gpu_example_but_for_its_graph(run_python):
    code = NO_GRAPHS + GRAPH.replace('"cuda"', '"cpu"')
    done = run_python(code, env={"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}, check=True)
    assert done.stdout == "True True inf\n"


@pytest.mark.gpu
@pytest.mark.skipif(interpreted(), reason="needs a GPU and TRITON_INTERPRET=0")
@pytest.mark.parametrize("code, printed", [(SPARSE, "torch.Size([2, 1, 20, 512])"), (GRAPH, "True True inf\n")])
def test_the_examples_run_on_a_gpu(code, printed, run_python):
    done = run_python(code, env={"TRITON_INTERPRET": "0"}, check=True)
    assert done.stdout.startswith(printed)
