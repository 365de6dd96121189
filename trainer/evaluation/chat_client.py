"""A client for any OpenAI-compatible chat endpoint: one question, one answer, with retries."""

from __future__ import annotations

import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPException
from typing import Any, TypeVar
from urllib.parse import urlsplit

from ..errors import UserError
from ..files import parse_json
from ..text import printable
from .tools import KEY

OPENAI = "https://api.openai.com/v1"
PASSING = {408, 409, 425, 429, 500, 502, 503, 504, 529}
"""HTTP statuses that may pass, so that another attempt is worth it."""

NOTHING: Mapping[str, Any] = {}
Parsed = TypeVar("Parsed")
Asked = TypeVar("Asked")


def in_order(
    work: Callable[[Asked], Parsed], items: Sequence[Asked], at_once: int
) -> Iterator[Parsed]:
    """``work`` of each item in their order, so many at once."""
    with ThreadPoolExecutor(at_once) as threads:
        for start in range(0, len(items), at_once):
            yield from threads.map(work, items[start : start + at_once])


class Unusable(Exception):
    """An answer that cannot be used; the next may be better."""


class NothingUsable(UserError):
    """Every attempt got an answer, and none of use."""


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Makes a redirect an error: it would take the key to another place."""

    def redirect_request(  # pyright: ignore[reportIncompatibleMethodOverride]
        self, *_: Any
    ) -> None:
        return None


@dataclass
class ChatClient:
    """Asks ``model`` at ``url`` (up to and with ``/v1``).

    The key is that of the environment variable OPENAI_API_KEY; a server that wants none gets none.
    Statuses in `PASSING`, timeouts, broken connections and unusable answers are tried again, after
    ``first_wait_s``, then twice that, and so on, or what ``Retry-After`` says; at most ``attempts``
    times in all. ``role`` is what messages call the server; its address is ``--ROLE-url``.
    """

    model: str
    url: str = OPENAI
    attempts: int = 6
    timeout_s: float = 120.0
    first_wait_s: float = 1.0
    longest_wait_s: float = 60.0
    role: str = "judge"

    def __post_init__(self) -> None:
        parts = urlsplit(self.url)
        if parts.scheme not in ("http", "https") or not parts.netloc:
            raise UserError(
                f"--{self.role}-url: expected an address such as {OPENAI}, got {self.url!r}"
            )
        if parts.username or parts.password:
            raise UserError(f"--{self.role}-url: it holds a password; put the key in {KEY} instead")
        self._opener = urllib.request.build_opener(_NoRedirect)
        self._takes_temperature = True

    def ask(
        self,
        messages: list[dict[str, Any]],
        parse: Callable[[Any], Parsed],
        body: Mapping[str, Any] = NOTHING,
    ) -> Parsed:
        """What ``parse`` makes of the completion of ``messages``; `Unusable` says: try again.

        ``body`` is sent too; without it the likeliest answer is asked for, where the model lets one
        ask: some that reason take no temperature.

        Raises:
            NothingUsable: the last attempt got an answer that was of no use.
            UserError: every attempt failed, or one in a way that will not pass (a wrong key, an
                unknown model).
        """
        wait = self.first_wait_s
        trouble, kind = "", UserError
        for attempt in range(self.attempts):
            if attempt:
                time.sleep(min(wait, self.longest_wait_s))
            wait, kind = self.first_wait_s * 2**attempt, UserError
            likeliest = {"temperature": 0} if self._takes_temperature and not body else NOTHING
            try:
                return parse(_completion(self._post(messages, likeliest or body)))
            except urllib.error.HTTPError as error:
                trouble = self._status(error)
                if error.code == 400 and likeliest and "temperature" in trouble:
                    self._takes_temperature, wait = False, 0.0
                    continue
                if error.code not in PASSING:
                    raise UserError(f"{self.role} {self.url}: {trouble}") from None
                asked = error.headers.get("Retry-After", "")
                wait = float(asked) if asked.isdecimal() else wait
            except Unusable as error:
                trouble, kind = printable(str(error), 200), NothingUsable
            except (OSError, HTTPException) as error:  # timeouts are OSErrors too
                reason = getattr(error, "reason", error)
                trouble = printable(f"{type(error).__name__}: {reason}", 200)
        raise kind(
            f"{self.role} {self.url}: {self.attempts} attempts failed, the last with {trouble}; "
            "what is finished is kept, so the same command goes on from here"
        )

    def _post(self, messages: list[dict[str, Any]], body: Mapping[str, Any]) -> bytes:
        headers = {"Content-Type": "application/json", "User-Agent": "widemargin"}
        key = os.environ.get(KEY)
        if key:
            headers["Authorization"] = f"Bearer {key.strip()}"
        sent = {"model": self.model, "messages": messages} | dict(body)
        address = self.url.rstrip("/") + "/chat/completions"
        request = urllib.request.Request(address, json.dumps(sent).encode(), headers)
        with self._opener.open(request, timeout=self.timeout_s) as answer:
            return answer.read(1 << 24)

    def _status(self, error: urllib.error.HTTPError) -> str:
        """The status and what the server says, without the key, which some servers repeat."""
        try:
            said = error.read(2000).decode("utf-8", "replace")
        except OSError:
            said = ""
        key = (os.environ.get(KEY) or "").strip()
        if key:
            said = said.replace(key, "***")
        return f"HTTP {error.code} ({printable(' '.join(said.split()), 200)})"


def _completion(body: bytes) -> Any:
    """A chat completion that has a message."""
    try:
        completion = parse_json(body)
        completion["choices"][0]["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError):
        shown = body[:100].decode("utf-8", "replace")
        raise Unusable(f"something that is no chat completion: {shown}") from None
    return completion


def text_of(completion: Any) -> str:
    """The answer's text in a chat completion."""
    content = completion["choices"][0]["message"]["content"]
    if not isinstance(content, str):
        raise Unusable("a completion without text")
    return content
