"""A whole server and a whole client, and peers that say what no peer says: they live on, and log nothing as an error of theirs."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.fuzz import peers, targets
from tests.fuzz.mutations import Step, mutate_bytes
from tests.fuzz.seeds import conversations, frames_in, wire
from tests.fuzz.strategies import SIZES, conversation, some

Given = tuple[bytes, list[Step], bool]


@pytest.fixture(autouse=True, scope="module")
def _harmless() -> Iterator[None]:
    with targets.harmless_pickles():
        yield


def changed(given: Given) -> bytes:
    data, steps, honest_start = given
    return mutate_bytes(data, steps, len(wire(next(frames_in(data)))) if honest_start else 0)


@given(
    given=st.lists(st.tuples(conversation(), SIZES, st.integers(0, 3)), min_size=1, max_size=4),
    trusted=st.booleans(),
    deserialize=st.booleans(),
)
@some(80)
def test_a_server_lives_on(given: list[tuple[Given, list[int], int]], trusted: bool, deserialize: bool) -> None:
    attacks = [(changed(each), sizes, ending) for each, sizes, ending in given]
    peers.attack_server(attacks, trusted=trusted, deserialize=deserialize)


@given(given=conversation(), sizes=SIZES, ending=st.integers(0, 3), use=st.integers(0, 4), trusted=st.booleans())
@some(120)
def test_a_client_lives_on(given: Given, sizes: list[int], ending: int, use: int, trusted: bool) -> None:
    peers.attack_client(changed(given), sizes, ending, use, trusted=trusted)


@given(data=st.binary(max_size=200), sizes=SIZES, ending=st.integers(0, 3))
@some(25)
def test_any_bytes(data: bytes, sizes: list[int], ending: int) -> None:
    peers.attack_server([(data, sizes, ending)], trusted=False)
    peers.attack_client(data, sizes, ending, ending, trusted=False)


@pytest.mark.parametrize("ending", range(len(peers.ENDINGS)))
@pytest.mark.parametrize("trusted", [False, True])
def test_every_conversation_as_it_is(ending: int, trusted: bool) -> None:
    """To whom it wasn't meant, for the most part.  Each once: the rest is chance's."""
    for number, data in enumerate([*conversations().values()][2 * ending + trusted :: 8]):
        peers.attack_server([(data, [], ending)], trusted=trusted)
        peers.attack_client(data, [], ending, number, trusted=trusted)


# -- the tools themselves --------------------------------------------------------------------------------------------------------


def test_an_untyped_error_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests of this module can fail: a server logs what it didn't expect, a client raises it."""

    def fail(*args: object) -> None:
        raise KeyError("compression")

    data = conversations()["ours-call"]
    monkeypatch.setattr("trio_dcore.comm._comm.conclude", fail)
    with pytest.raises(BaseExceptionGroup) as caught:
        peers.attack_client(data, [], 0, 0, trusted=False)
    assert caught.group_contains(KeyError)
    with pytest.raises((AssertionError, BaseExceptionGroup)):
        peers.attack_server([(data, [], 0)], trusted=False)


def test_an_error_line_is_a_finding() -> None:
    with pytest.raises(AssertionError, match="something of ours"), peers.no_errors_logged():
        logging.getLogger("trio_dcore.server").error("something of ours")
