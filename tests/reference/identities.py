"""Certificates for tests over TLS, made once for all of them, and contexts for peers that are no code of ours."""

from __future__ import annotations

import datetime
import functools
import ssl
from dataclasses import dataclass
from typing import Any

import trustme

from trio_dcore import Security

__all__ = ["Identity", "ours", "theirs"]


@dataclass(frozen=True)
class Identity:
    """One certificate, and the CA whose certificates it believes.

    Attributes:
        authority: the PEM text of that CA.
        certificate: its own PEM text, with the chain.
        key: that of its private key.
    """

    authority: str
    certificate: str
    key: str

    def security(self, **options: Any) -> Security:
        """What a server or client of this identity is given."""
        return Security(tls_ca_file=self.authority, tls_cert=self.certificate, tls_key=self.key, **options)

    def context(self, side: str, *, certificate: bool = True) -> ssl.SSLContext:
        """The context of a "client" or "server" that asks for a certificate and has one, made by the standard library alone.

        Args:
            side: which of them it is.
            certificate: False is one without.
        """
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT if side == "client" else ssl.PROTOCOL_TLS_SERVER)
        context.check_hostname = False
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(cadata=self.authority)
        if certificate:
            with trustme.Blob(f"{self.key}\n{self.certificate}".encode()).tempfile() as path:
                context.load_cert_chain(path)
        return context


@functools.cache
def _authority(name: str) -> trustme.CA:
    return trustme.CA(organization_name=name)


@functools.cache
def ours(*names: str, authority: str = "ours", expired: bool = False) -> Identity:
    """An identity by the CA that all tests share.

    Args:
        names: what the certificate names; this machine's loopback interface if there is none.
        authority: a name for the CA, which is made when it is used first.
        expired: whether the certificate has.
    """
    ca = _authority(authority)
    # So long ago that no clock is so wrong.
    until = datetime.datetime.now(datetime.UTC) - datetime.timedelta(days=30) if expired else None
    begun = None if until is None else until - datetime.timedelta(days=30)
    issued = ca.issue_cert(*(names or ("127.0.0.1", "localhost")), not_before=begun, not_after=until)
    return Identity(
        ca.cert_pem.bytes().decode(),
        b"".join(blob.bytes() for blob in issued.cert_chain_pems).decode(),
        issued.private_key_pem.bytes().decode(),
    )


def theirs() -> Identity:
    """An identity by another CA, which believes that one."""
    return ours(authority="theirs")
