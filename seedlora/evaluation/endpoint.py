"""Generate by a server that speaks OpenAI's completions protocol: vLLM, SGLang and others."""

from __future__ import annotations

import http.client
import json
import os
import random
import time
import urllib.request
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

from seedlora.evaluation.generate import LENGTH, STOPPED, Generation, OnDone, Prompt, cut_at_stop
from seedlora.utils.plain_data import from_json

_RETRIED_CODES = {408, 409, 425, 429, 500, 502, 503, 504}
#: Seconds that a server may take to say which models it has: it has nothing to compute for that.
_MODELS_TIMEOUT = 10.0
KEY_VARIABLE = "SEEDLORA_ENDPOINT_KEY"
#: What the protocol takes in one request; vLLM refuses more.
_MOST_STOPS = 4


class EndpointGenerator:
    """Asks a server, which knows each adapter as a model of its own name.

    Args:
        url: of the server, with or without ``/v1``.
        models: name of each adapter here to the model's name there.
        concurrency: requests at once.
        timeout: seconds for one request.
        retries: of a request that failed for a reason that may pass: no connection, too many requests, a fault of the
            server. The waits between them double, from half a second on. The first question, which models there are, is
            asked once: an address may be wrong.

    A key, if the server wants one, is read from the environment variable ``SEEDLORA_ENDPOINT_KEY``.

    Raises:
        ValueError: if the server does not have one of the models.
        OSError: if it does not answer.
    """

    def __init__(
        self, url: str, *, models: Mapping[str, str], concurrency: int = 16, timeout: float = 600.0, retries: int = 5
    ) -> None:
        if not url.startswith(("http://", "https://")):
            raise ValueError(f"endpoint '{url}' is no address of a server; one is http://localhost:8000")
        if concurrency < 1 or timeout <= 0:
            raise ValueError(f"concurrency {concurrency} and timeout {timeout} must be positive")
        self.url, self.models = url.rstrip("/").removesuffix("/v1"), models
        self.concurrency, self.timeout, self.retries = concurrency, timeout, retries
        self.batch_size = 64 * concurrency
        answer = self._request("/v1/models", retries=0, timeout=min(timeout, _MODELS_TIMEOUT))
        try:
            known = [str(model["id"]) for model in answer["data"]]
        except (KeyError, TypeError):
            raise OSError(f"the server at {self.url} answered without a list of models: {str(answer)[:200]}") from None
        if missing := sorted(set(models.values()) - set(known)):
            raise ValueError(
                f"the server at {self.url} has no model '{missing[0]}'; it has {', '.join(known) or 'none'} (vLLM "
                "takes adapters by --enable-lora --lora-modules NAME=FOLDER)"
            )

    def lengths(self, prompts: Sequence[Prompt]) -> list[int]:
        """Return the characters of each prompt: only the server can count tokens."""
        return [len(prompt.text) for prompt in prompts]

    def __call__(
        self,
        prompts: Mapping[str, Sequence[Prompt]],
        *,
        max_new_tokens: int,
        stops: Sequence[str],
        on_done: OnDone,
    ) -> None:
        """Ask the server for all answers, several at once; ``on_done`` is called in the caller's thread."""

        def one(name: str, prompt: Prompt) -> Generation:
            request: dict[str, object] = {
                "model": self.models[name],
                "prompt": prompt.text,
                "max_tokens": max_new_tokens,
                "temperature": 0,
            }
            if stops:
                request["stop"] = stops_to_send(stops)
            if not prompt.add_special_tokens:
                request["add_special_tokens"] = False
            answer = self._request("/v1/completions", request)
            try:
                choice = answer["choices"][0]
                text = cut_at_stop(str(choice["text"]), stops)
            except (KeyError, IndexError, TypeError):
                raise OSError(f"the server at {self.url} answered without choices: {str(answer)[:200]}") from None
            finish = LENGTH if choice.get("finish_reason") == "length" and text == choice["text"] else STOPPED
            return Generation(text, int((answer.get("usage") or {}).get("completion_tokens") or 0), finish)

        with ThreadPoolExecutor(self.concurrency) as pool:
            futures = {
                pool.submit(one, name, prompt): (name, i)
                for name, asked in prompts.items()
                for i, prompt in enumerate(asked)
            }
            try:
                for future in as_completed(futures):
                    on_done(*futures[future], future.result())
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise

    def _request(
        self,
        path: str,
        body: Mapping[str, object] | None = None,
        *,
        retries: int | None = None,
        timeout: float | None = None,
    ) -> dict[str, Any]:
        retries, timeout = self.retries if retries is None else retries, timeout or self.timeout
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(KEY_VARIABLE):
            headers["Authorization"] = f"Bearer {key}"
        data = None if body is None else json.dumps(body).encode()
        for attempt in range(retries + 1):
            request = urllib.request.Request(self.url + path, data, headers)  # noqa: S310 - checked in __init__
            try:
                with urllib.request.urlopen(request, timeout=timeout) as response:  # noqa: S310
                    answer: dict[str, Any] = from_json(response.read())
                    return answer
            except urllib.error.HTTPError as error:
                reason = f"{error.code}: {_message(error.read())}"
                if error.code not in _RETRIED_CODES:
                    raise OSError(f"the server at {self.url} refused {path} ({reason})") from None
            except (OSError, http.client.HTTPException, ValueError) as error:
                reason = str(getattr(error, "reason", error)) or type(error).__name__
            if attempt < retries:
                time.sleep(0.5 * 2**attempt * (0.5 + random.random()))  # noqa: S311 - spreads the requests
        tried = f"; {retries + 1} attempts" if retries else ""
        raise OSError(f"the server at {self.url} does not answer {path} ({reason}{tried})")


def stops_to_send(stops: Sequence[str]) -> list[str]:
    """Return the stops that a server is told: at most four, and none that holds another, where that one stops already.

    A text is cut at every stop when it is here; a server that knows fewer of them only says more before it is.

    >>> stops_to_send(["Instruction:", "Instruction", "Q:", "A:", "END", "###"])
    ['Instruction', 'Q:', 'A:', 'END']
    """
    needed = [stop for stop in stops if not any(other != stop and other in stop for other in stops)]
    return needed[:_MOST_STOPS]


def _message(body: bytes) -> str:
    """Return what the server says of an error, however it wraps it."""
    text = body.decode("utf-8", errors="replace")
    try:
        found = from_json(text)
        found = found.get("error", found)
        text = found.get("message", text) if isinstance(found, dict) else str(found)
    except (ValueError, AttributeError):
        pass
    return " ".join(text.split())[:300]
