"""Questions to a language model behind any OpenAI-compatible endpoint: no answer is paid for twice, no key is written.

Every answer is kept in a file as it arrives, under the digest of the request that it answers; a question whose answer
is on file is not sent. What comes from the endpoint is not trusted: it is bounded in size and time, and only ever text.
"""

import asyncio
import contextlib
import email.utils
import hashlib
import json
import os
import random
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import filelock
import httpx2
from rich.progress import Progress, TaskID

from saerelay.errors import EndpointError, RunDirectoryError

MAX_ATTEMPTS = 6
"""Times a question is sent before it is given up, where the endpoint fails."""
MAX_UNREADABLE = 3
"""Times a question is sent before it is given up, where the answers cannot be read."""
MAX_CONSECUTIVE_FAILURES = 8
"""Questions given up, one after the other, after which everything stops."""
FIRST_WAIT = 1.0
"""Seconds before the first repetition; then twice as many, and so on."""
LONGEST_WAIT = 300.0
"""Seconds before any repetition; an endpoint that asks for more stops everything."""
TIMEOUT = 300.0
"""Seconds until an answer must be complete."""
MAX_BODY_BYTES = 2**20
MAX_ANSWER_CHARS = 20_000
MAX_ERROR_CHARS = 300
"""Of a response, of the answer in it, and of an error in it, as much as this is looked at."""
LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")
ADDRESSES = ("SAERELAY_ENDPOINT", "OPENAI_BASE_URL")
"""Environment variables that an endpoint's address is taken from: the first that is set."""
KEYS = ("SAERELAY_API_KEY", "OPENAI_API_KEY")
"""Environment variables that its key is taken from."""
RETRYABLE_STATUS = (408, 409, 425, 429)
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """Where to ask: an address, a model's name there, fields for each request, and a key that is never shown."""

    url: str
    model: str
    body: dict[str, Any] = field(default_factory=dict)
    key: str = field(default="", repr=False)

    @classmethod
    def of(cls, model: str, url: str = "", key_env: str = "", body: str = "") -> "Endpoint":
        """An endpoint from options, and where they are empty, the environment; EndpointError if it cannot be used.

        >>> Endpoint.of("some-model", "http://localhost:8000/v1/", body='{"temperature": 1}').body
        {'temperature': 1}

        `body` is JSON: fields that each request has besides the usual ones, or instead of them (null leaves one out). A
        key is sent over https, and to this machine, only.
        """
        url = url or _first_set(ADDRESSES)
        if not url:
            raise EndpointError(
                f"no endpoint: give --endpoint http://localhost:8000/v1, or set {' or '.join(ADDRESSES)}"
            )
        parsed = _parse_address(url)
        fields = _parse_fields(body)
        if key_env and not os.environ.get(key_env):
            raise EndpointError(f"--key-env {key_env}: no such environment variable, or it is empty")
        names = [key_env] if key_env else KEYS
        key = _first_set(names).strip()
        if not all(33 <= ord(character) <= 126 for character in key):
            raise EndpointError(
                "the key contains characters that no key has (spaces? line ends?); check the variable that holds it"
            )
        if key and parsed.scheme == "http" and parsed.host not in LOCAL_HOSTS:
            raise EndpointError(
                f"http://{parsed.host}: no key is sent in the clear; use https, or unset {' and '.join(names)}"
            )
        return cls(url=str(parsed).rstrip("/"), model=model, body=fields, key=key)


def _first_set(names: Sequence[str]) -> str:
    """The value of the first environment variable that is set, or ""."""
    return next((os.environ[name] for name in names if os.environ.get(name)), "")


def _parse_address(url: str) -> httpx2.URL:
    try:
        parsed = httpx2.URL(url)
    except httpx2.InvalidURL:
        raise EndpointError("--endpoint is not a valid address; write it like https://host/v1") from None
    further = parsed.userinfo or parsed.query or parsed.fragment
    if parsed.scheme not in ("http", "https") or not parsed.host or further:
        raise EndpointError(
            "--endpoint must be http(s)://host/path, without user, password, ? or #; keys come from --key-env NAME"
        )
    return parsed


def _parse_fields(body: str) -> dict[str, Any]:
    try:
        fields = json.loads(body or "{}")
    except (ValueError, RecursionError) as error:
        raise EndpointError(f'--body is not valid JSON ({error}); write it like {{"temperature": 1}}') from None
    if not isinstance(fields, dict):
        raise EndpointError('--body must be a JSON object; write it like {"temperature": 1}')
    return fields


class Answer(NamedTuple):
    """The outcome of a question."""

    value: Any
    """The answer as it was read; None if the question was given up."""
    tokens_in: int
    """Over all times it was sent, as the endpoint counts them, or estimated."""
    tokens_out: int


def estimated_tokens(text: str) -> int:
    """Tokens of a text, on the large side: one for every three bytes of UTF-8.

    >>> estimated_tokens("abcdefg")
    3
    """
    return -(-len(text.encode("utf-8", "replace")) // 3)


def request_body(endpoint: Endpoint, system: str, question: str, max_tokens: int) -> bytes:
    """The request, byte for byte the same for the same question.

    >>> request_body(Endpoint(url="", model="m", body={"temperature": None}), "s", "q", 9).decode()
    '{"max_tokens":9,"messages":[{"content":"s","role":"system"},{"content":"q","role":"user"}],"model":"m"}'
    """
    messages = [{"role": "system", "content": system}, {"role": "user", "content": question}]
    body = {"model": endpoint.model, "messages": messages, "temperature": 0, "max_tokens": max_tokens} | endpoint.body
    kept = {name: value for name, value in body.items() if value is not None}
    return json.dumps(kept, sort_keys=True, separators=(",", ":")).encode("ascii")


class Asker:
    """Asks questions at an endpoint, several at a time, and keeps all answers; used in a `with`.

    `spent` is what this session's answers cost in USD: `prices` are those of a million tokens in and out. Nothing more
    is sent once it comes to `max_cost`.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        answers: Path,
        *,
        concurrency: int = 8,
        prices: tuple[float, float] = (0.0, 0.0),
        max_cost: float = float("inf"),
    ) -> None:
        self.endpoint = endpoint
        self.path = answers
        self.prices = prices
        self.max_cost = max_cost
        self.concurrency = concurrency
        self.bar: Progress | None = None
        self.task = TaskID(0)
        self.n_sent = 0
        self.n_given_up = 0
        self.spent = 0.0
        self.wait_until = 0.0
        self.error: Exception | None = None

    def __enter__(self) -> "Asker":
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.lock = filelock.FileLock(self.path.with_suffix(".lock"))
        try:
            self.lock.acquire(timeout=0)
        except filelock.Timeout:
            raise RunDirectoryError(
                f"{self.path}: another process is asking questions about this run; wait for it, or stop it"
            ) from None
        self.known = read_answers(self.path)
        self.file = self.path.open("ab")
        return self

    def __exit__(self, *error: object) -> None:
        self.file.close()
        self.lock.release()

    def digest(self, body: bytes) -> str:
        """What an answer is kept under: a digest of the address and the request."""
        return hashlib.sha256(self.endpoint.url.encode() + b"\n" + body).hexdigest()

    def run(self, jobs: Iterable[Coroutine[Any, Any, T]], bar: Progress | None = None, total: int = 0) -> list[T]:
        """What all jobs (coroutines that call `ask`) return.

        Raises EndpointError if the endpoint refuses or keeps failing, KeyboardInterrupt after Ctrl-C; in both cases
        what was under way is waited for and kept, and a second Ctrl-C does not wait.
        """
        self.bar = bar
        self.task = bar.add_task("asking", total=total, cost="") if bar else TaskID(0)
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return asyncio.run(self._all(jobs))
        with ThreadPoolExecutor(1) as thread:  # a notebook has a loop of its own
            return thread.submit(asyncio.run, self._all(jobs)).result()

    async def _all(self, jobs: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
        self.stopping = asyncio.Event()
        self.turn = asyncio.Semaphore(self.concurrency)
        headers = {"Content-Type": "application/json"}
        if self.endpoint.key:
            headers["Authorization"] = f"Bearer {self.endpoint.key}"
        secure = self.endpoint.url.startswith("https:")  # an address in the clear is not reached through a proxy
        limits = httpx2.Limits()  # no limit but that of `turn`
        async with httpx2.AsyncClient(headers=headers, timeout=TIMEOUT, trust_env=secure, limits=limits) as self.client:
            tasks = [asyncio.create_task(job) for job in jobs]
            try:
                if tasks:
                    await asyncio.wait(tasks)
            except asyncio.CancelledError:
                self.stopping.set()
                await asyncio.wait(tasks)
                raise
        if self.error:
            raise type(self.error)(f"{self.error}\nAll answers so far are kept; the same command goes on from there.")
        return [task.result() for task in tasks]

    async def ask(self, body: bytes, read: Callable[[str], Any]) -> Answer:
        """The answer to a request; `read` makes something of its text, or raises ValueError if it is nonsense."""
        digest = self.digest(body)
        if digest in self.known:
            return self.kept(self.known[digest], read)
        async with self.turn:
            record = await self._until_sensible(body, read)
            if self.bar:
                self.bar.update(self.task, advance=1, cost=f"${self.spent:.4f}" if any(self.prices) else "")
            if record is None:
                return Answer(None, 0, 0)
            self.known[digest] = record
            try:
                self.file.write((json.dumps({"request": digest} | record) + "\n").encode("ascii"))
                self.file.flush()
            except OSError as error:
                self._stop(RunDirectoryError(f"{self.path}: cannot be written ({error.strerror})"))
        answer = self.kept(record, read)
        self._count(answer.value is not None, f'the last answer was "{self._inert(record["answer"])}"')
        return answer

    def kept(self, record: dict[str, Any], read: Callable[[str], Any]) -> Answer:
        """An answer from what was kept of it."""
        try:
            value = read(record["answer"])
        except ValueError:
            value = None
        return Answer(value, record["tokens_in"], record["tokens_out"])

    async def _until_sensible(self, body: bytes, read: Callable[[str], Any]) -> dict[str, Any] | None:
        """What is kept of an answer: the first that can be read, or the last one; None if there was none."""
        record: dict[str, Any] = {"answer": "", "tokens_in": 0, "tokens_out": 0}
        price_in, price_out = self.prices
        for _ in range(MAX_UNREADABLE):
            answered = await self._until_answered(body)
            if answered is None:
                return None
            text, tokens_in, tokens_out = answered
            record["answer"] = text
            record["tokens_in"] += tokens_in
            record["tokens_out"] += tokens_out
            self.spent += (tokens_in * price_in + tokens_out * price_out) / 1e6
            if self.spent >= self.max_cost:
                self._stop(EndpointError(f"${self.spent:.4f} is spent, and --max-cost is ${self.max_cost:.4f}"))
            try:
                read(text)
                break
            except ValueError:
                continue
        return record

    async def _until_answered(self, body: bytes) -> tuple[str, int, int] | None:
        """Text, tokens in and out of the first response with an answer; None after MAX_ATTEMPTS, or when stopping."""
        trouble = ""
        for attempt in range(MAX_ATTEMPTS):
            wait = self.wait_until - time.monotonic()
            if attempt:
                wait = max(wait, FIRST_WAIT * 2 ** (attempt - 1) * random.uniform(0.5, 1.5))
            if await self._stopped_within(wait):
                return None
            try:
                self.n_sent += 1
                async with asyncio.timeout(TIMEOUT):
                    status, headers, content = await self._post(body)
            except (httpx2.HTTPError, TimeoutError) as error:
                trouble = type(error).__name__
                continue
            if status == 200:
                return self._text(body, content)
            trouble = f"HTTP {status}: {self._inert(content.decode('utf-8', 'replace'))}"
            if status not in RETRYABLE_STATUS and status < 500:
                self._refused(status, trouble)
                return None
            asked = retry_after(headers.get("retry-after", ""))
            if asked > LONGEST_WAIT:
                self._stop(EndpointError(f"{self.endpoint.url} asks to come back in {asked:.0f} seconds ({trouble})"))
                return None
            self.wait_until = max(self.wait_until, time.monotonic() + asked)
        self._count(False, f"sent {MAX_ATTEMPTS} times, last: {trouble}")
        return None

    async def _post(self, body: bytes) -> tuple[int, httpx2.Headers, bytes]:
        """Status, headers and the beginning of the body of one response."""
        content = b""
        async with self.client.stream("POST", f"{self.endpoint.url}/chat/completions", content=body) as response:
            async for part in response.aiter_bytes():
                content += part
                if len(content) > MAX_BODY_BYTES:
                    break
        return response.status_code, response.headers, content

    def _text(self, body: bytes, content: bytes) -> tuple[str, int, int]:
        """The answer in a response, empty if there is none, and the tokens it is charged for."""
        try:
            document = json.loads(content)
            text = document["choices"][0]["message"]["content"]
            text = text if isinstance(text, str) else ""
        except (ValueError, LookupError, TypeError, RecursionError):
            document = {}
            text = ""
        usage = document.get("usage") if isinstance(document, dict) else None
        tokens_in = _charged(usage, "prompt_tokens", estimated_tokens(body.decode("ascii")))
        tokens_out = _charged(usage, "completion_tokens", estimated_tokens(text))
        return self._without_key(text)[:MAX_ANSWER_CHARS], tokens_in, tokens_out

    def _refused(self, status: int, trouble: str) -> None:
        """Stop, unless it may have been about this one question."""
        remedies = {
            401: "look at the key: " + " or ".join(KEYS) + ", or --key-env NAME",
            403: "the key may not use this model; choose another --model, or key",
            404: "look at --endpoint (it ends in /v1 with most) and --model",
        }
        if 300 <= status < 400:
            remedies[status] = "redirects are not followed; give the address itself as --endpoint"
        if status in remedies or not self.known:
            remedy = remedies.get(status, "it does not take such requests; --body changes their fields")
            self._stop(EndpointError(f"{self.endpoint.url} refuses ({trouble}); {remedy}"))
        else:
            self._count(False, trouble)

    def _count(self, good: bool, trouble: str) -> None:
        self.n_given_up = 0 if good else self.n_given_up + 1
        if self.n_given_up >= MAX_CONSECUTIVE_FAILURES:
            n = MAX_CONSECUTIVE_FAILURES
            self._stop(EndpointError(f"{self.endpoint.url}: {n} questions in a row without an answer; {trouble}"))

    def _stop(self, error: Exception) -> None:
        self.error = self.error or error
        self.stopping.set()

    async def _stopped_within(self, seconds: float) -> bool:
        if seconds > 0:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.stopping.wait(), seconds)
        return self.stopping.is_set()

    def _without_key(self, text: str) -> str:
        return text.replace(self.endpoint.key, "[key]") if self.endpoint.key else text

    def _inert(self, text: str) -> str:
        """The beginning of what an endpoint said, fit for a terminal."""
        shown = ascii(self._without_key(text))[1:-1]
        return shown[:MAX_ERROR_CHARS] + "…" * (len(shown) > MAX_ERROR_CHARS)


def _charged(usage: Any, name: str, otherwise: int) -> int:
    """The tokens that an endpoint says it charges for, if it says something sensible."""
    n = usage.get(name) if isinstance(usage, dict) else None
    return n if type(n) is int and 0 <= n < 10**8 else otherwise


def read_answers(path: Path) -> dict[str, dict[str, Any]]:
    """What was kept of answers, by digest; a last line that was not finished is cut off, a damaged one left out."""
    known: dict[str, dict[str, Any]] = {}
    if not path.is_file():
        return known
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        os.truncate(path, whole)
    for line in content[:whole].splitlines():
        try:
            record = json.loads(line)
            known[record.pop("request")] = {
                "answer": str(record["answer"]),
                "tokens_in": int(record["tokens_in"]),
                "tokens_out": int(record["tokens_out"]),
            }
        except (ValueError, LookupError, TypeError, AttributeError):
            continue
    return known


def retry_after(value: str) -> float:
    """Seconds that a Retry-After header asks for: a number, or a date; 0 if it says neither.

    >>> retry_after("7"), retry_after("soon"), retry_after("Wed, 21 Oct 2015 07:28:00 GMT")
    (7.0, 0.0, 0.0)
    """
    try:
        seconds = float(value)
    except ValueError:
        parsed = email.utils.parsedate_tz(value)
        seconds = email.utils.mktime_tz(parsed) - time.time() if parsed else 0.0
    return max(0.0, seconds) if seconds == seconds else 0.0
