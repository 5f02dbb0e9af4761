"""`prices.yaml` as typed values, and the cost of a model call at those prices.

```yaml
version: 1
models:
  - {match: openai/gpt-5-mini*, input: 1.5, cached_input: 0.15, output: 6}     # USD per million tokens
```

Money is counted in whole picodollars (1e-12 USD): a price per million tokens with six decimals is a whole number of
them for one token, so that costs are exact and their sums, too.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable
from decimal import Decimal
from fnmatch import fnmatchcase
from typing import Annotated, Literal

import msgspec
from msgspec import Meta, Struct

from gateway.config import Settings, load_yaml
from gateway.errors import ConfigError
from gateway.events import Usage

PICO = 10**12
"""Picodollars in a dollar."""

_MOST_USD = 1_000_000
"""A reported cost above this is a mistake, not a cost."""

MOST_TOKENS = 10**12
"""Usage that an upstream reports beyond this is no usage: it would not fit the ledger, or any purse."""

MOST_COST = _MOST_USD * PICO
"""A call that would cost more by its prices has no known cost."""

_REMEMBERED = 4_096

Price = Annotated[float, Meta(ge=0, le=1_000_000)]


class PriceRow(Struct, frozen=True, kw_only=True):
    """The prices of the models that ``match``, as ``upstream/model`` or an fnmatch pattern of it.

    Each is in USD per million tokens. Tokens of a kind whose price is left out cost what ``input`` or ``output`` says;
    a model that answers with tokens has an ``output``.
    """

    match: Annotated[str, Meta(min_length=1, max_length=256)]
    input: Price
    output: Price | None = None
    cached_input: Price | None = None
    cache_write: Price | None = None
    reasoning: Price | None = None
    audio_input: Price | None = None
    audio_output: Price | None = None


class PricesConfig(Struct, frozen=True, kw_only=True):
    """The file. An exact name comes before patterns, of which the first that fits counts."""

    version: Literal[1] = 1
    currency: Literal["USD"] = "USD"
    models: tuple[PriceRow, ...] = ()


class _Rates(Struct, frozen=True):
    """Picodollars for one token of each kind."""

    input: int
    cached_input: int
    cache_write: int
    audio_input: int
    output: int | None
    reasoning: int | None
    audio_output: int | None


class PriceTable:
    """What a model call costs; made of a `PricesConfig`, and never changed: a reload makes a new one."""

    def __init__(self, rows: Iterable[PriceRow] = ()) -> None:
        """Raise `ConfigError` for a price that is no whole number of picodollars, and for a name that comes twice."""
        rows = tuple(rows)
        self.version = hashlib.sha256(msgspec.json.encode(rows)).hexdigest()[:12]
        """What the ledger calls these prices: the same rows have the same name."""
        self._rows: dict[str, _Rates] = {}
        for row in rows:
            if row.match in self._rows:
                raise ConfigError(f"prices.yaml: models: '{row.match}' stands there twice; leave one of them.")
            self._rows[row.match] = _rates(row)
        self._found: dict[tuple[str, str], _Rates | None] = {}

    def cost(self, upstream: str, model: str, usage: Usage) -> int | None:
        """Return what ``usage`` of one model call costs in picodollars; None where no price says so.

        Cached, cache-writing and audio tokens are part of the input, reasoning and audio tokens of the output, as
        upstreams count.
        """
        try:
            rates = self._found[upstream, model]
        except KeyError:
            rates = self._find(upstream, model)
        if rates is None:
            return None
        cached = min(usage.cached_input_tokens, usage.input_tokens)
        heard = min(usage.audio_input_tokens, usage.input_tokens - cached)
        kept = min(usage.cache_write_tokens, usage.input_tokens - cached - heard)
        cost = (usage.input_tokens - cached - heard - kept) * rates.input
        cost += cached * rates.cached_input + heard * rates.audio_input + kept * rates.cache_write
        thought = min(usage.reasoning_tokens, usage.output_tokens)
        spoken = min(usage.audio_output_tokens, usage.output_tokens - thought)
        for tokens, rate in (
            (usage.output_tokens - thought - spoken, rates.output),
            (thought, rates.reasoning),
            (spoken, rates.audio_output),
        ):
            if tokens:
                if rate is None:
                    return None
                cost += tokens * rate
        return cost

    def most(self, upstream: str, model: str, input_tokens: int, output_tokens: int) -> int:
        """Return the cost of as many tokens if each were of the dearest kind; 0 where there is no price."""
        try:
            rates = self._found[upstream, model]
        except KeyError:
            rates = self._find(upstream, model)
        if rates is None:
            return 0
        reading = max(rates.input, rates.cached_input, rates.cache_write, rates.audio_input)
        writing = max(rates.output or 0, rates.reasoning or 0, rates.audio_output or 0)
        return input_tokens * reading + output_tokens * writing

    def _find(self, upstream: str, model: str) -> _Rates | None:
        name = f"{upstream}/{model}"
        found = self._rows.get(name)
        if found is None:
            found = next((rates for match, rates in self._rows.items() if fnmatchcase(name, match)), None)
        if len(self._found) >= _REMEMBERED:
            self._found.clear()
        self._found[upstream, model] = found
        return found


def load_prices(settings: Settings) -> PriceTable:
    """Return the prices of `prices.yaml`. Raises `ConfigError` naming file and key."""
    path = settings.config_file("prices.yaml")
    return PriceTable(load_yaml(path, PricesConfig).models if path is not None else ())


def reported_cost(value: object) -> int | None:
    """Return the cost in USD that an upstream put into its ``usage``, in picodollars; None where it is no amount."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    if not math.isfinite(value) or not 0 <= value <= _MOST_USD:
        return None
    return round(Decimal(repr(value)) * PICO)


def usd(picodollars: int) -> str:
    """Return an amount in dollars, exactly: ``0.000123``."""
    whole, part = divmod(picodollars, PICO)
    return f"{whole}.{part:012d}".rstrip("0").rstrip(".")


def _rates(row: PriceRow) -> _Rates:
    def rate(price: float | None, key: str) -> int | None:
        if price is None:
            return None
        amount = Decimal(repr(price)) * 1_000_000 if math.isfinite(price) else Decimal("0.5")
        if amount != int(amount):
            raise ConfigError(
                f"prices.yaml: models: '{row.match}': {key}: {price!r} is no amount in USD per million tokens with at "
                "most six decimals."
            )
        return int(amount)

    full = rate(row.input, "input")
    assert full is not None, "a row has an input price"
    cached, heard = rate(row.cached_input, "cached_input"), rate(row.audio_input, "audio_input")
    written, output = rate(row.cache_write, "cache_write"), rate(row.output, "output")
    thought, spoken = rate(row.reasoning, "reasoning"), rate(row.audio_output, "audio_output")
    return _Rates(
        input=full,
        cached_input=full if cached is None else cached,
        cache_write=full if written is None else written,
        audio_input=full if heard is None else heard,
        output=output,
        reasoning=output if thought is None else thought,
        audio_output=output if spoken is None else spoken,
    )
