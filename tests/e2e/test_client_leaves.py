"""When a client leaves, its upstream call ends within a second: streamed or not, also before the first token."""

from __future__ import annotations

import itertools
import json
import socket
import struct
import time
from typing import Any

import pytest

from tests.support.by_hand import read_until, send_by_hand
from tests.support.house import CHAT
from tests.support.obedient_upstream import Call, ObedientUpstream
from tests.support.server import Gateway
from tests.support.waiting import in_time, wait_for

MODELS = ["default/weatheragent", "local/test-model"]
LONG_BEFORE_A_DEADLINE_S = 20.0


def send(gateway: Gateway, body: dict[str, Any]) -> socket.socket:
    return send_by_hand(gateway, body, key=CHAT)


def assert_upstream_closed(call: Call, left: float) -> None:
    """It ended because the client left: no deadline of the gateway would have ended it by then."""
    assert call.hung_up.wait(60), "the upstream call went on after the client had left"
    assert call.hung_up_at - left < LONG_BEFORE_A_DEADLINE_S


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("how", ["close", "reset"])
def test_streamed_after_some_tokens(gateway: Gateway, upstream: ObedientUpstream, model: str, how: str) -> None:
    marker = f"leaves streaming {how} {model}"
    text = f"[hold=4] say a b c d e {marker}"
    sock = send(gateway, {"model": model, "stream": True, "messages": [{"role": "user", "content": text}]})
    with sock:
        read_until(sock, b'"b ')
        if how == "reset":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    assert_upstream_closed(upstream.find(marker)[-1], time.monotonic())


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("streamed", [True, False])
def test_before_the_first_token(gateway: Gateway, upstream: ObedientUpstream, model: str, streamed: bool) -> None:
    numbers = itertools.count()

    def leave() -> float:
        marker = f"leaves early {streamed} {model} {next(numbers)}"
        text = f"[fault=hang] say {marker}"
        sock = send(gateway, {"model": model, "stream": streamed, "messages": [{"role": "user", "content": text}]})
        with sock:
            call = upstream.wait_for_call(marker)
            assert call.started.wait(60)
        left = time.monotonic()
        assert_upstream_closed(call, left)
        return call.hung_up_at - left

    in_time(leave, 1.0)


def test_while_a_tool_runs_the_run_is_cancelled(gateway: Gateway, upstream: ObedientUpstream) -> None:
    text = 'call wait {"seconds": 100} ;; say tool finished anyway'
    request = {"model": "default/tooltrouble", "stream": True, "messages": [{"role": "user", "content": text}]}
    sock = send(gateway, request)
    with sock:
        call = upstream.wait_for_call("tool finished anyway")
        assert call.finished.wait(60)
    gateway.logged("run.finished", outcome="cancelled", model="default/tooltrouble")
    assert len(upstream.find("tool finished anyway")) == 1, "the run ended before its tool did"


def test_in_an_inner_agents_call(gateway: Gateway, upstream: ObedientUpstream) -> None:
    inner = json.dumps({"input": "[hold=1] say inner agent left alone"})
    request = {
        "model": "default/agentastool",
        "stream": True,
        "messages": [{"role": "user", "content": f"call to_french {inner} ;; echo"}],
    }
    sock = send(gateway, request)
    with sock:
        call = wait_for(
            lambda: [c for c in upstream.find("inner agent left alone") if "French" in c.system],
            what="the inner agent asks the upstream",
        )[0]
        assert call.started.wait(60)
    assert_upstream_closed(call, time.monotonic())


def test_a_client_that_stays_is_not_cut_by_others_that_leave(gateway: Gateway, upstream: ObedientUpstream) -> None:
    stay = send(
        gateway,
        {
            "model": "default/weatheragent",
            "stream": True,
            "messages": [{"role": "user", "content": "[hold=3] say one two three staying"}],
        },
    )
    with stay:
        read_until(stay, b'"two ')
        for index in range(5):
            text = f"[fault=hang] say leaver {index}"
            request = {"model": "default/weatheragent", "messages": [{"role": "user", "content": text}]}
            with send(gateway, request):
                call = upstream.wait_for_call(f"leaver {index}")
            assert call.hung_up.wait(60)
        upstream.find("three staying")[-1].release()
        assert b"staying" in read_until(stay, b"[DONE]")
