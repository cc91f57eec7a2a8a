"""What went wrong with TLS, in words that say what to do about it.

OpenSSL's errors have names that are the same in all its versions of interest.  They only ever choose a text here: what is done about
an error is the same for all of them.
"""

from __future__ import annotations

import ssl

from ..protocol._frames import HANDSHAKE, looks_like

__all__ = ["explain", "plain_text"]

# verify_code of ssl.SSLCertVerificationError (man 3 X509_STORE_CTX_get_error): what is wrong with the certificate of the peer.
_UNKNOWN_CA = "it was not signed by the CA in Security(tls_ca_file=...) of this side"
_VERIFY = {
    2: _UNKNOWN_CA,
    18: _UNKNOWN_CA,
    19: _UNKNOWN_CA,
    20: _UNKNOWN_CA,
    21: _UNKNOWN_CA,
    9: "it is not valid yet; is the clock right?",
    10: "it has expired",
    26: "it is made for another purpose: its extended key usage lacks this side's",
    62: "it doesn't name the host that was connected to, and Security(check_hostname=True) is set",
    64: "it doesn't name the IP address that was connected to, and Security(check_hostname=True) is set",
}

_REFUSED = "the peer refused our certificate"
_NO_COMMON_VERSION = "there is no version of TLS that both sides accept; see Security(tls_min_version=..., tls_max_version=...)"
_NO_COMMON_CIPHER = "there is no cipher that both sides accept; see Security(tls_ciphers=...) and the versions of TLS"
_REASONS = {
    # What the peer says of us: alerts.
    "TLSV1_ALERT_UNKNOWN_CA": f"{_REFUSED}: it was not signed by a CA that the peer knows; compare tls_cert here with tls_ca_file there",
    "TLSV13_ALERT_CERTIFICATE_REQUIRED": "the peer requires a certificate, and this side sent none that the peer's CA has signed; "
    "set Security(tls_cert=..., tls_key=...)",
    "SSLV3_ALERT_CERTIFICATE_EXPIRED": f"{_REFUSED}: it has expired, or the peer's clock is wrong",
    "SSLV3_ALERT_CERTIFICATE_REVOKED": f"{_REFUSED}: it has been revoked",
    "SSLV3_ALERT_BAD_CERTIFICATE": f"{_REFUSED}; is it for the name that the peer connected to?",
    "SSLV3_ALERT_UNSUPPORTED_CERTIFICATE": f"{_REFUSED}: it is made for another purpose",
    "SSLV3_ALERT_CERTIFICATE_UNKNOWN": f"{_REFUSED}, and doesn't say why",
    "TLSV1_ALERT_DECRYPT_ERROR": f"{_REFUSED}: its signature is wrong; another CA of the same name, perhaps",
    "TLSV1_ALERT_PROTOCOL_VERSION": _NO_COMMON_VERSION,
    "SSLV3_ALERT_HANDSHAKE_FAILURE": "the peer found nothing that both sides accept, or no certificate of ours; "
    "see Security(tls_cert=...), the versions of TLS and tls_ciphers",
    "TLSV1_ALERT_ACCESS_DENIED": f"{_REFUSED}: access denied",
    # What we say of the peer.
    "PEER_DID_NOT_RETURN_A_CERTIFICATE": "the peer has no certificate, and both sides must show one; it needs a "
    "tls_cert and tls_key",
    "WRONG_VERSION_NUMBER": "what came is no TLS",
    "UNSUPPORTED_PROTOCOL": _NO_COMMON_VERSION,
    "VERSION_TOO_LOW": _NO_COMMON_VERSION,
    "NO_SHARED_CIPHER": _NO_COMMON_CIPHER,
    "DECRYPTION_FAILED_OR_BAD_RECORD_MAC": "what came has been changed on its way",
}


def explain(error: ssl.SSLError, first: bytes) -> str:
    """What an error of OpenSSL's means here.

    Args:
        error: what it raised.
        first: the first bytes that came, if it was in the handshake: they may not be TLS at all.
    """
    name = error.reason or str(error)
    if isinstance(error, ssl.SSLCertVerificationError):
        what = _VERIFY.get(error.verify_code, error.verify_message)
        return f"the peer's certificate is not accepted: {what} ({error.verify_message})"
    hint = plain_text(first) or _REASONS.get(name)
    return name if hint is None else f"{hint} ({name})"


def plain_text(first: bytes) -> str | None:
    """What the first bytes of a connection are, if they aren't TLS."""
    kind = looks_like(first)
    if kind == "TLS":
        return None
    if kind is not None:
        return f"what came is no TLS, and looks like {kind}"
    # The outer length of a handshake as Dask peers send it, which comes first and is a small number (wire document, section 2).
    if len(first) >= 8 and 16 <= int.from_bytes(first[:8], "little") <= HANDSHAKE:
        return "what came is a handshake without TLS: the peer uses tcp://, and this side tls://"
    return None
