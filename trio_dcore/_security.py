"""Security: whom to believe, and what to prove to be."""

from __future__ import annotations

import datetime
import ipaddress
import os
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields
from types import MappingProxyType
from typing import Any, Literal, Protocol

__all__ = ["Identity", "Security"]

# Where the certificate of each side stands, first come first served: our own name, then those that Dask's options have for roles.
_CERTIFICATES_OF = {
    "listen": ("tls", "tls_scheduler", "tls_worker", "tls_client"),
    "connect": ("tls", "tls_client", "tls_worker", "tls_scheduler"),
}
_PEM_FIELDS = ("tls_ca_file", *(f"{prefix}_{part}" for prefix in _CERTIFICATES_OF["listen"] for part in ("cert", "key")))
# As a number, as in Dask's configuration, and as ssl.TLSVersion has them, which need not be imported for that.
_VERSIONS = {1.2: 1.2, 1.3: 1.3, 0x303: 1.2, 0x304: 1.3}

#: Strings, also where a path was given: what is kept has passed os.fspath.
PathOrText = str | os.PathLike[str] | None
Role = Literal["listen", "connect"]
#: The names of the fields and what they hold: (CA, certificate, key); the key is None if it stands behind the certificate.
Identity = tuple[tuple[str, str], tuple[str, str], tuple[str, str | None]]


class _HasTrust(Protocol):
    @property
    def trusted(self) -> bool: ...


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Security:
    """Who may make this process run code, which is what unpickling is, and what ``tls://`` addresses use.

    With TLS both sides prove who they are, always, and a peer whose certificate was signed by the CA in ``tls_ca_file`` is trusted:
    *that CA is a list of who may run code here*.  The system's own store of CAs is never used.  Files are read when the first
    address needs them, once for each Security: make a new one when they have changed.

    Fields for files take a path, or the PEM text itself, which is told by its newlines.

    Args:
        pickle: "trusted" (default): pickles only from and to peers that are trusted, which are those in this process, those of this
            user on this machine, and with TLS those with a certificate; "never": from nobody; "always": from everybody, for closed
            networks only.
        trust_loopback: whether peers on this machine's loopback interface may be trusted.
        require_encryption: refuse to listen on or connect to addresses whose transport neither encrypts nor stays on this machine.
        enum_modules: root packages whose enums may be looked up when a peer names them.  A module is never imported for it.
        tls_ca_file: the CA, or several, that must have signed the peer's certificate.
        tls_cert: our certificate, with those between it and the CA behind it, if there are any.
        tls_key: its private key, without a passphrase; None if it stands in ``tls_cert``.
        tls_client_cert, tls_client_key, tls_scheduler_cert, tls_scheduler_key, tls_worker_cert, tls_worker_key: Dask's options.  Used
            where ``tls_cert`` is not given: to listen that of the scheduler before the worker's and the client's, to connect that of
            the client before the worker's and the scheduler's.
        tls_ciphers: OpenSSL's list of ciphers, which concerns TLS 1.2 only; None for its default.
        tls_min_version: 1.2 (default) or 1.3, or the ``ssl.TLSVersion``.
        tls_max_version: the same; None (default) for the highest there is.
        check_hostname: whether a server's certificate must name the host in the address that was connected to (or that in
            ``extra_conn_args``).  As in Dask it need not: the CA alone says who belongs to us.
        trusted_subjects: whom to trust of those whose certificate the CA has signed: patterns, as of shells (:mod:`fnmatch`; ``*``
            also stands for dots and slashes), for one of the certificate's subject alternative names, which are DNS names, IP
            addresses, URIs and e-mail addresses.  ``"worker*.example.org"`` is for a name of any kind, ``"DNS:..."``, ``"IP:..."``,
            ``"URI:..."`` and ``"email:..."`` for one of that kind.  Upper and lower case are the same, the common name is not
            looked at.  None (default) is all of them, ``()`` none.  The others may connect, and are strangers.
        extra_conn_args: ``{"server_hostname": ...}``: the name to ask a server for, instead of the host in its address.
    """

    pickle: Literal["trusted", "never", "always"] = "trusted"
    trust_loopback: bool = True
    require_encryption: bool = False
    enum_modules: tuple[str, ...] = ("dask", "distributed")
    tls_ca_file: PathOrText = None
    tls_cert: PathOrText = None
    tls_key: PathOrText = None
    tls_client_cert: PathOrText = None
    tls_client_key: PathOrText = None
    tls_scheduler_cert: PathOrText = None
    tls_scheduler_key: PathOrText = None
    tls_worker_cert: PathOrText = None
    tls_worker_key: PathOrText = None
    tls_ciphers: str | None = None
    tls_min_version: float = 1.2
    tls_max_version: float | None = None
    check_hostname: bool = False
    trusted_subjects: tuple[str, ...] | None = None
    extra_conn_args: Mapping[str, Any] = field(default_factory=dict, hash=False)
    # Of the comm layer: what it made of the files, for each role.
    _contexts: dict[str, Any] = field(default_factory=dict, init=False, compare=False)

    def __post_init__(self) -> None:
        if self.pickle not in ("trusted", "never", "always"):
            raise ValueError(f"Security(pickle={self.pickle!r}): must be 'trusted', 'never' or 'always'")
        for name in ("trust_loopback", "require_encryption", "check_hostname"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"Security({name}={getattr(self, name)!r}): must be a bool")
        modules = self.enum_modules
        if isinstance(modules, str) or not all(isinstance(module, str) for module in modules):
            raise TypeError(f"Security(enum_modules={modules!r}): must be a tuple of package names")
        object.__setattr__(self, "enum_modules", tuple(modules))
        for name in _PEM_FIELDS:
            object.__setattr__(self, name, _path_or_text(name, getattr(self, name)))
        if self.tls_ciphers is not None and not isinstance(self.tls_ciphers, str):
            raise TypeError(f"Security(tls_ciphers={self.tls_ciphers!r}): must be a text of OpenSSL's cipher names, or None")
        lowest = 1.2 if self.tls_min_version is None else _version("tls_min_version", self.tls_min_version)
        highest = None if self.tls_max_version is None else _version("tls_max_version", self.tls_max_version)
        if highest is not None and highest < lowest:
            raise ValueError(f"Security(tls_min_version={lowest}, tls_max_version={highest}): there is no version between them")
        object.__setattr__(self, "tls_min_version", lowest)
        object.__setattr__(self, "tls_max_version", highest)
        subjects = self.trusted_subjects
        if subjects is not None:
            if isinstance(subjects, str) or not all(isinstance(pattern, str) for pattern in subjects):
                raise TypeError(f"Security(trusted_subjects={subjects!r}): must be a tuple of patterns, or None")
            object.__setattr__(self, "trusted_subjects", tuple(subjects))
        extra = {} if self.extra_conn_args is None else dict(self.extra_conn_args)
        if unknown := extra.keys() - {"server_hostname"}:
            raise ValueError(f"Security(extra_conn_args=...): {sorted(unknown)} mean nothing here; 'server_hostname' does")
        if not isinstance(extra.get("server_hostname", ""), str):
            raise TypeError(f"Security(extra_conn_args={extra!r}): 'server_hostname' must be a host's name")
        object.__setattr__(self, "extra_conn_args", MappingProxyType(extra))

    def allows_pickle(self, peer: _HasTrust) -> bool:
        """Whether a pickle may come from, or go to, this peer."""
        return self.pickle == "always" or (self.pickle == "trusted" and peer.trusted)

    def identity(self, role: Role) -> Identity | None:
        """The CA, certificate and key that a side uses, each with the name of its field; None if the first two are not there."""
        for prefix in _CERTIFICATES_OF[role]:
            certificate = getattr(self, f"{prefix}_cert")
            if certificate is not None and self.tls_ca_file is not None:
                key = f"{prefix}_key"
                return ("tls_ca_file", os.fspath(self.tls_ca_file)), (f"{prefix}_cert", certificate), (key, getattr(self, key))
        return None

    @classmethod
    def temporary(cls, **options: Any) -> Security:
        """Make a CA that signs one certificate and is then thrown away: who gets this Security may connect, and nobody else.

        The certificate is good for a year and names this machine's loopback interface, so that ``check_hostname=True`` works there.
        Processes share it by its fields ``tls_ca_file``, ``tls_cert`` and ``tls_key``, which are PEM texts here, or by pickling it.
        Needs the package ``cryptography``: ``pip install 'trio_dcore[tls]'``.

        Args:
            options: further fields.  As with Dask's, ``require_encryption`` is True unless it is given.

        Raises:
            ImportError: ``cryptography`` is not installed.
        """
        authority, certificate, key = _throw_away_certificate()
        given = {"require_encryption": True, **options}
        return cls(tls_ca_file=authority, tls_cert=certificate, tls_key=key, **given)

    def __repr__(self) -> str:
        shown = []
        for each in fields(self):
            value = getattr(self, each.name)
            if each.name == "_contexts" or value == (each.default if each.default_factory is MISSING else {}):
                continue
            if each.name in _PEM_FIELDS and "\n" in value:
                shown.append(f"{each.name}=<PEM text>")  # a key's is a secret
            elif each.name == "extra_conn_args":
                shown.append(f"{each.name}={dict(value)!r}")
            else:
                shown.append(f"{each.name}={value!r}")
        return f"Security({', '.join(shown)})"

    def __reduce__(self) -> tuple[Any, ...]:
        # What was made of the files can't be sent to another process; it will make its own.
        values = {each.name: getattr(self, each.name) for each in fields(self) if each.init}
        values["extra_conn_args"] = dict(self.extra_conn_args)
        return _rebuild, (values,)


def _rebuild(values: dict[str, Any]) -> Security:
    return Security(**values)


def _path_or_text(name: str, value: Any) -> str | None:
    if value is None:
        return None
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if not isinstance(value, str):
        # Not the value itself: it may be a key.
        raise TypeError(f"Security({name}=...): must be a path or a PEM text, not {type(value).__name__}")
    if not value:
        raise ValueError(f"Security({name}=''): must be a path or a PEM text; None is for none")
    return value


def _version(name: str, value: Any) -> float:
    known = None if isinstance(value, bool) or not isinstance(value, (int, float)) else _VERSIONS.get(value)
    if known is None:
        raise ValueError(f"Security({name}={value!r}): must be 1.2 or 1.3")
    return known


def _throw_away_certificate() -> tuple[str, str, str]:
    """PEM texts of a new CA, a certificate that it has signed, and the certificate's key."""
    try:
        from cryptography import x509
        from cryptography.hazmat.primitives import hashes, serialization
        from cryptography.hazmat.primitives.asymmetric import ec
    except ImportError as error:
        raise ImportError("Security.temporary() needs the package cryptography: pip install 'trio_dcore[tls]'") from error
    now = datetime.datetime.now(datetime.UTC)
    authority_key, key = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())
    # Each CA has a name of its own, so that one taken for another is told as unknown, not as a bad signature.
    authority_name = x509.Name(
        [x509.NameAttribute(x509.NameOID.COMMON_NAME, f"trio_dcore temporary CA {x509.random_serial_number():x}"[:64])]
    )

    def start(subject: x509.Name, public_key: ec.EllipticCurvePublicKey) -> x509.CertificateBuilder:
        builder = x509.CertificateBuilder().subject_name(subject).issuer_name(authority_name).public_key(public_key)
        # The clocks of two machines differ.
        builder = builder.not_valid_before(now - datetime.timedelta(days=1)).not_valid_after(now + datetime.timedelta(days=365))
        builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
        issuer = x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key())
        return builder.add_extension(issuer, critical=False).serial_number(x509.random_serial_number())

    def usage(*, signs_certificates: bool) -> x509.KeyUsage:
        return x509.KeyUsage(
            digital_signature=not signs_certificates,
            key_cert_sign=signs_certificates,
            crl_sign=signs_certificates,
            content_commitment=False,
            key_encipherment=False,
            data_encipherment=False,
            key_agreement=False,
            encipher_only=False,
            decipher_only=False,
        )

    names = x509.SubjectAlternativeName(
        [
            x509.DNSName("localhost"),
            x509.IPAddress(ipaddress.ip_address("127.0.0.1")),
            x509.IPAddress(ipaddress.ip_address("::1")),
        ]
    )
    authority = (
        start(authority_name, authority_key.public_key())
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage(signs_certificates=True), critical=True)
        .sign(authority_key, hashes.SHA256())
    )
    certificate = (
        start(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "trio_dcore temporary certificate")]), key.public_key())
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(usage(signs_certificates=False), critical=True)
        .add_extension(names, critical=False)
        .sign(authority_key, hashes.SHA256())
    )
    key_text = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ).decode()
    pem = serialization.Encoding.PEM
    return authority.public_bytes(pem).decode(), certificate.public_bytes(pem).decode(), key_text
