"""An experiment is told where SGLang's forward steps begin and end.

Draft models' forward calls are no steps. They keep the engine's arm, unless the experiment asks that their decodes run
the arm of the target model's step before them.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

from mla_patch.compat import steps
from mla_patch.compat.sglang.graphs import rank_info, step_info
from mla_patch.hooks.editing import checked_method, shared_edit


@shared_edit()
def watch_steps(module: ModuleType) -> tuple[type, dict[str, Any]]:
    """Tell the experiment of each forward step of the target model."""
    owner = module.ModelRunner
    original = checked_method(owner, "forward", "forward_batch")

    @functools.wraps(original)
    def forward(self: Any, forward_batch: Any, *args: Any, **kwargs: Any) -> Any:
        watcher = steps.watcher
        if watcher is None:
            return original(self, forward_batch, *args, **kwargs)
        if not self.is_draft_worker:
            watcher.begin(functools.partial(rank_info, self), self.forward_pass_id + 1)
        elif watcher.draft and forward_batch.forward_mode.is_decode():
            watcher.begin_draft()
        else:
            return original(self, forward_batch, *args, **kwargs)
        return until_end(watcher, original, self, forward_batch, args, kwargs)

    return owner, {"forward": forward}


def until_end(
    watcher: steps.Watcher, original: Callable[..., Any], runner: Any, batch: Any, args: Any, kwargs: Any
) -> Any:
    """What has begun, to its end."""
    work = None
    try:
        output = original(runner, batch, *args, **kwargs)
        work = functools.partial(step_info, batch)
        return output
    finally:
        watcher.end(work)
