"""Files and texts of certificates, and who is trusted."""

from __future__ import annotations

import os
import ssl
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization

from tests.reference.identities import Identity, ours, theirs
from trio_dcore import LocalProtocolError, Security
from trio_dcore.comm._tls_context import judge, subjects_of, tls_context


@pytest.fixture(params=["listen", "connect"])
def role(request: pytest.FixtureRequest) -> Any:
    return request.param


def secret_of(identity: Identity) -> str:
    return identity.key.splitlines()[1]


def refused(security: Security, role: Any, match: str) -> None:
    with pytest.raises(LocalProtocolError, match=match) as caught:
        tls_context(security, role)
    assert secret_of(ours()) not in str(caught.value)
    assert security._contexts == {}


class TestContexts:
    def test_what_they_ask_for(self, role: Any) -> None:
        context = tls_context(ours().security(), role)
        assert context.verify_mode == ssl.CERT_REQUIRED
        assert not context.check_hostname
        assert not context.verify_flags & ssl.VERIFY_X509_STRICT
        assert context.minimum_version == ssl.TLSVersion.TLSv1_2
        assert context.options & ssl.OP_NO_RENEGOTIATION
        # The one CA that was given, none of the system's.
        assert context.cert_store_stats() == {"x509": 1, "crl": 0, "x509_ca": 1}

    def test_versions_and_ciphers(self, role: Any) -> None:
        security = ours().security(tls_min_version=1.3, tls_max_version=ssl.TLSVersion.TLSv1_3)
        context = tls_context(security, role)
        assert (context.minimum_version, context.maximum_version) == (ssl.TLSVersion.TLSv1_3, ssl.TLSVersion.TLSv1_3)
        security = ours().security(tls_ciphers="ECDHE-ECDSA-AES128-GCM-SHA256")
        names = {cipher["name"] for cipher in tls_context(security, role).get_ciphers()}
        assert {name for name in names if not name.startswith("TLS_")} == {"ECDHE-ECDSA-AES128-GCM-SHA256"}

    def test_only_clients_look_for_the_name_of_a_host(self) -> None:
        security = ours().security(check_hostname=True)
        assert tls_context(security, "connect").check_hostname
        assert not tls_context(security, "listen").check_hostname

    def test_they_are_made_once(self) -> None:
        security = ours().security()
        assert tls_context(security, "listen") is tls_context(security, "listen")
        assert tls_context(security, "listen") is not tls_context(security, "connect")
        assert tls_context(security, "listen") is not tls_context(ours().security(), "listen")

    def test_no_session_can_be_taken_up_again(self) -> None:
        assert tls_context(ours().security(), "listen").num_tickets == 0


class TestFiles:
    @pytest.fixture
    def files(self, tmp_path: Path) -> dict[str, Path]:
        identity = ours()
        texts = {
            "ca": identity.authority,
            "cert": identity.certificate,
            "key": identity.key,
            "both": identity.key + identity.certificate,
        }
        for name, text in texts.items():
            (tmp_path / f"{name}.pem").write_text(text)
        return {name: tmp_path / f"{name}.pem" for name in texts}

    @pytest.mark.parametrize("as_path", [True, False])
    @pytest.mark.parametrize("as_text", ["", "ca", "cert", "key", "ca cert key"])
    def test_paths_and_texts(self, role: Any, files: dict[str, Path], as_path: bool, as_text: str) -> None:
        given = {name: path.read_text() if name in as_text else path if as_path else str(path) for name, path in files.items()}
        context = tls_context(Security(tls_ca_file=given["ca"], tls_cert=given["cert"], tls_key=given["key"]), role)
        assert len(context.get_ca_certs()) == 1

    @pytest.mark.parametrize("text", [True, False])
    def test_a_key_that_stands_with_the_certificate(self, role: Any, files: dict[str, Path], text: bool) -> None:
        both = files["both"].read_text() if text else files["both"]
        tls_context(Security(tls_ca_file=files["ca"], tls_cert=both), role)

    def test_where_there_are_no_files_in_memory(
        self, role: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, files: dict[str, Path]
    ) -> None:
        monkeypatch.delattr(os, "memfd_create", raising=False)
        monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
        before = set(tmp_path.iterdir())
        tls_context(ours().security(), role)
        refused(Security(tls_ca_file=ours().authority, tls_cert=ours().certificate, tls_key=theirs().key), role, "doesn't belong")
        assert set(tmp_path.iterdir()) == before

    def test_nothing_is_given(self, role: Any) -> None:
        for security in (Security(), Security(tls_cert="a", tls_key="b")):
            refused(
                security,
                role,
                r"^tls:// works only with certificates, and Security\(tls_ca_file=...\) is not set; both sides need",
            )
        refused(Security(tls_ca_file="a", tls_key="b"), role, r"Security\(tls_cert=...\) is not set; .*Security.temporary\(\)")

    @pytest.mark.parametrize("field", ["tls_ca_file", "tls_cert", "tls_key"])
    def test_files_that_are_not_there(self, role: Any, field: str, tmp_path: Path) -> None:
        given = {"tls_ca_file": ours().authority, "tls_cert": ours().certificate, "tls_key": ours().key}
        path = str(tmp_path / "missing.pem")
        refused(
            Security(**given | {field: path}), role, rf"^Security\({field}='{path}'\) can't be read: No such file or directory$"
        )
        refused(Security(**given | {field: str(tmp_path)}), role, rf"Security\({field}=.* can't be read: Is a directory$")
        refused(Security(**given | {field: "a\0b"}), role, rf"Security\({field}=.* can't be read: .*null byte")

    @pytest.mark.parametrize(
        "text", ["garbage", "gar\nbage", "gär\nbage", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"]
    )
    def test_what_is_no_ca(self, role: Any, text: str, tmp_path: Path) -> None:
        security = Security(tls_ca_file=text, tls_cert=ours().certificate, tls_key=ours().key)
        if "\n" not in text:
            (tmp_path / "ca.pem").write_text(text)
            security = Security(tls_ca_file=tmp_path / "ca.pem", tls_cert=ours().certificate, tls_key=ours().key)
        refused(security, role, r"^Security\(tls_ca_file=.*\) holds no certificate in PEM format that OpenSSL can read: .")

    def test_what_is_no_certificate(self, role: Any) -> None:
        for cert in ("gar\nbage", ours().key):
            security = Security(tls_ca_file=ours().authority, tls_cert=cert, tls_key=ours().key)
            refused(security, role, r"^Security\(tls_cert=<PEM text>\) holds no certificate in PEM format$")
        cert = "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"
        security = Security(tls_ca_file=ours().authority, tls_cert=cert, tls_key=ours().key)
        refused(
            security,
            role,
            r"^Security\(tls_cert=<PEM text>\) and the private key in Security\(tls_key=<PEM text>\) can't be used",
        )

    def test_what_is_no_key(self, role: Any) -> None:
        for key in ("gar\nbage", ours().certificate):
            security = Security(tls_ca_file=ours().authority, tls_cert=ours().certificate, tls_key=key)
            refused(security, role, r"^Security\(tls_key=<PEM text>\) holds no private key in PEM format$")
        security = Security(tls_ca_file=ours().authority, tls_cert=ours().certificate)
        refused(
            security, role, r"^Security\(tls_cert=<PEM text>\) holds no private key in .*; give it as Security\(tls_key=...\)$"
        )
        key = "-----BEGIN PRIVATE KEY-----\nAAAA\n-----END PRIVATE KEY-----\n"
        security = Security(tls_ca_file=ours().authority, tls_cert=ours().certificate, tls_key=key)
        refused(security, role, r"the private key in Security\(tls_key=<PEM text>\) can't be used")

    def test_another_certificates_key(self, role: Any) -> None:
        security = Security(tls_ca_file=ours().authority, tls_worker_cert=ours().certificate, tls_worker_key=theirs().key)
        refused(
            security,
            role,
            r"^the private key in Security\(tls_worker_key=<PEM text>\) doesn't belong to the certificate in "
            r"Security\(tls_worker_cert=<PEM text>\)$",
        )

    def test_a_key_with_a_passphrase(self, role: Any) -> None:
        """OpenSSL would ask for it on the terminal."""
        loaded = serialization.load_pem_private_key(ours().key.encode(), None)
        for form in (serialization.PrivateFormat.PKCS8, serialization.PrivateFormat.TraditionalOpenSSL):
            secret = serialization.BestAvailableEncryption(b"secret")
            key = loaded.private_bytes(serialization.Encoding.PEM, form, secret).decode()
            security = Security(tls_ca_file=ours().authority, tls_cert=ours().certificate, tls_key=key)
            refused(security, role, r"^the private key in Security\(tls_key=<PEM text>\) has a passphrase")

    def test_ciphers_that_nobody_knows(self, role: Any) -> None:
        refused(ours().security(tls_ciphers="ROT13"), role, r"^Security\(tls_ciphers='ROT13'\): OpenSSL knows none of these$")

    def test_files_are_read_when_they_are_needed(self, role: Any, tmp_path: Path) -> None:
        security = Security(tls_ca_file=tmp_path / "ca.pem", tls_cert=ours().certificate, tls_key=ours().key)
        refused(security, role, "can't be read")
        (tmp_path / "ca.pem").write_text(ours().authority)
        context = tls_context(security, role)
        (tmp_path / "ca.pem").unlink()
        assert tls_context(security, role) is context


CERTIFICATE: dict[str, Any] = {
    "subject": ((("commonName", "boss.example.org"),),),
    "subjectAltName": (
        ("DNS", "Node1.Example.org"),
        ("IP Address", "10.0.0.5"),
        ("IP Address", "2001:DB8:0:0:0:0:0:1"),
        ("IP Address", "<invalid>"),
        ("URI", "spiffe://example.org/worker"),
        ("email", "me@example.org"),
        ("DirName", ((("commonName", "x"),),)),
    ),
}


class TestVerdict:
    def test_the_names_of_a_certificate(self) -> None:
        assert subjects_of(CERTIFICATE) == [
            "DNS:Node1.Example.org",
            "IP:10.0.0.5",
            "IP:2001:db8::1",
            "URI:spiffe://example.org/worker",
            "email:me@example.org",
        ]
        assert subjects_of({}) == []

    def test_the_ca_is_enough_by_default(self) -> None:
        assert judge(Security(), CERTIFICATE) == (True, "its certificate was signed by the CA in tls_ca_file")

    @pytest.mark.parametrize(
        "pattern",
        [
            "node1.example.org",
            "NODE?.example.ORG",
            "*.example.org",
            "*",
            "DNS:node1.*",
            "dns:*",
            "10.0.0.5",
            "IP:10.0.*",
            "2001:db8::1",
            "IP:2001:DB8::*",
            "spiffe://example.org/*",
            "URI:spiffe://*",
            "*@example.org",
            "email:me@*",
        ],
    )
    def test_subjects_that_match(self, pattern: str) -> None:
        trusted, reason = judge(Security(trusted_subjects=("nobody", pattern)), CERTIFICATE)
        assert trusted
        assert "in trusted_subjects" in reason

    @pytest.mark.parametrize(
        "pattern",
        ["node2.example.org", "example.org", "boss.example.org", "DNS:10.0.0.5", "IP:*org", "email:spiffe*", "URI:", "", "x"],
    )
    def test_subjects_that_do_not(self, pattern: str) -> None:
        trusted, reason = judge(Security(trusted_subjects=(pattern,)), CERTIFICATE)
        assert not trusted
        assert "names DNS:Node1.Example.org, IP:10.0.0.5" in reason
        assert "trusted_subjects" in reason

    def test_nobody(self) -> None:
        assert not judge(Security(trusted_subjects=()), CERTIFICATE)[0]
        assert judge(Security(trusted_subjects=("*",)), {}) == (
            False,
            "its certificate names nobody, and nobody in Security(trusted_subjects=('*',))",
        )
