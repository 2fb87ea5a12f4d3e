"""Opens the door where the start-up file is not read: `mla-patch run` puts this folder on PYTHONPATH."""

import os
import sys
from importlib.machinery import PathFinder
from importlib.util import module_from_spec

from mla_patch._autostart import run

_here = os.path.dirname(os.path.abspath(__file__))
# there may be another sitecustomize behind this one, and its owner expects it to run
_next = PathFinder.find_spec("sitecustomize", [p for p in sys.path if os.path.abspath(p) != _here])
if _next is not None and _next.loader is not None:
    _module = sys.modules["sitecustomize"] = module_from_spec(_next)
    _next.loader.exec_module(_module)
run()
