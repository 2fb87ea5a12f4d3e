"""Takes secrets out of command lines, which reports keep and people paste into bug reports.

A value is taken for a secret by the name of its option: one that holds "key", "token", "secret", "passw", "credential",
"auth" or "cookie" anywhere, in any case. Not meant are tokenizers, and a number whose name says "tokens".
Whatever has the form of a well-known kind of access token goes too, as does what stands before the @ of a URL. This
errs towards taking too much.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

REDACTED = "<redacted>"

_WORD = r"(?:key|token(?!iz)|secret|passw|passphrase|credential|auth|cookie)"
_SECRET = re.compile(_WORD, re.IGNORECASE)
_COUNTED = re.compile("tokens(?![a-z])", re.IGNORECASE)
# bounded names, begun at their beginning: a command line may have megabytes, and the engine has better things to do
_NAME = r"[\w.-]{1,128}"
_OPTION = re.compile(_NAME)
_WHOLE = re.compile(rf"(?P<name>{_NAME})(?P<sign>\s*[:=]\s*)(?P<value>.+)", re.DOTALL)
# name=value, "name": "value", Name: Bearer value: within one argument, such as JSON or a URL's query
_PAIR = re.compile(
    rf"(?<![\w.-])(?=[\w.-]{{0,120}}?{_WORD})(?P<name>{_NAME})"
    r"(?P<sign>[\"']?\s*[:=]\s*)(?P<scheme>(?:bearer|basic|token)\s+)?"
    r"(?P<value>\"(?:[^\"\\]|\\.)*\"?|'(?:[^'\\]|\\.)*'?|[^\s\"'&,;{}\[\]()]+)",
    re.IGNORECASE,
)
_LOGIN = re.compile(r"(?<=://)[^/\s]+(?=@)")
_KNOWN = re.compile(r"\b(?:hf_|sk-|gh[a-z]_|github_pat_|glpat-|xox[a-z]-|AKIA|eyJ)[\w.-]{12,}")


def argv(arguments: Iterable[str]) -> list[str]:
    """A command line without its secrets, of the same length."""
    found = []
    name, first = "", False  # the option whose values are secret, and whether none has been seen yet
    for text in arguments:
        # a value may begin with one dash, if an option is waiting for it
        if text.startswith("-") and not (first and not text.startswith("--")):
            name = text if _OPTION.fullmatch(text) and _SECRET.search(text) else ""
            first = bool(name)
            found.append(argument(text))
        elif name:
            first = False
            found.append(_hidden(name, text))
        else:
            found.append(argument(text))
    return found


def argument(text: str) -> str:
    """One argument without the secrets that it names itself: ``--api-key=x``, ``KEY=x``, a header, JSON, a URL."""
    whole = _WHOLE.fullmatch(text)
    if whole is not None and _SECRET.search(whole["name"]):
        return f"{whole['name']}{whole['sign']}{_hidden(whole['name'], whole['value'])}"
    text = _PAIR.sub(_hide, text)
    return _KNOWN.sub(REDACTED, _LOGIN.sub(REDACTED, text))


def _hidden(name: str, value: str) -> str:
    rest = _COUNTED.sub("", name)
    return value if value.isdecimal() and rest != name and not _SECRET.search(rest) else REDACTED


def _hide(pair: re.Match[str]) -> str:
    value = pair["value"]
    quote = value[0] if value[0] in "\"'" else ""
    return f"{pair['name']}{pair['sign']}{pair['scheme'] or ''}{quote}{_hidden(pair['name'], value)}{quote}"
