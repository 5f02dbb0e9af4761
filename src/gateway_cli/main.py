"""The `gateway` command: reads the arguments and hands over to one module per command.

A command's module is imported when the command runs, so that `gateway --help` answers at once.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from gateway import __version__
from gateway.errors import GatewayError
from gateway_cli.errors import CliError


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code: 0 done, 1 failed, 2 called wrongly, 130 interrupted."""
    try:
        arguments = build_parser().parse_args(argv)
        module = importlib.import_module(f"gateway_cli.{arguments.module}")
        status: int = module.run(arguments)
    except CliError as error:
        print(f"gateway: {error.message}", file=sys.stderr)
        return error.status
    except GatewayError as error:
        print(f"gateway: {error.message}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader of our output is gone (`gateway list | head`); leave nothing for the interpreter to flush.
        sys.stdout = None
        return 1
    return status


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of every command."""
    parser = _Parser(prog="gateway", description="Drop an agent into a folder and chat with it as a model.")
    parser.add_argument("--version", action="version", version=f"agent-gateway {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=_Parser)

    dev = _command(commands, "dev", "dev", "Serve a folder of agents on this machine, and reload what changes.")
    dev.add_argument(
        "path", nargs="?", type=Path, metavar="PATH", help="folder of agents (default: ./src/agents, else ./agents)"
    )
    dev.add_argument("--host", help="address to listen on (default: GATEWAY_HOST, else 127.0.0.1)")
    dev.add_argument(
        "--port", type=_port, help="port to listen on; 0 takes a free one (default: GATEWAY_PORT, else 8000)"
    )
    dev.add_argument("--no-watch", action="store_true", help="do not reload agents and YAML files when they change")

    serve = _command(commands, "serve", "serve", "Serve a folder of agents in production.")
    serve.add_argument(
        "path", nargs="?", type=Path, metavar="PATH", help="folder of agents (default: ./src/agents, else ./agents)"
    )
    serve.add_argument("--host", help="address to listen on (default: GATEWAY_HOST, else 127.0.0.1)")
    serve.add_argument("--port", type=_port, help="port to listen on (default: GATEWAY_PORT, else 8000)")
    serve.add_argument("--workers", type=_count, help="processes that serve (default: GATEWAY_WORKERS, else 1)")
    serve.add_argument("--tls-cert", type=Path, metavar="FILE", help="certificates, PEM (default: GATEWAY_TLS_CERT)")
    serve.add_argument("--tls-key", type=Path, metavar="FILE", help="their private key, PEM (default: GATEWAY_TLS_KEY)")

    new = _command(commands, "new", "new", "Make a folder with a working agent.")
    new.add_argument("name", metavar="NAME", help="folder name, or NAMESPACE/NAME")
    new.add_argument("--path", type=Path, help="folder of agents (default: ./src/agents, else ./agents)")

    list_ = _command(
        commands, "list", "listing", "List the agents of the running gateway, or of the folder when none runs."
    )
    list_.add_argument("--url", help="address of the gateway (default: the one that `gateway dev` runs)")
    list_.add_argument("--key", help="an admin key (default: GATEWAY_API_KEY, else the development key)")
    list_.add_argument("--path", type=Path, help="folder of agents to look at when no gateway runs")
    list_.add_argument("--json", action="store_true", help="print JSON")

    validate = _command(
        commands, "validate", "validating", "Import every agent in a throw-away process and say what is wrong."
    )
    validate.add_argument(
        "path", nargs="?", type=Path, metavar="PATH", help="folder of agents, or one agent's file or folder"
    )
    validate.add_argument("--json", action="store_true", help="print JSON")

    keys = commands.add_parser("keys", help="Make, list and end API keys.", description="Make, list and end API keys.")
    key_commands = keys.add_subparsers(metavar="COMMAND", required=True, parser_class=_Parser)
    _add_stored_keys(key_commands)

    usage = _command(commands, "usage", "usage", "Say what was used and what it cost, from the gateway's database.")
    usage.add_argument(
        "--by",
        default="key,model",
        metavar="NAMES",
        help="key, model, agent, upstream, end_user, namespace, day; several by commas (default: key,model)",
    )
    usage.add_argument("--from", dest="start", metavar="DATE", help="first day in UTC (default: 30 days up to today)")
    usage.add_argument("--to", dest="end", metavar="DATE", help="last day in UTC (default: today)")
    usage.add_argument("--only", action="append", metavar="NAME=VALUE", help="as key=alice; repeatable")
    usage.add_argument("--path", type=Path, help="folder of agents (default: ./src/agents, else ./agents)")
    usage.add_argument("--json", action="store_true", help="print JSON")

    summary = "List the gateway's tools, and accept those that changed."
    tools = commands.add_parser("tools", help=summary, description=summary)
    _add_tools(tools.add_subparsers(metavar="COMMAND", required=True, parser_class=_Parser))

    explain = _command(
        commands, "explain", "explaining", "Say what a model name means, and who serves it in which order."
    )
    explain.add_argument(
        "model", nargs="?", metavar="MODEL", help="an agent, a virtual model, an alias or UPSTREAM/MODEL"
    )
    explain.add_argument("--settings", action="store_true", help="say where the value of every setting comes from")
    explain.add_argument("--path", type=Path, help="folder of agents (default: ./src/agents, else ./agents)")
    explain.add_argument("--json", action="store_true", help="print JSON")

    doctor = _command(commands, "doctor", "doctor", "Check this installation and its configuration.")
    doctor.add_argument("--path", type=Path, help="folder of agents (default: ./src/agents, else ./agents)")

    health = _command(commands, "health", "health", "Say whether the gateway on this machine serves.")
    health.add_argument("--url", help="address of the gateway (default: by GATEWAY_HOST and GATEWAY_PORT)")
    asked = health.add_mutually_exclusive_group()
    asked.add_argument("--ready", action="store_true", help="ask whether it should get traffic, not only if it lives")
    asked.add_argument("--providers", action="store_true", help="ask upstreams, tools, store and Redis; needs --key")
    health.add_argument("--key", help="admin key for --providers (default: GATEWAY_API_KEY, or that of development)")

    audit = _command(commands, "audit", "audit", "Look for weak keys, forgotten modules and vulnerable packages.")
    audit.add_argument("--path", type=Path, help="folder of agents (default: ./src/agents, else ./agents)")
    audit.add_argument("--lock", type=Path, metavar="FILE", help="requirements file that the installation must equal")
    audit.add_argument(
        "--advisories", metavar="URL", help="a service that speaks OSV's API (default: https://api.osv.dev)"
    )
    audit.add_argument("--no-packages", action="store_true", help="leave the packages out")

    _command(commands, "version", "version", "Say which versions run here.")
    return parser


def _add_stored_keys(commands: argparse._SubParsersAction[_Parser]) -> None:
    """The keys of the database: gateways that run on it follow within a second."""
    summaries = {
        "create": "Make a key, in the gateway's database or for security.yaml, and show it once.",
        "list": "List the keys of the database.",
        "rotate": "Give a key a new secret; the old one works for a while.",
        "revoke": "End a key for ever, and its open streams.",
    }
    found = {name: _command(commands, name, "stored_keys", summary) for name, summary in summaries.items()}
    for action, command in found.items():
        command.set_defaults(action=action)
        command.add_argument("--path", type=Path, help="folder of agents (default: ./src/agents, else ./agents)")
        if action != "list":
            command.add_argument("name", metavar="NAME", help="id of the key")
        if action != "revoke":
            command.add_argument("--json", action="store_true", help="print JSON")
    create = found["create"]
    create.add_argument(
        "--allow", action="append", metavar="PATTERN", help="models the key reaches (repeatable; default: inherited)"
    )
    create.add_argument(
        "--allow-tool", action="append", metavar="PATTERN", help="tools it reaches (repeatable; default: inherited)"
    )
    create.add_argument("--yaml", action="store_true", help="store nothing: print what to add to security.yaml")
    create.add_argument("--admin", action="store_true", help="let the key administer the gateway")
    create.add_argument("--description", metavar="TEXT", help="what the key is for")
    create.add_argument("--namespace", metavar="NAME", help="namespace it belongs to (default: default)")
    create.add_argument("--profile", choices=("openai", "openwebui"), help="client dialect (default: openai)")
    create.add_argument("--expires", metavar="DATE", help="last day, as YYYY-MM-DD")
    create.add_argument("--requests-per-minute", type=int, metavar="N", help="limit of requests in any minute")
    create.add_argument("--tokens-per-minute", type=int, metavar="N", help="limit of tokens in any minute")
    create.add_argument("--cost-per-day", type=float, metavar="USD", help="limit of cost in any 24 hours")
    found["rotate"].add_argument(
        "--grace",
        type=float,
        default=24.0,
        metavar="HOURS",
        help="how long the old secret works (default: 24; 0: no more)",
    )


def _add_tools(commands: argparse._SubParsersAction[_Parser]) -> None:
    summaries = {
        "list": "List the tools of the running gateway with their health, and what waits for approval.",
        "approve": "Show tools of an MCP server that are new or changed, and accept them as they are.",
    }
    found = {name: _command(commands, name, "tool_commands", summary) for name, summary in summaries.items()}
    for action, command in found.items():
        command.set_defaults(action=action)
        command.add_argument("--url", help="address of the gateway (default: the one that `gateway dev` runs)")
        command.add_argument("--key", help="an admin key (default: GATEWAY_API_KEY, else the development key)")
        command.add_argument("--path", type=Path, help="folder of agents (default: ./src/agents, else ./agents)")
        command.add_argument("--json", action="store_true", help="print JSON")
    approve = found["approve"]
    approve.add_argument("server", metavar="SERVER", help="the server's entry in tools.yaml")
    approve.add_argument("tools", nargs="*", metavar="TOOL", help="the server's own names (default: all that wait)")
    approve.add_argument("--yes", action="store_true", help="accept without a question")


class _Parser(argparse.ArgumentParser):
    """An argument parser whose refusal is one sentence."""

    def error(self, message: str) -> NoReturn:
        text = message[0].upper() + message[1:]
        raise CliError(f"{text}; `{self.prog} --help` says how it is called.", status=2)


def _command(
    commands: argparse._SubParsersAction[_Parser], name: str, module: str, summary: str
) -> argparse.ArgumentParser:
    parser = commands.add_parser(name, help=summary, description=summary)
    parser.set_defaults(module=module)
    return parser


def _port(text: str) -> int:
    if not text.isdigit() or int(text) > 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port (0 to 65535)")
    return int(text)


def _count(text: str) -> int:
    if not text.isdigit() or not 1 <= int(text) <= 256:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of processes (1 to 256)")
    return int(text)
