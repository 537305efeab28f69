"""Drive Debian's Chromium, headless, by the DevTools protocol over its websocket."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import aiohttp

from tests.real.process import need

_START_TIMEOUT_S = 30.0
"""Seconds until the browser listens, also on a busy machine."""
_WAIT_TIMEOUT_S = 20.0
"""Seconds until a condition of a page is true, also on a busy machine."""
_POLL_INTERVAL_S = 0.05


class Browser:
    """One tab of a running browser."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._count = 0
        self._replies: dict[int, asyncio.Future[Any]] = {}
        self.console: list[str] = []
        """Errors and warnings of the console, uncaught exceptions, and failed requests."""

    async def listen(self) -> None:
        """Receive messages until the browser ends."""
        async for message in self._socket:
            if message.type is not aiohttp.WSMsgType.TEXT:
                continue
            self._on_message(json.loads(message.data))

    def _on_message(self, message: dict[str, Any]) -> None:
        if (number := message.get("id")) is not None:
            reply = self._replies.pop(number, None)
            if reply is not None and not reply.done():
                reply.set_result(message)
            return
        given = message.get("params", {})
        match message.get("method"):
            case "Runtime.exceptionThrown":
                details = given["exceptionDetails"]
                text = details.get("exception", {}).get("description") or details["text"]
                self.console.append(f"exception: {text}")
            case "Runtime.consoleAPICalled" if given["type"] in ("error", "warning", "assert"):
                self.console.append(f"console.{given['type']}: {given['args']}")
            case "Log.entryAdded" if given["entry"]["level"] in ("error", "warning"):
                entry = given["entry"]
                self.console.append(f"{entry['level']}: {entry['text']} {entry.get('url', '')}")

    async def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Call a method of the protocol, and return its result."""
        self._count += 1
        reply = self._replies[self._count] = asyncio.get_running_loop().create_future()
        await self._socket.send_json({"id": self._count, "method": method, "params": params})
        message = await asyncio.wait_for(reply, _WAIT_TIMEOUT_S)
        assert "error" not in message, (method, message["error"])
        result: dict[str, Any] = message["result"]
        return result

    async def evaluate(self, expression: str) -> Any:
        """Return the value of a JavaScript expression, or of its promise."""
        answer = await self.call(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in answer, (expression[:200], answer["exceptionDetails"])
        return answer["result"].get("value")

    async def wait_for(self, expression: str) -> Any:
        """Wait until an expression is true, and return its value."""
        end = asyncio.get_running_loop().time() + _WAIT_TIMEOUT_S
        # An element has no value: it is an empty mapping here.
        while (value := await self.evaluate(expression)) in (None, False, 0, ""):
            if asyncio.get_running_loop().time() > end:
                raise AssertionError(f"never true: {expression}; console: {self.console}")
            await asyncio.sleep(_POLL_INTERVAL_S)
        return value

    async def open(self, url: str) -> None:
        """Go to an address, and wait until it is loaded."""
        await self.call("Page.navigate", url=url)
        await self.wait_for("document.readyState === 'complete'")

    async def click(self, selector: str) -> None:
        """Click the first element of a selector, as a mouse does."""
        find = f"document.querySelector({json.dumps(selector)})"
        await self.wait_for(f"!!{find}")
        # The place is used once it is the same twice: what is above may still be loading.
        place = await self.wait_for(
            f"(async () => {{ const e = {find}; if (!e) return null;"
            " e.scrollIntoView({block: 'center', behavior: 'instant'});"
            " const a = e.getBoundingClientRect(); await new Promise(r => setTimeout(r, 60));"
            " const b = e.getBoundingClientRect(), x = b.x + b.width / 2, y = b.y + b.height / 2;"
            " const top = document.elementFromPoint(x, y);"
            " return a.y === b.y && e.isConnected && top && (e.contains(top) || top.contains(e))"
            " ? [x, y] : null; })()"
        )
        for kind in ("mousePressed", "mouseReleased"):
            await self.call(
                "Input.dispatchMouseEvent",
                type=kind,
                x=place[0],
                y=place[1],
                button="left",
                clickCount=1,
            )

    async def type(self, text: str) -> None:
        """Write into the element that has the focus."""
        await self.call("Input.insertText", text=text)

    async def press(self, key: str) -> None:
        """Press a key, such as ``Escape`` or ``/``."""
        codes = {"Escape": 27, "Enter": 13, "Tab": 9}
        text = {"text": key} if len(key) == 1 else {"text": "\r"} if key == "Enter" else {}
        for kind in ("keyDown", "keyUp"):
            await self.call(
                "Input.dispatchKeyEvent",
                type=kind,
                key=key,
                windowsVirtualKeyCode=codes.get(key, 0),
                **(text if kind == "keyDown" else {}),
            )

    async def emulate(self, width: int, height: int, *, is_dark: bool, is_phone: bool) -> None:
        """Show the page on another screen."""
        await self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=is_phone,
        )
        scheme = "dark" if is_dark else "light"
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        await self.call("Emulation.setEmulatedMedia", features=features)

    async def screenshot(self, path: Path, *, is_whole: bool = True) -> None:
        """Write a PNG of the page, the whole of it or the part that is seen."""
        answer = await self.call(
            "Page.captureScreenshot", format="png", captureBeyondViewport=is_whole
        )
        path.write_bytes(base64.b64decode(answer["data"]))  # noqa: ASYNC240 - a test may wait


@asynccontextmanager
async def open_browser(profile: Path) -> AsyncIterator[Browser]:
    """Run a browser with one tab. ``profile``: an empty directory for its files."""
    process = await asyncio.create_subprocess_exec(
        need("chromium"),
        *("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"),
        *("--no-first-run", "--disable-extensions", "--disable-background-networking"),
        *("--disable-component-update", "--disable-default-apps", "--disable-sync", "--mute-audio"),
        *("--no-proxy-server", "--hide-scrollbars", "--force-color-profile=srgb"),
        f"--user-data-dir={profile}",
        "--remote-debugging-port=0",
        "about:blank",
        stdout=asyncio.subprocess.DEVNULL,
        stderr=asyncio.subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        port = await _wait_for_port(profile / "DevToolsActivePort", process)
        async with aiohttp.ClientSession() as session:
            async with session.get(f"http://127.0.0.1:{port}/json/list") as response:
                targets = await response.json()
            page = next(target for target in targets if target["type"] == "page")
            async with session.ws_connect(
                page["webSocketDebuggerUrl"], max_msg_size=0, autoclose=True
            ) as socket:
                browser = Browser(socket)
                listener = asyncio.get_running_loop().create_task(browser.listen())
                try:
                    for domain in ("Page", "Runtime", "Log", "Network"):
                        await browser.call(f"{domain}.enable")
                    yield browser
                finally:
                    listener.cancel()
                    with suppress(asyncio.CancelledError):
                        await listener
    finally:
        with suppress(ProcessLookupError):
            process.terminate()
        try:
            await asyncio.wait_for(process.wait(), 10)
        except TimeoutError:
            process.kill()
            await process.wait()


async def _wait_for_port(file: Path, process: asyncio.subprocess.Process) -> int:
    end = asyncio.get_running_loop().time() + _START_TIMEOUT_S
    while asyncio.get_running_loop().time() < end:
        assert process.returncode is None, "the browser has ended"
        with suppress(OSError, IndexError):
            return int(file.read_text().split()[0])  # noqa: ASYNC240 - a test may wait
        await asyncio.sleep(_POLL_INTERVAL_S)
    raise AssertionError("the browser does not listen")
