"""Command lines are kept without the secrets in them, and without losing what helps to understand a report."""

import time

import pytest

from mla_patch import redact

SECRET = "hunter2-Zq9"  # in no line that comes back


@pytest.mark.parametrize(
    "given, expected",
    [
        (["--api-key", SECRET, "--model", "m"], ["--api-key", "#", "--model", "m"]),
        ([f"--api-key={SECRET}"], ["--api-key=#"]),
        ([f"--api-key={SECRET} and, more"], ["--api-key=#"]),
        (["--api-key", SECRET, SECRET, "-p", "3"], ["--api-key", "#", "#", "-p", "3"]),
        (["--api-key", f"-{SECRET}", "x"], ["--api-key", "#", "#"]),
        (["--admin-api-key", SECRET], ["--admin-api-key", "#"]),
        (["--hf-token", SECRET], ["--hf-token", "#"]),
        (["--HF_TOKEN", SECRET], ["--HF_TOKEN", "#"]),
        (["-apikey", SECRET], ["-apikey", "#"]),
        (["--ssl-keyfile-password", SECRET], ["--ssl-keyfile-password", "#"]),
        (["--client-secret", SECRET], ["--client-secret", "#"]),
        (["--db.credentials", SECRET], ["--db.credentials", "#"]),
        (["--basic-auth", SECRET], ["--basic-auth", "#"]),
        (["--auth-tokens", "12"], ["--auth-tokens", "#"]),
        ([f"API_KEY={SECRET}"], ["API_KEY=#"]),
        (["--header", f"Authorization: Bearer {SECRET}"], ["--header", "Authorization: #"]),
        (["--header", f"X-Api-Key: {SECRET}"], ["--header", "X-Api-Key: #"]),
        ([f"http://user:{SECRET}@host:1/x"], ["http://#@host:1/x"]),
        ([f"--proxy=https://{SECRET}@host"], ["--proxy=https://#@host"]),
        ([f"http://host/?api_key={SECRET}&page=2"], ["http://host/?api_key=#&page=2"]),
        (['{"api_key": "' + SECRET + ' \\" x", "n": 1}'], ['{"api_key": "#", "n": 1}']),
        ([f"curl -H 'Authorization: Bearer {SECRET}' url"], ["curl -H 'Authorization: Bearer #' url"]),
        (["hf_abcdefghijklmnopqrs", "sk-abcdefghijklmnop"], ["#", "#"]),
    ],
    ids=lambda value: " ".join(value)[:40] if "#" not in " ".join(value) else "",
)
def test_secrets_go(given: list[str], expected: list[str]) -> None:
    found = redact.argv(given)
    assert found == [text.replace("#", redact.REDACTED) for text in expected]
    assert SECRET not in " ".join(found)
    assert redact.argv(found) == found  # a report that is read again stays as it is


@pytest.mark.parametrize(
    "line",
    [
        ["python", "-m", "sglang.launch_server", "--model-path", "deepseek-ai/DeepSeek-V3", "--tp", "8"],
        ["--tokenizer-path", "x", "--tokenizer-mode", "auto", "--skip-tokenizer-init", "--trust-remote-code"],
        ["--max-total-tokens", "1000", "--num-reserved-decode-tokens=512", '{"max_tokens": 5}'],
        ["--kv-cache-dtype", "fp8_e4m3", "--port", "30000", "--url", "http://host:80/a?b=c"],
        ["--enable-auth", "--model", "m"],
        ["", "-", "--", "=", "a=b", "--x="],
        [],
    ],
    ids=["server", "tokenizer", "counts", "values", "a switch", "odd", "empty"],
)
def test_the_rest_stays(line: list[str]) -> None:
    assert redact.argv(line) == line


@pytest.mark.parametrize("part", ["a", "key", "tokens-", "key=' ", "://a@", "-key ", "a.key.b ", "key \t"])
def test_a_long_line_takes_time_in_proportion(part: str) -> None:
    start = time.perf_counter()
    redact.argv([part * (200_000 // len(part)) + "!"] * 2)
    assert time.perf_counter() - start < 10  # a tenth of a second on an idle machine; for ever if it were squared
