"""What a feature declares about its host: entry points, edits, variables, arms. Standard library only.

A ``Home`` says where an entry point of a host is and how it is called. A hook makes a ``Target`` of it: its own code
takes the entry point's place. An ``Edit`` changes anything else. The core reads these declarations and never a host's
version; the files beside this one know the versions.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from typing import Any, Literal, NamedTuple, TypeVar

SWITCHED_ON = ("true", "1", "yes", "y")  # how hosts read their switches in the environment, in lower case

# A function, or "module:function", which is imported when the host's module is: declaring imports no kernel
Code = str | Callable[..., Any]
# (call) -> the same call with outputs of its own, and pairs to compare; see `Target`
ShadowClone = Callable[[Any], "tuple[Any, list[tuple[Any, Any]] | None]"]
# Takes an edit back. It may have `places`, see `mla_patch.hooks.editing.Undoing`: a report then says where something
# else stands by now
Undo = Callable[[], None]


@dataclass(frozen=True)
class CachedOn:
    """Living instances that keep a target's function in an attribute, where a late activation can set our function."""

    place: str  # "module:Class.attribute"
    # what they keep is within(function), a function made by functools.wraps; None: the function itself
    within: Callable[[Any], Any] | None = None
    fixed: Callable[[Any], str | None] | None = None  # (instance) -> why it would not call our function, or None


@dataclass(frozen=True)
class Home:
    """Where one entry point of a host is, and how it is called there: what is true of a release."""

    module: str  # "sglang.srt.layers.attention.utils"
    name: str  # "create_flashmla_kv_indices_triton" or "Class.method"
    params: tuple[str, ...] = ()  # reviewed parameter names, in order; "*args" and "**kwargs" as written
    kind: Literal["call", "kernel"] = "call"
    # call: bind(*args, **kwargs); kernel: bind(grid, *args, **kwargs). Returns the call object,
    # raises TypeError for arguments that it does not know.
    bind: Callable[..., Any] | None = None
    cached_on: tuple[CachedOn, ...] = field(default=(), kw_only=True)
    entry: str = field(default="", kw_only=True)  # empty: the name

    def target(
        self,
        declines: Code = "",
        serve: Code = "",
        *,
        around: bool = False,
        shadow_clone: ShadowClone | None = None,
        group: str = "",
        arms: bool = True,
    ) -> Target:
        """The target that a hook makes of this entry point; see `Target` for the arguments."""
        facts: dict[str, Any] = {one.name: getattr(self, one.name) for one in fields(Home)}
        return Target(
            **facts,
            declines=declines,
            serve=serve,
            around=around,
            shadow_clone=shadow_clone,
            group=group,
            arms=arms,
        )


@dataclass(frozen=True)
class Target(Home):
    """One entry point of a host that a feature replaces.

    Several targets of a feature with the same ``name`` are alternative homes of one entry point:
    the first whose module exists and whose parameters match is taken. Where two entry points have one name,
    ``entry`` tells them apart.
    """

    declines: Code = ""  # (call) -> reason or None; empty: our code declines nothing
    serve: Code = ""  # (call) -> what the host's function returns
    # serve(original, call): our code has the host's own function do the work, with other arguments
    around: bool = field(default=False, kw_only=True)
    # for shadow checks: (call) -> the same call with outputs of its own, filled as the host's are now, and pairs of
    # (the host's, its own) tensors to compare, or None where what is returned is the output; raises ValueError with the
    # reason why this call has none
    shadow_clone: ShadowClone | None = field(default=None, kw_only=True)
    # Entry points that stand or fall together, where an engine imports one such group and not another: what has drifted
    # in one leaves the others replaced. Empty: all of the feature without a group do.
    group: str = field(default="", kw_only=True)
    # whether plugins' arms that name no group get its calls, too
    arms: bool = field(default=True, kw_only=True)


@dataclass(frozen=True)
class Edit:
    """One change of a host that is not the replacement of an entry point."""

    module: str  # whose import is the moment to make it
    name: str  # a label, unique in the feature
    edit: Callable[..., Undo]  # edit(module) -> undo
    # The edit changes how stored data are read or written: it outlives the breaker and restore()
    survives_restore: bool = field(default=False, kw_only=True)
    # The edit brings calls of its own: edit(module, counts), and adds to counts.served
    counts_calls: bool = field(default=False, kw_only=True)
    group: str = field(default="", kw_only=True)  # as in `Target`
    entry: str = field(default="", kw_only=True)  # edits with the same one are alternatives; empty: the name
    kind: Literal["edit"] = field(default="edit", init=False)


Change = Target | Edit  # what a feature does to a host


@dataclass(frozen=True)
class Variable:
    """One ``MLA_PATCH_<FEATURE>_<NAME>`` of a feature."""

    name: str  # "MATH" for MLA_PATCH_DECODE_MATH
    values: tuple[str, ...]  # what it may be set to; empty: what `read` takes
    default: str
    help: str
    read: Callable[[str], str] = str  # its text -> its value; raises ValueError with what was expected


# The names of arms. A shadow check is no arm: the engine's code serves, and our code runs beside it on the same inputs.
HOST, PATCH, SHADOW = "host", "patch", "shadow"


@dataclass(frozen=True)
class Arm:
    """One more implementation of a feature's calls, beside ``host`` and ``patch``."""

    name: str
    feature: str  # "decode" or "decode@sglang"
    serve: str  # "module:function", as in Target
    declines: str = ""  # empty: the feature's own
    group: str = ""  # whose entry points it is written for, see `Target`; empty: those with the feature's usual calls


@dataclass(frozen=True)
class Gpu:
    """One device, as far as it is known without touching CUDA."""

    name: str
    capability: tuple[int, int]
    driver: str = ""
    cuda: bool = True  # NVIDIA's; else the capability is a number of another maker's, which means something else

    @property
    def sm(self) -> str:
        return f"sm_{self.capability[0]}{self.capability[1]}" if self.cuda else "not NVIDIA's"


@dataclass(frozen=True)
class MlaBackendSpec:
    """One TRT-LLM MLA backend whose kernels a plugin brings: what they will be asked for."""

    device: Any  # torch.device
    heads: int  # query heads of this rank
    kv_lora_rank: int
    qk_rope_head_dim: int
    head_dim: int  # of prompts' queries and keys
    v_head_dim: int  # of prompts' values
    page_size: int
    draft_tokens: int  # the most query tokens of a request in a decode, as far as the arguments tell
    has_prefill: bool


@dataclass(frozen=True, slots=True)
class MlaDecode:
    """One decode, target verify or draft extend over the paged latent cache.

        query         [B, q_len, heads, 576] e4m3, B > 0
        kv_cache      [pages, page_size, 576] e4m3
        block_tables  [B, width] int32; what it holds past a request's pages is not to be read
        seq_lens      [B] int32, the query's tokens among them

    Query token i sees the first ``seq_lens - q_len + 1 + i`` tokens. Wanted: [B, q_len, heads, 512]. Called under graph
    capture: no sync, and nothing that depends on what tensors hold.
    """

    query: Any
    kv_cache: Any
    block_tables: Any
    seq_lens: Any
    max_seq_len: int  # of the batch, or of the model under graph capture
    softmax_scale: float
    seam: MlaBackendSpec


@dataclass(frozen=True, slots=True)
class MlaPrefill:
    """One ragged attention of prompts: their own tokens, or a chunk of their prefixes.

        q             [sum of query lengths, heads, 192] e4m3
        k, v          [sum of key lengths, heads, 192 and 128] e4m3
        cum_seq_lens  [batch_size + 1] int32, of queries and of keys
        seq_lens_kv   [batch_size], may be 0

    ``is_causal`` aligns the last query token with the last key. Wanted: [queries, heads, 128], and with ``return_lse``
    also the natural log-sum-exp of the scaled scores, [queries, heads] float32; where there is no key, 0 and -inf.
    """

    q: Any
    k: Any
    v: Any
    batch_size: int
    cum_seq_lens_q: Any
    max_q_len: int
    seq_lens_kv: Any
    cum_seq_lens_kv: Any
    max_kv_len: int
    softmax_scale: float
    is_causal: bool
    return_lse: bool
    seam: MlaBackendSpec


@dataclass(frozen=True)
class MlaKernel:
    """A decode kernel, a prefill kernel or both, for the seam of the feature ``tokenspeed``."""

    name: str
    decode: str = ""  # "module:function", (MlaDecode) -> out
    prefill: str = ""  # "module:function", (MlaPrefill) -> out, or (out, lse)
    # why it cannot run here, or None. Asked when the server's arguments are read, with what NVML tells (None: nothing),
    # and again when a backend has been built; must not touch CUDA
    problem: Callable[[Gpu | None], str | None] | None = None
    prepare: str = (
        ""  # "module:function", (MlaBackendSpec, {"decode", "prefill"} or one of them), when a backend has been built
    )


class Provider(NamedTuple):
    """Who serves a call of a feature that has several to choose from: the first of its table that applies."""

    provider: str
    when: str  # as `explain` prints it, and the report, where the host keeps a call
    applies: Callable[[Any], bool]


class Mark(NamedTuple):
    """A module that a host has in some of its releases alone."""

    module: str
    first: str  # the first release that has it
    until: str  # the first later one that does not


@dataclass(frozen=True)
class Host:
    """One engine that features can be written for."""

    name: str  # its name in reports: "sglang"
    package: str  # the top package whose import wakes the plugin
    distributions: tuple[str, ...]  # names under which it is installed
    reviewed: tuple[str, ...] = ()  # releases whose entry points were read
    plugin_filter: str = ""  # environment variable that narrows the host's own plugins
    # (reviewed release, modules that no earlier one has), newest first: what tells of source whose version does not
    marks: tuple[tuple[str, tuple[str, ...]], ...] = ()
    # environment variables with which its processes promise something about results, and what that is
    promises: tuple[tuple[str, str], ...] = ()


One = TypeVar("One", bound=Change)


def key_targets(changes: Iterable[One]) -> dict[str, tuple[One, ...]]:
    """Targets and edits by entry point, alternatives in order."""
    keyed: dict[str, list[One]] = {}
    for change in changes:
        keyed.setdefault(change.entry or change.name, []).append(change)
    return {name: tuple(homes) for name, homes in keyed.items()}
