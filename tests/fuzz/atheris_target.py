"""Coverage-guided fuzzing: ``python tests/fuzz/atheris_target.py --seconds 600``; needs ``pip install atheris``.

It starts from the files in ``corpus/``, which ``--make-corpus`` writes from the seeds; what it finds on its way is kept in a
directory of its own, below the system's for temporary files.  A finding ends the run, with the input in ``crash-*`` in the current
directory: put it into ``corpus/`` under a name that says what it was, and every normal run of the tests will try it again.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import warnings
from pathlib import Path

HERE = Path(__file__).resolve().parent
CORPUS = HERE / "corpus"
_LARGEST = 2048
sys.path.insert(0, str(HERE.parent.parent))


def make_corpus() -> None:
    """Write the corpus anew, leaving alone what was found later."""
    from tests.fuzz.seeds import conversations, messages

    CORPUS.mkdir(exist_ok=True)
    for kind in ("stream", "message"):
        for path in CORPUS.glob(f"{kind}-*"):
            path.unlink()
    for name, data in conversations().items():
        if not name.startswith("golden-") and len(data) <= _LARGEST:  # those are the messages below
            (CORPUS / f"stream-{name}").write_bytes(b"\0" + data)
    for name, frames in messages().items():
        packed = b"".join(len(frame).to_bytes(2, "little") + frame for frame in frames)
        if len(packed) <= _LARGEST:
            (CORPUS / f"message-{name}").write_bytes(b"\2" + packed)
    for number, text in enumerate(
        ("tcp://127.0.0.1:8786", "tls://[::1]:0", "inproc://10.0.0.5/4711/1", "unix:///run/x", ":80", "a")
    ):
        (CORPUS / f"address-{number}").write_bytes(b"\3" + text.encode())


def main() -> None:
    """Fuzz for a given time and tell how many inputs were tried."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0, help="0 is another one each time")
    parser.add_argument("--make-corpus", action="store_true")
    options = parser.parse_args()
    if options.make_corpus:
        make_corpus()
        return

    import atheris

    with atheris.instrument_imports(include=["trio_dcore.protocol", "trio_dcore.comm._addressing"]):
        from tests.fuzz import targets

    warnings.simplefilter("error")
    # Tables of exceptions and time zones, loaded on first use, are no news to the fuzzer.
    for path in sorted(CORPUS.iterdir()):
        with targets.harmless_pickles():
            targets.run(path.read_bytes())

    count = 0

    def one(data: bytes) -> None:
        nonlocal count
        count += 1
        targets.run(data)

    work = tempfile.mkdtemp(prefix="trio-dcore-fuzz-")
    arguments = [sys.argv[0], f"-max_total_time={options.seconds}", "-max_len=4096", "-timeout=20", "-rss_limit_mb=2048"]
    arguments += [f"-seed={options.seed}", "-print_final_stats=1", work, str(CORPUS)]
    atheris.Setup(arguments, one)
    with targets.harmless_pickles():
        atheris.Fuzz()


if __name__ == "__main__":
    main()
