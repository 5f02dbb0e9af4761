"""Counters in Redis: one script for each exchange, atomic, by the clock of the server.

A window is a hash of amounts by slot (``total`` is their sum) and a list of the slots in order; what is held is a hash
of ``amount:until`` by holder. All keys share one hash tag, and so one node of a cluster. The script mirrors
`gateway.limits.book`; one test-suite holds both to the same answers.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, cast

import msgspec

from gateway.limits.port import SCARCE, Answer, Batch, Grant, LimitStoreDown, Refusal, Rule

if TYPE_CHECKING:  # 0.2 s, only where Redis is configured
    from redis.asyncio import Redis

_SCRIPT = """
local batch = cjson.decode(ARGV[1])
local now = batch.now
if not now then
  local time = redis.call('TIME')
  now = tonumber(time[1]) * 1000 + math.floor(tonumber(time[2]) / 1000)
end
local function whole(number) return string.format('%.0f', number) end
local rules, totals = batch.rules, {}

local function expire(n)
  local key, rule = KEYS[n], rules[n]
  local total = 0
  if rule.window > 0 then
    total = tonumber(redis.call('HGET', key, 'total') or '0')
    local life = rule.slot + rule.window + rule.hold
    while true do
      local first = redis.call('LINDEX', key .. ':slots', 0)
      if not first or tonumber(first) + life > now then break end
      total = total - tonumber(redis.call('HGET', key, first) or '0')
      redis.call('HDEL', key, first)
      redis.call('LPOP', key .. ':slots')
      redis.call('HSET', key, 'total', whole(total))
    end
  else
    local held = redis.call('HGETALL', key)
    for i = 1, #held, 2 do
      local amount, ends = string.match(held[i + 1], '^(%d+):(%d+)$')
      if tonumber(ends) <= now then redis.call('HDEL', key, held[i]) else total = total + tonumber(amount) end
    end
  end
  totals[n] = total
end

local function keep(n)
  local rule = rules[n]
  local life = rule.slot + rule.window + rule.hold + 1000
  redis.call('PEXPIRE', KEYS[n], whole(life))
  if rule.window > 0 then redis.call('PEXPIRE', KEYS[n] .. ':slots', whole(life)) end
end

local function held_by(n)
  local held = redis.call('HGET', KEYS[n], batch.holder)
  if not held then return 0 end
  return tonumber(string.match(held, '^(%d+):'))
end

local function hold(n, amount)
  totals[n] = totals[n] + amount - held_by(n)
  if amount == 0 then redis.call('HDEL', KEYS[n], batch.holder)
  else redis.call('HSET', KEYS[n], batch.holder, whole(amount) .. ':' .. whole(now + rules[n].hold)) end
  keep(n)
end

local function add(n, amount)
  local key, rule = KEYS[n], rules[n]
  if rule.window == 0 then
    hold(n, held_by(n) + amount)
    return 0
  end
  local slot = now - now % rule.slot
  local last = redis.call('LINDEX', key .. ':slots', -1)
  if last and tonumber(last) > slot then slot = tonumber(last) end
  if amount > 0 then
    if not last or tonumber(last) < slot then redis.call('RPUSH', key .. ':slots', whole(slot)) end
    redis.call('HINCRBY', key, whole(slot), whole(amount))
    totals[n] = totals[n] + amount
    redis.call('HSET', key, 'total', whole(totals[n]))
    keep(n)
  end
  return slot
end

local function give_back(n, slot, amount)
  local key, rule = KEYS[n], rules[n]
  if rule.window == 0 then
    local held = redis.call('HGET', key, batch.holder)
    if held then
      local there, ends = string.match(held, '^(%d+):(%d+)$')
      local left = math.max(tonumber(there) - amount, 0)
      totals[n] = totals[n] + left - tonumber(there)
      if left == 0 then redis.call('HDEL', key, batch.holder)
      else redis.call('HSET', key, batch.holder, whole(left) .. ':' .. ends) end
    end
    return
  end
  local there = tonumber(redis.call('HGET', key, whole(slot)) or '0')
  local given = math.min(there, amount)
  if given > 0 then
    if given == there then
      redis.call('HDEL', key, whole(slot))
      redis.call('LREM', key .. ':slots', -1, whole(slot))
    else redis.call('HINCRBY', key, whole(slot), whole(-given)) end
    totals[n] = totals[n] - given
    redis.call('HSET', key, 'total', whole(totals[n]))
  end
end

local function reset(n)
  local rule = rules[n]
  local first = rule.window > 0 and redis.call('LINDEX', KEYS[n] .. ':slots', 0)
  if not first then return 0 end
  return tonumber(first) + rule.slot + rule.window + rule.hold - now
end

local function wait(n, amount)
  local rule = rules[n]
  if amount > rule.limit then return -1 end
  if rule.window == 0 then return 1000 end
  local missing = totals[n] + amount - rule.limit
  local from = 0
  while true do
    local slots = redis.call('LRANGE', KEYS[n] .. ':slots', from, from + 63)
    if #slots == 0 then return 0 end
    local taken = redis.call('HMGET', KEYS[n], unpack(slots))
    for i, slot in ipairs(slots) do
      missing = missing - tonumber(taken[i] or '0')
      if missing <= 0 then return tonumber(slot) + rule.slot + rule.window + rule.hold - now end
    end
    from = from + 64
  end
end

for n = 1, #KEYS do expire(n) end
local answer = {}
for _, change in ipairs(batch.changes) do
  local n, amount, slot = change[1], change[2], change[3]
  if amount < 0 then give_back(n, slot, -amount) else add(n, amount) end
  answer[#answer + 1] = whole(totals[n])
end
for _, renewal in ipairs(batch.renewals) do hold(renewal[1], renewal[2]) end
for _, group in ipairs(batch.groups) do
  local refused = nil
  for index, ask in ipairs(group) do
    local n = ask[1]
    local wanted = math.max(ask[2], 1)
    if totals[n] + wanted > rules[n].limit then
      refused = index
      answer[#answer + 1] = 'no'
      answer[#answer + 1] = whole(index - 1)
      answer[#answer + 1] = whole(totals[n])
      answer[#answer + 1] = whole(wait(n, wanted))
      break
    end
  end
  if not refused then
    answer[#answer + 1] = 'yes'
    for _, ask in ipairs(group) do
      local n, amount, block = ask[1], ask[2], ask[3]
      if block > amount and rules[n].limit - totals[n] >= batch.scarce * block then amount = block end
      local slot = add(n, amount)
      answer[#answer + 1] = whole(amount)
      answer[#answer + 1] = whole(slot)
      answer[#answer + 1] = whole(totals[n])
      answer[#answer + 1] = whole(reset(n))
    end
  end
end
return answer
"""


class RedisLimits:
    """Counters that all replicas with the same Redis share. ``prefix`` keeps several gateways in one Redis apart."""

    name = "redis"

    def __init__(self, client: Redis, *, prefix: str = "gateway", clock: Callable[[], int] | None = None) -> None:
        self._script = client.register_script(_SCRIPT)
        self._prefix = f"{prefix}:{{limits}}:"
        self._clock = clock
        self._failures: tuple[type[Exception], ...] = (importlib.import_module("redis.exceptions").RedisError, OSError)

    async def exchange(self, batch: Batch) -> Answer:
        """See `LimitStore.exchange`."""
        rules = batch.rules()
        if not rules:
            return Answer(())
        number = {key: index for index, key in enumerate(rules, 1)}
        text = msgspec.json.encode(
            {
                "now": None if self._clock is None else self._clock(),
                "holder": batch.holder,
                "scarce": SCARCE,
                "rules": [_shape(rule) for rule in rules.values()],
                "renewals": [(number[r.rule.key], r.amount) for r in batch.renewals],
                "changes": [(number[c.rule.key], c.amount, c.slot) for c in batch.changes],
                "groups": [[(number[a.rule.key], a.amount, a.block) for a in group] for group in batch.groups],
            }
        ).replace(b'"now":null,', b"")
        keys = [self._prefix + key for key in rules]
        try:
            words = cast("list[bytes]", await cast(Any, self._script(keys=keys, args=[text])))
        except self._failures as error:
            raise LimitStoreDown("Redis does not answer") from error
        return _answer(batch, iter(words))


def _shape(rule: Rule) -> dict[str, int]:
    return {"limit": rule.limit, "window": rule.window_ms, "slot": rule.slot_ms, "hold": rule.hold_ms}


def _answer(batch: Batch, words: Iterator[bytes]) -> Answer:
    totals = tuple(int(next(words)) for _ in batch.changes)
    groups: list[tuple[Grant, ...] | Refusal] = []
    for group in batch.groups:
        if next(words) == b"no":
            groups.append(Refusal(int(next(words)), int(next(words)), int(next(words))))
        else:
            numbers = [[int(next(words)) for _ in range(4)] for _ in group]
            groups.append(tuple(Grant(*four) for four in numbers))
    return Answer(tuple(groups), totals)
