from __future__ import annotations

import pytest
import trio

from trio_dcore.cli import _demo, main


def test_demo(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    steps = [line.split()[0] for line in out.splitlines() if line.startswith("  ")]
    assert steps == ["server", "connect", "rpc", "errors", "stream", "stream", "shutdown"]
    assert all(line.endswith(" ms") for line in out.splitlines() if line.startswith("  "))
    assert out.splitlines()[-1].startswith("All of it was as promised")


@pytest.mark.parametrize(
    ("name", "broken"),
    [
        ("add", lambda self, x, y: x - y),
        ("divide", lambda self, x, y: 1),
    ],
)
def test_demo_notices_what_is_not_as_promised(
    name: str, broken: object, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(_demo._Handlers, name, broken)
    assert main(["demo"]) == 1
    out, err = capsys.readouterr()
    assert "not as promised: " in err
    assert err.count("\n") == 1
    assert "All of it" not in out


def test_demo_does_not_hang(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    async def late(self: object) -> str:
        await trio.sleep_forever()
        raise AssertionError

    monkeypatch.setattr(_demo, "_AT_MOST", 0.3)
    monkeypatch.setattr(_demo._Handlers, "work", late)
    assert main(["demo"]) == 1
    assert "was not through after" in capsys.readouterr().err
