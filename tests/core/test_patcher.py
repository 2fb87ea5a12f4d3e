"""Taking a host's entry points and giving them back: every order, each in a fresh interpreter."""

import pytest
from fake_host import FakeHost, fake_host

CPU_SECONDS = 290  # see budget.py

__all__ = ["fake_host"]  # a fixture

STEP = {
    "import": "import fakehost.caller",
    "ops": "import fakehost.ops, fakehost.kernels, fakehost.layers, fakehost.srt.layers.attend",  # not their callers
    "apply": "mla_patch.apply()",
    "restore": "mla_patch.restore()",
}
ORDERS = {
    "import": "host",
    "apply import": "ours",
    "import apply": "ours",
    "apply apply import": "ours",
    "apply import apply": "ours",
    "import apply apply": "ours",
    "ops apply import": "ours",
    "apply ops import": "ours",
    "apply ops apply import": "ours",
    "restore import": "host",
    "import restore apply": "ours",
    "apply restore import": "host",
    "apply import restore": "host",
    "import apply restore": "host",
    "ops apply restore import": "host",
    "apply ops restore import": "host",
    "ops apply import restore": "host",
    "apply import restore restore": "host",
    "apply restore apply import": "ours",
    "apply import restore apply": "ours",
    "import apply restore apply": "ours",
    "ops apply restore import apply": "ours",
    "apply ops restore apply import": "ours",
    "import apply restore apply restore": "host",
    "apply import restore apply restore apply": "ours",
}


@pytest.mark.parametrize("order, served", ORDERS.items())
def test_any_order(order: str, served: str, fake_host: FakeHost) -> None:
    steps = "\n".join(STEP[step] for step in order.split())
    left = fake_host.says(f"{steps}\nprint(serves())\nprint(len(left()))").splitlines()
    assert left[0] == served
    assert (left[1] == "0") == (served == "host")


def test_armed_before_anything_is_imported(fake_host: FakeHost) -> None:
    code = """
    mla_patch.apply()
    states("ops", "kernel", "method", "tools", "both")
    print([name for name in sys.modules if name.startswith("fakehost")])
    """
    assert fake_host.says(code) == "armed armed armed armed armed\n[]"


def test_the_report_names_what_stands_where(fake_host: FakeHost) -> None:
    code = """
    mla_patch.apply()
    import fakehost.more
    print(state("both"))
    print(*((t["module"], t["name"], t["kind"], t["replaced_by"]) for t in row("both")["targets"]), sep="\\n")
    import fakehost.srt.layers.attend
    print(state("both"))
    mla_patch.restore()
    print(state("both"), [t["replaced_by"] for t in row("both")["targets"]])
    """
    assert fake_host.says(code).splitlines() == [
        "applied: waiting for fakehost.srt.layers.attend",
        "('fakehost.more', 'prefill', 'call', 'fakeplug:serve')",
        "('fakehost.srt.layers.attend', 'attend', 'call', None)",
        "applied",
        "off: restored [None, None]",
    ]


def test_names_choose_features(fake_host: FakeHost) -> None:
    code = """
    import fakehost.caller
    mla_patch.apply("ops", "method@fakehost")
    print(*(f"{k}={v}" for k, v in fakehost.caller.run_all().items() if v == "ours"))
    mla_patch.restore("ops@fakehost")
    print(*(f"{k}={v}" for k, v in fakehost.caller.run_all().items() if v == "ours"))
    for wrong in ("opss", "ops@sglang"):
        try:
            mla_patch.apply(wrong)
        except ValueError as problem:
            print(problem)
    """
    said = fake_host.says(code).splitlines()
    assert said[:2] == ["alias=ours static=ours instance static=ours abstract=ours inherited=ours", "inherited=ours"]
    assert said[2].startswith("'opss' is not a feature; did you mean ops?; there are both@fakehost, ")
    assert said[3].startswith("'ops@sglang' is not a feature; did you mean ")


def test_ours_may_call_what_it_stands_for(fake_host: FakeHost) -> None:
    """Unbound, as it stood there; whoever it fails for has the host's own call, and the report names our code."""
    fake_host.plug("""
    def around(original, call):
        if call.args[0] == "fail":
            raise ValueError("no such q")
        owner = call.options["owner"]
        return f"around the {original(owner, *call.args)}'s {type(owner).__name__}"

    AROUND = Target("fakehost.layers", "Backend.forward", ("self", "q"), bind=method_call, serve="fakeplug:around",
                    around=True)
    FEATURES = [feature("method", AROUND)]
    """)
    code = """
    mla_patch.apply()
    from fakehost.layers import Backend, Other
    print(Backend().forward(1), Other().forward(1), Backend().forward("fail"), row("method")["declined"], sep="; ")
    print(row("method")["served"], row("method")["targets"][0]["replaced_by"])
    mla_patch.restore()
    print(Backend().forward(1))
    mla_patch.apply()
    print(Backend().forward(1), state("method"))
    """
    assert fake_host.says(code).splitlines() == [
        "around the host's Backend; host; host; {'no such q': 1}",
        "1 fakeplug:around",
        "host",
        "around the host's Backend applied",
    ]


def test_ours_looks_like_the_hosts(fake_host: FakeHost) -> None:
    code = """
    import inspect
    import fakehost.ops as ops, fakehost.kernels as kernels
    name, signature, fn = id(ops.decode), inspect.signature(ops.decode), kernels.indices.fn
    mla_patch.apply()
    print(id(ops.decode) != name, ops.decode.__name__, ops.decode.__module__, ops.decode == ops.decode.__wrapped__)
    print(inspect.signature(ops.decode) == signature, callable(kernels.indices), kernels.indices.arg_names)
    print(isinstance(kernels.indices, type(kernels.outer)), kernels.indices.fn is fn)
    """
    assert fake_host.says(code).splitlines() == [
        "True decode fakehost.ops True",
        "True True ['src', 'dst', 'n', 'BLOCK']",
        "True True",
    ]


# --- kernel objects


def test_a_launched_kernel_is_served(fake_host: FakeHost) -> None:
    code = """
    mla_patch.apply()
    import fakehost.caller as c
    print(c.launch(), row("kernel")["served"])
    dst = []
    c.indices[lambda meta: (1,)](None, dst, 3, BLOCK=32)
    print(dst, row("kernel")["served"])
    c.indices.run(None, dst, 3, grid=(1,)), c.indices.fn(None, dst, 3)
    print(dst, c.indices.warmup(grid=(1,)), row("kernel")["served"])
    """
    # run, fn and warmup stay the host's
    assert fake_host.says(code).splitlines() == [
        "ours 1",
        "['ours'] 2",
        "['ours', 'host', 'host'] warmed 2",
    ]


def test_a_function_wrapper_on_a_kernel_would_launch_the_hosts(fake_host: FakeHost) -> None:
    """The trap that the kernel's own stand-in is for: wrapt hands ``[grid]`` through."""
    code = """
    import wrapt, fakehost.kernels as k
    calls = []
    wrapped = wrapt.FunctionWrapper(k.indices, lambda *call: calls.append(call))
    dst = []
    wrapped[(1,)](None, dst, 3)
    print(dst, calls)
    """
    assert fake_host.says(code) == "['host'] []"


def test_a_kernel_that_another_kernel_calls_stays(fake_host: FakeHost) -> None:
    fake_host.plug("""
    INNER = target("fakehost.kernels", "inner", ("dst",), inner_call, "serve_kernel", "kernel")
    FEATURES = [feature("inner", INNER)]
    """)
    code = "mla_patch.apply()\nprint(state('inner'))\nimport fakehost.kernels\nprint(left())"
    assert fake_host.says(code).splitlines() == ["drifted: inner is called by another kernel, outer", "[]"]


def test_a_kernel_that_became_a_function_drifted(fake_host: FakeHost) -> None:
    fake_host.change("fakehost/kernels.py", "@jit\ndef indices", "def indices")
    code = "mla_patch.apply()\nimport fakehost.kernels\nprint(state('kernel'))\nprint(left())"
    assert fake_host.says(code).splitlines() == [
        "drifted: fakehost.kernels.indices is not a kernel that is launched as kernel[grid](...)",
        "[]",
    ]


TRITON = """
import triton
import triton.language as tl

@triton.jit
def indices(src, dst, n, BLOCK: tl.constexpr = 64):
    at = tl.arange(0, BLOCK)
    tl.store(dst + at, tl.load(src + at, mask=at < n), mask=at < n)
"""


def test_a_real_triton_kernel(fake_host: FakeHost) -> None:
    fake_host.write("fakehost/kernels.py", TRITON)
    fake_host.plug("""
    def double(call):
        dst, src = call.args
        dst.copy_(2 * src)

    def bind(grid, src, dst, n, BLOCK=64):
        return Call(dst, src)

    FEATURES = [feature("kernel", target("fakehost.kernels", "indices", ("src", "dst", "n", "BLOCK"), bind, "double",
                                         "kernel"))]
    """)
    code = """
    import torch
    from fakehost.kernels import indices
    def run(**more):
        src, dst = torch.arange(4), torch.zeros(4, dtype=torch.int64)
        indices[(1,)](src, dst, 4, **more)
        return dst.tolist()
    print(run())
    mla_patch.apply()
    print(state("kernel"), run(), run(BLOCK=4), run(num_warps=2), row("kernel")["declined"])
    mla_patch.restore()
    print(run(), torch.cuda.is_initialized())
    """
    assert fake_host.says(code, {"TRITON_INTERPRET": "1"}).splitlines() == [
        "[0, 1, 2, 3]",
        "applied [0, 2, 4, 6] [0, 2, 4, 6] [0, 1, 2, 3] {'unknown argument num_warps': 1}",
        "[0, 1, 2, 3] False",
    ]


# --- someone else's wrapper on top, or below


WRAP = {
    "functools": """
        import functools, fakehost.ops
        def wrap():
            inner = fakehost.ops.decode
            @functools.wraps(inner)
            def outer(*args, **kwargs):
                return "wrapped " + inner(*args, **kwargs)
            fakehost.ops.decode = outer
            return outer
    """,
    "wrapt": """
        import wrapt, fakehost.ops
        def wrap():
            def outer(wrapped, instance, args, kwargs):
                return "wrapped " + wrapped(*args, **kwargs)
            fakehost.ops.decode = wrapt.FunctionWrapper(fakehost.ops.decode, outer)
            return fakehost.ops.decode
    """,
}


@pytest.mark.parametrize("how", WRAP)
@pytest.mark.parametrize(
    "steps, served",
    [
        ("apply wrap", "wrapped ours"),
        ("apply wrap restore", "wrapped host"),
        ("apply wrap restore apply", "wrapped ours"),
        ("apply wrap restore apply restore", "wrapped host"),
        ("apply wrap restore apply restore apply", "wrapped ours"),
        ("apply wrap apply", "wrapped ours"),
        ("wrap apply", "ours"),  # ours is outside: the wrapper is the host's entry point by now
        ("wrap apply restore", "wrapped host"),
        ("wrap apply restore apply", "ours"),
        ("apply wrap unwrap restore", "host"),
    ],
)
def test_someone_elses_wrapper(steps: str, served: str, how: str, fake_host: FakeHost) -> None:
    fake_host.write("wrapping.py", WRAP[how])
    step = STEP | {
        "apply": "mla_patch.apply('ops')",
        "wrap": "import wrapping; top = wrapping.wrap()",
        "unwrap": "fakehost.ops.decode = top.__wrapped__; del top",
    }
    code = "\n".join(["import fakehost.ops", *(step[s] for s in steps.split()), "print(fakehost.ops.decode(1, 2))"])
    assert fake_host.says(code) == served


def test_a_wrapper_on_top_is_left_alone(fake_host: FakeHost) -> None:
    fake_host.write("wrapping.py", WRAP["wrapt"])
    code = """
    mla_patch.apply("ops")
    import fakehost.ops, wrapping
    top = wrapping.wrap()
    from fakehost.caller import run
    print(run())
    mla_patch.restore()
    print(fakehost.ops.decode is top, run())
    mla_patch.apply("ops")
    print(fakehost.ops.decode is top, run(), state("ops"))
    """
    assert fake_host.says(code).splitlines() == [
        "wrapped ours",
        "True wrapped host",
        "True wrapped ours applied",
    ]


@pytest.mark.parametrize("before", [True, False], ids=["patched by name", "patched by another feature"])
def test_an_entry_point_that_wraps_another_of_its_name(before: bool, fake_host: FakeHost) -> None:
    """Two entry points called decode, one around the other: each feature has its own."""
    fake_host.write(
        "fakehost/outer.py",
        """
        import functools
        from fakehost import ops

        @functools.wraps(ops.decode)
        def decode(q, kv, scale=1.0):
            return "outer " + ops.decode(q, kv, scale)
        """,
    )
    fake_host.plug("""
    def serve_outer(call):
        return "our outer"

    OUTER = target("fakehost.outer", "decode", ("q", "kv", "scale"), decode_call, "serve_outer")
    FEATURES = [feature("ops", DECODE), feature("outer", OUTER)]
    """)
    first, second = ("ops", "outer") if before else ("outer", "ops")
    code = f"""
    mla_patch.apply("{first}")
    mla_patch.apply("{second}")
    import fakehost.outer as o
    print(o.decode(1, 2), o.ops.decode(1, 2), row("ops")["served"], row("outer")["served"])
    mla_patch.restore("outer")
    print(o.decode(1, 2), o.ops.decode(1, 2))
    """
    assert fake_host.says(code).splitlines() == ["our outer ours 1 1", "outer ours ours"]


def test_two_features_on_one_entry_point(fake_host: FakeHost) -> None:
    """The one that came last serves; each restores its own, in either order."""
    fake_host.plug("""
    def serve_second(call):
        return "second"

    SECOND = target("fakehost.ops", "decode", ("q", "kv", "scale"), decode_call, "serve_second")
    FEATURES = [feature("ops", DECODE), feature("second", SECOND)]
    """)
    code = """
    from fakehost.caller import run
    for order in (("ops", "second"), ("second", "ops")):
        mla_patch.apply("ops")
        mla_patch.apply("second")
        print(run(), row("ops")["served"], row("second")["served"])
        for name in order:
            mla_patch.restore(name)
            print(run())
    print(left())
    """
    assert fake_host.says(code).splitlines() == [
        "second 0 1", "second", "host",
        "second 0 3", "ours", "host", "[]",
    ]  # fmt: skip


def test_a_wrapper_from_before_is_named_and_is_no_drift(fake_host: FakeHost) -> None:
    """The source is what was reviewed; what stands there is a plugin's, with other parameters or none."""
    fake_host.write("plugin.py", PLUGIN_ON_TOP)
    code = """
    import plugin
    ops, kernels = plugin.ops, plugin.fakehost.kernels
    for top in (plugin.closure(ops.decode), plugin.Caller(ops.decode), plugin.Caller(ops.decode).__call__):
        ops.decode = top
        mla_patch.apply("ops")
        print(state("ops"), ops.decode is top)
        mla_patch.restore("ops")
    kernels.indices = plugin.same
    mla_patch.apply("kernel")
    print(state("kernel"))
    """
    done = fake_host.run(code)
    told = "refused: fakehost.ops.decode was wrapped or replaced by {} before we patched it True"
    names = ["plugin:closure.<locals>.by_closure", "an instance of plugin:Caller", "plugin:Caller.__call__"]
    assert done.stdout.splitlines() == [
        *map(told.format, names),
        "refused: fakehost.kernels.indices was wrapped or replaced by plugin:same before we patched it",
    ], done.stderr


# --- ours is displaced, and put back


PLUGIN_ON_TOP = """
    import functools, fakehost.ops as ops, fakehost.layers, fakehost.kernels

    def same(q, kv, scale=1.0):
        return "theirs"

    def other(*args, **kwargs):
        return "theirs"

    inner = ops.decode  # kept as wrappers often keep it, by a global name

    def by_name(*args, **kwargs):
        return "theirs, " + inner(*args, **kwargs)

    def closure(inner):
        def by_closure(*args, **kwargs):
            return "theirs, " + inner(*args, **kwargs)
        return by_closure

    class Caller:
        def __init__(self, inner):
            self.inner = inner
        def __call__(self, *args, **kwargs):
            return "theirs, " + self.inner(*args, **kwargs)

    class Opaque:
        def __init__(self, inner):
            self.table = {"inner": [inner]}
        def __call__(self, *args, **kwargs):
            return "theirs, " + self.table["inner"][0](*args, **kwargs)
"""


def test_displaced_and_put_back(fake_host: FakeHost) -> None:
    """Another plugin's setattr on the entry point: the state says so, whatever its signature, and apply() undoes it."""
    fake_host.write("plugin.py", PLUGIN_ON_TOP)
    code = """
    mla_patch.apply()
    import fakehost.caller as c, plugin
    ops = plugin.ops
    for theirs in (plugin.same, plugin.other, print, None):
        ours = ops.decode
        ops.decode = theirs
        told = row("ops")
        print(told["state"], told["reason"], told["targets"][0]["replaced_by"], row("kernel")["state"], sep="; ")
        mla_patch.apply()
        told = row("ops")
        print(ops.decode(1, 2), c.run(), told["state"], told["reason"], told["targets"][0]["replaced_by"], sep="; ")
    mla_patch.restore()
    print(ops.decode, c.run(), left())
    """
    done = fake_host.run(code)
    again = "ours; ours; applied; ; fakeplug:serve"
    assert done.stdout.splitlines() == [
        "displaced; fakehost.ops.decode is plugin:same; plugin:same; applied",
        again,
        "displaced; fakehost.ops.decode is plugin:other; plugin:other; applied",
        again,
        "displaced; fakehost.ops.decode is an instance of builtins:builtin_function_or_method; "
        "an instance of builtins:builtin_function_or_method; applied",
        again,
        "displaced; fakehost.ops.decode is nothing; None; applied",
        again,
        # each was put where the one before it had been
        "None host []",
    ], done.stderr
    asked = "mla-patch: ops@fakehost (MLA_PATCH_OPS=on, apply()) is displaced"
    said = [line for line in done.stderr.splitlines() if line.startswith("mla-patch: ")]
    assert [line for line in said if asked in line] == []  # a default never warns
    assert said == [
        "mla-patch: fakehost.ops.decode was plugin:same; our code is back in place",
        "mla-patch: fakehost.ops.decode was plugin:other; our code is back in place",
        "mla-patch: fakehost.ops.decode was an instance of builtins:builtin_function_or_method; "
        "our code is back in place",
        "mla-patch: fakehost.ops.decode was nothing; our code is back in place",
    ]


def test_a_wrapper_that_can_be_seen_to_call_ours_displaces_nothing(fake_host: FakeHost) -> None:
    """With functools.wraps or without; apply() leaves it where it is."""
    fake_host.write("plugin.py", PLUGIN_ON_TOP)
    code = """
    mla_patch.apply("ops")
    import plugin
    ops, ours = plugin.ops, plugin.inner
    @plugin.functools.wraps(ours)
    def wraps(*args, **kwargs):
        return "theirs, " + ours(*args, **kwargs)
    partial = plugin.functools.partial(ours)
    call = plugin.Caller(ours).__call__
    for top in (plugin.by_name, plugin.closure(ours), plugin.Caller(ours), call, wraps, partial):
        ops.decode = top
        mla_patch.apply("ops")
        print(ops.decode is top, ops.decode(1, 2), state("ops"), row("ops")["targets"][0]["replaced_by"], sep="; ")
    """
    over = "over fakeplug:serve"
    assert fake_host.says(code).splitlines() == [
        f"True; theirs, ours; applied; plugin:by_name {over}",
        f"True; theirs, ours; applied; plugin:closure.<locals>.by_closure {over}",
        f"True; theirs, ours; applied; an instance of plugin:Caller {over}",
        f"True; theirs, ours; applied; plugin:Caller.__call__ {over}",
        f"True; theirs, ours; applied; __main__:wraps {over}",
        f"True; ours; applied; an instance of functools:partial {over}",
    ]


def test_a_wrapper_that_cannot_be_seen_through_is_believed_once_calls_arrive(fake_host: FakeHost) -> None:
    fake_host.write("plugin.py", PLUGIN_ON_TOP)
    code = """
    mla_patch.apply("ops")
    import plugin
    ops = plugin.ops
    del plugin.inner  # else calls may come by that name
    ops.decode = plugin.Opaque(ops.decode)
    print(state("ops"))
    print(ops.decode(1, 2), state("ops"))
    import fakehost.caller as c
    ops.decode = c.decode = plugin.other  # another one
    print(state("ops"))
    c.run()
    states("ops")
    """
    done = fake_host.run(code)
    told = "fakehost.ops.decode is an instance of plugin:Opaque"
    assert done.stdout.splitlines() == [
        f"displaced: {told}",
        f"theirs, ours applied: {told}; calls still reach our code",
        "displaced: fakehost.ops.decode is plugin:other",
        "displaced",
    ], done.stderr
    asked = "mla-patch: ops@fakehost (MLA_PATCH_OPS=on, apply()) is displaced"
    assert done.stderr.splitlines() == [f"{asked}: {told}", f"{asked}: fakehost.ops.decode is plugin:other"]


def test_every_place_is_asked(fake_host: FakeHost) -> None:
    """Names of callers, class attributes, methods and kernels; what nobody can come by is no place."""
    code = """
    import fakehost.caller as c  # before ours, so that its names are places, too
    mla_patch.apply()
    import fakehost.layers as layers, fakehost.kernels as kernels
    def theirs(*args, **kwargs): return "theirs"
    class Theirs:
        def __getitem__(self, grid): return theirs
    def told(*names): print(*(state(name) for name in names), sep="; ")
    c.decode = c.Static.decode = layers.Backend.forward = theirs
    kernels.indices = c.indices = Theirs()
    layers.Tools.plan = staticmethod(theirs)
    told("ops", "method", "kernel", "tools")
    mla_patch.apply()
    told("ops", "method", "kernel", "tools")
    print(serves())
    del c.decode
    class Backend: pass
    layers.Backend = Backend
    told("ops", "method")
    mla_patch.restore()
    print(c.Static.decode(), c.indices[(1,)](), layers.Tools.plan(1), sys.modules["fakehost.ops"].decode(1, 2))
    """
    done = fake_host.run(code)
    assert done.stdout.splitlines() == [
        "displaced: fakehost.caller.decode is __main__:theirs; fakehost.caller.Static.decode is __main__:theirs; "
        "displaced: fakehost.layers.Backend.forward is __main__:theirs; "
        "displaced: fakehost.kernels.indices is an instance of __main__:Theirs; "
        "fakehost.caller.indices is an instance of __main__:Theirs; "
        "displaced: fakehost.layers.Tools.plan is __main__:theirs",
        "applied; applied; applied; applied",
        "ours",
        "applied; displaced: fakehost.layers.Backend.forward is nothing",
        "theirs theirs theirs host",
    ], done.stderr


@pytest.mark.parametrize("how", ["reloaded", "dropped and imported again"])
def test_a_module_that_is_executed_again(how: str, fake_host: FakeHost) -> None:
    with_edits(fake_host, "feature('ops', DECODE, LIST), feature('method', METHOD), feature('kernel', KERNEL)")
    code = f"""
    mla_patch.apply()
    import fakehost.caller as old
    print(old.run(), state("ops"))
    names = ("fakehost.ops", "fakehost.layers", "fakehost.kernels")
    def again():
        for name in names:
            if {how == "reloaded"}:
                importlib.reload(sys.modules[name])
            else:
                del sys.modules[name]
                importlib.import_module(name)
    for ask in (False, True):  # ours comes back by itself
        again()
        if ask:
            mla_patch.apply()
        ops, layers, kernels = (sys.modules[name] for name in names)
        dst = []
        kernels.indices[(1,)](None, dst, 3)
        print(ops.decode(1, 2), layers.Backend().forward(1), dst, ops.LIST, old.run(), old.Backend().forward(1))
        states("ops", "method", "kernel")
    importlib.reload(old)
    print(old.run(), old.Backend().forward(1), old.launch())
    mla_patch.restore()
    print(old.run(), old.Backend().forward(1), old.launch(), ops.decode(1, 2), ops.LIST)
    """
    assert fake_host.says(code).splitlines() == [
        "ours applied",
        *["ours ours ['ours'] ['ours'] ours ours", "applied applied applied"] * 2,
        "ours ours ours",
        "host host host host []",
    ]


def test_a_module_that_is_gone_is_waited_for(fake_host: FakeHost) -> None:
    code = """
    mla_patch.apply("both")
    import fakehost.more, fakehost.srt.layers.attend as attend
    del sys.modules["fakehost.more"]
    print(state("both"), row("both")["targets"][0]["replaced_by"])
    import fakehost.more as more
    print(more.prefill(1), attend.attend(1), state("both"))
    del sys.modules["fakehost.more"], sys.modules["fakehost.srt.layers.attend"]
    states("both")
    """
    assert fake_host.says(code).splitlines() == [
        "applied: waiting for fakehost.more None",
        "ours ours applied",
        "armed",
    ]


def test_edits_are_asked(fake_host: FakeHost) -> None:
    """Those that say what they have put where; of the others, whether their module was executed again."""
    fake_host.plug("""
    from mla_patch.hooks.editing import set_methods

    def watch(module):
        owner = module.Base
        before = owner.forward
        def forward(self, q):
            return "edited " + before(self, q)
        return set_methods(owner, {"forward": forward})

    WATCH = Edit("fakehost.layers", "Base.watch", watch)
    FEATURES = [feature("edit", WATCH)]
    """)
    code = """
    mla_patch.apply()
    import fakehost.layers as layers
    print(layers.Other().forward(1), state("edit"), row("edit")["targets"][0]["replaced_by"])
    ours = layers.Base.forward
    def theirs(self, q): return "theirs"
    layers.Base.forward = theirs
    print(state("edit"), row("edit")["targets"][0]["replaced_by"])
    mla_patch.apply()
    print(layers.Other().forward(1), state("edit"))
    mla_patch.restore()
    print(layers.Other().forward(1), state("edit"))
    """
    assert fake_host.says(code).splitlines() == [
        "edited host applied fakeplug:watch",
        "displaced: fakehost.layers.Base.forward is __main__:theirs __main__:theirs",
        "edited theirs applied",
        "theirs off: restored",
    ]


def test_asking_imports_runs_and_raises_nothing(fake_host: FakeHost) -> None:
    """Lazy modules stay unloaded and proxies untouched, while other threads apply and restore."""
    fake_host.write("odd.py", ODD)
    code = """
    import odd, time
    import fakehost.caller as c, fakehost.ops as ops
    mla_patch.apply()
    class Lazy(types.ModuleType):
        def __getattribute__(self, name):
            raise RuntimeError(f"loaded for {name}")
    ours, real = ops.decode, sys.modules["fakehost.kernels"]
    ops.decode = odd.Touchy()
    sys.modules["fakehost.kernels"] = Lazy("fakehost.kernels")
    print(state("ops"), state("kernel"), sep="; ")
    ops.decode, sys.modules["fakehost.kernels"] = ours, real
    states("ops", "kernel")
    begin = time.perf_counter()
    for _ in range(100):
        mla_patch.report()
    print("cheap" if time.perf_counter() - begin < 1 else time.perf_counter() - begin)
    stop, seen, problems = threading.Event(), set(), []
    def watch():
        try:
            while not stop.is_set():
                seen.update(one["state"] for one in mla_patch.report()["features"] if one["host"] == "fakehost")
        except BaseException as problem:
            problems.append(problem)
    watchers = [threading.Thread(target=watch) for _ in range(2)]
    [one.start() for one in watchers]
    for _ in range(4):
        mla_patch.restore()
        mla_patch.apply()
    stop.set()
    [one.join() for one in watchers]
    print(sorted(seen), problems)
    """
    assert fake_host.says(code).splitlines() == [
        "displaced: fakehost.ops.decode is an instance of odd:Touchy; displaced: fakehost.kernels.indices is nothing",
        "applied applied",
        "cheap",
        "['applied', 'armed', 'off'] []",
    ]


def test_strict_does_not_end_an_engine_at_work(fake_host: FakeHost) -> None:
    as_sglang(fake_host)
    code = """
    import sglang, sglang.ops as ops
    ops.decode = len
    print(state(), state())
    """
    env = {"MLA_PATCH_OPS": "on", "MLA_PATCH_STRICT": "1"}
    done = fake_host.run(code, env, door=True)
    told = "displaced: sglang.ops.decode is an instance of builtins:builtin_function_or_method"
    assert (done.returncode, done.stdout.splitlines()) == (0, [f"{told} {told}"]), done.stderr
    said = [line for line in done.stderr.splitlines() if "displaced" in line]
    assert len(said) == 1 and said[0].startswith("mla-patch: ops@sglang (MLA_PATCH_OPS=on, environment) is displaced: ")


def test_an_edit_alone_is_not_the_feature(fake_host: FakeHost) -> None:
    """A launcher imports the module of an experiment's edits and never the one whose function ours replaces."""
    fake_host.plug("""
    def none(module):
        return lambda: None

    STEPS = Edit("fakehost.more", "steps", none)
    FEATURES = [feature("ops", DECODE, STEPS)]
    """)
    code = """
    mla_patch.apply()
    import fakehost.more
    print(state("ops"), [one["replaced_by"] for one in row("ops")["targets"]])
    import fakehost.ops
    print(state("ops"))
    """
    assert fake_host.says(code).splitlines() == [
        "armed: waiting for fakehost.ops [None, 'fakeplug:none']",
        "applied",
    ]


# --- late: who keeps the host's, who keeps ours


KEEPERS = {
    "an instance": ("keep = c.Keeper()", "attribute decode of a Keeper"),
    "a closure": (
        "def make(fn):\n    def inner():\n        return fn(1, 2)\n    return inner\nkeep = make(c.decode)",
        "a function make.<locals>.inner",
    ),
    "a partial": ("import functools; keep = functools.partial(c.decode, 1)", "a partial"),
    "a default": ("def keep(fn=c.decode): pass", "a function keep"),
    "a table": ("class Registry:\n    table = {'d': c.decode}", "a dict"),
    "a list": ("keep = [c.decode]", "a list"),
    "a class elsewhere": ("class Mine:\n    decode = staticmethod(c.decode)", "a class Mine"),
    "a class's function": ("class Mine:\n    decode = c.decode", "a class Mine"),
}


@pytest.mark.parametrize("keeper", KEEPERS)
def test_late_is_refused_and_names_the_holder(keeper: str, fake_host: FakeHost) -> None:
    keep, named = KEEPERS[keeper]
    code = f"import fakehost.caller as c\n{keep}\nmla_patch.apply()\nprint(state('ops'))\nprint(left())"
    reason, left = fake_host.says(code).splitlines()
    assert reason == f"refused: fakehost.ops.decode was imported before and is kept by {named}"
    assert "decode" not in left


METHOD_KEEPERS = {
    "a bound method": ("class Mine:\n    pass\nkeep = Mine(); keep.fn = old.forward", "a method"),
    "a class elsewhere": ("class Mine:\n    forward = Backend.forward", "a class Mine"),
}


@pytest.mark.parametrize("keeper", METHOD_KEEPERS)
def test_a_method_kept_elsewhere_is_late_too(keeper: str, fake_host: FakeHost) -> None:
    fake_host.plug("FEATURES = [feature('layers', METHOD)]")
    keep, named = METHOD_KEEPERS[keeper]
    code = f"from fakehost.layers import Backend\nold = Backend()\n{keep}\nmla_patch.apply()\nprint(state('layers'))"
    assert fake_host.says(code).startswith(
        f"refused: fakehost.layers.Backend.forward was imported before and is kept by {named}"
    )


def test_what_made_a_kernel_may_keep_it(fake_host: FakeHost) -> None:
    """A compiler holds its kernels, and copies of their modules' names, in places that nobody launches from."""
    fake_host.plug("FEATURES = [feature('kernels', KERNEL)]")
    code = """
    import fakehost.kernels as k
    class Compiler:
        def __init__(self, names): self.scope = dict(names)
    compiler = Compiler(vars(k))
    machinery = {names!r}
    for name in machinery: setattr(eval(name), "__module__", "compiler.parts")
    mla_patch.apply()
    print(state("kernels"))
    """.replace("{names!r}", '["type(k.indices)", "Compiler"]')
    assert fake_host.says(code) == "applied"
    theirs = code.replace('"Compiler"]', "]")
    assert fake_host.says(theirs).startswith("refused: fakehost.kernels.indices was imported before and is kept by a ")


HELD = """
    import functools
    from dataclasses import replace
    from mla_patch.compat.types import CachedOn

    def within(fn):
        @functools.wraps(fn)
        def disabled(*args, **kwargs):
            return fn(*args, **kwargs)
        disabled.inner = fn
        return disabled

    def fixed(instance):
        return "it is cast in stone" if getattr(instance, "stone", False) else None

    HELD = CachedOn("fakehost.caller:Keeper.decode", WITHIN, fixed)
    FEATURES = [feature("ops", replace(DECODE, cached_on=(HELD,)))]
"""
SELF_KEPT = "    self.decode = decode"
WRAPPED_KEPT = """from fakeplug import within
                self.decode = within(decode)"""


@pytest.fixture(params=["bare", "wrapped"])
def held_host(request: pytest.FixtureRequest, fake_host: FakeHost) -> FakeHost:
    """Its Keeper has the function in an attribute, bare or in a wrapper of the host's making."""
    fake_host.plug(HELD.replace("WITHIN", "within" if request.param == "wrapped" else "None"))
    if request.param == "wrapped":
        fake_host.change("fakehost/caller.py", "        self.decode = decode", "        self.decode = within(decode)")
        fake_host.change(
            "fakehost/caller.py", "from abc import ABC", "from abc import ABC\nfrom fakeplug import within"
        )
    return fake_host


HELD_STEP = STEP | {
    "build": "import fakehost.caller as c\nclass Special(c.Keeper): pass\nkeep += [c.Keeper(), Special()]\n"
    "had = had or [id(k.decode) for k in keep]"
}


@pytest.mark.parametrize(
    ("order", "served"),
    [
        ("apply build", "ours"),
        ("build apply", "ours"),
        ("build apply apply", "ours"),
        ("build apply build", "ours"),
        ("build apply restore", "host"),
        ("build apply restore build", "host"),
        ("build apply restore apply", "ours"),
        ("apply build restore", "host"),
        ("apply build restore apply", "ours"),
        ("apply build restore build apply restore", "host"),
        ("apply restore build apply", "ours"),
        ("build apply restore apply restore", "host"),
    ],
)
def test_instances_that_keep_the_function(order: str, served: str, held_host: FakeHost) -> None:
    steps = "\n".join(HELD_STEP[step] for step in order.split())
    code = f"""
keep, had = [], []
{steps}
print({{k.decode(1, 2) for k in keep}} == {{{served!r}}}, state("ops").partition(":")[0])
if {order.startswith("build") and served == "host"}:
    print([id(k.decode) for k in keep[:2]] == had)  # the very same objects
"""
    said = held_host.says(code).splitlines()
    assert said[0] == f"True {'applied' if served == 'ours' else 'off'}"
    assert said[1:] in ([], ["True"])


def test_instances_are_not_kept_alive(held_host: FakeHost) -> None:
    code = """
    import weakref
    import fakehost.caller as c
    one, other = c.Keeper(), c.Keeper()
    gone = weakref.ref(one)
    mla_patch.apply("ops")
    print(one.decode(1, 2), state("ops"))
    del one
    print(gone())
    mla_patch.restore()
    print(other.decode(1, 2))
    """
    assert held_host.says(code).splitlines() == ["ours applied", "None", "host"]


def test_instances_that_are_dead_but_not_collected(held_host: FakeHost) -> None:
    code = """
    import gc
    import fakehost.caller as c
    gc.disable()
    keep = c.Keeper()
    keep.ring = keep
    inner = keep.decode
    keep.decode = lambda *args: inner(*args)
    del keep, inner
    mla_patch.apply("ops")
    print(c.Keeper().decode(1, 2), state("ops"))
    """
    assert held_host.says(code) == "ours applied"


def test_instances_that_were_frozen(held_host: FakeHost) -> None:
    """gc.freeze() hides them from every search."""
    code = """
    import gc
    import fakehost.caller as c
    keep = c.Keeper()
    gc.collect(); gc.freeze()
    frozen = gc.get_freeze_count()
    mla_patch.apply("ops")
    print(keep.decode(1, 2), state("ops"), gc.get_freeze_count() >= frozen > 0)
    """
    assert held_host.says(code) == "ours applied True"


NOT_SETTABLE = {
    "another attribute": ("keep.other = keep.decode", "kept by attribute other of a Keeper"),
    "somebody's wrapper": (
        "inner = keep.decode\nkeep.decode = lambda *args: inner(*args)",
        "a living Keeper has a function <lambda> for its decode, not fakehost.ops.decode",
    ),
    "somebody's faithful wrapper": (
        "import functools\ninner = keep.decode\n@functools.wraps(inner)\ndef outer(*args): return inner(*args)\n"
        "keep.decode = outer\ndel inner, outer",
        "a living Keeper has a function decode for its decode, not fakehost.ops.decode",
    ),
    "a partial": (
        "import functools\nkeep.decode = functools.partial(keep.decode)",
        "a living Keeper has a partial for its decode, not fakehost.ops.decode",
    ),
    "somebody else": ("mine = [keep.decode]", "kept by a list"),
    "an instance beyond change": ("keep.stone = True", "kept by attribute decode of a Keeper: it is cast in stone"),
}


@pytest.mark.parametrize("how", NOT_SETTABLE)
def test_instances_are_set_all_or_none(how: str, held_host: FakeHost) -> None:
    spoil, reason = NOT_SETTABLE[how]
    code = f"""
import fakehost.caller as c
good, keep = c.Keeper(), c.Keeper()
{spoil}
had = id(good.decode), id(keep.decode)
mla_patch.apply("ops")
print(state("ops"))
print((id(good.decode), id(keep.decode)) == had, c.run(), left())
"""
    done = held_host.run(code)
    said, untouched = done.stdout.splitlines()
    assert said.startswith("refused: ") and reason in said, said + done.stderr
    assert untouched == "True host []"


def test_a_wrapper_around_ours_is_left_in_place(held_host: FakeHost) -> None:
    code = """
    import functools
    mla_patch.apply("ops")
    import fakehost.caller as c
    keep = c.Keeper()
    inner = keep.decode
    @functools.wraps(inner)
    def outer(*args): return "timed " + inner(*args)
    keep.decode = outer
    mla_patch.restore()
    print(keep.decode(1, 2))
    mla_patch.apply("ops")
    print(keep.decode(1, 2), keep.decode is outer, state("ops"))
    """
    assert held_host.says(code).splitlines() == ["timed host", "timed ours True applied"]


def test_an_instance_that_keeps_ours(fake_host: FakeHost) -> None:
    """It reaches the host after restore(), and ours again after the next apply()."""
    code = """
    mla_patch.apply()
    import fakehost.caller as c
    keep = c.Keeper()
    print(keep.decode(1, 2))
    mla_patch.restore()
    print(keep.decode(1, 2), c.run())
    mla_patch.apply()
    print(keep.decode(1, 2), c.run(), state())
    mla_patch.restore()
    print(keep.decode(1, 2), c.run())
    """
    assert fake_host.says(code).splitlines() == ["ours", "host host", "ours ours applied", "host host"]


def test_names_taken_while_ours_was_there(fake_host: FakeHost) -> None:
    code = """
    import fakehost.ops
    mla_patch.apply()
    import fakehost.caller  # takes ours by name
    mla_patch.restore()
    print(serves(), left())
    """
    assert fake_host.says(code) == "host []"


def test_restore_leaves_what_is_not_ours(fake_host: FakeHost) -> None:
    code = """
    mla_patch.apply()
    import fakehost.caller as c
    def third(*args, **kwargs): return "third"
    c.decode = third
    mla_patch.restore()
    print(c.run(), sys.modules["fakehost.ops"].decode(1, 2), left())
    """
    assert fake_host.says(code) == "third host []"


ODD = """
import sys, types

class Touchy:
    '''Raises whatever it is asked.'''
    def __getattribute__(self, name):
        raise RuntimeError(f"asked for {name}")

class Dictless(types.ModuleType):
    __dict__ = property(lambda self: 1 / 0)

class Sealed(types.ModuleType):
    def __setattr__(self, name, value):
        raise RuntimeError("sealed")

class Meta(type):
    __hash__ = None
    def __getattribute__(cls, name):
        raise RuntimeError(f"asked for {name}")
    def __subclasscheck__(cls, other):
        raise RuntimeError("asked for subclasses")

odd = {name: Touchy() for name in ("odd.touchy", "fakehost.touchy")} | {"odd.dictless": Dictless("odd.dictless")}
nameless = odd["odd.nameless"] = types.ModuleType("odd.nameless")
del nameless.__name__
odd["odd.numbered"] = types.ModuleType("odd.numbered")
vars(odd["odd.numbered"])["__name__"] = 3
sys.modules.update(odd)
sealed = Sealed("sealed")
"""


def test_odd_objects_hold_nothing_up(fake_host: FakeHost) -> None:
    """What other programs keep in sys.modules, in a host's modules and on the heap may raise at any question."""
    fake_host.write("odd.py", ODD)
    code = """
    import odd, fakehost.caller as c
    c.Strange = odd.Meta("Strange", (), {"__module__": "fakehost.caller"})
    keep = odd.Touchy()
    object.__setattr__(keep, "names", [1])
    mla_patch.apply()  # late, so that the heap is searched
    print(serves())
    sys.modules["sealed"] = odd.sealed
    types.ModuleType.__setattr__(odd.sealed, "decode", c.decode)  # taken while ours was there
    types.ModuleType.__setattr__(odd.sealed, "launch", c.indices)
    mla_patch.restore()
    states("ops", "kernel", "method", "tools", "both")
    print(serves())
    """
    done = fake_host.run(code)
    assert done.stdout.splitlines() == ["ours", "off off off off off", "host"], done.stderr
    said = [line for line in done.stderr.splitlines() if line.startswith("mla-patch: ")]
    assert sorted(said) == [f"mla-patch: {name} of sealed could not be restored" for name in ("decode", "launch")]


def test_who_keeps_a_function_is_found_among_odd_objects(fake_host: FakeHost) -> None:
    fake_host.write("odd.py", ODD)
    code = """
    import odd, fakehost.caller as c
    keep = odd.Touchy()
    object.__setattr__(keep, "fn", c.decode)
    mla_patch.apply()
    print(state("ops"))
    """
    told = "refused: fakehost.ops.decode was imported before and is kept by attribute fn of a Touchy"
    assert fake_host.says(code) == told


def test_inherited_methods_leave_their_siblings(fake_host: FakeHost) -> None:
    code = """
    from fakehost.layers import Backend, Base, Other
    old = Backend()
    mla_patch.apply()
    print(old.forward(1), Backend().forward(q=1), Backend.forward(old, 1), Other().forward(1), Base().forward(1))
    mla_patch.restore()
    print(old.forward(1), "forward" in vars(Backend))
    """
    assert fake_host.says(code).splitlines() == ["ours ours ours host host", "host False"]


def test_classes_are_never_replaced(fake_host: FakeHost) -> None:
    """A class that is not its own any more cannot be pickled, and a host's spawn would find out."""
    fake_host.plug("""
    FEATURES = [feature("method", METHOD), feature("whole", target("fakehost.layers", "Backend", (), one_call))]
    """)
    code = """
    import pickle
    import fakehost.layers as layers
    before = layers.Backend
    mla_patch.apply()
    there = pickle.loads(pickle.dumps(layers.Backend()))
    again = pickle.loads(pickle.dumps(layers.Backend))
    print(layers.Backend is before, type(there) is before, there.forward(1), again is before)
    print(state("whole"))
    """
    assert fake_host.says(code).splitlines() == [
        "True True ours True",
        "drifted: fakehost.layers has no Backend",
    ]


def test_what_a_host_copies_and_sends(fake_host: FakeHost) -> None:
    """wrapt's own proxies raise here; functions are copied as themselves, and pickled by name."""
    fake_host.write(
        "spawned.py",
        """
        import copy, multiprocessing, pickle
        import mla_patch
        from fakehost.caller import Keeper, decode, indices

        def call(fn, queue):
            queue.put(fn(1, 2))

        if __name__ == "__main__":
            mla_patch.apply()
            keep = copy.deepcopy({"decode": decode, "indices": indices})
            print(keep["decode"] is decode, keep["indices"] is indices, copy.copy(decode) is decode)
            print(copy.deepcopy(Keeper()).decode(1, 2))
            print(pickle.loads(pickle.dumps(decode)) is decode, pickle.loads(pickle.dumps(indices)) is indices)
            spawn = multiprocessing.get_context("spawn")
            queue = spawn.Queue()
            child = spawn.Process(target=call, args=(decode, queue))
            child.start()
            print(queue.get(), child.join(), child.exitcode)
        """,
    )
    code = """
    import subprocess
    print(subprocess.run([sys.executable, sys.path[1] + "/spawned.py"], capture_output=True, text=True))
    """
    said = fake_host.says(code)
    # the child is a process of its own: nobody has said apply() there
    assert "stdout='True True True\\nours\\nTrue True\\nhost None 0\\n', stderr=''" in said


# --- edits

EDITS = """
def rename(module):
    before = module.LIST[:]
    module.LIST.append("ours")
    def undo():
        module.LIST[:] = before
    return undo

def scale(module):
    module.SCALE *= 2
    def undo():
        module.SCALE /= 2
    return undo

def counting(module, counts):
    def attend(x):
        counts.served += 1
        return "counted"

    module.attend = attend
    return lambda: delattr(module, "attend")


def fails(module):
    raise RuntimeError("boom")

def undo_fails(module):
    def undo():
        raise RuntimeError("boom")
    return undo

LIST = Edit("fakehost.ops", "the list", rename)
SCALE = Edit("fakehost.ops", "the scale", scale, survives_restore=True)
COUNTED = Edit("fakehost.ops", "counted", counting, counts_calls=True)
FAILS = Edit("fakehost.more", "fails", fails)
UNDO_FAILS = Edit("fakehost.ops", "hard to undo", undo_fails)
"""
STORED = "\nLIST = []\nSCALE = 1\n"


def with_edits(fake_host: FakeHost, features: str) -> None:
    ops = fake_host.root / "fakehost/ops.py"
    ops.write_text(ops.read_text() + STORED)
    fake_host.plug(EDITS + f"\nFEATURES = [{features}]\n")


def test_edits_and_their_undo(fake_host: FakeHost) -> None:
    with_edits(fake_host, "feature('ops', DECODE, LIST, SCALE)")
    code = """
    mla_patch.apply()
    import fakehost.ops as ops
    def now(): print(ops.LIST, ops.SCALE, ops.decode(1, 2))
    now()
    mla_patch.apply()
    now()
    mla_patch.restore()
    now()  # what is stored was stored for the new scale
    mla_patch.apply()
    now()
    mla_patch.restore()
    mla_patch.restore()
    now()
    print(row("ops")["targets"][1]["kind"])
    """
    assert fake_host.says(code).splitlines() == [
        "['ours'] 2 ours",
        "['ours'] 2 ours",
        "[] 2 host",
        "['ours'] 2 ours",
        "[] 2 host",
        "edit",
    ]


def test_the_calls_of_an_edit_are_counted(fake_host: FakeHost) -> None:
    with_edits(fake_host, "feature('ops', COUNTED)")
    code = """
    mla_patch.apply()
    import fakehost.ops as ops
    print(ops.attend(1), ops.attend(2), row("ops")["served"])
    """
    assert fake_host.says(code) == "counted counted 2"


def test_an_edit_that_fails_takes_all_back(fake_host: FakeHost) -> None:
    with_edits(fake_host, "feature('ops', DECODE, LIST, SCALE, FAILS)")
    code = """
    mla_patch.apply()
    import fakehost.ops as ops
    print(ops.LIST, ops.SCALE)
    import fakehost.more
    print(ops.LIST, ops.SCALE, ops.decode(1, 2), left(), fakehost.more.prefill(1))
    print(state())
    """
    done = fake_host.run(code)
    assert done.stdout.splitlines() == ["['ours'] 2", "[] 1.0 host [] host", "failed: RuntimeError('boom')"]
    assert done.stderr.startswith("mla-patch: ops@fakehost failed; the engine keeps its own code\nTraceback")


def test_an_undo_that_fails_holds_nothing_up(fake_host: FakeHost) -> None:
    with_edits(fake_host, "feature('ops', DECODE, LIST, UNDO_FAILS)")
    code = """
    mla_patch.apply()
    import fakehost.ops as ops
    mla_patch.restore()
    print(ops.LIST, ops.decode(1, 2), left())
    """
    done = fake_host.run(code)
    assert done.stdout == "[] host []\n"
    assert done.stderr.startswith("mla-patch: the edit hard to undo of fakehost.ops could not be undone\nTraceback")


def test_an_edit_that_lasts_lies_over_a_method_of_ours(fake_host: FakeHost) -> None:
    """What is left of it after restore() is no stranger who keeps the method: ours is applied again, late."""
    fake_host.plug("""
    import functools

    def louder(module):
        from mla_patch.hooks.editing import set_methods

        before = vars(module.Backend).get("forward", module.Backend.forward)

        @functools.wraps(before)
        def forward(self, q):
            return before(self, q) + "!"

        module.Backend.forward = before
        return set_methods(module.Backend, {"forward": forward})

    LOUDER = Edit("fakehost.layers", "louder", louder, survives_restore=True)
    FEATURES = [feature("method", METHOD, LOUDER)]
    """)
    code = """
    import fakehost.layers as layers
    kept = layers.Backend()
    for step in (mla_patch.apply, mla_patch.restore) * 2:
        step("method")
        print(step.__name__, state("method"), kept.forward(1))
    """
    assert fake_host.says(code).splitlines() == [
        "apply applied ours!", "restore off: restored host!", "apply applied ours!", "restore off: restored host!",
    ]  # fmt: skip


def test_the_breaker_leaves_lasting_edits(fake_host: FakeHost) -> None:
    with_edits(
        fake_host,
        "feature('ops', target('fakehost.ops', 'decode', ('q', 'kv', 'scale'), decode_call, 'broken'), LIST, SCALE)",
    )
    code = """
    mla_patch.apply()
    import fakehost.ops as ops
    print(ops.decode(1, 2), ops.decode(1, 2), ops.SCALE, state())
    mla_patch.restore()
    print(ops.decode(1, 2), ops.SCALE, ops.LIST, left())
    """
    done = fake_host.run(code)
    assert done.stdout.splitlines() == ["host host 2 failed: decode: RuntimeError('boom')", "host 2 [] []"]
    assert len(done.stderr.splitlines()) == 1


# --- all or none


DRIFT = {
    "source": ("def attend(q):", "def attend(q, mask=None):"),
    "source, gone": ("def attend(q):", "def attention(q):"),
    "source, order": ("def attend(q):", "def attend(k, q):"),
}


@pytest.mark.parametrize("kind", DRIFT)
def test_drifted_in_source(kind: str, fake_host: FakeHost) -> None:
    fake_host.change("fakehost/srt/layers/attend.py", *DRIFT[kind])
    code = "mla_patch.apply()\nprint(state('both'))\nimport fakehost.more\nprint(left(), fakehost.more.prefill(1))"
    reason, rest = fake_host.says(code).splitlines()
    told = {
        "source": "drifted: fakehost.srt.layers.attend.attend has the new mask",
        "source, gone": "drifted: fakehost.srt.layers.attend has no attend",
        "source, order": "drifted: fakehost.srt.layers.attend.attend has the new k",
    }
    assert (reason, rest) == (told[kind], "[] host")


LIVE = """
def attend(q):
    return "host"

def wrapper(q, mask=None):
    return attend(q)

{last}
"""


@pytest.mark.parametrize(
    "last, reason",
    [
        ("attend, wrapper = wrapper, attend", "fakehost.srt.layers.attend.attend has the new mask"),
        ("del attend", "fakehost.srt.layers.attend.attend does not exist"),
        ("attend = 3", "fakehost.srt.layers.attend.attend has no signature"),
        ("class attend: pass", "fakehost.srt.layers.attend.attend lacks q"),
    ],
)
@pytest.mark.parametrize("order", [("more", "srt.layers.attend"), ("srt.layers.attend", "more")], ids=str)
def test_drifted_at_import_restores_the_first(
    last: str, reason: str, order: tuple[str, str], fake_host: FakeHost
) -> None:
    fake_host.write("fakehost/srt/layers/attend.py", LIVE.format(last=last))
    code = f"""
    mla_patch.apply()
    import fakehost.{order[0]}
    states("both")
    import fakehost.{order[1]}
    print(state("both"))
    print([n for n in left() if "attend" in n or "prefill" in n], fakehost.more.prefill(1), row("both")["served"])
    """
    first, told, rest = fake_host.says(code).splitlines()
    assert first == ("applied" if order[0] == "more" else "drifted")
    assert told.startswith(f"drifted: {reason}")
    assert rest == "[] host 0"


GROUPS = """
from dataclasses import replace
told = []
one, other = (replace(each, group=name) for each, name in ((PREFILL, "one"), (ATTEND, "other")))
FEATURES = [feature("both", one, other, on_decision=lambda mode, asked_for: told.append((mode, asked_for)))]
"""


def test_an_engine_may_import_one_group_of_entry_points_alone(fake_host: FakeHost) -> None:
    fake_host.plug(GROUPS)
    code = """
    mla_patch.apply()
    print(state("both"))
    import fakehost.more
    print(state("both"), fakehost.more.prefill(1), row("both")["served_by"])
    import fakehost.srt.layers.attend
    print(state("both"), fakehost.srt.layers.attend.attend(1), row("both")["served_by"])
    mla_patch.restore()
    print(left(), fakehost.more.prefill(1), fakehost.srt.layers.attend.attend(1))
    """
    assert fake_host.says(code).splitlines() == [
        "armed", "applied ours {'prefill': 1}", "applied ours {'prefill': 1, 'attend': 1}", "[] host host",
    ]  # fmt: skip


@pytest.mark.parametrize("kind", DRIFT)
def test_what_has_drifted_in_one_group_leaves_the_others_to_ours(kind: str, fake_host: FakeHost) -> None:
    fake_host.plug(GROUPS)
    fake_host.change("fakehost/srt/layers/attend.py", *DRIFT[kind])
    code = """
    mla_patch.apply()
    import fakehost.more, fakehost.srt.layers.attend
    print(state("both"), "|", fakehost.more.prefill(1), [n for n in left() if "attend" in n])
    """
    assert fake_host.says(code).startswith("applied: other: fakehost.srt.layers.attend.attend has ") or kind != "source"
    assert fake_host.says(code).endswith(" | ours []")
    fake_host.change("fakehost/more.py", "def prefill(q):", "def prefill(q, more):")
    told = fake_host.says("mla_patch.apply()\nprint(state('both'))")
    assert told.startswith("drifted: ") and "one: fakehost.more.prefill has the new more" in told
    assert "other: fakehost.srt.layers.attend" in told


@pytest.mark.parametrize("order", [("more", "srt.layers.attend"), ("srt.layers.attend", "more")], ids=str)
def test_a_group_that_drifted_at_import_is_the_hosts_alone(order: tuple[str, str], fake_host: FakeHost) -> None:
    fake_host.plug(GROUPS)
    fake_host.write("fakehost/srt/layers/attend.py", LIVE.format(last="attend, wrapper = wrapper, attend"))
    code = f"""
    mla_patch.apply()
    import fakehost.{order[0]}
    import fakehost.{order[1]}
    print(state("both"), "|", fakehost.more.prefill(1), [n for n in left() if "attend" in n])
    mla_patch.restore()
    mla_patch.apply("both")
    print(fakehost.more.prefill(1))
    """
    done = fake_host.run(code)
    reason = "other: fakehost.srt.layers.attend.attend has the new mask"
    assert done.stdout.splitlines() == [f"applied: {reason} | ours []", "ours"]
    assert done.stderr.strip() == f"mla-patch: both@fakehost leaves {reason}"  # where it was asked for


def test_a_feature_is_told_its_flag_whenever_it_is_decided(fake_host: FakeHost) -> None:
    fake_host.plug(GROUPS)
    code = "import fakeplug, fakehost.more\nmla_patch.apply()\nmla_patch.apply('both')\nprint(fakeplug.told)"
    assert fake_host.says(code) == "[('on', False), ('on', True)]"
    assert fake_host.says(code, env={"MLA_PATCH_BOTH": "off"}) == "[('off', True), ('on', True)]"
    fake_host.plug(GROUPS.replace("told.append((mode, asked_for))", "1 / 0"))
    done = fake_host.run("mla_patch.apply()\nimport fakehost.more\nprint(state('both'), fakehost.more.prefill(1))")
    assert done.stdout.strip() == "applied ours" and "both@fakehost raised when it was told its flag" in done.stderr


def test_a_method_that_is_gone(fake_host: FakeHost) -> None:
    fake_host.change("fakehost/layers.py", "def forward", "def run")
    code = "mla_patch.apply()\nprint(state('method'))\nimport fakehost.layers\nprint(state('method'))"
    assert fake_host.says(code).splitlines() == ["armed", "drifted: fakehost.layers.Backend.forward does not exist"]


@pytest.mark.parametrize("threads", [True, False])
def test_all_or_none_while_two_modules_are_imported_at_once(threads: bool, fake_host: FakeHost) -> None:
    """The first module's kernel code is slow to import; meanwhile the second module turns out to have drifted."""
    fake_host.write("fakehost/srt/layers/attend.py", LIVE.format(last="attend = wrapper"))
    fake_host.write("slowkernel.py", "import time\ntime.sleep(0.4)\ndef serve(call): return 'ours'\n")
    fake_host.plug("""
    SLOW = Target("fakehost.more", "prefill", ("q",), bind=one_call, serve="slowkernel:serve")
    FEATURES = [feature("both", SLOW, ATTEND)]
    """)
    code = f"""
    import time
    def load(name): importlib.import_module(name)
    mla_patch.apply()
    first = threading.Thread(target=load, args=("fakehost.more",))
    first.start()
    time.sleep(0.2) if {threads} else first.join()
    load("fakehost.srt.layers.attend")
    first.join()
    states("both")
    print(left(), sys.modules["fakehost.more"].prefill(1))
    """
    assert fake_host.says(code).splitlines() == ["drifted", "[] host"]


# --- failing hooks


@pytest.mark.parametrize("late", [False, True], ids=["early", "late"])
@pytest.mark.parametrize(
    "hook, reason",
    [
        ("bind=one_call, serve='no_such_module:serve'", "ModuleNotFoundError"),
        ("bind=one_call, serve='fakeplug:no_such'", "AttributeError"),
        ("bind=one_call, serve='fakeplug:serve', declines='fakeplug:no_such'", "AttributeError"),
        ("serve='fakeplug:serve'", "TypeError"),
        ("bind=one_call", "ValueError"),
        ("kind='edit'", "TypeError"),
    ],
)
def test_a_hook_that_cannot_be_used(hook: str, reason: str, late: bool, fake_host: FakeHost) -> None:
    fake_host.plug(f"FEATURES = [feature('ops', Target('fakehost.more', 'prefill', ('q',), {hook}), DECODE)]")
    first, second = ("import fakehost.more", "mla_patch.apply()")[:: -1 if not late else 1]
    code = f"{first}\n{second}\nimport fakehost.caller as c\nprint(c.run(), c.fill(1), left())\nprint(state())"
    done = fake_host.run(code)
    served, told = done.stdout.splitlines()
    assert served == "host host []"
    assert told.startswith(f"failed: {reason}(")
    assert done.stderr.count("mla-patch: ") == 1
    assert done.returncode == 0


def test_a_bind_that_breaks(fake_host: FakeHost) -> None:
    fake_host.plug("""
    def bad_bind(q, kv, scale=1.0):
        raise KeyError("boom")
    FEATURES = [feature("ops", target("fakehost.ops", "decode", ("q", "kv", "scale"), bad_bind))]
    """)
    code = """
    mla_patch.apply()
    import fakehost.caller as c
    print(c.run(), c.run(), row("ops")["declined"], state("ops"))
    print({c.run() for _ in range(40)}, state("ops"))
    """
    done = fake_host.run(code)
    reason = "decode: bind: KeyError('boom'), at 32 calls in a row"
    assert done.stdout.splitlines() == [
        """host host {"bind: KeyError('boom')": 2} applied""",
        f"{{'host'}} failed: {reason}",
    ]
    assert done.stderr.splitlines() == [
        f"mla-patch: ops@fakehost stopped; the engine's code serves from now on: {reason}"
    ]


def test_first_calls_that_are_all_declined(fake_host: FakeHost) -> None:
    """One line a process and feature: a warning where it was asked for, else for those who read everything."""
    fake_host.plug("""
    def declines(call):
        return "1 kv heads of 288, not one of 512 + 64"

    MORE = target("fakehost.more", "prefill", ("q",), one_call, declines="fakeplug:declines")
    OPS = target("fakehost.ops", "decode", ("q", "kv", "scale"), decode_call, declines="fakeplug:declines")
    FEATURES = [feature("ops", OPS), feature("more", MORE)]
    """)
    code = """
    logging.basicConfig(format="%(levelname)s %(message)s", level=logging.INFO)
    import mla_patch.startup
    mla_patch.apply("ops")
    mla_patch.startup._get_session().activate({}, "", lambda feature: feature.name == "more")
    import fakehost.caller as c
    for _ in range(200):
        c.run(), c.fill(1)
    """
    said = [line for line in fake_host.run(code).stderr.splitlines() if "first" in line]
    reason = "served none of its first 64 calls: 1 kv heads of 288, not one of 512 + 64"
    assert said == [f"WARNING mla-patch: ops@fakehost {reason}", f"INFO mla-patch: more@fakehost {reason}"]


@pytest.mark.parametrize(
    "declared",
    [
        "Feature('bad', 'fakehost>=1,<2', broken, '', '', '')",
        "feature('bad', DECODE, native=lambda target, version: broken(1))",
        "feature('bad', DECODE, host='fakehost>>1')",
        "Feature('bad', 'fakehost>=1,<2', lambda version: None, '', '', '')",
    ],
)
def test_a_declaration_that_breaks_costs_only_itself(declared: str, fake_host: FakeHost) -> None:
    fake_host.plug(f"FEATURES = [{declared}, feature('both', PREFILL), feature('ops', DECODE)]")
    code = "mla_patch.apply()\nimport fakehost.caller as c\nprint(c.run(), c.fill(1))\nprint(state('bad'))"
    done = fake_host.run(code)
    served, told = done.stdout.splitlines()
    assert served == "ours ours"
    assert told.startswith("failed: ")
    (line,) = done.stderr.splitlines()  # an error is told whoever asked
    assert line.startswith("mla-patch: bad@fakehost (MLA_PATCH_BAD=on, default) is failed: ")


# --- which host, which release


def as_sglang(fake_host: FakeHost, version: str = "0.5.11", metadata: bool = True) -> None:
    """An engine with a reviewed list, which wakes the plugin when it is imported."""
    fake_host.write("sglang/__init__.py", "")
    fake_host.write("sglang/ops.py", "def decode(q, kv, scale=1.0):\n    return 'host'\n")
    if metadata:
        fake_host.install("sglang", version)
    fake_host.plug("""
    OPS = target("sglang.ops", "decode", ("q", "kv", "scale"), decode_call)
    FEATURES = [feature("ops", OPS, host="sglang>=0.5.1,<0.5.24")]
    """)


WAKE = "import sglang\nprint(state())\nfrom sglang.ops import decode\nprint(decode(1, 2), state())"


@pytest.mark.parametrize(
    "version, armed, served",
    [
        ("0.5.11", "armed", "ours applied"),
        ("0.5.11.post3", "armed: sglang 0.5.11.post3 is unreviewed", "ours applied: sglang 0.5.11.post3 is unreviewed"),
        ("0.5.24", "absent: sglang 0.5.24 is outside >=0.5.1,<0.5.24", None),
        ("0.4.6", "absent: sglang 0.4.6 is outside >=0.5.1,<0.5.24", None),
        ("0.5.11+local", "armed: sglang 0.5.11+local is unreviewed", "ours applied: sglang 0.5.11+local is unreviewed"),
        ("0.5.12rc1", "armed: sglang 0.5.12rc1: taken for 0.5.12 by its source", None),
        ("0.5.24rc0", "absent: sglang 0.5.24rc0 is outside >=0.5.1,<0.5.24", None),
        ("0.5.10.post1.dev40+gabc", "armed: sglang 0.5.10.post1.dev40+gabc: taken for 0.5.23 by its source", None),
        ("0.4.9.dev3", "armed: sglang 0.4.9.dev3: taken for 0.5.23 by its source", None),
        ("0.6.0.dev20261130", "armed: sglang 0.6.0.dev20261130: taken for 0.5.23 by its source", None),
        ("banana", "armed: version banana cannot be read; sglang banana: taken for 0.5.23 by its source", None),
        *(
            (said, f"armed: its metadata says {said}, which is not informative; taken for 0.5.23 by its source", None)
            for said in ("0.0.0.dev0", "0.0.0.dev1+gdce8b0606", "0.0.0", "0+unknown")
        ),
    ],
)
def test_releases(version: str, armed: str, served: str | None, fake_host: FakeHost) -> None:
    as_sglang(fake_host, version)
    served = served or (f"host {armed}" if armed.startswith("absent") else f"ours {armed.replace('armed', 'applied')}")
    assert fake_host.says(WAKE, door=True).splitlines() == [armed, served]


def test_skip_the_version_check(fake_host: FakeHost) -> None:
    as_sglang(fake_host, "0.5.99")
    assert fake_host.says(WAKE, {"MLA_PATCH_SKIP_VERSION_CHECK": "1"}, door=True).splitlines() == [
        "armed: outside >=0.5.1,<0.5.24: unreviewed, applied on request",
        "ours applied: outside >=0.5.1,<0.5.24: unreviewed, applied on request",
    ]


def test_skipping_the_version_check_keeps_the_signature_check(fake_host: FakeHost) -> None:
    as_sglang(fake_host, "0.5.99")
    fake_host.write("sglang/ops.py", "def decode(q, kv):\n    return 'host'\n")
    assert fake_host.says(WAKE, {"MLA_PATCH_SKIP_VERSION_CHECK": "1"}, door=True).splitlines() == [
        "drifted: sglang.ops.decode lacks scale",
        "host drifted: sglang.ops.decode lacks scale",
    ]


def test_no_metadata(fake_host: FakeHost) -> None:
    as_sglang(fake_host, metadata=False)
    armed, served = fake_host.says(WAKE, door=True).splitlines()
    assert armed.startswith("armed: sglang comes from PYTHONPATH (")
    assert armed.endswith(") and has no metadata; its version is unknown; taken for 0.5.23 by its source")
    assert served.startswith("ours applied")


def test_an_overlay_over_an_installed_release(fake_host: FakeHost) -> None:
    """The release's metadata is there, but Python imports another folder; its version file tells."""
    as_sglang(fake_host, "0.4.6")
    fake_host.write("overlay/sglang/__init__.py", "")
    fake_host.write("overlay/sglang/ops.py", "def decode(q, kv, scale=1.0):\n    return 'overlay'\n")
    fake_host.write("overlay/sglang/version.py", "__version__ = '0.5.11'\n")
    over = str(fake_host.root / "overlay")
    armed, served = fake_host.says(WAKE, door=True, path=(over,)).splitlines()
    assert armed == f"armed: sglang comes from PYTHONPATH ({over}) and has no metadata"
    assert served.startswith("ours applied")


def test_a_host_that_is_not_installed(fake_host: FakeHost) -> None:
    fake_host.plug("FEATURES = [feature('ops', DECODE, host='nosuchhost>=1,<2')]")
    assert fake_host.says("mla_patch.apply()\nprint(state())") == "absent: nosuchhost is not installed"


def test_looking_for_a_host_that_is_not_there_is_no_event(fake_host: FakeHost) -> None:
    """Engines try each other's packages: even strict, and asked for, nothing is said or ended."""
    as_sglang(fake_host)
    fake_host.plug("FEATURES = [feature('ops', DECODE, host='vllm>=1,<2')]")
    code = """
    try:
        import vllm
    except ImportError:
        print("absent", "pluggy" in sys.modules)
    """
    env = {"MLA_PATCH_OPS": "on", "MLA_PATCH_STRICT": "1"}
    done = fake_host.run(code, env, door=True)
    assert (done.stdout, done.stderr, done.returncode) == ("absent False\n", "", 0)


def test_the_first_import_wakes_and_no_other(fake_host: FakeHost) -> None:
    as_sglang(fake_host)
    code = """
    import json, fakehost
    print(any(n.startswith("mla_patch.") and n.partition(".")[2] not in ("_autostart", "startup", "compat", "imports")
              for n in sys.modules if n in early))
    import sglang
    print(state())
    """
    code = "early = set(sys.modules)\n" + code.replace("\n    ", "\n")
    done = fake_host.run("pass", door=True)
    assert done.stderr == ""
    assert fake_host.says(code, door=True).splitlines() == ["False", "armed"]


def test_without_the_door_a_host_stays_as_it_is(fake_host: FakeHost) -> None:
    as_sglang(fake_host)
    assert fake_host.says("import sglang.ops\nprint(sglang.ops.decode(1, 2))") == "host"


def test_another_home(fake_host: FakeHost) -> None:
    """Of two homes of one entry point, the one that is there is taken."""
    fake_host.plug("""
    OLD = target("fakehost.old.ops", "decode", ("q", "kv"), decode_call)
    FEATURES = [feature("ops", OLD, DECODE)]
    """)
    code = (
        "mla_patch.apply()\nfrom fakehost.caller import run\nprint(run(), [t['module'] for t in row('ops')['targets']])"
    )
    assert fake_host.says(code) == "ours ['fakehost.ops']"


def test_native(fake_host: FakeHost) -> None:
    fake_host.plug("""
    def native(target, version):
        return f"{version} has it" if target.name == "decode" else None
    FEATURES = [feature("ops", DECODE, native=native), feature("more", DECODE, PREFILL, native=native)]
    """)
    code = """
    mla_patch.apply()
    import fakehost.caller as c
    print(c.run(), c.fill(1))
    print(state("ops"))
    print(state("more"))
    mla_patch.apply("ops")
    print(c.run(), state("ops"))
    """
    assert fake_host.says(code).splitlines() == [
        "host ours",
        "native: decode: 1.5 has it",
        "applied: decode: 1.5 has it",
        "ours applied",
    ]
    code = "mla_patch.apply()\nimport fakehost.caller as c\nprint(c.run(), state('ops'))"
    assert fake_host.says(code, {"MLA_PATCH_OPS": "on"}) == "ours applied"


NVML = """
    class NVMLError(Exception): pass
    def nvmlInit(): {init}
    def nvmlShutdown(): pass
    def nvmlDeviceGetCount(): return 1
    def nvmlDeviceGetHandleByIndex(index): return index
    def nvmlDeviceGetName(device): return b"Fake"
    def nvmlDeviceGetCudaComputeCapability(device): return (8, 6)
    def nvmlSystemGetDriverVersion(): return "1.0"
"""
HARDWARE = """
FEATURES = [feature("ops", DECODE, hardware=lambda gpu: f"{gpu.sm} is too small" if gpu.capability < (9, 0) else None)]
"""


def test_hardware_is_told_by_nvml(fake_host: FakeHost) -> None:
    fake_host.write("pynvml.py", NVML.format(init="pass"))
    fake_host.plug(HARDWARE)
    code = "mla_patch.apply()\nimport fakehost.caller as c\nprint(c.run(), state())\nprint('torch' in sys.modules)"
    assert fake_host.says(code).splitlines() == ["host refused: sm_86 is too small", "False"]


NO_NVML = """
    from types import SimpleNamespace
    from mla_patch.compat import gpu
    from mla_patch.compat.types import Gpu
    asked = []
    def tell(index):
        asked.append(index)
        return Gpu("Fake", (8, 6))
    gpu._from_index = tell
    tensor = SimpleNamespace(is_cuda=True, device=SimpleNamespace(index=0))
    import fakehost.ops
    own = fakehost.ops.decode
"""


def without_nvml(fake_host: FakeHost, features: str, init: str = "raise NVMLError('no driver')") -> None:
    """No NVML, and a call object that shows its first tensor."""
    fake_host.write("pynvml.py", NVML.format(init=init))
    fake_host.plug(features)
    fake_host.change("fakeplug.py", '__slots__ = ("args", "options")', '__slots__ = ("args", "options", "q")')
    fake_host.change("fakeplug.py", "self.args = args", "self.args = args; self.q = args[0] if args else None")


def test_hardware_without_nvml_waits_for_a_call(fake_host: FakeHost) -> None:
    without_nvml(fake_host, HARDWARE)
    code = f"""
    {NO_NVML}
    mla_patch.apply("ops")
    import fakehost.caller as c
    print(c.run(), state())
    print(c.decode(tensor, 2), c.run(), c.decode(tensor, 2), state())
    print(fakehost.ops.decode is own, row("ops")["targets"][0]["replaced_by"])
    """
    done = fake_host.run(code)
    assert done.stdout.splitlines() == [
        "ours applied", "host host host refused: sm_86 is too small", "True None",
    ]  # fmt: skip
    assert done.stderr == ("mla-patch: ops@fakehost (MLA_PATCH_OPS=on, apply()) is refused: sm_86 is too small\n")


NATIVE = """
def on_device(gpu):
    return f"not measured on {gpu.sm}" if gpu.capability == UNKNOWN else None

def native(target, version):
    return on_device

def mark(module):
    module.marked = True
    def undo():
        del module.marked
    return undo

EDIT = Edit("fakehost.ops", "mark", mark)
FEATURES = [feature("ops", DECODE, EDIT, native=native)]
"""
WAITS = "applied: NVML reports no GPU: the GPU of the first call decides whether the engine's code is kept"


def test_the_first_call_decides_that_the_hosts_own_is_kept(fake_host: FakeHost) -> None:
    without_nvml(fake_host, NATIVE.replace("UNKNOWN", "(8, 6)"))
    code = f"""
    {NO_NVML}
    mla_patch.apply()
    print(state())
    import fakehost.caller as c
    keep = c.Keeper()
    print(c.run(), asked, fakehost.ops.marked)
    print(c.decode(tensor, 2), c.decode(tensor, 2), keep.decode(tensor, 2), c.run(), state(), asked)
    print(fakehost.ops.decode is own, c.decode is own, hasattr(fakehost.ops, "marked"), left())
    print(row("ops")["served"], row("ops")["declined"], [t["replaced_by"] for t in row("ops")["targets"]])
    mla_patch.apply()  # the device is known by now
    print(c.run(), state())
    mla_patch.apply("ops")
    print(c.decode(tensor, 2), keep.decode(tensor, 2), state())
    """
    assert fake_host.says(code).splitlines() == [
        WAITS,
        "ours [] True",
        "host host host host native: not measured on sm_86 [0]",
        "True True False []",
        "1 {} [None, None]",
        "host native: decode, mark: not measured on sm_86",
        "ours ours applied",
    ]


def test_a_first_call_in_a_group_that_does_not_ask(fake_host: FakeHost) -> None:
    """What the host has of its own at one group of entry points says nothing of another group."""
    without_nvml(
        fake_host,
        """
    from dataclasses import replace

    def on_device(gpu):
        return f"not measured on {gpu.sm}"

    OPS, MORE = replace(DECODE, group="asks"), replace(PREFILL, group="other")
    FEATURES = [feature("ops", OPS, MORE, native=lambda target, version: on_device if target.group == "asks" else None)]
    """,
    )
    code = f"""
    {NO_NVML}
    mla_patch.apply()
    import fakehost.caller as c, fakehost.more
    print(CALL, state())
    """
    other = fake_host.says(code.replace("CALL", "fakehost.more.prefill(tensor), fakehost.more.prefill(tensor)"))
    assert other == "ours ours applied"
    asking = fake_host.says(code.replace("CALL", "c.decode(tensor, 2), fakehost.more.prefill(tensor)"))
    assert asking == "host host native: not measured on sm_86"


def test_the_first_call_decides_that_ours_serves(fake_host: FakeHost) -> None:
    without_nvml(fake_host, NATIVE.replace("UNKNOWN", "(8, 0)"))
    code = f"""
    {NO_NVML}
    import fakehost.caller as c
    mla_patch.apply()
    print(state())
    print(c.decode(tensor, 2), c.decode(tensor, 2), state(), asked)
    print(fakehost.ops.decode._self_entry.switch.fast_path)  # nothing is asked of a call any more
    """
    assert fake_host.says(code).splitlines() == [WAITS, "ours ours applied [0]", "True"]


@pytest.mark.parametrize(
    ("features", "state"),
    [
        (NATIVE.replace("UNKNOWN", "(8, 9)"), "native: not measured on sm_89"),
        (HARDWARE.replace("< (9, 0)", "!= (8, 6)"), "refused: sm_89 is too small"),
    ],
    ids=["native", "hardware"],
)
def test_the_first_calls_gpu_goes_before_what_nvml_said(features: str, state: str, fake_host: FakeHost) -> None:
    """NVML tells of sm_86, on which ours serves; the engine then runs on another GPU."""
    without_nvml(fake_host, features, "pass")
    code = f"""
    {NO_NVML}
    gpu._from_index = lambda index: Gpu("Another", (8, 9))
    mla_patch.apply()
    import fakehost.caller as c
    print(c.run(), state())
    print(c.decode(tensor, 2), state())
    """
    assert fake_host.says(code).splitlines() == ["ours applied", f"host {state}"]


def test_what_is_asked_for_waits_for_no_gpu(fake_host: FakeHost) -> None:
    without_nvml(fake_host, NATIVE.replace("UNKNOWN", "(8, 6)"))
    code = f"""
    {NO_NVML}
    import fakehost.caller as c
    {{}}
    mla_patch.apply("ops")
    print(state(), row("ops")["source"], c.decode(tensor, 2), state())
    """
    for before in ("", "mla_patch.apply()"):
        assert fake_host.says(code.format(before)) == "applied apply() ours applied"


def test_nvml_decides_at_import(fake_host: FakeHost) -> None:
    fake_host.write("pynvml.py", NVML.format(init="pass"))
    fake_host.plug(NATIVE.replace("UNKNOWN", "(8, 6)"))
    code = "mla_patch.apply()\nimport fakehost.caller as c\nprint(c.run(), state())"
    assert fake_host.says(code).startswith("host native: decode, mark: not measured on sm_86")


# --- what is said, and to whom


def unsatisfied(fake_host: FakeHost, kind: str) -> str:
    """A feature of sglang's that cannot be had; returns the state."""
    as_sglang(fake_host, "0.5.24" if kind == "absent" else "0.5.11")
    if kind == "drifted":
        fake_host.write("sglang/ops.py", "def decode(q):\n    return 'host'\n")
    if kind == "drifted live":
        fake_host.write(
            "sglang/ops.py", "def decode(q, kv, scale=1.0):\n    return 'host'\ndecode = lambda q: 'host'\n"
        )
    if kind == "failed":
        fake_host.change("fakeplug.py", 'serve=f"fakeplug:{serve}"', 'serve="fakeplug:none"')
    if kind == "refused":
        fake_host.write("pynvml.py", NVML.format(init="pass"))
        fake_host.change("fakeplug.py", 'host="sglang>=0.5.1,<0.5.24"', 'host="sglang>=0.5.1,<0.5.24", hardware=str')
    return kind.split()[0]


UNSATISFIED = ["absent", "drifted", "drifted live", "refused", "failed"]
ENGINE = """
import sglang
print("imported")
import sglang.ops
print("imported", sglang.ops.decode(1) if "drifted" in state() else "")
import sglang.ops
states("ops")
"""


@pytest.mark.parametrize("kind", UNSATISFIED)
def test_asked_for_and_not_had_warns_once(kind: str, fake_host: FakeHost) -> None:
    state = unsatisfied(fake_host, kind)
    done = fake_host.run(ENGINE, {"MLA_PATCH_OPS": "on"}, door=True)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, state)
    told = [line for line in done.stderr.splitlines() if line.startswith("mla-patch: ")]
    assert len(told) == 1
    if state == "failed":
        assert told[0] == "mla-patch: ops@sglang failed; the engine keeps its own code"
    else:
        assert told[0].startswith(f"mla-patch: ops@sglang (MLA_PATCH_OPS=on, environment) is {state}: ")
        assert len(done.stderr.splitlines()) == 1


@pytest.mark.parametrize("kind", UNSATISFIED)
def test_a_default_never_warns_or_ends_anything(kind: str, fake_host: FakeHost) -> None:
    state = unsatisfied(fake_host, kind)
    done = fake_host.run(ENGINE, {"MLA_PATCH_STRICT": "1"}, door=True)
    assert (done.returncode, done.stdout.splitlines()[-1]) == (0, state)
    if kind != "failed":  # an error of ours is told whoever asked
        assert done.stderr == ""


@pytest.mark.parametrize("kind", UNSATISFIED)
def test_strict_ends_the_process_with_the_reason(kind: str, fake_host: FakeHost) -> None:
    state = unsatisfied(fake_host, kind)
    env = {"MLA_PATCH_OPS": "on", "MLA_PATCH_STRICT": "1"}
    done = fake_host.run(ENGINE, env, door=True)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith(
        f"mla-patch: ops@sglang (MLA_PATCH_OPS=on, environment) is {state}: "
    )
    # when the host imports the target, not before; a host that we do not know has no such moment
    assert done.stdout == ("" if kind == "absent" else "imported\n")


@pytest.mark.parametrize("value", ["on", "off", None])
def test_strict_is_content_with_what_it_asked_for(value: str | None, fake_host: FakeHost) -> None:
    as_sglang(fake_host)
    said = fake_host.says(WAKE, {"MLA_PATCH_OPS": value, "MLA_PATCH_STRICT": "1"}, door=True).splitlines()
    off = "off: MLA_PATCH_OPS=off (environment)"
    assert said == ([off, f"host {off}"] if value == "off" else ["armed", "ours applied"])


@pytest.mark.parametrize(
    "name, value, told",
    [
        ("MLA_PATCH_OSP", "on", "MLA_PATCH_OSP is not a variable of mla-patch; did you mean MLA_PATCH_OPS?"),
        ("MLA_PATCH_OPS", "onn", "MLA_PATCH_OPS=onn: expected one of on, off; did you mean on?"),
        ("MLA_PATCH_AB", "blocks=2", "MLA_PATCH_AB=blocks=2: 'blocks' is not one of block, ratio, seed,"),
    ],
)
def test_bad_flags_are_told_once_when_a_host_appears(name: str, value: str, told: str, fake_host: FakeHost) -> None:
    as_sglang(fake_host)
    for code in (ENGINE, "mla_patch.apply()\nmla_patch.apply()"):
        done = fake_host.run(code, {name: value}, door=True)
        assert done.returncode == 0
        assert len(done.stderr.splitlines()) == 1
        assert done.stderr.startswith(f"mla-patch: {told}")
    assert fake_host.says("import json; print(1)", {name: value}, door=True) == "1"

    done = fake_host.run(ENGINE, {name: value, "MLA_PATCH_STRICT": "1"}, door=True)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"mla-patch: {told}")


def test_a_bad_value_is_refused_and_the_rest_goes_on(fake_host: FakeHost) -> None:
    done = fake_host.run(
        "mla_patch.apply()\nimport fakehost.caller as c\nprint(c.run(), c.fill(1), state())", {"MLA_PATCH_OPS": "maybe"}
    )
    assert done.stdout.startswith("host ours refused: MLA_PATCH_OPS=maybe: expected one of on, off")


@pytest.mark.parametrize("mode", ["ab", "shadow", "ab+shadow"])
def test_no_experiment_without_an_arm_of_the_hosts(mode: str, fake_host: FakeHost) -> None:
    done = fake_host.run(
        "mla_patch.apply()\nimport fakehost.caller as c\nprint(c.run(), state())", {"MLA_PATCH_OPS": mode}
    )
    problem = f"MLA_PATCH_OPS={mode}: there is no host arm to compare with; expected one of on, off"
    assert done.stdout == f"host refused: {problem}\n"
    assert len(done.stderr.splitlines()) == 1


# --- threads


def test_modules_imported_by_many_threads(fake_host: FakeHost) -> None:
    code = """
    names = ["fakehost.ops", "fakehost.more", "fakehost.kernels", "fakehost.layers", "fakehost.srt.layers.attend",
             "fakehost.caller"]
    gate = threading.Barrier(2 * len(names) + 4)
    errors = []
    def go(act, *args):
        gate.wait()
        try:
            act(*args)
        except BaseException as problem:
            errors.append(problem)
    threads = [threading.Thread(target=go, args=(importlib.import_module, name)) for name in names * 2]
    threads += [threading.Thread(target=go, args=(mla_patch.apply,)) for _ in range(4)]
    for thread in threads: thread.start()
    for thread in threads: thread.join(30)
    print(errors, any(thread.is_alive() for thread in threads))
    mla_patch.apply()
    print(serves())
    states("ops", "kernel", "method", "tools", "both")
    mla_patch.restore()
    print(serves(), left())
    """
    said = fake_host.says("mla_patch.apply()\n" + code.replace("\n    ", "\n")).splitlines()
    assert said == ["[] False", "ours", "applied applied applied applied applied", "host []"]


def test_apply_and_restore_by_many_threads(fake_host: FakeHost) -> None:
    code = """
    import random
    import fakehost.caller
    errors = []
    def work(seed):
        choose = random.Random(seed)
        try:
            for _ in range(20):
                choose.choice([mla_patch.apply, mla_patch.restore])()
                fakehost.caller.run_all()
        except BaseException as problem:
            errors.append(problem)
    sys.setswitchinterval(1e-5)
    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads: thread.start()
    for thread in threads: thread.join(30)
    print(errors)
    mla_patch.apply()
    print(serves())
    mla_patch.restore()
    print(serves(), left())
    """
    assert fake_host.says(code).splitlines() == ["[]", "ours", "host []"]


def test_a_module_that_another_thread_is_importing(fake_host: FakeHost) -> None:
    """It is there, but half made: what it lacks yet has not drifted."""
    fake_host.write("gate.py", "import threading\nentered, go_on = threading.Event(), threading.Event()\n")
    ops = fake_host.root / "fakehost/ops.py"
    ops.write_text("import gate\ngate.entered.set()\ngate.go_on.wait(5)\n" + ops.read_text())
    code = """
    import gate
    mla_patch.report()
    thread = threading.Thread(target=importlib.import_module, args=("fakehost.ops",))
    thread.start()
    gate.entered.wait()
    threading.Timer(0.2, gate.go_on.set).start()
    mla_patch.apply()
    thread.join()
    from fakehost.caller import run
    print(run(), state())
    """
    assert fake_host.says(code) == "ours applied"


def test_two_entry_points_of_one_name(fake_host: FakeHost) -> None:
    """They are no alternatives: both are taken, given back and taken again."""
    fake_host.write("fakehost/again.py", "def decode(q, kv, scale=1.0):\n    return 'host'\n")
    fake_host.plug(
        "from dataclasses import replace\n"
        "FEATURES = [feature('twice', DECODE, replace(DECODE, module='fakehost.again', entry='decode, again'))]"
    )
    code = """
    import fakehost.again, fakehost.ops
    def both():
        print(fakehost.ops.decode(1, 2), fakehost.again.decode(1, 2), state("twice"))
    for step in (mla_patch.apply, mla_patch.restore, mla_patch.apply):
        step()
        both()
    """
    assert fake_host.says(code).splitlines() == ["ours ours applied", "host host off: restored", "ours ours applied"]


def test_what_ours_holds_is_in_the_report(fake_host: FakeHost) -> None:
    fake_host.plug("from dataclasses import replace\nFEATURES = [replace(feature('ops', DECODE), memory=lambda: 7)]")
    assert fake_host.says("mla_patch.apply()\nprint(row('ops')['memory'])") == "7"
