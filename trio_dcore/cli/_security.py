"""The options that say whom to trust, and what to prove to be: the same for every command."""

from __future__ import annotations

import argparse
from typing import Any

from .. import Security
from ._errors import USAGE, CliError

__all__ = ["add_security_options", "security_of"]

_TLS = ("tls_ca_file", "tls_cert", "tls_key")


def add_security_options(parser: argparse.ArgumentParser) -> None:
    """Give a command the options ``--tls-ca-file``, ``--tls-cert``, ``--tls-key`` (Dask's names) and ``--pickle``."""
    group = parser.add_argument_group("trust", "tls:// addresses need all three files; both ends prove who they are.")
    group.add_argument(
        "--tls-ca-file", metavar="FILE", help="PEM file of the authority that must have signed the peer's certificate"
    )
    group.add_argument("--tls-cert", metavar="FILE", help="PEM file with our own certificate")
    group.add_argument("--tls-key", metavar="FILE", help="PEM file with its private key")
    group.add_argument(
        "--pickle",
        choices=("trusted", "never", "always"),
        help="from and to whom pickles are accepted (default: trusted peers, which are those of this user on this machine, "
        "and with TLS whoever has a certificate of that authority)",
    )


def security_of(args: argparse.Namespace) -> Security | None:
    """What the options ask for; None if none of them was given.

    Raises:
        CliError: some of the three files are missing from the command line, or can't be used.
    """
    options: dict[str, Any] = {name: value for name in _TLS if (value := getattr(args, name)) is not None}
    if options and len(options) < len(_TLS):
        missing = " and ".join("--" + name.replace("_", "-") for name in _TLS if name not in options)
        raise CliError(f"TLS needs --tls-ca-file, --tls-cert and --tls-key; {missing} is missing", USAGE)
    if args.pickle is not None:
        options["pickle"] = args.pickle
    if not options:
        return None
    try:
        return Security(**options)
    except (OSError, TypeError, ValueError) as exc:
        raise CliError(str(exc), USAGE) from exc
