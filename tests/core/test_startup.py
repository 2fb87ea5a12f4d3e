"""What start-up says: one line when an engine is imported, and what was asked for and cannot be had on any engine."""

from pathlib import Path

import pytest
from fake_host import FakeHost, fake_host
from test_patcher import as_sglang

from mla_patch import __version__

__all__ = ["fake_host"]  # a fixture

OPS = "feature('ops', target('sglang.ops', 'decode', ('q', 'kv', 'scale'), decode_call), host='sglang>=0.5.1,<0.5.24')"


def with_features(fake_host: FakeHost, *features: str, version: str = "0.5.11") -> None:
    as_sglang(fake_host, version)
    fake_host.plug(f"FEATURES = [{', '.join([OPS, *features])}]")


def test_one_line_when_the_engine_is_imported(fake_host: FakeHost, tmp_path: Path) -> None:
    more = "target('sglang.ops', 'decode', ('q', 'kv', 'scale'), decode_call)"
    with_features(
        fake_host,
        f"feature('has', {more}, host='sglang>=0.5.1', native=lambda t, v: 'the engine has it since 0.5.2; and more')",
        f"feature('later', {more}, host='sglang>=9,<10')",
        f"feature('quiet', {more}, host='sglang>=0.5.1')",
    )
    env = {"MLA_PATCH_QUIET": "off", "MLA_PATCH_REPORT": str(tmp_path / "reports")}
    for code in ("import sglang, sglang.ops, threading", "import sglang\nimport mla_patch.startup as s; s.start()"):
        assert fake_host.says(code, env, door="threading" in code) == ""
        (line,) = fake_host.announced
        assert "; native: has (decode: the engine has it since 0.5.2); " in line
        assert "absent: later (sglang 0.5.11 is outside >=9,<10)" in line
        assert "off: quiet (MLA_PATCH_QUIET=off (environment))" in line
        assert line.startswith(f"mla-patch {__version__}, sglang 0.5.11: armed: ops; native: ")
        report = Path(line.partition("; report: ")[2])
        assert report.parent == tmp_path / "reports" and report.name.startswith("sglang-")


def test_the_line_says_that_there_is_no_report_and_no_feature(fake_host: FakeHost) -> None:
    fake_host.write("vllm/__init__.py", "")
    fake_host.write("sglang/__init__.py", "import vllm\n")
    assert fake_host.says("import vllm", door=True) == ""
    (line,) = fake_host.announced
    assert line.startswith(f"mla-patch {__version__}, vllm of unknown version: no feature is for this engine; ")
    assert line.endswith("; no report: MLA_PATCH_REPORT is not set")
    # an engine that imports another: one line, of the one that has features
    assert fake_host.says("import sglang", door=True) == ""
    assert [line.split()[2] for line in fake_host.announced][-1] == "sglang"
    assert fake_host.says("import mla_patch", door=True) == "" and fake_host.announced == []


def test_the_line_promises_no_report_that_is_refused(fake_host: FakeHost, tmp_path: Path) -> None:
    with_features(fake_host)
    tmp_path.chmod(0o777)
    done = fake_host.run("import sglang", {"MLA_PATCH_REPORT": str(tmp_path)}, door=True)
    (line,) = fake_host.announced
    assert "; no report: mode 0777 lets everybody write to it" in line
    assert done.stderr.startswith(f"mla-patch: no report in MLA_PATCH_REPORT={tmp_path}: mode 0777 lets everybody")
    assert len(done.stderr.splitlines()) == 1


LOGGING = """
import io, logging
kept = io.StringIO()
{setup}
import sglang
print(len(kept.getvalue().splitlines()), kept.getvalue().startswith("mla_patch INFO mla-patch {version}, sglang "))
print(logging.getLogger().handlers == handlers, logging.getLogger("mla_patch").handlers == own)
"""
HANDLER = "logging.basicConfig(stream=kept, level={level}, format='%(name)s %(levelname)s %(message)s')"
THEN = "\nhandlers, own = list(logging.getLogger().handlers), list(logging.getLogger('mla_patch').handlers)"


@pytest.mark.parametrize(
    "setup, logged, on_stderr",
    [
        (HANDLER.format(level="logging.INFO"), True, 0),
        (HANDLER.format(level="logging.WARNING"), False, 0),
        ("logging.getLogger('mla_patch').setLevel(logging.WARNING)", False, 0),
        ("sys.stderr = None", False, 0),
        ("", False, 1),
    ],
    ids=["logged at INFO", "filtered at WARNING", "filtered by our logger's level", "no stderr", "no logging yet"],
)
def test_the_line_goes_where_the_engine_logs(setup: str, logged: bool, on_stderr: int, fake_host: FakeHost) -> None:
    """Logger mla_patch, level INFO; nothing is attached to any logger."""
    with_features(fake_host)
    said = fake_host.says(LOGGING.format(setup=setup + THEN, version=__version__), door=True).splitlines()
    assert said == [f"{int(logged)} {logged}", "True True"]
    assert len(fake_host.announced) == on_stderr


def test_the_line_cannot_fail_the_engine(fake_host: FakeHost) -> None:
    with_features(fake_host)
    code = (
        "class Bad:\n    def write(self, text): raise OSError('full')\nsys.stderr = Bad()\nimport sglang\nprint('fine')"
    )
    assert fake_host.run(code, door=True).stdout == "fine\n"


# --- asked for, whatever the engine


@pytest.mark.parametrize("strict", [None, "1"], ids=["lenient", "strict"])
def test_asked_for_on_an_engine_that_has_no_such_feature(strict: str | None, fake_host: FakeHost) -> None:
    """vLLM alone is installed, and the feature is SGLang's."""
    fake_host.write("vllm/__init__.py", "")
    env = {"MLA_PATCH_DECODE": "on", "MLA_PATCH_STRICT": strict}
    done = fake_host.run("import vllm, vllm\nprint(state('decode'))", env, door=True)
    line = "mla-patch: decode@sglang (MLA_PATCH_DECODE=on, environment) is absent: sglang is not installed\n"
    assert done.stderr == line
    told = "" if strict else "absent: sglang is not installed\n"
    assert (done.stdout, done.returncode) == (told, 1 if strict else 0)


@pytest.mark.parametrize("value", [None, "off"])
def test_what_was_not_asked_for_is_not_missed(value: str | None, fake_host: FakeHost) -> None:
    fake_host.write("vllm/__init__.py", "")
    env = {"MLA_PATCH_DECODE": value, "MLA_PATCH_STRICT": "1"}
    assert fake_host.says("import vllm\nprint('fine')", env, door=True) == "fine"


@pytest.mark.parametrize("first", ["vllm", "sglang"])
def test_another_engine_of_this_machine_has_it(first: str, fake_host: FakeHost) -> None:
    with_features(fake_host)
    fake_host.write("vllm/__init__.py", "")
    env = {"MLA_PATCH_OPS": "on", "MLA_PATCH_STRICT": "1"}
    code = f"import {first}, vllm, sglang.ops\nprint(sglang.ops.decode(1, 2), state())"
    assert fake_host.says(code, env, door=True) == "ours applied"


def test_another_engine_of_this_machine_cannot_have_it_either(fake_host: FakeHost) -> None:
    with_features(fake_host, version="0.5.99")
    fake_host.write("vllm/__init__.py", "")
    done = fake_host.run("import vllm\nprint('went on')", {"MLA_PATCH_OPS": "on"}, door=True)
    assert done.stdout == "went on\n"
    assert done.stderr == (
        "mla-patch: ops@sglang (MLA_PATCH_OPS=on, environment) is absent: sglang 0.5.99 is outside >=0.5.1,<0.5.24\n"
    )


def test_a_feature_of_both_engines_is_the_imported_ones(fake_host: FakeHost) -> None:
    """Had on one, it is not missed on the other, whose own release cannot have it."""
    both = "feature('ops', target('vllm.ops', 'decode', ('q',), one_call), host='vllm>=1,<2')"
    with_features(fake_host, both)
    fake_host.write("vllm/__init__.py", "")
    fake_host.install("vllm", "0.9")
    code = "import sglang.ops\nprint(sglang.ops.decode(1, 2))"
    assert fake_host.says(code, {"MLA_PATCH_OPS": "on", "MLA_PATCH_STRICT": "1"}, door=True) == "ours"
    done = fake_host.run("import vllm", {"MLA_PATCH_OPS": "on", "MLA_PATCH_STRICT": "1"}, door=True)
    assert done.returncode == 1 and "ops@vllm (MLA_PATCH_OPS=on, environment) is absent" in done.stderr
