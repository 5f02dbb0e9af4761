"""A load test: users who chat with one model, seven calls plain for three streamed, by the official client.

    PYTHONPATH=src python scripts/load.py --url http://127.0.0.1:8000 --key KEY --model default/hello --users 20

Prints JSON: calls, failures by code, calls a second, latency and time to first token. Exits with 1 when more than
``--max-failures`` of the calls failed. It measures what users see; `make bench` measures what the gateway costs.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field

from openai import APIError, APIStatusError, AsyncOpenAI

PLAIN_SHARE = 0.7
"""Seven plain calls for three streamed ones."""


@dataclass
class Result:
    """What the users saw; times are seconds."""

    plain_s: list[float] = field(default_factory=list)
    streamed_s: list[float] = field(default_factory=list)
    first_token_s: list[float] = field(default_factory=list)
    failures: Counter[str] = field(default_factory=Counter)

    @property
    def calls(self) -> int:
        """All calls, failed ones included."""
        return len(self.plain_s) + len(self.streamed_s) + sum(self.failures.values())

    def report(self, seconds: float) -> dict[str, object]:
        """Return the numbers as JSON values, times in milliseconds."""
        return {
            "seconds": round(seconds, 3),
            "calls": self.calls,
            "calls_per_second": round(self.calls / seconds, 1),
            "failures": dict(self.failures),
            "plain_ms": _spread(self.plain_s),
            "streamed_ms": _spread(self.streamed_s),
            "first_token_ms": _spread(self.first_token_s),
        }


def main(argv: Sequence[str] | None = None) -> int:
    """Run the test; return 1 when too many calls failed, or none was made."""
    parser = argparse.ArgumentParser(description="Send a 7:3 mix of plain and streamed calls to a gateway.")
    parser.add_argument("--url", default="http://127.0.0.1:8000")
    parser.add_argument("--key", default="dev-secret")
    parser.add_argument("--model", default="default/hello")
    parser.add_argument("--message", default="How do people greet in Paris?")
    parser.add_argument("--users", type=int, default=10)
    parser.add_argument("--seconds", type=float, default=30.0)
    parser.add_argument("--max-failures", type=float, default=0.0, metavar="SHARE")
    arguments = parser.parse_args(argv)
    started = time.perf_counter()
    result = asyncio.run(run(arguments))
    print(json.dumps(result.report(time.perf_counter() - started), indent=2))
    failed = sum(result.failures.values())
    return 1 if not result.calls or failed / result.calls > arguments.max_failures else 0


async def run(arguments: argparse.Namespace) -> Result:
    """Let ``users`` chat, each with one call at a time, until the time is over."""
    result = Result()
    until = time.perf_counter() + arguments.seconds
    async with AsyncOpenAI(
        base_url=f"{arguments.url.rstrip('/')}/v1", api_key=arguments.key, max_retries=0, timeout=120
    ) as client:
        await asyncio.gather(*(_user(client, arguments, result, until, user) for user in range(arguments.users)))
    return result


async def _user(client: AsyncOpenAI, arguments: argparse.Namespace, result: Result, until: float, user: int) -> None:
    dice = random.Random(user)  # the same mix in every run
    while time.perf_counter() < until:
        call = _plain if dice.random() < PLAIN_SHARE else _streamed
        try:
            await call(client, arguments.model, arguments.message, result)
        except APIStatusError as error:
            result.failures[f"{error.status_code} {error.code}"] += 1
        except APIError as error:
            result.failures[type(error).__name__] += 1


async def _plain(client: AsyncOpenAI, model: str, message: str, result: Result) -> None:
    started = time.perf_counter()
    answer = await client.chat.completions.create(model=model, messages=[{"role": "user", "content": message}])
    if not answer.choices or not answer.choices[0].message.content:
        result.failures["empty answer"] += 1
        return
    result.plain_s.append(time.perf_counter() - started)


async def _streamed(client: AsyncOpenAI, model: str, message: str, result: Result) -> None:
    started, first, ended = time.perf_counter(), None, False
    stream = await client.chat.completions.create(
        model=model, messages=[{"role": "user", "content": message}], stream=True
    )
    async for chunk in stream:
        for choice in chunk.choices:
            if choice.delta.content and first is None:
                first = time.perf_counter() - started
            ended = ended or choice.finish_reason is not None
    if first is None or not ended:
        result.failures["unfinished stream"] += 1
        return
    result.first_token_s.append(first)
    result.streamed_s.append(time.perf_counter() - started)


def _spread(seconds: list[float]) -> dict[str, float] | None:
    """Return median, 95th and 99th percentile and maximum in milliseconds."""
    if len(seconds) < 2:
        return None
    cuts = statistics.quantiles(seconds, n=100, method="inclusive")
    named = {"p50": cuts[49], "p95": cuts[94], "p99": cuts[98], "max": max(seconds)}
    return {name: round(value * 1_000, 1) for name, value in named.items()}


if __name__ == "__main__":
    sys.exit(main())
