"""Plugins come in by entry point; one that is no good is left out and named, and the others work."""

import dataclasses
import re
from pathlib import Path

import pytest
from fake_host import PLUGIN, FakeHost, fake_host
from scratch import ROOT
from test_patcher import NVML

from mla_patch import plugins
from mla_patch.compat.types import Target
from mla_patch.features import Feature

CPU_SECONDS = 110  # see budget.py

__all__ = ["fake_host"]  # a fixture

SAMPLE = ROOT / "tests" / "sample_plugin"
SERVED = "mla_patch.apply()\nfrom fakehost.caller import run\nprint(run(), *mla_patch.report()['problems'], sep='\\n')"


def add(fake_host: FakeHost, text: str, name: str = "other", value: str = "other") -> None:
    """One more plugin, beside the one that replaces decode."""
    fake_host.write("other.py", PLUGIN.replace("fakeplug:", "other:") + text)
    fake_host.install("other", "1.0", f"{name} = {value}")


@pytest.mark.parametrize(
    "text, reason",
    [
        ("import no_such_module", "ModuleNotFoundError"),
        ("raise RuntimeError('boom')", "RuntimeError('boom')"),
        ("def broken(:", "SyntaxError"),
        ("import sys\nsys.exit(3)", "SystemExit(3)"),
        ("raise GeneratorExit", "GeneratorExit()"),
        ("class Mute(Exception):\n    def __repr__(self): exit(3)\nraise Mute", "Mute, which cannot be printed"),
        ("@hookimpl\ndef mla_patch_features():\n    exit(3)", "SystemExit(3)"),
        ("FEATURES = []\n@hookimpl\ndef mla_patch_arms():\n    exit(3)", "SystemExit(3)"),
        ("FEATURES = []\n@hookimpl\ndef mla_patch_mla_kernels():\n    exit(3)", "SystemExit(3)"),
        ("class FEATURES:\n    def __iter__(self): exit(3)\nFEATURES = FEATURES()", "SystemExit(3)"),
        ("FEATURES = [3]", "TypeError('mla_patch_features offered 3, expected a Feature')"),
        ("FEATURES = 3", "TypeError"),
        ("", "NameError"),
        ("FEATURES = [feature('Upper', PREFILL)]", "expected lower-case letters, digits and underscores"),
        ("FEATURES = [feature('', PREFILL)]", "expected lower-case letters, digits and underscores"),
        ("FEATURES = [feature('with-dash', PREFILL)]", "expected lower-case letters, digits and underscores"),
        ("FEATURES = [feature('ops', DECODE)]", "feature ops@fakehost is declared already"),
        ("FEATURES = [feature('new', PREFILL), feature('new', ATTEND)]", "feature new@fakehost is declared"),
        ("FEATURES = [feature('strict', PREFILL)]", "feature name 'strict' is taken"),
        ("FEATURES = [feature('report', PREFILL)]", "feature name 'report' is taken"),
        (
            "FEATURES = [feature('new', PREFILL)]\n@hookimpl\ndef mla_patch_arms():\n    return ['fast']",
            "TypeError(\"mla_patch_arms offered 'fast', expected an Arm\")",
        ),
        (
            "FEATURES = [feature('new', PREFILL)]\n@hookimpl\ndef mla_patch_arms():\n"
            "    return [Arm('host', 'ops', 'other:serve')]",
            "ValueError(\"arm name 'host' is taken\")",
        ),
        (
            "FEATURES = [feature('new', PREFILL)]\n@hookimpl\ndef mla_patch_featurs():\n    return []",
            "unknown hook 'mla_patch_featurs'",
        ),
        (
            "FEATURES = []\n@hookimpl\ndef mla_patch_arms(what):\n    return []",
            "can not be found in the hookspec",
        ),
    ],
)
def test_a_plugin_that_is_no_good(text: str, reason: str, fake_host: FakeHost) -> None:
    add(fake_host, text)
    names_after = "\nprint(*(row['name'] for row in (mla_patch.apply(), mla_patch.report())[1]['features']))"
    done = fake_host.run(SERVED + names_after)
    served, *problems, names = done.stdout.splitlines()
    assert (served, done.returncode) == ("ours", 0)
    assert problems[0].startswith("plugin other")
    assert reason in "\n".join(problems)
    assert done.stderr.startswith("mla-patch: plugin other ")
    assert done.stderr.count("mla-patch: ") == 1
    names_now = ["both", "decode", "kernel", "kv_cast", "kv_indices", "method", "ops", "sched_meta", "sparse_prefill"]
    names_now += ["tokenspeed", "tools"]
    assert names.split() == names_now


EXITS = """
def leave(*args, **more):
    import sys
    sys.exit(3)

"""


@pytest.mark.parametrize(
    "features",
    [
        "Feature('bad', 'fakehost>=1,<2', leave, '', '', '')",
        "feature('bad', PREFILL, native=leave)",
        "feature('bad', PREFILL, hardware=leave)",
        "feature('bad', PREFILL, native=lambda target, version: leave)",
        "feature('bad', PREFILL, Edit('fakehost.more', 'an edit', leave))",
        "feature('bad', Target('fakehost.more', 'prefill', ('q',), bind=one_call, serve='gone:serve'))",
        "feature('bad', target('fakehost.more', 'prefill', ('q',), one_call, declines='gone:declines'))",
    ],
    ids=["targets", "native", "hardware", "native on a GPU", "edit", "import of serve", "import of declines"],
)
def test_a_declaration_that_exits_costs_its_feature(features: str, fake_host: FakeHost) -> None:
    """The engine goes on, with the other features, and the line says which one and why."""
    fake_host.write("gone.py", "import sys\nsys.exit(3)\n")
    fake_host.write("pynvml.py", NVML.format(init="pass"))
    fake_host.plug(f"{EXITS}FEATURES = [feature('ops', DECODE), {features}]")
    done = fake_host.run(
        "mla_patch.apply()\nimport fakehost.caller as c\nprint(c.run(), c.fill(1), state('ops'), state('bad'))"
    )
    assert (done.stdout, done.returncode) == ("ours host applied failed: SystemExit(3)\n", 0), done.stderr
    told = [line for line in done.stderr.splitlines() if line.startswith("mla-patch: ")]
    assert len(told) == 1 and "bad@fakehost" in told[0] and "failed" in told[0]


@pytest.mark.parametrize("where", ["bind", "declines", "serve"])
def test_a_call_that_exits_costs_its_feature(where: str, fake_host: FakeHost) -> None:
    options = {"bind": "one_call, ", "declines": "one_call, ", "serve": "one_call, 'leave'"}
    options |= {"bind": "leave, ", "declines": "one_call, declines='fakeplug:leave', "}
    fake_host.plug(f"{EXITS}FEATURES = [feature('bad', target('fakehost.more', 'prefill', ('q',), {options[where]}))]")
    code = "mla_patch.apply()\nfrom fakehost.more import prefill\n"
    code += "print({prefill(1) for _ in range(99)}, row('bad')['served'])"
    done = fake_host.run(code)
    assert (done.stdout, done.returncode) == ("{'host'} 0\n", 0), done.stderr
    assert "bad@fakehost" in done.stderr and "SystemExit(3)" in done.stderr


@pytest.mark.parametrize("command", ["doctor", "list"])
def test_commands_outlive_a_plugin_that_exits(command: str, fake_host: FakeHost) -> None:
    add(fake_host, "import sys\nsys.exit(3)")
    fake_host.plug(f"{EXITS}FEATURES = [feature('ops', DECODE), Feature('bad', 'fakehost>=1,<2', leave, '', '', '')]")
    done = fake_host.run(f"from mla_patch.cli.main import main\nsys.exit(main(['{command}', '--json']))")
    assert done.returncode == 1, done.stderr  # a finding
    assert "plugin other (other) was left out: SystemExit(3)" in done.stdout + done.stderr
    assert '"ops"' in done.stdout
    if command == "doctor":
        assert '"reason": "SystemExit(3)"' in done.stdout


def test_what_is_not_a_plugins_exit_passes(fake_host: FakeHost) -> None:
    """A person's Ctrl-C, and the exit of a handler that a signal has started while a plugin was being imported."""
    add(fake_host, "raise KeyboardInterrupt")
    done = fake_host.run(SERVED)
    assert done.returncode != 0 and done.stderr.splitlines()[-1] == "KeyboardInterrupt"
    add(fake_host, "import os, signal, time\nos.kill(os.getpid(), signal.SIGTERM)\ntime.sleep(5)")
    handler = "import signal\ndef handler(number, frame): sys.exit(7)\nsignal.signal(signal.SIGTERM, handler)\n"
    assert fake_host.run(handler + SERVED).returncode == 7


def test_our_hooks_are_those_that_the_package_registers() -> None:
    """``OWN_HOOKS`` stands in where no metadata is: a source tree on PYTHONPATH."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    _, _, section = text.partition("\n[project.entry-points.mla_patch]\n")
    section, _, _ = section.partition("\n[")
    assert dict(re.findall(r'^(\w+) = "([\w.:]+)"$', section, re.MULTILINE)) == plugins.OWN_HOOKS
    hooks = (ROOT / "hooks").glob("*/*.py")
    # one that declares no feature serves another's entry points
    found = {
        f"mla_patch.hooks.{path.parent.name}.{path.stem}"
        for path in hooks
        if "\nFEATURE = Feature(" in path.read_text()
    }
    assert set(plugins.OWN_HOOKS.values()) == found


@pytest.mark.parametrize("value", ["no_such_module", "other:no_such", "other.deeper"])
def test_an_entry_point_that_leads_nowhere(value: str, fake_host: FakeHost) -> None:
    add(fake_host, "FEATURES = []", value=value)
    served, *problems = fake_host.run(SERVED).stdout.splitlines()
    assert served == "ours"
    assert len(problems) == 1 and problems[0].startswith(f"plugin other ({value}) was left out: ")


@pytest.mark.parametrize("offer", ["[]", "None", "(x for x in ())", "()"])
def test_a_plugin_may_offer_nothing(offer: str, fake_host: FakeHost) -> None:
    add(fake_host, f"FEATURES = {offer}")
    assert fake_host.says(SERVED) == "ours"


def test_an_entry_point_may_name_an_object(fake_host: FakeHost) -> None:
    add(
        fake_host,
        """
class Plugin:
    @hookimpl
    def mla_patch_features(self):
        return [feature("filled", PREFILL)]

mine = Plugin()
del mla_patch_features
""",
        value="other:mine",
    )
    code = "mla_patch.apply()\nimport fakehost.caller as c\nprint(c.fill(1), state('filled'), state('ops'))"
    fake_host.plug("FEATURES = [feature('ops', DECODE)]")
    assert fake_host.says(code) == "ours applied applied"


def test_an_object_that_cannot_be_hashed_costs_itself_alone(fake_host: FakeHost) -> None:
    add(fake_host, "class Plugin:\n    __hash__ = None\n\nmine = Plugin()\n", value="other:mine")
    served, *problems = fake_host.run(SERVED).stdout.splitlines()
    assert served == "ours"
    assert problems == ["plugin other (other:mine) was left out: TypeError(\"unhashable type: 'Plugin'\")"]


def test_two_plugins_whose_entry_points_have_one_name(fake_host: FakeHost) -> None:
    """Distributions choose these names alone; neither may vanish."""
    fake_host.plug("FEATURES = [feature('ops', DECODE)]")
    add(fake_host, "FEATURES = [feature('filled', PREFILL)]", name="fakeplug")
    code = "mla_patch.apply()\nimport fakehost.caller as c\nprint(c.run(), c.fill(1), mla_patch.report()['problems'])"
    assert fake_host.says(code) == "ours ours []"


def test_a_strangers_kv_indices_leaves_ours(fake_host: FakeHost) -> None:
    fake_host.plug("FEATURES = [feature('ops', DECODE)]")
    add(fake_host, "FEATURES = [feature('filled', PREFILL)]", name="kv_indices")
    code = "mla_patch.apply()\nprint(*(r['name'] for r in mla_patch.report()['features']))"
    assert fake_host.says(code).split() == [
        "decode", "filled", "kv_cast", "kv_indices", "ops", "sched_meta", "sparse_prefill", "tokenspeed",
    ]  # fmt: skip


def test_plugins_load_when_a_host_appears_and_not_before(fake_host: FakeHost) -> None:
    fake_host.write("sglang/__init__.py", "")
    fake_host.write("fakeplug.py", "print('loaded')\n")
    assert fake_host.says("print('first')\nimport sglang\nimport sglang", door=True) == "first\nloaded"
    assert fake_host.says("print('first')", door=True) == "first"


def test_declaring_imports_neither_host_nor_torch(fake_host: FakeHost) -> None:
    code = (
        "mla_patch.apply()\nprint([n for n in ('torch', 'triton', 'fakehost', 'sglang', 'numpy') if n in sys.modules])"
    )
    assert fake_host.says(code) == "[]"


ARMS = """
from dataclasses import replace

@hookimpl
def mla_patch_arms():
    return [
        Arm("tuned", "ops", "fakeplug:serve_tuned"),
        Arm("picky", "ops@fakehost", "fakeplug:serve_tuned", declines="fakeplug:never"),
        Arm("elsewhere", "kernel", "fakeplug:serve_tuned"),
        Arm("lost", "no_such_feature", "fakeplug:serve_tuned"),
    ]

def serve_tuned(call):
    return "tuned"

def never(call):
    return "never"

def fussy(call):
    return "too small" if call.args[2] < 1 else None

FEATURES = [feature("ops", replace(DECODE, declines="fakeplug:fussy")), feature("kernel", KERNEL)]
"""


def test_arms(fake_host: FakeHost) -> None:
    fake_host.plug(ARMS)
    code = """
    mla_patch.apply()
    import fakehost.caller as c
    site = c.decode._self_entry
    print(sorted(site.arms), mla_patch.report()["problems"])

    class Take:
        def __init__(self, name): self.name = name
        def choose(self, site, call): return self.name

    def take(name): site.switch.set(arms=name and Take(name))
    print(c.run())
    for name in ("host", "patch", "tuned", "picky"):
        take(name)
        print(name, c.run(), c.decode(1, 2, 0.5))
    take(None)
    print(c.run(), row("ops")["served"], row("ops")["declined"])
    """
    done = fake_host.run(code)
    problem = "arm lost was left out: no feature is called no_such_feature"
    assert done.stderr == f"mla-patch: {problem}\n"
    assert done.stdout.splitlines() == [
        f"['patch', 'picky', 'tuned'] ['{problem}']",
        "ours",
        "host host host",
        "patch ours host",
        "tuned tuned host",
        "picky host host",
        "ours 4 {'too small': 2, 'never': 2}",
    ]


# --- the sample plugin, and the page that shows it


def test_the_sample_plugin_serves(fake_host: FakeHost, tmp_path: Path) -> None:
    """From its source folder and its own metadata, with its own kernel, on the fake host's tensors."""
    text = (SAMPLE / "pyproject.toml").read_text()
    entry_points = re.search(r"(?s)\[project.entry-points.mla_patch\]\n(.*?)\n\n", text)
    assert entry_points
    fake_host.install("fakehost_scale_rows", "0.1", entry_points[1].replace('"', ""))
    fake_host.write(
        "fakehost/norm.py",
        """
        def scale_rows(x, weight):
            return x * weight[:, None]
        """,
    )
    code = """
    import torch
    assert "fakehost" not in sys.modules
    mla_patch.apply()
    assert "triton" not in sys.modules
    from fakehost.norm import scale_rows
    x, weight = torch.randn(5, 7), torch.randn(5)
    ours = scale_rows(x, weight)
    print(torch.equal(ours, x * weight[:, None]), row("scale_rows")["served"])
    print(torch.equal(scale_rows(x.t(), weight[:7].repeat(2)[:7]), x.t() * weight[:7].repeat(2)[:7][:, None]))
    print(row("scale_rows")["served"], row("scale_rows")["declined"], state("scale_rows"))
    """
    said = fake_host.says(code, {"TRITON_INTERPRET": "1"}, path=(str(SAMPLE),)).splitlines()
    assert said == ["True 1", "True", "1 {'not contiguous': 1} applied"]


def test_the_sample_plugin_is_short() -> None:
    lines = [line for path in SAMPLE.glob("*.py") for line in path.read_text().splitlines()]
    assert 0 < len(lines) < 40


def test_the_page_shows_the_sample_as_it_is() -> None:
    page = (ROOT / "docs" / "plugins.md").read_text()
    for path in (*SAMPLE.glob("*.py"), SAMPLE / "pyproject.toml"):
        kind = "python" if path.suffix == ".py" else "toml"
        assert f"`{path.name}`" in page
        assert f"```{kind}\n{path.read_text()}```\n" in page


@pytest.mark.parametrize("kind", [Feature, Target])
def test_the_page_names_what_the_class_has(kind: type) -> None:
    page = (ROOT / "docs" / "plugins.md").read_text()
    section = page.partition(f"\n## {kind.__name__}\n")[2].partition("\n## ")[0]
    cells = [line.split("|")[1] for line in section.splitlines() if line.startswith("| `")]
    named = {name for cell in cells for name in re.findall(r"`(\w+)", cell)}
    assert len(named) >= 5
    assert named <= {field.name for field in dataclasses.fields(kind)}


@pytest.mark.parametrize(
    "offer, reason",
    [
        ("['fast']", "TypeError(\"mla_patch_mla_kernels offered 'fast', expected an MlaKernel\")"),
        ("[MlaKernel('mine')]", "ValueError(\"kernel 'mine' has neither decode nor prefill\")"),
        ("[MlaKernel('host', decode='other:decode')]", "ValueError(\"kernel name 'host' is taken\")"),
        (
            "[MlaKernel('tokenspeed_mla', decode='other:decode')]",
            "ValueError(\"kernel name 'tokenspeed_mla' is taken\")",
        ),
        ("[MlaKernel('mine', 'other:decode')] * 2", "ValueError(\"kernel name 'mine' is taken\")"),
    ],
)
def test_an_mla_kernel_that_is_no_good(offer: str, reason: str, fake_host: FakeHost) -> None:
    text = "FEATURES = []\nfrom mla_patch.compat.types import MlaKernel\n@hookimpl\n"
    # asked after ours: plugins go by their names
    add(fake_host, text + f"def mla_patch_mla_kernels():\n    return {offer}", name="zz_other")
    _, *problems = fake_host.run(SERVED).stdout.splitlines()
    assert problems == [f"plugin zz_other was left out: {reason}"]


def test_mla_kernels_are_known_where_the_backend_looks(fake_host: FakeHost) -> None:
    text = "FEATURES = []\nfrom mla_patch.compat.types import MlaKernel\n@hookimpl\n"
    add(fake_host, text + "def mla_patch_mla_kernels():\n    return [MlaKernel('mine', 'other:decode')]")
    code = "mla_patch.report()\nfrom mla_patch.hooks.sglang.edits.mla_kernels import offered\nprint(*offered())"
    assert fake_host.run(code).stdout.split() == ["mine", "tokenspeed_mla"]


def test_every_plugin_is_told_what_all_offer(fake_host: FakeHost) -> None:
    """Once in a process; one that raises costs nobody else anything."""
    begin = "from mla_patch.hookspecs import hookimpl\nFEATURES = []\n@hookimpl\ndef mla_patch_begin(kernels):\n"
    add(
        fake_host, begin + "    print('told', sorted(kernel.name for kernel in kernels))\n    raise OSError('too much')"
    )
    code = "import mla_patch\nprint(mla_patch.report()['problems'])\nmla_patch.report()"
    told, problems = fake_host.run(code).stdout.splitlines()
    assert told == "told ['tokenspeed_mla']"
    assert "plugin other, mla_patch_begin: OSError('too much')" in problems
