"""One timer finds everything that is late, and nothing that was moved or forgotten; ids come from a pool."""

from __future__ import annotations

import asyncio

from gateway.deadlines import Deadlines
from gateway.ids import RandomIds


class Item:
    def __init__(self, name: str, due: float, late: list[str]) -> None:
        self.name, self.due, self.late = name, due, late
        self.expired = asyncio.Event()

    def expire(self) -> None:
        self.late.append(self.name)
        self.expired.set()


def test_what_is_late_expires_in_time_and_the_rest_stays() -> None:
    async def main() -> list[str]:
        loop, late = asyncio.get_running_loop(), list[str]()
        deadlines = Deadlines[Item](loop)
        now = deadlines.now()
        soon, sooner, moved, forgotten, far = (
            Item("soon", now + 0.04, late),
            Item("sooner", now + 0.02, late),
            Item("moved", now + 0.01, late),
            Item("forgotten", now + 0.01, late),
            Item("far", now + 60, late),
        )
        for item in (far, soon, sooner, moved, forgotten):
            deadlines.watch(item)
        moved.due = now + 60
        deadlines.forget(forgotten)
        await asyncio.wait_for(soon.expired.wait(), 60)
        assert deadlines.watched == {moved, far}
        far.due = now
        deadlines.advance(far.due)
        await asyncio.wait_for(far.expired.wait(), 60)
        return late

    assert asyncio.run(main()) == ["sooner", "soon", "far"]


def test_many_runs_cost_one_timer() -> None:
    async def main() -> int:
        loop = asyncio.get_running_loop()
        deadlines, armed = Deadlines[Item](loop), 0
        arm = loop.call_at

        def call_at(*arguments: object) -> asyncio.TimerHandle:
            nonlocal armed
            armed += 1
            return arm(*arguments)  # type: ignore[arg-type]

        loop.call_at = call_at  # type: ignore[method-assign, assignment]
        for number in range(1_000):
            item = Item("", deadlines.now() + 60 + number, [])
            deadlines.watch(item)
            deadlines.forget(item)
        return armed

    assert asyncio.run(main()) == 1


def test_ids_differ_also_past_the_pool() -> None:
    ids = RandomIds()
    taken = [ids.take() for _ in range(1_000)]
    assert len(set(taken)) == 1_000
    assert {len(one) for one in taken} == {16}
    assert ids.uuid().version == 4
