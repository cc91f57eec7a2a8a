"""From :class:`~trio_dcore.Security` to :class:`ssl.SSLContext`, and from a certificate to a verdict."""

from __future__ import annotations

import ipaddress
import os
import ssl
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any, Literal

from .._security import Security
from ..errors import LocalProtocolError

__all__ = ["judge", "subjects_of", "tls_context"]

_VERSIONS = {1.2: ssl.TLSVersion.TLSv1_2, 1.3: ssl.TLSVersion.TLSv1_3}
# What ssl.SSLSocket.getpeercert calls the kinds of names, and what they are called in patterns, as in OpenSSL's own files.
_KINDS = {"DNS": "DNS", "IP Address": "IP", "URI": "URI", "email": "email"}


def tls_context(security: Security, role: Literal["listen", "connect"]) -> ssl.SSLContext:
    """The context for one side, made once for each Security.

    Raises:
        LocalProtocolError: files are not given or can't be used; it names the field.
    """
    context = security._contexts.get(role)
    if context is None:
        context = security._contexts[role] = _build(security, role)
    made: ssl.SSLContext = context
    return made


def _build(security: Security, role: Literal["listen", "connect"]) -> ssl.SSLContext:
    identity = security.identity(role)
    if identity is None:
        missing = "tls_ca_file" if security.tls_ca_file is None else "tls_cert"
        raise LocalProtocolError(
            f"tls:// works only with certificates, and Security({missing}=...) is not set; both sides need "
            "Security(tls_ca_file=..., tls_cert=..., tls_key=...), or one Security.temporary() that they share"
        )
    authority, certificate, key = identity
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER if role == "listen" else ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = role == "connect" and security.check_hostname
    context.verify_mode = ssl.CERT_REQUIRED
    # As Dask: it refuses certificates that are in use, such as those of Dask's own Security.temporary().
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    context.options |= ssl.OP_NO_RENEGOTIATION
    context.minimum_version = _VERSIONS[security.tls_min_version]
    if security.tls_max_version is not None:
        context.maximum_version = _VERSIONS[security.tls_max_version]
    if role == "listen":
        # A ticket would be something to read on a comm that is idle, and a session that is resumed shows no certificate.  With TLS 1.2
        # OpenSSL keeps sessions here, too, which nothing in Python turns off: the pump refuses who resumes one.
        context.num_tickets = 0
        context.options |= ssl.OP_NO_TICKET
    if security.tls_ciphers is not None:
        try:
            context.set_ciphers(security.tls_ciphers)
        except ssl.SSLError as error:
            raise LocalProtocolError(f"Security(tls_ciphers={security.tls_ciphers!r}): OpenSSL knows none of these") from error
    _load_authority(context, *authority)
    _load_certificate(context, *certificate, *key)
    return context


def _load_authority(context: ssl.SSLContext, field: str, value: str) -> None:
    _read(field, value)  # says why, where it can't be read
    try:
        if _is_text(value):
            context.load_verify_locations(cadata=value)
        else:
            context.load_verify_locations(cafile=value)
    except (ssl.SSLError, ValueError, TypeError) as error:  # the latter two: texts with other characters than certificates have
        raise LocalProtocolError(
            f"{_named(field, value)} holds no certificate in PEM format that OpenSSL can read: {error}"
        ) from error


def _load_certificate(context: ssl.SSLContext, cert_field: str, cert: str, key_field: str, key: str | None) -> None:
    if b"-----BEGIN CERTIFICATE-----" not in _read(cert_field, cert):
        raise LocalProtocolError(f"{_named(cert_field, cert)} holds no certificate in PEM format")
    key_source = _named(cert_field, cert) if key is None else _named(key_field, key)
    key_bytes = _read(cert_field, cert) if key is None else _read(key_field, key)
    if b"PRIVATE KEY-----" not in key_bytes:
        hint = f"; give it as Security({key_field}=...)" if key is None else ""
        raise LocalProtocolError(f"{key_source} holds no private key in PEM format{hint}")
    if b"ENCRYPTED" in key_bytes:
        raise LocalProtocolError(f"the private key in {key_source} has a passphrase, which nobody could be asked for; remove it")
    with _as_file(cert) as cert_path, _as_file(cert if key is None else key) as key_path:
        try:
            context.load_cert_chain(cert_path, key_path, password=_no_passphrase)
        except (ssl.SSLError, ValueError) as error:
            if getattr(error, "reason", None) == "KEY_VALUES_MISMATCH":
                why = f"the private key in {key_source} doesn't belong to the certificate in {_named(cert_field, cert)}"
            else:
                why = f"{_named(cert_field, cert)} and the private key in {key_source} can't be used: {error}"
            raise LocalProtocolError(why) from error


def _no_passphrase() -> str:
    return ""  # without this OpenSSL asks on the terminal


def _is_text(value: str) -> bool:
    return "\n" in value


def _named(field: str, value: str) -> str:
    return f"Security({field}=<PEM text>)" if _is_text(value) else f"Security({field}={value!r})"


def _read(field: str, value: str) -> bytes:
    if _is_text(value):
        return value.encode()
    try:
        with open(value, "rb") as file:
            return file.read()
    except (OSError, ValueError) as error:  # ValueError: a NUL in the path
        raise LocalProtocolError(f"{_named(field, value)} can't be read: {getattr(error, 'strerror', None) or error}") from error


@contextmanager
def _as_file(value: str) -> Iterator[str]:
    """A path to the text; OpenSSL reads certificates for its own use from files only."""
    if not _is_text(value):
        yield value
    elif hasattr(os, "memfd_create") and os.path.isdir("/proc/self/fd"):
        # On Linux it needs no disk, where what is deleted can be found again.
        number = os.memfd_create("pem")
        with open(number, "wb") as file:
            file.write(value.encode())
            file.flush()
            yield f"/proc/self/fd/{number}"
    else:
        number, path = tempfile.mkstemp()  # for nobody else to read
        try:
            with open(number, "wb") as file:
                file.write(value.encode())
            yield path
        finally:
            os.unlink(path)


def subjects_of(certificate: Mapping[str, Any]) -> list[str]:
    """The subject alternative names of a certificate as ``getpeercert()`` gives it: "DNS:...", "IP:...", "URI:...", "email:..."."""
    found = []
    for kind, value in certificate.get("subjectAltName", ()):
        name = _KINDS.get(kind)
        if name == "IP":
            try:
                value = ipaddress.ip_address(value.strip()).compressed  # OpenSSL writes every zero of an IPv6 address
            except ValueError:
                continue  # "<invalid>"
        if name is not None:
            found.append(f"{name}:{value}")
    return found


def judge(security: Security, certificate: Mapping[str, Any]) -> tuple[bool, str]:
    """Whether a peer with this certificate, which the CA has signed, is trusted, and why."""
    patterns = security.trusted_subjects
    if patterns is None:
        return True, "its certificate was signed by the CA in tls_ca_file"
    subjects = subjects_of(certificate)
    for pattern in patterns:
        for subject in subjects:
            if _matches(subject, pattern):
                return True, f"its certificate, signed by the CA in tls_ca_file, names {subject}, as in trusted_subjects"
    names = ", ".join(subjects) or "nobody"
    return False, f"its certificate names {names}, and nobody in Security(trusted_subjects={patterns!r})"


def _matches(subject: str, pattern: str) -> bool:
    subject, pattern = subject.lower(), pattern.lower()
    kind, _, name = subject.partition(":")
    if pattern.startswith(tuple(f"{known.lower()}:" for known in _KINDS.values())):
        return pattern.startswith(f"{kind}:") and fnmatchcase(name, pattern.partition(":")[2])
    return fnmatchcase(name, pattern)
