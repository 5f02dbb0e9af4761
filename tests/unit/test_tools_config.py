"""tools.yaml: read whole, refused by name, its secrets by reference; what an operator may get wrong is said."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from gateway.config import Settings
from gateway.errors import ConfigError
from gateway.tools.building import check_entries
from gateway.tools.config import load_tools
from gateway.tools.secrets import resolve_headers, resolve_secret
from gateway_cli.main import main


def check(tmp_path: Path, text: str) -> None:
    file = tmp_path / "tools.yaml"
    file.write_text(text, encoding="utf-8")
    settings = Settings(tool_config=file)
    asyncio.run(check_entries(load_tools(settings), settings))


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (
            "{name: a, provider: locl}",
            "Invalid value 'locl'; use local or http or openapi or mcp or shell or file_ops or research.",
        ),
        ("{name: a, provider: http, url: u, method: GTE}", "'GTE'; use GET or HEAD or POST or PUT or PATCH or DELETE."),
        ("{name: a, provider: mcp, url: u, overrides: {b: {on_denied: nay}}}", "'nay'; use tell_model or end_run."),
        ("{name: a, provider: http, url: 'https://x.example', metod: GET}", "did you mean 'method'?"),
        ("{name: a, provider: mcp, comand: [x]}", "did you mean 'command'?"),
        ("{name: a, provider: http, url: 'https://x.example', overrides: {}}", "unknown key 'overrides'"),
        ("{name: a, provider: openapi, document: d, overrides: {x: {timeot: 1}}}", "did you mean 'timeout'?"),
        ("{name: a b, provider: local, module: 'm:f'}", "name"),
        ("{name: a, provider: local, module: m.f}", "module"),
        ("{name: a, provider: http, url: 'ftp://x.example'}", "https://"),
        ("{name: a, provider: http, url: 'https://u:p@x.example'}", "user and password"),
        ("{name: a, provider: http, url: 'https://{h}.example', schema: {properties: {h: {}}}}", "host"),
        ("{name: a, provider: http, url: 'https://x.example/{h}'}", "'{h}' is no property"),
        ("{name: a, provider: http, url: 'https://x.example', headers: {host: y}}", "writes this header itself"),
        ("{name: a, provider: http, url: 'https://x.example', headers: {a: 'env:NO_SUCH'}}", "NO_SUCH is not set"),
        ("{name: a, provider: http, url: 'https://x.example', caller_headers: {a: Bearer X-Api-Key}}", "no server is"),
        ("{name: a, provider: http, url: 'https://x.example', caller_headers: {a: x-cred-b-base-url}}", "no address"),
        ("{name: a, provider: http, url: 'https://x.example', caller_headers: {a: x-cred-b}}", "x-cred-SERVICE-KEY"),
        ("{name: a, provider: http, url: 'https://x.example', caller_headers: {host: x-cred-b-c}}", "cannot be set"),
        ("{name: a, provider: http, url: 'https://x.example', headers: {a: 'file:/no/x'}}", "secret file x"),
        ("{name: a, provider: http, url: 'https://x.example', schema: {type: array}}", "'array'"),
        ("{name: a, provider: http, url: 'https://x.example', rules: [{argument: x}]}", "prefix, enum, regex"),
        ("{name: a, provider: http, url: 'https://x.example', network: {allow_private: [10.0.0.0/99]}}", "10.0.0.0/99"),
        ("{name: a, provider: openapi, document: nothing.yaml}", "nothing.yaml cannot be read"),
        ("{name: a, provider: mcp, url: 'https://x.example', headers: {a: 'env:NO_SUCH'}}", "the secret it refers to"),
        ("{name: a, provider: local, module: 'm:f', timeout: 0}", "timeout"),
    ],
)
def test_a_wrong_file_is_refused_with_the_sentence_that_mends_it(tmp_path: Path, entry: str, words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        check(tmp_path, f"version: 1\ntools:\n  - {entry}\n")
    assert caught.value.message.startswith("tools.yaml")
    assert words in caught.value.message


def test_two_entries_of_one_name_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="two entries are called 'a'"):
        check(tmp_path, "tools:\n  - {name: a, provider: local, module: 'm:f'}\n  - {name: a, provider: mcp, url: x}\n")


@pytest.mark.parametrize(
    ("document", "words"),
    [
        ("{}", "no OpenAPI 3 document"),
        ('{"openapi": "3.0.0", "paths": {}}', "info"),
        ("swagger: '2.0'", "no OpenAPI 3 document"),
        ("a: &a [x]\nb: *a\n", "neither JSON nor YAML"),
        ('{"openapi": "3.1.0", "info": {"title": "t", "version": "1"}, "paths": {}}', "where its server is"),
    ],
)
def test_a_wrong_document_is_refused(tmp_path: Path, document: str, words: str) -> None:
    (tmp_path / "d.yaml").write_text(document, encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        check(tmp_path, "tools: [{name: a, provider: openapi, document: d.yaml}]")
    assert words in caught.value.message


def test_secrets_are_read_by_reference(tmp_path: Path) -> None:
    (tmp_path / "key").write_text("from-file\n", encoding="utf-8")
    assert resolve_secret("env:KEY", where="x", env={"KEY": "v"}) == "v"
    assert resolve_secret("Bearer env:KEY", where="x", env={"KEY": "v"}) == "Bearer v"
    assert resolve_secret(f"file:{tmp_path / 'key'}", where="x") == "from-file"
    assert resolve_secret("plain text", where="x") == "plain text"
    with pytest.raises(ConfigError, match="characters"):
        resolve_headers({"a": "x\r\nhost: evil"}, where="x")


def test_doctor_knows_the_tools(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "tools.yaml"
    file.write_text("tools: [{name: a, provider: local, module: 'm:f'}]", encoding="utf-8")
    monkeypatch.setenv("GATEWAY_TOOL_CONFIG", str(file))
    monkeypatch.setenv("GATEWAY_AGENT_DISCOVERY_PATH", str(tmp_path))
    main(["doctor"])
    assert "ok    tools: a (local)" in capsys.readouterr().out
    file.write_text("tools: [{name: a, provider: local, modul: 'm:f'}]", encoding="utf-8")
    assert main(["doctor"]) == 1
    assert "FAIL  tools: tools.yaml:1: unknown key 'modul'; did you mean 'module'?" in capsys.readouterr().out
