from __future__ import annotations

import copy
import dataclasses
import datetime
import os
import pickle
import ssl
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509

import trio_dcore
from trio_dcore import Security
from trio_dcore.abc import CommSettings, Peer
from trio_dcore.protocol._limits import Limits


def peer(trusted: bool) -> Peer:
    return Peer("tcp://127.0.0.1:1", "loopback", verify=lambda: (trusted, "for the test"))


@pytest.mark.parametrize(
    ("whose", "from_trusted", "from_stranger"), [("trusted", True, False), ("never", False, False), ("always", True, True)]
)
def test_whose_pickles_are_loaded(whose: Any, from_trusted: bool, from_stranger: bool) -> None:
    security = Security(pickle=whose)
    assert security.allows_pickle(peer(True)) is from_trusted
    assert security.allows_pickle(peer(False)) is from_stranger


@pytest.mark.parametrize("pickle", ["never", "always"])
def test_who_the_peer_is_may_not_matter(pickle: Any) -> None:
    """Finding out may take a look into the kernel's tables."""

    def verify() -> tuple[bool, str]:
        raise AssertionError("nobody needs to know")

    Security(pickle=pickle).allows_pickle(Peer("tcp://127.0.0.1:1", "tcp", verify=verify))


def test_the_defaults() -> None:
    assert Security() == Security(
        pickle="trusted", trust_loopback=True, require_encryption=False, enum_modules=("dask", "distributed")
    )


@pytest.mark.parametrize("pickle", ["Trusted", "", None, True, ["trusted"]])
def test_a_wrong_pickle(pickle: Any) -> None:
    with pytest.raises(ValueError, match=r"^Security\(pickle=.*: must be 'trusted', 'never' or 'always'$"):
        Security(pickle=pickle)


@pytest.mark.parametrize("name", ["trust_loopback", "require_encryption", "check_hostname"])
@pytest.mark.parametrize("value", [None, 1, "yes"])
def test_a_wrong_switch(name: str, value: Any) -> None:
    with pytest.raises(TypeError, match=rf"^Security\({name}=.*: must be a bool$"):
        Security(**{name: value})


@pytest.mark.parametrize("modules", ["dask", ("dask", 5), [None], b"dask"])
def test_wrong_enum_modules(modules: Any) -> None:
    with pytest.raises(TypeError, match=r"^Security\(enum_modules=.*: must be a tuple of package names$"):
        Security(enum_modules=modules)


def test_enum_modules_from_any_sequence() -> None:
    security = Security(enum_modules=["mine"])  # type: ignore[arg-type]
    assert security.enum_modules == ("mine",)
    assert Security(enum_modules=()).enum_modules == ()


def test_security_is_a_value() -> None:
    security = Security(pickle="never")
    assert hash(security) == hash(Security(pickle="never"))
    assert dataclasses.replace(security, trust_loopback=False) != security
    with pytest.raises(dataclasses.FrozenInstanceError):
        security.pickle = "always"  # type: ignore[misc]
    with pytest.raises(TypeError):
        Security("never")  # type: ignore[call-arg]


PEM_FIELDS = (
    "tls_ca_file",
    *(f"{prefix}_{part}" for prefix in ("tls", "tls_client", "tls_scheduler", "tls_worker") for part in ("cert", "key")),
)


class TestTLS:
    @pytest.mark.parametrize("name", PEM_FIELDS)
    def test_paths_and_texts(self, name: str) -> None:
        assert getattr(Security(), name) is None
        assert getattr(Security(**{name: "a.pem"}), name) == "a.pem"
        assert getattr(Security(**{name: Path("a") / "b.pem"}), name) == os.path.join("a", "b.pem")
        with pytest.raises(ValueError, match=rf"^Security\({name}=''\): must be a path or a PEM text; None is for none$"):
            Security(**{name: ""})
        for value in (b"secret", 5, Path(os.fsdecode("x")).stat):
            with pytest.raises(TypeError, match=rf"^Security\({name}=...\): must be a path or a PEM text, not \w+$") as caught:
                Security(**{name: value})
            assert "secret" not in str(caught.value)

    @pytest.mark.parametrize("name", PEM_FIELDS)
    def test_secrets_are_not_shown(self, name: str) -> None:
        assert repr(Security(**{name: "sec\nret"})) == f"Security({name}=<PEM text>)"
        assert repr(Security(**{name: "a.pem"})) == f"Security({name}='a.pem')"

    def test_what_is_shown(self) -> None:
        assert repr(Security()) == "Security()"
        security = Security(pickle="never", tls_min_version=1.3, extra_conn_args={"server_hostname": "a"}, trusted_subjects=["b"])  # type: ignore[arg-type]
        assert repr(security) == (
            "Security(pickle='never', tls_min_version=1.3, trusted_subjects=('b',), extra_conn_args={'server_hostname': 'a'})"
        )

    @pytest.mark.parametrize(
        ("given", "meant"), [(1.2, 1.2), (1.3, 1.3), (ssl.TLSVersion.TLSv1_2, 1.2), (ssl.TLSVersion.TLSv1_3, 1.3)]
    )
    def test_versions(self, given: Any, meant: float) -> None:
        security = Security(tls_min_version=given, tls_max_version=given)
        assert (security.tls_min_version, security.tls_max_version) == (meant, meant)

    def test_the_default_versions(self) -> None:
        for security in (Security(), Security(tls_min_version=None, tls_max_version=None)):  # type: ignore[arg-type]
            assert (security.tls_min_version, security.tls_max_version) == (1.2, None)

    @pytest.mark.parametrize("name", ["tls_min_version", "tls_max_version"])
    @pytest.mark.parametrize("value", [1.1, 1, "1.2", True, ssl.TLSVersion.TLSv1_1, ssl.TLSVersion.MINIMUM_SUPPORTED])
    def test_wrong_versions(self, name: str, value: Any) -> None:
        with pytest.raises(ValueError, match=rf"^Security\({name}=.*\): must be 1.2 or 1.3$"):
            Security(**{name: value})

    def test_versions_the_wrong_way_round(self) -> None:
        with pytest.raises(ValueError, match="there is no version between them"):
            Security(tls_min_version=1.3, tls_max_version=1.2)

    @pytest.mark.parametrize("subjects", ["*.example.org", [1], (None,)])
    def test_wrong_subjects(self, subjects: Any) -> None:
        with pytest.raises(TypeError, match=r"^Security\(trusted_subjects=.*\): must be a tuple of patterns, or None$"):
            Security(trusted_subjects=subjects)

    def test_wrong_ciphers(self) -> None:
        with pytest.raises(TypeError, match="tls_ciphers"):
            Security(tls_ciphers=["AES"])  # type: ignore[arg-type]

    def test_arguments_of_connections(self) -> None:
        given = {"server_hostname": "a"}
        security = Security(extra_conn_args=given)
        given["server_hostname"] = "b"
        assert security.extra_conn_args == {"server_hostname": "a"}
        assert Security(extra_conn_args=None).extra_conn_args == {}  # type: ignore[arg-type]
        with pytest.raises(TypeError):
            security.extra_conn_args["x"] = 1  # type: ignore[index]
        with pytest.raises(ValueError, match=r"\['headers'\] mean nothing here"):
            Security(extra_conn_args={"headers": {}})
        with pytest.raises(TypeError, match="must be a host's name"):
            Security(extra_conn_args={"server_hostname": 5})

    def test_it_stays_a_value(self) -> None:
        security = Security(tls_ca_file="a", tls_cert="b", extra_conn_args={"server_hostname": "a"})
        assert hash(security) == hash(dataclasses.replace(security))
        assert security == dataclasses.replace(security)
        assert security != dataclasses.replace(security, tls_cert="c")
        security._contexts["listen"] = lambda: "can't be pickled"
        for other in (pickle.loads(pickle.dumps(security)), copy.deepcopy(security), dataclasses.replace(security)):
            assert other == security
            assert other._contexts == {}

    def test_who_is_who(self) -> None:
        assert Security(tls_cert="a").identity("listen") is None
        assert Security(tls_ca_file="a").identity("listen") is None
        every = {name: name.upper() for name in PEM_FIELDS}
        for role, order in (("listen", ("tls", "tls_scheduler", "tls_worker", "tls_client")), ("connect", ("tls", "tls_client"))):
            left = dict(every)
            for prefix in order:
                expected = tuple((name, name.upper()) for name in ("tls_ca_file", f"{prefix}_cert", f"{prefix}_key"))
                assert Security(**left).identity(role) == expected  # type: ignore[arg-type]
                del left[f"{prefix}_key"]
                assert Security(**left).identity(role)[2] == (f"{prefix}_key", None)  # type: ignore[arg-type,index]
                del left[f"{prefix}_cert"]

    def test_ssl_is_not_imported_for_it(self) -> None:
        code = "import sys, trio_dcore._security as s; s.Security(tls_ca_file='x', tls_min_version=1.3); assert 'ssl' not in sys.modules"
        subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


class TestTemporary:
    def test_what_is_made(self) -> None:
        security = Security.temporary()
        assert security.require_encryption
        assert (security.pickle, security.check_hostname) == ("trusted", False)
        texts = [str(security.tls_ca_file), str(security.tls_cert), str(security.tls_key)]
        assert [text.splitlines()[0] for text in texts] == [
            "-----BEGIN CERTIFICATE-----",
            "-----BEGIN CERTIFICATE-----",
            "-----BEGIN PRIVATE KEY-----",
        ]
        assert repr(security) == (
            "Security(require_encryption=True, tls_ca_file=<PEM text>, tls_cert=<PEM text>, tls_key=<PEM text>)"
        )
        certificate = x509.load_pem_x509_certificate(texts[1].encode())
        certificate.verify_directly_issued_by(x509.load_pem_x509_certificate(texts[0].encode()))
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        assert names.get_values_for_type(x509.DNSName) == ["localhost"]
        now = datetime.datetime.now(datetime.UTC)
        assert certificate.not_valid_before_utc < now - datetime.timedelta(hours=23)
        assert now + datetime.timedelta(days=364) < certificate.not_valid_after_utc < now + datetime.timedelta(days=366)

    def test_options(self) -> None:
        security = Security.temporary(require_encryption=False, pickle="never", tls_min_version=1.3)
        assert (security.require_encryption, security.pickle, security.tls_min_version) == (False, "never", 1.3)

    def test_each_is_another(self) -> None:
        one, two = Security.temporary(), Security.temporary()
        assert len({one.tls_ca_file, two.tls_ca_file, one.tls_cert, two.tls_cert, one.tls_key, two.tls_key}) == 6

    def test_without_the_package(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "cryptography", None)
        with pytest.raises(ImportError, match=r"needs the package cryptography: pip install 'trio_dcore\[tls\]'"):
            Security.temporary()


class TestPeer:
    def test_the_verdict_is_reached_once_and_when_it_is_needed(self) -> None:
        asked = []

        def verify() -> tuple[bool, str]:
            asked.append(1)
            return True, "because"

        who = Peer("tcp://127.0.0.1:1", "loopback", verify=verify)
        assert asked == []
        assert (who.trusted, who.reason, who.trusted) == (True, "because", True)
        assert asked == [1]

    def test_a_failing_look_is_repeated(self) -> None:
        answers = iter([OSError("no"), (True, "yes")])

        def verify() -> tuple[bool, str]:
            answer = next(answers)
            if isinstance(answer, OSError):
                raise answer
            return answer

        who = Peer("tcp://127.0.0.1:1", "loopback", verify=verify)
        with pytest.raises(OSError, match="no"):
            _ = who.trusted
        assert who.trusted

    def test_nobody_is_trusted_by_default(self) -> None:
        who = Peer("tcp://10.0.0.5:1", "tcp")
        assert not who.trusted
        assert who.reason == "nothing is known about this peer"

    def test_it_is_frozen_and_shows_what_it_is(self) -> None:
        who = Peer("tcp://10.0.0.5:1", "tcp")
        assert repr(who) == "Peer(address='tcp://10.0.0.5:1', kind='tcp', uid=None, pid=None, certificate=None)"
        with pytest.raises(dataclasses.FrozenInstanceError):
            who.uid = 0  # type: ignore[misc]
        assert who != Peer("tcp://10.0.0.5:1", "tcp")  # two connections are two peers


class TestCommSettings:
    def test_none_is_the_default(self) -> None:
        settings = CommSettings.of(None, None, True, None, None)
        assert settings == CommSettings()
        assert (settings.security, settings.limits) == (Security(), Limits())
        assert (settings.serializers, settings.deserializers) == (None, None)

    def test_families_are_any_sequence_but_text(self) -> None:
        settings = CommSettings.of(None, None, True, ["dask"], ())
        assert (settings.serializers, settings.deserializers) == (("dask",), ())
        for arguments in (("pickle", None), (None, "pickle")):
            with pytest.raises(TypeError, match=r"serializers='pickle': give a sequence of family names, such as \('pickle',\)"):
                CommSettings.of(None, None, True, *arguments)


def test_it_is_what_the_package_exports() -> None:
    assert trio_dcore.Security is Security
