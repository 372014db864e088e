"""The address to which questions are sent, and the form of a request."""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import httpx2

from saerelay.errors import EndpointError
from saerelay.files import leafwise, parse_json

LOCAL_HOSTS = ("localhost", "127.0.0.1", "::1")
ADDRESSES = ("SAERELAY_ENDPOINT", "OPENAI_BASE_URL")
"""Environment variables for an endpoint's address; the first that is set counts."""
SHORTEST_SECRET = 6
"""Least length of a text in a request's body that may be a key; "low" and "json" are not."""
KEYS = ("SAERELAY_API_KEY", "OPENAI_API_KEY")
"""Environment variables for an endpoint's key; the first that is set counts."""


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """An endpoint to ask: its address, a model's name there, fields for each request, and a key that is never shown."""

    url: str
    model: str
    body: dict[str, Any] = field(default_factory=dict)
    key: str = field(default="", repr=False)

    @property
    def secrets(self) -> list[str]:
        """Texts that are never written to a file: the key, and texts in the body, where some gateways take a key."""
        texts = [self.key]
        leafwise(lambda leaf: texts.append(leaf) if isinstance(leaf, str) else None, self.body)
        return [text for text in texts if len(text) >= SHORTEST_SECRET]

    @property
    def described_body(self) -> dict[str, Any]:
        """The body with its numbers, and without its texts, any of which may be secret.

        >>> Endpoint(url="", model="m", body={"temperature": 1, "api_key": "sk-1"}).described_body
        {'temperature': 1, 'api_key': '(not kept)'}
        """
        return leafwise(lambda leaf: "(not kept)" if isinstance(leaf, str) else leaf, self.body)

    @classmethod
    def of(cls, model: str, url: str = "", key_env: str = "", body: str = "") -> "Endpoint":
        """Make an endpoint from options or, if they are empty, the environment; EndpointError if it cannot be used.

        >>> Endpoint.of("some-model", "http://localhost:8000/v1/", body='{"temperature": 1}').body
        {'temperature': 1}

        `body` is JSON: fields that are added to each request or replace its usual ones (null removes a field). A key is
        sent only over https or to this machine.
        """
        url = url or _first_set(ADDRESSES)
        if not url:
            raise EndpointError(
                f"no endpoint: give --endpoint http://localhost:8000/v1, or set {' or '.join(ADDRESSES)}"
            )
        parsed = _parse_address(url)
        fields = _parse_fields(body)
        key = _read_key(key_env, parsed)
        return cls(url=str(parsed).rstrip("/"), model=model, body=fields, key=key)


def estimated_tokens(text: str) -> int:
    """Estimate the tokens of a text, on the large side: one for every three bytes of UTF-8.

    >>> estimated_tokens("abcdefg")
    3
    """
    return math.ceil(len(text.encode("utf-8", "replace")) / 3)


def request_body(endpoint: Endpoint, system: str, question: str, max_tokens: int) -> bytes:
    """Return the request, byte for byte the same for the same question.

    >>> request_body(Endpoint(url="", model="m", body={"temperature": None}), "s", "q", 9).decode()
    '{"max_tokens":9,"messages":[{"content":"s","role":"system"},{"content":"q","role":"user"}],"model":"m"}'
    """
    messages = [{"role": "system", "content": system}, {"role": "user", "content": question}]
    body: dict[str, Any] = {
        "model": endpoint.model,
        "messages": messages,
        "temperature": 0,
        "max_tokens": max_tokens,
        **endpoint.body,
    }
    fields = {name: value for name, value in body.items() if value is not None}
    return json.dumps(fields, sort_keys=True, separators=(",", ":")).encode("ascii")


def _first_set(names: Sequence[str]) -> str:
    """Return the value of the first environment variable that is set, or ""."""
    return next((os.environ[name] for name in names if os.environ.get(name)), "")


def _parse_address(url: str) -> httpx2.URL:
    try:
        parsed = httpx2.URL(url)
    except httpx2.InvalidURL:
        raise EndpointError("--endpoint is not a valid address; write it like https://host/v1") from None
    # An address needs none of these, and each of them may hold a key, which an error or a file would then show.
    beyond_path = parsed.userinfo or parsed.query or parsed.fragment
    if parsed.scheme not in ("http", "https") or not parsed.host or beyond_path:
        raise EndpointError(
            "--endpoint must be http(s)://host/path, without user, password, ? or #; keys come from --key-env NAME"
        )
    return parsed


def _parse_fields(body: str) -> dict[str, Any]:
    try:
        fields = parse_json(body or "{}")
    except ValueError as error:
        raise EndpointError(f'--body is not valid JSON ({error}); write it like {{"temperature": 1}}') from None
    if not isinstance(fields, dict):
        raise EndpointError('--body must be a JSON object; write it like {"temperature": 1}')
    return fields


def _read_key(key_env: str, address: httpx2.URL) -> str:
    """Return the key in an environment variable, `key_env` or one of `KEYS`; "" if none of them is set."""
    if key_env and not os.environ.get(key_env):
        raise EndpointError(f"--key-env {key_env}: no such environment variable, or it is empty")
    names = [key_env] if key_env else KEYS
    key = _first_set(names).strip()
    if not all(33 <= ord(character) <= 126 for character in key):
        raise EndpointError(
            "the key contains characters that a key cannot have (a space? a line break?); check the variable that "
            "holds it"
        )
    if key and address.scheme == "http" and address.host not in LOCAL_HOSTS:
        raise EndpointError(
            f"http://{address.host}: a key is never sent unencrypted; use https, or unset {' and '.join(names)}"
        )
    return key
