"""The command line ``trio-dcore``: serve handlers, call them, watch their streams, ping a server, and a demo.

::

    trio-dcore serve my_module:handlers --listen tcp://127.0.0.1:8786
    trio-dcore call tcp://127.0.0.1:8786 add x=1 y=2
    trio-dcore stream tcp://127.0.0.1:8786 ticks interval=0.5 --count 3
    trio-dcore ping tcp://127.0.0.1:8786
    trio-dcore demo

Exit codes: 0 done; 1 the call failed there, or the connection failed; 2 wrong usage; 124 timed out; 130 interrupted, and 143
terminated: a server by the second signal, since the first stops it in order.  Errors are one line on stderr.  :mod:`._output`
documents how values are read and printed.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Sequence

from .. import __version__
from ._call import run_call, run_ping, run_stream
from ._demo import run_demo
from ._errors import CliError
from ._security import add_security_options
from ._serve import run_serve

__all__ = ["main"]

_EXAMPLES = "examples:"


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if math.isnan(value) or value < 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no number of seconds (0 or more, or 'inf')")
    return value


def _positive(text: str) -> int:
    if not (text.isascii() and text.isdecimal()) or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """Fills the description as usual, and leaves examples as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        if text.startswith(_EXAMPLES):
            return super()._fill_text(text, width, indent)
        return argparse.HelpFormatter._fill_text(self, text, width, indent)


def _examples(*lines: str) -> str:
    return "\n  ".join((_EXAMPLES, *lines))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="trio-dcore",
        description="Serve and call handlers over Dask's wire protocol.",
        epilog=_examples(
            "trio-dcore demo",
            "trio-dcore serve my_module:handlers --listen tcp://127.0.0.1:8786",
            "trio-dcore call 127.0.0.1:8786 add x=1 y=2",
        )
        + "\n\nexit codes:\n  0 done, 1 the call or the connection failed, 2 wrong usage, 124 timed out, 130 interrupted, 143 terminated",
        formatter_class=_Formatter,
    )
    parser.add_argument("--version", action="version", version=f"trio-dcore {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    serve = commands.add_parser(
        "serve",
        help="run a server",
        description="Run a server until SIGTERM or SIGINT (Ctrl-C).  The first signal stops it in order: running handlers get "
        "--grace seconds to finish and their replies are delivered.  A second one stops it now.",
        epilog=_examples(
            "trio-dcore serve my_module:handlers",
            "trio-dcore serve my_module:MyServer --listen tcp://:8786 --listen unix:///run/my.sock --grace 30",
            "trio-dcore serve my_module:handlers --listen tls://:8786 --tls-ca-file ca.pem --tls-cert me.pem --tls-key me.key",
        ),
        formatter_class=_Formatter,
    )
    serve.add_argument(
        "target",
        metavar="MODULE:HANDLERS",
        help="a dict of handlers, a Server, a Server class, or a function that makes one of these; "
        "the current directory is searched for MODULE first",
    )
    serve.add_argument(
        "--listen",
        metavar="ADDRESS",
        action="append",
        help="where to listen: tcp://, tls:// or unix://PATH; may be given several times "
        "(default: tcp://127.0.0.1:0, a free port; tls:// if there are certificates)",
    )
    serve.add_argument(
        "--grace", metavar="SECONDS", type=_seconds, help="how long running handlers may go on (default: the server's own, 5)"
    )
    add_security_options(serve)
    serve.set_defaults(run=run_serve)

    def caller(name: str, help: str, description: str, form: str, *examples: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name, help=help, description=description, epilog=_examples(*examples), formatter_class=_Formatter
        )
        sub.add_argument(
            "address", metavar="ADDRESS", help="e.g. tcp://127.0.0.1:8786, 127.0.0.1:8786, tls://host:8786 or unix:///run/my.sock"
        )
        sub.add_argument(
            "--format", choices=("json", "table"), default=form, help=f"json for programs, table for eyes (default: {form})"
        )
        add_security_options(sub)
        return sub

    def with_call(sub: argparse.ArgumentParser) -> None:
        sub.add_argument("op", metavar="OP", help="name of the handler")
        sub.add_argument(
            "arguments",
            metavar="KEY=VALUE",
            nargs="*",
            help="its arguments; a VALUE is JSON or else text: n=1 name=joe",
        )
        sub.add_argument("--traceback", action="store_true", help="if the handler fails, show its traceback from over there")

    call = caller(
        "call",
        "call a handler and print its result",
        "Call a handler and print its result, by default as one line of JSON.",
        "json",
        "trio-dcore call 127.0.0.1:8786 add x=1 y=2",
        'trio-dcore call tcp://127.0.0.1:8786 find name=joe \'tags=["a", "b"]\' --timeout 5',
        "trio-dcore call unix:///run/my.sock jobs --format table",
    )
    with_call(call)
    call.add_argument(
        "--timeout", metavar="SECONDS", type=_seconds, default=30.0, help="for all of it (default: 30; inf for no limit)"
    )
    call.set_defaults(run=run_call)

    stream = caller(
        "stream",
        "print what a handler streams",
        "Print every item that a handler streams as it comes, by default as one line of JSON.",
        "json",
        "trio-dcore stream 127.0.0.1:8786 ticks interval=0.5 --count 3",
        "trio-dcore stream 127.0.0.1:8786 events --format table",
    )
    with_call(stream)
    stream.add_argument("--count", metavar="N", type=_positive, help="stop after N items (default: when the stream ends)")
    stream.add_argument(
        "--timeout",
        metavar="SECONDS",
        type=_seconds,
        default=math.inf,
        help="for all of it (default: none but for connecting)",
    )
    stream.set_defaults(run=run_stream)

    ping = caller(
        "ping",
        "ask a server who it is and how fast it answers",
        "Show a server's identity and its echo times.  Every server answers, stock Dask ones too.",
        "table",
        "trio-dcore ping 127.0.0.1:8786",
        "trio-dcore ping tls://node1:8786 --count 100 --format json --tls-ca-file ca.pem --tls-cert me.pem --tls-key me.key",
    )
    ping.add_argument("--count", metavar="N", type=_positive, default=5, help="how many echoes (default: 5)")
    ping.add_argument(
        "--timeout", metavar="SECONDS", type=_seconds, default=30.0, help="for all of it (default: 30; inf for no limit)"
    )
    ping.set_defaults(run=run_ping)

    demo = commands.add_parser(
        "demo",
        help="see it work: a server and its clients over real sockets",
        description="Start a server, call it in every way, shut it down during a call, and check what was promised.",
        epilog=_examples("trio-dcore demo"),
        formatter_class=_Formatter,
    )
    demo.set_defaults(run=run_demo)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        argv: the arguments without the program's name; None takes them from ``sys.argv``.

    Raises:
        SystemExit: from argparse, for ``--help`` and usage that it refuses.
    """
    if sys.stderr is None:  # it was closed by whoever called us, and everything that is said there would go to stdout instead
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115  # until the process ends
    args = _parser().parse_args(argv)
    try:
        code: int = args.run(args)
    except CliError as exc:
        print(f"trio-dcore: error: {exc}", file=sys.stderr)
        return exc.code
    except KeyboardInterrupt:
        return 130
    return code
