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

    keys = commands.add_parser("keys", help="Make API keys.", description="Make API keys.")
    key_commands = keys.add_subparsers(metavar="COMMAND", required=True, parser_class=_Parser)
    key = _command(
        key_commands, "new", "keys", "Print a fresh key, once, and the lines of security.yaml that let it in."
    )
    key.add_argument("name", metavar="NAME", help="id of the key")
    key.add_argument(
        "--allow",
        action="append",
        metavar="PATTERN",
        help="models the key reaches, e.g. 'default/*' (repeatable; default: '*')",
    )
    key.add_argument("--admin", action="store_true", help="let the key administer the gateway")
    key.add_argument("--expires", metavar="DATE", help="last day, as YYYY-MM-DD")

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

    _command(commands, "version", "version", "Say which versions run here.")
    return parser


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
