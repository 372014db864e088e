"""Ask many questions at a time: an endpoint that fails is asked again, an endpoint that refuses is not."""

import asyncio
import contextlib
import email.utils
import hashlib
import json
import random
import time
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Self, TypeVar

import httpx2
from rich.progress import Progress, TaskID

from saerelay.analysis.endpoint.address import KEYS, Endpoint, estimated_tokens
from saerelay.analysis.endpoint.answers import Answer, AnswerFile, KeptAnswer
from saerelay.errors import EndpointError, RunDirectoryError

MAX_ATTEMPTS = 6
"""Times a question is sent before it is given up, if the endpoint fails."""
MAX_UNREADABLE = 3
"""Times a question is sent before it is given up, if its answers cannot be read; later runs send it once more."""
MAX_CONSECUTIVE_FAILURES = 8
"""Number of questions given up in a row after which everything stops."""
FIRST_WAIT = 1.0
"""Seconds before the first repetition; the wait doubles with each further one."""
LONGEST_WAIT = 300.0
"""Most seconds before a repetition; an endpoint that asks for more stops everything."""
TIMEOUT = 300.0
"""Seconds until an answer must be complete."""
MAX_BODY_BYTES = 2**20
MAX_ANSWER_CHARS = 20_000
MAX_ERROR_CHARS = 300
"""How much is read of a response, of the answer in it, and of an error in it."""
MAX_CHARGED_TOKENS = 10**8
"""Most tokens that an endpoint is believed to have charged for one answer."""
RETRYABLE_STATUS = (408, 409, 425, 429)
T = TypeVar("T")


class Asker:
    """Asks questions at an endpoint, several at a time, and keeps all answers; used in a `with` block.

    `spent` is the cost of this session's answers in USD; `prices` are the prices of a million input tokens and output
    tokens. Once `spent` reaches `max_cost`, nothing more is sent.
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
        self.file = AnswerFile(answers)
        self.prices = prices
        self.max_cost = max_cost
        self.concurrency = concurrency
        self.bar: Progress | None = None
        self.task = TaskID(0)
        self.n_given_up = 0
        self.spent = 0.0
        self.wait_until = 0.0
        self.error: Exception | None = None

    def __enter__(self) -> Self:
        self.file.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self.file.__exit__(*error)

    def digest(self, body: bytes) -> str:
        """Return the key under which an answer is kept: a digest of the address and the request."""
        return hashlib.sha256(self.endpoint.url.encode() + b"\n" + body).hexdigest()

    def kept(self, body: bytes) -> KeptAnswer | None:
        """Return the answer to a request, if it is on file."""
        return self.file.answers.get(self.digest(body))

    def is_answered(self, body: bytes, read: Callable[[str], Any]) -> bool:
        """Whether a request has an answer on file that can be read; an unreadable answer is asked for again."""
        kept = self.kept(body)
        return kept is not None and kept.read(read).value is not None

    def run(self, jobs: Iterable[Coroutine[Any, Any, T]], bar: Progress | None = None, total: int = 0) -> list[T]:
        """Run all jobs (coroutines that call `ask`), and return their results.

        Raises EndpointError if the endpoint refuses or keeps failing, KeyboardInterrupt after Ctrl-C; in both cases
        requests in flight are waited for and their answers kept. A second Ctrl-C does not wait.
        """
        self.bar = bar
        self.task = bar.add_task("asking", total=total, cost="") if bar else TaskID(0)
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            return asyncio.run(self._all(jobs))
        with ThreadPoolExecutor(1) as thread:  # in a notebook, a loop is running already
            return thread.submit(asyncio.run, self._all(jobs)).result()

    async def ask(self, body: bytes, read: Callable[[str], Any]) -> Answer:
        """Return the answer to a request; `read` parses its text, or raises ValueError if it cannot."""
        kept = self.kept(body)
        if kept is not None and self.is_answered(body, read):
            return kept.read(read)

        async with self.turn:
            given = await self._until_sensible(body, read, attempts=1 if kept else MAX_UNREADABLE)
            if self.bar:
                cost = f"${self.spent:.4f}" if any(self.prices) else ""
                self.bar.update(self.task, advance=1, cost=cost)
            if given is None:
                return kept.read(read) if kept else Answer(None, 0, 0)
            if kept:
                given = given.after(kept)
            try:
                self.file.add(self.digest(body), given)
            except RunDirectoryError as error:
                self._stop(error)

        answer = given.read(read)
        if answer.value is not None or kept is None:  # an answer that was unreadable before is no sign of new trouble
            self._count(answer.value is not None, f'the last answer was "{self._inert(given.text)}"')
        return answer

    async def _all(self, jobs: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
        self.stopping = asyncio.Event()
        self.turn = asyncio.Semaphore(self.concurrency)
        headers = {"Content-Type": "application/json"}
        if self.endpoint.key:
            headers["Authorization"] = f"Bearer {self.endpoint.key}"
        secure = self.endpoint.url.startswith("https:")  # unencrypted addresses are not reached through a proxy
        limits = httpx2.Limits()  # no limit except that of `turn`
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

    async def _until_sensible(self, body: bytes, read: Callable[[str], Any], *, attempts: int) -> KeptAnswer | None:
        """Return the first answer that can be read, or else the last answer; None if there was none.

        Its tokens are those of all answers received for the question.
        """
        price_in, price_out = self.prices
        text = ""
        tokens_in = 0
        tokens_out = 0
        for _ in range(attempts):
            answered = await self._until_answered(body)
            if answered is None:
                return None
            text = answered.text
            tokens_in += answered.tokens_in
            tokens_out += answered.tokens_out
            self.spent += (answered.tokens_in * price_in + answered.tokens_out * price_out) / 1e6
            if self.spent >= self.max_cost:
                self._stop(EndpointError(f"${self.spent:.4f} has been spent; --max-cost is ${self.max_cost:.4f}"))
            try:
                read(text)
                break
            except ValueError:
                continue
        return KeptAnswer(text, tokens_in, tokens_out)

    async def _until_answered(self, body: bytes) -> KeptAnswer | None:
        """Return the first response with an answer; None after MAX_ATTEMPTS, or when stopping."""
        trouble = ""
        for attempt in range(MAX_ATTEMPTS):
            wait = self.wait_until - time.monotonic()
            if attempt:
                wait = max(wait, FIRST_WAIT * 2 ** (attempt - 1) * random.uniform(0.5, 1.5))
            if await self._stopped_within(wait):
                return None

            try:
                async with asyncio.timeout(TIMEOUT):
                    status, headers, content = await self._post(body)
            except (httpx2.HTTPError, TimeoutError) as error:
                trouble = type(error).__name__
                continue
            if status == 200:
                return self._answer_in(content, body)

            trouble = f"HTTP {status}: {self._inert(content.decode('utf-8', 'replace'))}"
            if status not in RETRYABLE_STATUS and status < 500:
                self._refused(status, trouble)
                return None
            seconds = retry_after(headers.get("retry-after", ""))
            if seconds > LONGEST_WAIT:
                self._stop(
                    EndpointError(
                        f"{self.endpoint.url} asks to be tried again only in {seconds:.0f} seconds ({trouble})"
                    )
                )
                return None
            self.wait_until = max(self.wait_until, time.monotonic() + seconds)
        self._count(False, f"sent {MAX_ATTEMPTS} times, last: {trouble}")
        return None

    async def _post(self, body: bytes) -> tuple[int, httpx2.Headers, bytes]:
        """Send a request, and return status, headers and the beginning of the body of the response."""
        content = b""
        async with self.client.stream("POST", f"{self.endpoint.url}/chat/completions", content=body) as response:
            async for part in response.aiter_bytes():
                content += part
                if len(content) > MAX_BODY_BYTES:
                    break
        return response.status_code, response.headers, content

    def _answer_in(self, content: bytes, request: bytes) -> KeptAnswer:
        """Return the answer in a response (empty if there is none) and the tokens charged for it."""
        try:
            response = json.loads(content)
            text = response["choices"][0]["message"]["content"]
        except (ValueError, LookupError, TypeError, RecursionError):
            response = None
            text = None
        if not isinstance(text, str):
            text = ""
        usage = response.get("usage") if isinstance(response, dict) else None
        tokens_in = _charged(usage, "prompt_tokens", estimated_tokens(request.decode("ascii")))
        tokens_out = _charged(usage, "completion_tokens", estimated_tokens(text))
        return KeptAnswer(self._without_key(text)[:MAX_ANSWER_CHARS], tokens_in, tokens_out)

    def _refused(self, status: int, trouble: str) -> None:
        """Stop, unless the refusal may be due to this one question."""
        remedies = {
            401: "check the key: " + " or ".join(KEYS) + ", or --key-env NAME",
            403: "the key may not use this model; choose another --explainer, or another key",
            404: "check --endpoint (most end in /v1) and --explainer",
        }
        if 300 <= status < 400:
            remedies[status] = "redirects are not followed; give the address itself as --endpoint"
        if status in remedies or not self.file.answers:
            remedy = remedies.get(status, "it does not accept such requests; change their fields with --body")
            self._stop(EndpointError(f"{self.endpoint.url} refuses ({trouble}); {remedy}"))
        else:
            self._count(False, trouble)

    def _count(self, good: bool, trouble: str) -> None:
        """Stop after too many questions in a row without a readable answer."""
        self.n_given_up = 0 if good else self.n_given_up + 1
        if self.n_given_up >= MAX_CONSECUTIVE_FAILURES:
            n = MAX_CONSECUTIVE_FAILURES
            self._stop(EndpointError(f"{self.endpoint.url}: {n} questions in a row without an answer; {trouble}"))

    def _stop(self, error: Exception) -> None:
        self.error = self.error or error
        self.stopping.set()

    async def _stopped_within(self, seconds: float) -> bool:
        """Wait, at most until everything stops; returns whether it does."""
        if seconds > 0:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.stopping.wait(), seconds)
        return self.stopping.is_set()

    def _without_key(self, text: str) -> str:
        """Remove from a text the secrets that were sent along, in case the endpoint repeats them."""
        for secret in self.endpoint.secrets:
            text = text.replace(secret, "[key]")
        return text

    def _inert(self, text: str) -> str:
        """Return the beginning of an endpoint's text, safe for a terminal."""
        harmless = ascii(self._without_key(text))[1:-1]
        if len(harmless) <= MAX_ERROR_CHARS:
            return harmless
        return harmless[:MAX_ERROR_CHARS] + "…"


def _charged(usage: Any, name: str, otherwise: int) -> int:
    """Return the tokens that an endpoint says it charges for, or `otherwise` if the number is not sensible."""
    n = usage.get(name) if isinstance(usage, dict) else None
    return n if type(n) is int and 0 <= n < MAX_CHARGED_TOKENS else otherwise


def retry_after(value: str) -> float:
    """Return the seconds that a Retry-After header asks for, as a number or a date; 0 if it is neither.

    >>> retry_after("7"), retry_after("soon"), retry_after("Wed, 21 Oct 2015 07:28:00 GMT")
    (7.0, 0.0, 0.0)
    """
    try:
        seconds = float(value)
    except ValueError:
        parsed = email.utils.parsedate_tz(value)
        seconds = email.utils.mktime_tz(parsed) - time.time() if parsed else 0.0
    return max(0.0, seconds) if seconds == seconds else 0.0
