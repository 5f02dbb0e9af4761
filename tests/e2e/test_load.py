"""The load test sends the mix it promises, and its exit code tells."""

from __future__ import annotations

import json

import pytest

from scripts.load import PLAIN_SHARE
from scripts.load import main as load
from tests.support.server import Gateway


def test_the_load_test_mixes_seven_to_three(gateway: Gateway, capsys: pytest.CaptureFixture[str]) -> None:
    assert PLAIN_SHARE == 0.7
    where = ["--url", gateway.url, "--users", "4", "--seconds"]
    for seconds in ("1.5", "6", "24"):  # enough for some calls of both kinds, also on a busy machine
        assert load([*where, seconds, "--key", gateway.key or "", "--model", "default/weatheragent"]) == 0
        report = json.loads(capsys.readouterr().out)
        assert report["failures"] == {}
        if report["calls"] >= 30:
            break
    assert report["calls"] >= 8
    assert report["plain_ms"]["p50"] > 0
    assert report["first_token_ms"]["p50"] <= report["streamed_ms"]["p50"]

    assert load([*where, "1.5", "--key", "sk-wrong"]) == 1
    assert next(iter(json.loads(capsys.readouterr().out)["failures"])).startswith("401")
