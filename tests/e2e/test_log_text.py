"""`GATEWAY_LOG_FORMAT=text`: the log as a person reads it."""

from __future__ import annotations

import re

from tests.e2e.conftest import GatewayFactory
from tests.support.house import CHAT, write_agent
from tests.support.waiting import wait_for

LINE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z (DEBUG|INFO|WARNING|ERROR) +[\w.]+ .*")


def test_every_line_is_text_and_holds_no_more_than_json_would(start: GatewayFactory) -> None:
    gateway = start(
        prepare=lambda home: write_agent(home / "agents", "Reader", "You read."), env={"GATEWAY_LOG_FORMAT": "text"}
    )
    body = {"model": "default/reader", "messages": [{"role": "user", "content": "zq-prompt"}]}
    assert gateway.post("/v1/chat/completions", body, key=CHAT, headers={"x-request-id": "read-1"}).status == 200
    assert gateway.get("/v1/models", key="sk-zq-wrong-key-canary", headers={"x-request-id": "read-2"}).status == 401

    def lines() -> list[str]:
        return (gateway.home / "gateway.log").read_text(encoding="utf-8").splitlines()

    def answered(request_id: str) -> list[str]:
        return [line for line in lines() if " http.request " in line and f"request_id={request_id} " in line]

    wait_for(lambda: answered("read-1") and answered("read-2"), what="both requests are in the log")
    (first,) = answered("read-1")
    assert " INFO    http.request " in first and "status=200" in first and "key_id=chat" in first
    # The server greets before the product is asked how.
    written = [line for line in lines() if not line.startswith("INFO:     ")]
    assert all(LINE.fullmatch(line) or line.startswith("    ") for line in written), written
    text = "\n".join(written)
    assert not any(word in text for word in ("zq-prompt", CHAT, "zq-wrong-key"))
