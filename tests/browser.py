"""A headless Chromium, driven over the DevTools protocol's pipe: what a page asks for, complains of and draws."""

from __future__ import annotations

import base64
import fcntl
import itertools
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")


def find() -> str | None:
    return next(filter(None, map(shutil.which, NAMES)), None)


def _pipe() -> list[int]:
    """A pipe whose ends are neither 3 nor 4."""
    ends = []
    for end in os.pipe():
        ends.append(fcntl.fcntl(end, fcntl.F_DUPFD_CLOEXEC, 10))
        os.close(end)
    return ends


class Browser:
    """``with Browser(program, profile) as browser: browser.load(page)``; it may ask no server for anything."""

    def __init__(self, program: str, profile: Path, seconds: float = 120) -> None:
        self.requests: dict[str, str] = {}  # what was asked for, by the protocol's name of the request
        self.stopped: dict[str, str] = {}  # what of it was not let out, and by what
        self.complaints: list[str] = []
        self._loaded = False
        self._end = time.monotonic() + seconds
        self._numbers = itertools.count(1)
        self._rest = b""
        theirs, self._out = _pipe()
        self._in, back = _pipe()
        flags = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run"]
        flags += ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-zygote"]
        flags += ["--host-resolver-rules=MAP * ~NOTFOUND", "--remote-debugging-pipe", f"--user-data-dir={profile}"]

        # the protocol's two ends are file descriptors 3 and 4
        script = f'exec "$@" 3<&{theirs} 4>&{back} {theirs}<&- {back}>&-'
        log = open(profile.with_suffix(".log"), "wb")  # noqa: SIM115
        command = ["bash", "-c", script, "bash", program, *flags, "about:blank"]
        env = os.environ | {"HOME": str(profile.parent)}
        self._process = subprocess.Popen(command, pass_fds=(theirs, back), stdout=log, stderr=log, env=env)
        log.close()
        os.close(theirs)
        os.close(back)

    def __enter__(self) -> Browser:
        (target,) = [t for t in self._ask("Target.getTargets")["targetInfos"] if t["type"] == "page"]
        self._session = self._ask("Target.attachToTarget", targetId=target["targetId"], flatten=True)["sessionId"]
        for domain in ("Page", "Network", "Log", "Runtime"):
            self.ask(f"{domain}.enable")
        offline = {"offline": True, "latency": 0, "downloadThroughput": -1, "uploadThroughput": -1}
        self.ask("Network.emulateNetworkConditions", **offline)
        return self

    def __exit__(self, kind: type | None, problem: BaseException | None, trace: TracebackType | None) -> None:
        self._process.kill()
        self._process.wait()
        os.close(self._out)
        os.close(self._in)

    def load(self, page: Path) -> None:
        """Open a file and wait until it and whatever it asks for is there, or is not."""
        self.requests, self.stopped, self.complaints, self._loaded = {}, {}, [], False
        self.ask("Page.navigate", url=page.as_uri())
        while not self._loaded:
            self._take()
        self.evaluate("document.fonts.ready.then(() => 0)")

    def evaluate(self, code: str) -> Any:
        answer = self.ask("Runtime.evaluate", expression=code, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def screenshot(self) -> bytes:
        return base64.b64decode(self.ask("Page.captureScreenshot", captureBeyondViewport=True)["data"])

    def ask(self, method: str, **params: Any) -> Any:
        """One command to the page."""
        return self._ask(method, self._session, **params)

    def _ask(self, method: str, session: str | None = None, **params: Any) -> Any:
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": params} | ({"sessionId": session} if session else {})
        os.write(self._out, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._take()
            if answer.get("id") == number:
                assert "error" not in answer, (method, answer)
                return answer["result"]

    def _take(self) -> dict[str, Any]:
        """The next message; an event is noted on the way."""
        while b"\0" not in self._rest:
            ready, _, _ = select.select([self._in], [], [], max(self._end - time.monotonic(), 0))
            assert ready, "the browser does not answer"
            got = os.read(self._in, 1 << 20)
            assert got, "the browser has ended"
            self._rest += got
        text, _, self._rest = self._rest.partition(b"\0")
        message: dict[str, Any] = json.loads(text)
        params = message.get("params", {})
        if message.get("method") == "Network.requestWillBeSent":
            self.requests[params["requestId"]] = params["request"]["url"]
        elif message.get("method") == "Network.loadingFailed":
            self.stopped[self.requests[params["requestId"]]] = params.get("blockedReason") or params["errorText"]
        elif message.get("method") == "Log.entryAdded":
            self.complaints.append(params["entry"]["text"])
        elif message.get("method") == "Runtime.consoleAPICalled":
            self.complaints.append(" ".join(str(value.get("value")) for value in params["args"]))
        elif message.get("method") == "Runtime.exceptionThrown":
            self.complaints.append(str(params["exceptionDetails"]))
        elif message.get("method") == "Page.loadEventFired":
            self._loaded = True
        return message
