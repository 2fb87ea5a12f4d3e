"""A real release is imported while another thread imports what we and the release import too."""

import sys

import pytest
from scratch import ROOT
from test_threads import run_trials

from mla_patch.drive.sglang_fetch import fetch

CPU_SECONDS = 110  # see budget.py

pytestmark = [pytest.mark.network, pytest.mark.slow]
RELEASE = "0.5.18"


# Where packages that the release needs are missing, its import ends in an error, far behind the moment of this test.
def test_a_thread_imports_while_another_imports_the_engine() -> None:
    other = "import pluggy, packaging.version, wrapt, torch"
    done = run_trials(sys.executable, other, 2, *fetch(RELEASE), ROOT, at_once=1, patience=140)  # torch takes its time
    assert (done.stdout, done.returncode) == ("0 of 2\n", 0), done.stderr
