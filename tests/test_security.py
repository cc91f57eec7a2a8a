from __future__ import annotations

import dataclasses
from typing import Any

import pytest

import trio_dcore
from trio_dcore import Security
from trio_dcore.abc import CommSettings, Peer
from trio_dcore.protocol._limits import Limits


def peer(trusted: bool) -> Peer:
    return Peer("tcp://127.0.0.1:1", "loopback", verify=lambda: (trusted, "for the test"))


@pytest.mark.parametrize(
    ("pickle", "from_trusted", "from_stranger"), [("trusted", True, False), ("never", False, False), ("always", True, True)]
)
def test_whose_pickles_are_loaded(pickle: Any, from_trusted: bool, from_stranger: bool) -> None:
    security = Security(pickle=pickle)
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


@pytest.mark.parametrize("name", ["trust_loopback", "require_encryption"])
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
