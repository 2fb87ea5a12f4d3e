"""``mla-patch clean``: what --fetch has put into the cache goes, and nothing else."""

import json
from pathlib import Path

import pytest

from mla_patch.cli import main as cli
from mla_patch.drive import sglang_fetch


def test_what_was_fetched_goes_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cache, elsewhere = tmp_path / "cache", tmp_path / "elsewhere"
    monkeypatch.setenv("HOSTS_CACHE", str(cache))
    assert cli.main(["clean"]) == 0
    assert f"nothing to remove in {cache}" in capsys.readouterr().out and not cache.exists()
    elsewhere.mkdir()
    (elsewhere / "kept").write_text("x" * 50)
    for name in ("sglang-0.5.11", "common-cpython-311-0123abcd", ".sglang-0.5.12-tmpx", "sglang-kernel-0.4.5-a5ebe893"):
        (cache / name / "deep").mkdir(parents=True)
        (cache / name / "deep" / "file").write_text("x" * 100)
        (cache / name / "link").symlink_to(elsewhere)
    (cache / ".lock").touch()
    (cache / "sglang-0.5.13").symlink_to(elsewhere)
    (cache / "photos").mkdir()
    assert cli.main(["clean", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert (len(told["removed"]), told["left"]) == (4, ["photos", "sglang-0.5.13"])
    assert 400 <= told["bytes"] < 1000
    assert sorted(path.name for path in cache.iterdir()) == [".lock", "photos", "sglang-0.5.13"]
    assert (elsewhere / "kept").exists()
    (cache / "photos").rmdir()
    (cache / "sglang-0.5.13").unlink()
    (cache / "sglang-0.5.1").mkdir()
    assert cli.main(["clean"]) == 0
    assert f"removed 1 folder, 0 MB, from {cache}" in capsys.readouterr().out and not cache.exists()


def test_a_link_and_a_fetch_under_way_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cache, link = tmp_path / "cache", tmp_path / "link"
    (cache / "sglang-0.5.11").mkdir(parents=True)
    link.symlink_to(cache)
    monkeypatch.setenv("HOSTS_CACHE", str(link))
    assert cli.main(["clean"]) == 2
    assert "is a link" in capsys.readouterr().err
    monkeypatch.setenv("HOSTS_CACHE", str(cache))
    with sglang_fetch._lock(cache):
        assert cli.main(["clean"]) == 2
    assert "a release is being fetched into it" in capsys.readouterr().err and (cache / "sglang-0.5.11").is_dir()


def test_the_names_are_those_that_a_fetch_gives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sglang_fetch, "_pip", lambda *args: None)
    for version in ("0.5.1", "0.5.12.post1", "0.5.23"):
        for folder in sglang_fetch.fetch(version, tmp_path):
            assert sglang_fetch._OURS.fullmatch(folder.name), folder
