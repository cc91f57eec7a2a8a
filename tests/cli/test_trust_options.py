"""The options that say whom to trust."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest

from trio_dcore import Security, Server
from trio_dcore.cli import main
from trio_dcore.cli._errors import CliError
from trio_dcore.cli._security import add_security_options, security_of
from trio_dcore.cli._serve import load_server


def parsed(*options: str) -> Security | None:
    parser = argparse.ArgumentParser()
    add_security_options(parser)
    return security_of(parser.parse_args(options))


def test_none_given() -> None:
    assert parsed() is None


def test_all_given() -> None:
    security = parsed("--tls-ca-file", "ca.pem", "--tls-cert", "c.pem", "--tls-key", "k.pem", "--pickle", "never")
    assert security is not None
    assert (security.tls_ca_file, security.tls_cert, security.tls_key, security.pickle) == ("ca.pem", "c.pem", "k.pem", "never")


@pytest.mark.parametrize("missing", ["--tls-ca-file", "--tls-cert", "--tls-key"])
def test_one_missing(missing: str) -> None:
    options = {"--tls-ca-file": "ca.pem", "--tls-cert": "c.pem", "--tls-key": "k.pem"}
    del options[missing]
    with pytest.raises(CliError, match=f"{missing} is missing"):
        parsed(*[text for pair in options.items() for text in pair])


def test_a_server_has_its_own() -> None:
    with pytest.raises(CliError, match="a Security of its own"):
        load_server(f"{__name__}:SERVER", Security())


def test_handlers_have_not(monkeypatch: pytest.MonkeyPatch) -> None:
    security = Security(pickle="never")
    assert load_server(f"{__name__}:HANDLERS", security).settings.security is security


def test_files_that_are_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    files = [text for name in ("ca-file", "cert", "key") for text in (f"--tls-{name}", str(tmp_path / name))]
    assert main(["ping", "tls://127.0.0.1:1", *files]) in (1, 2)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("trio-dcore: error: ")
    assert err.count("\n") == 1
    assert "tls_ca_file" in err


def test_a_tls_address_without_certificates(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ping", "tls://127.0.0.1:1"]) in (1, 2)
    assert "tls_ca_file" in capsys.readouterr().err


HANDLERS = {"one": lambda: 1}
SERVER = Server()
