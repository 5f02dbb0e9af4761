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
from gateway.usage.measures import NOTHING_MEASURED, Measured

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


class ImagePrice(Struct, frozen=True, kw_only=True):
    """The price in USD of one picture of a ``size`` and a ``quality``; what is left out fits any."""

    price: Price
    size: Annotated[str, Meta(min_length=1, max_length=32)] | None = None
    quality: Annotated[str, Meta(min_length=1, max_length=32)] | None = None


class PriceRow(Struct, frozen=True, kw_only=True):
    """The prices of the models that ``match``, as ``upstream/model`` or an fnmatch pattern of it.

    Those of tokens are in USD per million. Tokens of a kind whose price is left out cost what ``input`` or ``output``
    says; a model that answers with tokens has an ``output``. ``image`` is for one picture, where none of ``images``
    fits, ``characters`` for a million that are spoken, ``minute`` for one of sound that is written down, ``request``
    for every call, on top of the rest.
    """

    match: Annotated[str, Meta(min_length=1, max_length=256)]
    input: Price | None = None
    output: Price | None = None
    cached_input: Price | None = None
    cache_write: Price | None = None
    reasoning: Price | None = None
    audio_input: Price | None = None
    audio_output: Price | None = None
    image: Price | None = None
    images: tuple[ImagePrice, ...] = ()
    characters: Price | None = None
    minute: Price | None = None
    request: Price | None = None


class PricesConfig(Struct, frozen=True, kw_only=True):
    """The file. An exact name comes before patterns, of which the first that fits counts."""

    version: Literal[1] = 1
    currency: Literal["USD"] = "USD"
    models: tuple[PriceRow, ...] = ()


class _OtherRates(Struct, frozen=True):
    """Picodollars for what is not counted in tokens: a picture, a character, a minute, a request."""

    image: int | None
    images: tuple[tuple[str | None, str | None, int], ...]
    characters: int | None
    minute: int | None
    request: int | None

    def image_of(self, size: str | None, quality: str | None) -> int | None:
        """Return the price of one picture."""
        fitting = (price for s, q, price in self.images if s in (None, size) and q in (None, quality))
        return next(fitting, self.image)

    def cost(self, measured: Measured) -> int | None:
        """Return what a call costs by its measures, its request not included; None where no price says so."""
        cost, found = 0, False
        for amount, price, per in (
            (measured.images, self.image_of(measured.size, measured.quality), 1),
            (measured.characters, self.characters, 1),
            (measured.milliseconds, self.minute, 60_000),
        ):
            if amount and price is not None:
                cost, found = cost + (amount * price + per // 2) // per, True
        return cost if found else None


class _Rates(Struct, frozen=True):
    """Picodollars for one token of each kind; ``is_counted`` is whether tokens have a price at all."""

    input: int
    cached_input: int
    cache_write: int
    audio_input: int
    output: int | None
    reasoning: int | None
    audio_output: int | None
    is_counted: bool = True
    others: _OtherRates | None = None


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

    def cost(self, upstream: str, model: str, usage: Usage, measured: Measured = NOTHING_MEASURED) -> int | None:
        """Return what ``usage`` of one model call costs in picodollars; None where no price says so.

        Cached, cache-writing and audio tokens are part of the input, reasoning and audio tokens of the output, as
        upstreams count. Where an upstream counts no tokens, or they have no price, what was ``measured`` counts.
        """
        try:
            rates = self._found[upstream, model]
        except KeyError:
            rates = self._find(upstream, model)
        if rates is None:
            return None
        if rates.others is not None or measured is not NOTHING_MEASURED:
            return _cost(rates, usage, measured)
        return _cost_of_tokens(rates, usage)

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
        request = 0 if rates.others is None else rates.others.request or 0
        return input_tokens * reading + output_tokens * writing + request

    def most_measured(self, upstream: str, model: str, measured: Measured) -> int:
        """Return the cost of a call by its measures; 0 where there is no price."""
        try:
            rates = self._found[upstream, model]
        except KeyError:
            rates = self._find(upstream, model)
        if rates is None or rates.others is None:
            return 0
        return (rates.others.cost(measured) or 0) + (rates.others.request or 0)

    def _find(self, upstream: str, model: str) -> _Rates | None:
        name = f"{upstream}/{model}"
        found = self._rows.get(name)
        if found is None:
            found = next((rates for match, rates in self._rows.items() if fnmatchcase(name, match)), None)
        if len(self._found) >= _REMEMBERED:
            self._found.clear()
        self._found[upstream, model] = found
        return found


def _cost(rates: _Rates, usage: Usage, measured: Measured) -> int | None:
    """Return the cost of a call that may be counted in more than tokens; the request's own price is on top."""
    others = rates.others
    cost: int | None = None
    if rates.is_counted and (usage.input_tokens or usage.output_tokens):
        cost = _cost_of_tokens(rates, usage)
    elif others is not None:
        cost = others.cost(measured)
        if cost is None and others == _OtherRates(None, (), None, None, others.request) and not rates.is_counted:
            cost = 0
    if cost is None or others is None:
        return cost
    return cost + (others.request or 0)


def _cost_of_tokens(rates: _Rates, usage: Usage) -> int | None:
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


_MILLION = 1_000_000
_OF_TOKENS = ("output", "cached_input", "cache_write", "reasoning", "audio_input", "audio_output")
_OTHERS = ("image", "characters", "minute", "request")


def _rates(row: PriceRow) -> _Rates:
    def rate(price: float | None, key: str, unit: int = _MILLION) -> int | None:
        if price is None:
            return None
        amount = Decimal(repr(price)) * unit if math.isfinite(price) else Decimal("0.5")
        if amount != int(amount):
            form = "per million with at most six decimals" if unit == _MILLION else "with at most twelve decimals"
            raise ConfigError(f"prices.yaml: models: '{row.match}': {key}: {price!r} is no amount in USD {form}.")
        return int(amount)

    others = None
    if row.images or any(getattr(row, key) is not None for key in _OTHERS):
        pictures = ((one.size, one.quality, rate(one.price, "images", PICO) or 0) for one in row.images)
        others = _OtherRates(
            rate(row.image, "image", PICO),
            tuple(pictures),
            rate(row.characters, "characters"),
            rate(row.minute, "minute", PICO),
            rate(row.request, "request", PICO),
        )
    if row.input is None and (others is None or any(getattr(row, key) is not None for key in _OF_TOKENS)):
        raise ConfigError(
            f"prices.yaml: models: '{row.match}' has no price for tokens of the request: set input, or one of image, "
            "characters, minute and request for a model that is not charged by tokens."
        )
    full = rate(row.input or 0, "input") or 0
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
        is_counted=row.input is not None,
        others=others,
    )
