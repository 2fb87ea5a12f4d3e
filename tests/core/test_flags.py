"""Every variable: where its value came from, what it may be, and what is said of one that is misspelt."""

import ast
import re

import pytest
from scratch import ROOT

import mla_patch
from mla_patch import flags
from mla_patch.compat.types import Variable
from mla_patch.eligibility import check
from mla_patch.features import Feature, State


def feature(name: str, host: str = "sglang>=1", **more) -> Feature:
    return Feature(name, host, lambda version: (), why="", upstream="", drop_when="", **more)


DECODE = feature(
    "decode", variables=(Variable("MATH", ("exact", "fast"), "exact", ""), Variable("NOTE", (), "", "")),
    steps=lambda version: (),
)  # fmt: skip
DECODE_VLLM = feature("decode", "vllm>=1")
PREFILL = feature("sparse_prefill", default="off")
ALL = [DECODE, DECODE_VLLM, PREFILL]


def setting(name: str, environ: dict[str, str]) -> tuple[str, str]:
    found = flags.read(environ, ALL)
    assert found.problems == []
    one = found.settings[name]
    return one.value, one.source


DEFAULTS = {
    "MLA_PATCH": "off",
    "MLA_PATCH_STRICT": "off",
    "MLA_PATCH_REPORT": "",
    "MLA_PATCH_AB": "block=64,ratio=0.5,seed=0,warmup=128",
    "MLA_PATCH_SHADOW": "every=64,tolerance=0.02",
    "MLA_PATCH_SKIP_VERSION_CHECK": "off",
    "MLA_PATCH_DECODE": "on",
    "MLA_PATCH_DECODE_MATH": "exact",
    "MLA_PATCH_DECODE_NOTE": "",
    "MLA_PATCH_SPARSE_PREFILL": "off",
}


def test_defaults() -> None:
    found = flags.read({"PATH": "/bin", "MLA": "1", "MLA_PATCHED": "1"}, ALL)
    assert {name: one.value for name, one in found.settings.items()} == DEFAULTS
    assert {one.source for one in found.settings.values()} == {"default"}
    assert not any(one.asked_for for one in found.settings.values())
    assert found.problems == []


def test_a_default_can_be_given_as_a_value() -> None:
    found = flags.read(DEFAULTS, ALL)
    assert {name: one.value for name, one in found.settings.items()} == DEFAULTS
    assert {one.source for one in found.settings.values()} == {"environment"}


@pytest.mark.parametrize(
    "name, raw, value",
    [
        ("MLA_PATCH", "1", "on"),
        ("MLA_PATCH", "yes", "on"),  # the door lets it in
        ("MLA_PATCH", " False ", "off"),
        ("MLA_PATCH_STRICT", "1", "on"),
        ("MLA_PATCH_STRICT", "TRUE", "on"),
        ("MLA_PATCH_STRICT", "0", "off"),
        ("MLA_PATCH_STRICT", "", "off"),
        ("MLA_PATCH_SKIP_VERSION_CHECK", "1", "on"),
        ("MLA_PATCH_REPORT", "/some/Where", "/some/Where"),
        ("MLA_PATCH_DECODE", "on", "on"),
        ("MLA_PATCH_DECODE", " Off", "off"),
        ("MLA_PATCH_DECODE", "0", "off"),
        ("MLA_PATCH_DECODE", "true", "on"),
        ("MLA_PATCH_DECODE", "ab", "ab"),
        ("MLA_PATCH_DECODE", "shadow", "shadow"),
        ("MLA_PATCH_DECODE", "AB+shadow", "ab+shadow"),
        ("MLA_PATCH_DECODE_MATH", "Fast", "fast"),
        ("MLA_PATCH_DECODE_NOTE", "any Text", "any Text"),
        ("MLA_PATCH_AB", "block=4", "block=4"),
        ("MLA_PATCH_AB", " block=8, ratio=0.25,seed=-3,warmup=0 ", "block=8, ratio=0.25,seed=-3,warmup=0"),
        ("MLA_PATCH_SHADOW", "tolerance=1e-3", "tolerance=1e-3"),
    ],
)
def test_values(name: str, raw: str, value: str) -> None:
    assert setting(name, {name: raw}) == (value, "environment")


ARMS = "expected two or more different names joined by +, such as host+patch"


@pytest.mark.parametrize(
    "name, raw, problem",
    [
        ("MLA_PATCH_STRICT", "yess", "expected 1 or 0"),
        ("MLA_PATCH_SKIP_VERSION_CHECK", "2", "expected 1 or 0"),
        ("MLA_PATCH_AB", "arms=host", f"arms=host: {ARMS}"),
        ("MLA_PATCH_DECODE", "shado", "expected one of on, off, ab, shadow, ab+shadow; did you mean shadow?"),
        ("MLA_PATCH_DECODE", "???", "expected one of on, off, ab, shadow, ab+shadow"),
        ("MLA_PATCH_DECODE_MATH", "exat", "expected one of exact, fast; did you mean exact?"),
        ("MLA_PATCH_AB", "blok=3", "'blok' is not one of block, ratio, seed, warmup, arms, draft; did you mean block?"),
        ("MLA_PATCH_AB", "block", "block=: expected a whole number, 1 or more"),
        ("MLA_PATCH_AB", "block=2", "block=2: expected 4 or more: shorter blocks are not compared"),
        ("MLA_PATCH_AB", "block=1.5", "block=1.5: expected a whole number, 1 or more"),
        ("MLA_PATCH_AB", "ratio=half", "ratio=half: expected a number between 0 and 1"),
        ("MLA_PATCH_AB", "block=0", "block=0: expected a whole number, 1 or more"),
        ("MLA_PATCH_AB", "ratio=1", "ratio=1: expected a number between 0 and 1"),
        ("MLA_PATCH_AB", "ratio=nan", "ratio=nan: expected a number between 0 and 1"),
        ("MLA_PATCH_AB", "warmup=-1", "warmup=-1: expected a whole number, 0 or more"),
        ("MLA_PATCH_AB", "arms=host+host+mine", f"arms=host+host+mine: {ARMS}"),
        ("MLA_PATCH_AB", "draft=yes", "draft=yes: expected 1 or 0"),
        ("MLA_PATCH_SHADOW", "every=0", "every=0: expected a whole number, 1 or more"),
        ("MLA_PATCH_SHADOW", "tolerance=nan", "tolerance=nan: expected a number above 0"),
        ("MLA_PATCH_SHADOW", "ever=5", "'ever' is not one of every, tolerance; did you mean every?"),
        (
            "MLA_PATCH_SPARSE_PREFILL",
            "shadow",
            "there is no host arm to compare with; expected one of on, off",
        ),
        ("MLA_PATCH_SPARSE_PREFILL", "of", "expected one of on, off; did you mean off?"),
    ],
)
def test_bad_values_keep_the_default_and_are_told(name: str, raw: str, problem: str) -> None:
    found = flags.read({name: raw}, ALL)
    assert found.problems == [f"{name}={raw}: {problem}"]
    assert found.settings[name].value == DEFAULTS[name]
    assert found.settings[name].problem == found.problems[0]


@pytest.mark.parametrize(
    "name, meant",
    [
        ("MLA_PATCH_DECODES", "MLA_PATCH_DECODE"),
        ("MLA_PATCH_SPARSEPREFILL", "MLA_PATCH_SPARSE_PREFILL"),
        ("MLA_PATCH_DECODE_MATHS", "MLA_PATCH_DECODE_MATH"),
        ("MLA_PATCH_REPORTS", "MLA_PATCH_REPORT"),
        ("MLA_PATCH_SKIP_VERSION", "MLA_PATCH_SKIP_VERSION_CHECK"),
    ],
)
def test_misspelt_names(name: str, meant: str) -> None:
    found = flags.read({name: "1"}, ALL)
    assert found.problems == [f"{name} is not a variable of mla-patch; did you mean {meant}?"]


@pytest.mark.parametrize(
    "name",
    [
        "MLA_PATCH_DECDE", "MLA_PATCH_DECODES", "MLA_PATCH_DEOCDE", "MLA_PATCH_DEC", "MLA_PATCH_decode",
        "mla_patch_decode", "MLA_PATH_DECODE", "MLAPATCH_DECODE", "MLA_PATCH_NO_DECODE", "MLA_PATCH_DISABLE_DECODE",
        "MLA_PATCH_DECODE_OFF", "MLA_PATCH_ENABLE_DECOD",
    ],
)  # fmt: skip
@pytest.mark.parametrize("value", ["off", "on"])
def test_a_misspelt_switch_withholds_what_it_looks_like(name: str, value: str) -> None:
    """It may have been a switch-off. The feature is refused, on every host, by the name that was set."""
    problem = f"{name} is not a variable of mla-patch; did you mean MLA_PATCH_DECODE?"
    for environ in ({name: value}, {name: value, "MLA_PATCH_DECODE": "on"}):
        found = flags.read(environ, ALL)
        assert found.problems == [problem]
        for one in (DECODE, DECODE_VLLM):
            verdict = check(one, found.feature(one), None)
            assert (verdict.state, verdict.reason) == (State.REFUSED, problem)
        assert not found.feature(PREFILL).problem
    # whoever says it in the program, or to a command, has spelt it right
    assert not flags.read({name: value}, ALL, {"decode": "on"}).feature(DECODE).problem


@pytest.mark.parametrize(
    "name",
    ["MLA_PATCH_DECODE_MTH", "MLA_PATCH_REPRT", "MLA_PATCH_STRIC", "MLA_PATCH_DEBUG", "MLA_PATCH_D", "MLA_PATCHED"],
)
def test_what_looks_like_no_switch_withholds_nothing(name: str) -> None:
    found = flags.read({name: "off"}, ALL)
    assert len(found.problems) == (name != "MLA_PATCHED")
    assert not any(setting.problem for setting in found.settings.values())


def test_a_name_that_looks_like_two_switches_withholds_neither() -> None:
    found = flags.read({"MLA_PATCH_ROW": "off"}, [feature("row_a"), feature("row_b")])
    assert len(found.problems) == 1
    assert not any(setting.problem for setting in found.settings.values())


@pytest.mark.parametrize("value", ["of", "offf", "nope", "0ff", "disabel"])
def test_a_switch_off_that_cannot_be_read_refuses_the_feature(value: str) -> None:
    found = flags.read({"MLA_PATCH_DECODE": value}, ALL)
    assert check(DECODE, found.feature(DECODE), None).state is State.REFUSED


def test_a_reader_of_a_plugins_that_raises_anything_costs_its_own_variable() -> None:
    def read(raw: str) -> str:
        raise SystemExit(3)

    mine = feature("mine", variables=(Variable("SIZE", (), "1", "", read),))
    found = flags.read({"MLA_PATCH_MINE_SIZE": "2", "MLA_PATCH_DECODE": "off"}, [mine, DECODE])
    assert found.problems == ["MLA_PATCH_MINE_SIZE=2: SystemExit(3)"]
    assert (found.feature(mine).value, found.feature(DECODE).value) == ("on", "off")


@pytest.mark.parametrize("word", [*mla_patch.OFF, *(f" {word.upper()} " for word in mla_patch.OFF)], ids=repr)
def test_every_word_for_off_is_off_everywhere(word: str) -> None:
    environ = {"MLA_PATCH": word, "MLA_PATCH_DECODE": word, "MLA_PATCH_STRICT": word}
    assert [setting(name, {name: word}) for name in environ] == [("off", "environment")] * 3


def test_the_start_file_knows_the_same_words() -> None:
    """Its line runs at every start of Python, and so can import the list from nowhere."""
    words = re.search(r"not in (\(.*?\))", (ROOT / "mla_patch.pth").read_text())
    assert words and ast.literal_eval(words[1]) == mla_patch.OFF
    assert {"0", "off", "false", "no", "none", "disable", "disabled", "n", "f", ""} <= set(mla_patch.OFF)
    assert not set(mla_patch.OFF) & set(flags.ON)


def test_a_flag_of_a_plugin_that_is_not_there() -> None:
    assert flags.read({"MLA_PATCH_DECODE": "on"}, []).problems[0].startswith("MLA_PATCH_DECODE is not a variable")


def test_precedence() -> None:
    environ = {"MLA_PATCH_DECODE": "off"}
    found = flags.read(environ, ALL, {"decode": "on"})
    assert (found.feature(DECODE).value, found.feature(DECODE).source) == ("on", "command line")
    found = flags.read(environ, ALL, {"decode": "shadow"}, "apply()")
    assert (found.feature(DECODE).value, found.feature(DECODE).source) == ("shadow", "apply()")
    found = flags.read(environ, ALL, {"sparse_prefill": "on"})
    assert (found.feature(DECODE).value, found.feature(DECODE).source) == ("off", "environment")
    assert (found.feature(PREFILL).value, found.feature(PREFILL).source) == ("on", "command line")


@pytest.mark.parametrize("chosen", [{"decode": "off", "decode@sglang": "on"}, {"decode@sglang": "on", "decode": "off"}])
def test_one_host(chosen: dict[str, str]) -> None:
    """A name with its host wins over one without, whichever came first."""
    found = flags.read({}, ALL, chosen)
    assert found.feature(DECODE).value == "on"
    assert found.feature(DECODE_VLLM).value == "off"


def test_one_host_leaves_the_other() -> None:
    found = flags.read({"MLA_PATCH_DECODE": "off"}, ALL, {"decode@vllm": "on"})
    assert (found.feature(DECODE).value, found.feature(DECODE).source) == ("off", "environment")
    assert (found.feature(DECODE_VLLM).value, found.feature(DECODE_VLLM).source) == ("on", "command line")


def test_each_host_has_its_own_default() -> None:
    """One flag, two features of its name: off by default on one host is not off on the other."""
    here, there = feature("decode", default="on"), feature("decode", "vllm>=1", default="off")
    found = flags.read({}, [here, there])
    assert (found.feature(here).value, found.feature(there).value) == ("on", "off")
    found = flags.read({"MLA_PATCH_DECODE": "on"}, [here, there])
    assert (found.feature(here).value, found.feature(there).value) == ("on", "on")


@pytest.mark.parametrize("name, near", [("decod", "decode"), ("decode@sglan", "decode@sglang")])
def test_an_unknown_choice(name: str, near: str) -> None:
    assert flags.read({}, ALL, {name: "on"}).problems == [f"{name!r} is not a feature; did you mean {near}?"]


def test_a_bad_choice() -> None:
    found = flags.read({}, ALL, {"decode": "onn"})
    assert found.problems[0].startswith("MLA_PATCH_DECODE=onn: expected one of")
    assert found.feature(DECODE).problem


def test_the_table_describes_every_variable() -> None:
    table = flags.known(ALL)
    assert set(table) == set(DEFAULTS)
    for known in table.values():
        assert known.values
        assert known.read(known.default) == known.default  # a default is one of the values
