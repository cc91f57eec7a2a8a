"""Compression of payload frames: formats, Dask's sampling rule, and bombs."""

from __future__ import annotations

import os
import sys
import tracemalloc
import zlib
from types import SimpleNamespace
from typing import Any

import pytest
from distributed.protocol.compression import compressions as stock_compressions
from hypothesis import given
from hypothesis import strategies as st

from trio_dcore.protocol import LimitExceeded, LocalProtocolError, RemoteProtocolError, SerializationError
from trio_dcore.protocol._compression import (
    CODECS,
    Budget,
    check_codec,
    codec_available,
    compress_payload,
    decompress,
    default_codec,
    maybe_compress,
)
from trio_dcore.protocol._errors import TooHeavy

TEXT = b"Grace is a deadline on the handlers' nursery. " * 1000


def unlimited() -> Budget:
    return Budget(lambda: None)


def limited(limit: int, used: int = 0) -> Budget:
    return Budget(lambda: limit, used)


def snappy_length(size: int) -> bytes:
    out = bytearray()
    while size >= 0x80:
        out.append(size & 0x7F | 0x80)
        size >>= 7
    return bytes([*out, size])


@pytest.mark.parametrize("codec", CODECS)
class TestEveryCodec:
    def test_ours_is_read_by_stock(self, codec: str) -> None:
        name, compressed = maybe_compress(memoryview(TEXT), codec)
        assert name == codec
        assert len(compressed) < len(TEXT) // 10
        assert bytes(stock_compressions[codec].decompress(compressed)) == TEXT

    def test_stock_is_read_by_ours(self, codec: str) -> None:
        compressed = stock_compressions[codec].compress(TEXT)
        for frame in (compressed, bytearray(compressed), memoryview(bytearray(compressed))):
            assert bytes(decompress(codec, frame, unlimited())) == TEXT

    def test_empty(self, codec: str) -> None:
        assert bytes(decompress(codec, stock_compressions[codec].compress(b""), unlimited())) == b""

    def test_the_limit_is_the_size_of_the_message(self, codec: str) -> None:
        compressed = stock_compressions[codec].compress(TEXT)
        # 100 bytes of other frames, and this one, as they came.
        exact = limited(100 + len(TEXT), used=100 + len(compressed))
        assert bytes(decompress(codec, compressed, exact)) == TEXT
        assert exact.used == 100 + len(TEXT)
        with pytest.raises(LimitExceeded, match=r"Limits\(message=") as caught:
            decompress(codec, compressed, limited(99 + len(TEXT), used=100 + len(compressed)))
        assert caught.value.limit == "message"
        assert caught.value.value == 99 + len(TEXT)
        assert caught.value.seen is not None
        assert caught.value.seen > 99 + len(TEXT)

    def test_many_small_frames_share_one_budget(self, codec: str) -> None:
        compressed = stock_compressions[codec].compress(TEXT)
        budget = limited(3 * len(TEXT), used=10 * len(compressed))
        decompress(codec, compressed, budget)
        decompress(codec, compressed, budget)
        with pytest.raises(LimitExceeded):
            decompress(codec, compressed, budget)
        assert budget.used <= 3 * len(TEXT)

    def test_bomb_takes_no_memory(self, codec: str) -> None:
        bomb = stock_compressions[codec].compress(bytes(64 * 2**20))
        decompress(codec, stock_compressions[codec].compress(TEXT), unlimited())  # what is imported and set up counts not
        tracemalloc.start()
        try:
            with pytest.raises(LimitExceeded):
                decompress(codec, bomb, limited(2**20, used=len(bomb)))
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < 3 * 2**20

    @pytest.mark.parametrize("damage", ["cut", "empty", "noise", "tail"])
    def test_damaged(self, codec: str, damage: str) -> None:
        compressed = stock_compressions[codec].compress(TEXT)
        frame = {
            "cut": compressed[: len(compressed) // 2],
            "empty": b"",
            "noise": b"\x10\x00\x00\x00" + bytes(range(255, 200, -1)),
            "tail": compressed + b"x",
        }[damage]
        with pytest.raises(RemoteProtocolError):
            decompress(codec, frame, limited(2**20))

    @given(data=st.binary(max_size=200))
    def test_any_bytes_give_typed_errors(self, codec: str, data: bytes) -> None:
        try:
            out = decompress(codec, data, limited(10_000, used=len(data)))
        except (RemoteProtocolError, LimitExceeded):
            return
        assert len(out) <= 10_000

    @given(data=st.data())
    def test_any_change_gives_typed_errors(self, codec: str, data: st.DataObject) -> None:
        frame = bytearray(stock_compressions[codec].compress(TEXT[:500]))
        frame[data.draw(st.integers(0, len(frame) - 1))] ^= data.draw(st.integers(1, 255))
        try:
            out = decompress(codec, frame, limited(10_000, used=len(frame)))
        except (RemoteProtocolError, LimitExceeded):
            return
        assert len(out) <= 10_000


def test_lz4_layout() -> None:
    # Wire document, appendix A: 4 bytes little-endian size, then the block.
    _, compressed = maybe_compress(bytes(20_000), "lz4")
    assert bytes(compressed[:4]) == b"\x20\x4e\x00\x00"


def test_lz4_gives_writable_memory() -> None:
    _, compressed = maybe_compress(TEXT, "lz4")
    assert isinstance(decompress("lz4", compressed, unlimited()), bytearray)


@pytest.mark.parametrize(
    ("codec", "frame"),
    [
        ("lz4", (2**31 - 1).to_bytes(4, "little") + b"abcdefgh"),
        ("snappy", snappy_length(2**32 - 1) + b"abcdefgh"),
        ("zstd", bytes.fromhex("28b52ffde0") + (2**40).to_bytes(8, "little") + b"\x01\x00\x00"),
    ],
)
def test_an_impossible_size_is_refused_without_a_limit_too(codec: str, frame: bytes) -> None:
    with pytest.raises(RemoteProtocolError, match="can't become"):
        decompress(codec, frame, unlimited())


def test_snappy_size_that_never_ends() -> None:
    with pytest.raises(RemoteProtocolError, match="begin with its size"):
        decompress("snappy", b"\xff" * 20, unlimited())


class TestZstdOfUnknownSize:
    """A frame written as a stream doesn't say its size."""

    @staticmethod
    def frame(data: bytes) -> bytes:
        import zstandard

        stream = zstandard.ZstdCompressor().compressobj()
        frame: bytes = stream.compress(data) + stream.flush()
        assert zstandard.frame_content_size(frame) == -1
        return frame

    def test_is_read(self) -> None:
        noise = os.urandom(5000)
        assert decompress("zstd", self.frame(noise), unlimited()) == noise
        assert decompress("zstd", self.frame(TEXT), limited(len(TEXT), used=0)) == TEXT

    def test_limit(self) -> None:
        frame = self.frame(bytes(64 * 2**20))
        tracemalloc.start()
        try:
            with pytest.raises(LimitExceeded):
                decompress("zstd", frame, limited(2**20))
            peak = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
        assert peak < 20 * 2**20

    @pytest.mark.parametrize("frame", [frame(b"abc" * 1000)[:-3], frame(b"abc") + b"x", frame(b"abc") + b"x" * 300])
    def test_damaged(self, frame: bytes) -> None:
        with pytest.raises(RemoteProtocolError, match=r"cut off|behind"):
            decompress("zstd", frame, unlimited())


class TestHeaderEntries:
    @pytest.mark.parametrize("codec", [None, False])
    def test_not_compressed(self, codec: object) -> None:
        frame = bytearray(b"abc")
        assert decompress(codec, frame, limited(0)) is frame

    @pytest.mark.parametrize("codec", ["brotli", "auto", 5, True, b"lz4", ()])
    def test_unknown_codec_is_named(self, codec: object) -> None:
        with pytest.raises(SerializationError, match=r"not known here; known are lz4, snappy, zlib, zstd") as caught:
            decompress(codec, b"", unlimited())
        assert repr(codec) in str(caught.value)

    @pytest.mark.parametrize(("codec", "module", "package"), [
        ("lz4", "lz4.block", "lz4"),
        ("snappy", "snappy", "python-snappy"),
        ("zstd", "zstandard", "zstandard"),
    ])  # fmt: skip
    def test_missing_package_is_named(self, codec: str, module: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, module, None)  # type: ignore[arg-type]
        assert not codec_available(codec)
        with pytest.raises(SerializationError, match=f"pip install {package}$"):
            decompress(codec, b"", unlimited())
        with pytest.raises(SerializationError, match=f"pip install {package}$"):
            maybe_compress(TEXT, codec)

    def test_available(self) -> None:
        assert all(map(codec_available, CODECS))
        assert not codec_available("brotli")


class TestSetting:
    def test_those_there_are(self) -> None:
        for codec in (*CODECS, "auto", None):
            assert check_codec(codec) is codec

    @pytest.mark.parametrize("codec", ["brotli", "", 3, False, ["lz4"]])
    def test_others(self, codec: Any) -> None:
        with pytest.raises(ValueError, match="must be one of lz4, snappy, zlib, zstd, 'auto', or None"):
            check_codec(codec)

    def test_one_that_is_not_installed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setitem(sys.modules, "zstandard", None)
        with pytest.raises(ValueError, match="compression='zstd' needs the package 'zstandard': pip install zstandard"):
            check_codec("zstd")

    @pytest.mark.parametrize(
        ("missing", "found"), [((), "lz4"), (("lz4.block",), "snappy"), (("lz4.block", "snappy"), None)], ids=str
    )
    def test_dasks_choice(self, monkeypatch: pytest.MonkeyPatch, missing: tuple[str, ...], found: str | None) -> None:
        for module in missing:
            monkeypatch.setitem(sys.modules, module, None)
        default_codec.cache_clear()
        try:
            assert default_codec() == found
        finally:
            default_codec.cache_clear()


class TestTooHeavy:
    """What would become more than may be made here is left alone, but for what it takes to see that."""

    @pytest.mark.parametrize("codec", CODECS)
    def test_what_becomes_more(self, codec: str) -> None:
        _, frame = maybe_compress(bytes(5_000_000), codec)
        budget = Budget(lambda: None, len(frame), 5_000_000)
        assert len(decompress(codec, frame, budget)) == budget.used == 5_000_000
        with pytest.raises(TooHeavy):
            decompress(codec, frame, Budget(lambda: None, len(frame), 4_999_999))

    def test_that_of_unknown_size(self) -> None:
        import zstandard

        maker = zstandard.ZstdCompressor().compressobj()
        frame = maker.compress(bytes(5_000_000)) + maker.flush()
        assert zstandard.frame_content_size(frame) < 0
        with pytest.raises(TooHeavy):
            decompress("zstd", frame, Budget(lambda: None, len(frame), 4_999_999))

    def test_the_limit_comes_first(self) -> None:
        _, frame = maybe_compress(bytes(5_000_000), "lz4")
        with pytest.raises(LimitExceeded):
            decompress("lz4", frame, Budget(lambda: 10_000, len(frame), 5_000))


class TestSamplingRule:
    @pytest.mark.parametrize(
        ("payload", "compressed"),
        [
            (bytes(9_999), False),
            (bytes(10_000), True),
            (os.urandom(100_000), False),
            # Noise where the samples are taken: all of it is never tried.
            (os.urandom(10_000) + b"".join(bytes(100_000) + os.urandom(10_000) for _ in range(4)), False),
            # The samples do well, all of it doesn't.
            (bytes(10_000) + b"".join(os.urandom(100_000) + bytes(10_000) for _ in range(4)), False),
            (os.urandom(10_000) + bytes(500_000), True),
        ],
        ids=["small", "just large enough", "noise", "bad sample", "good sample only", "mostly zero"],
    )
    def test_what_is_compressed(self, payload: bytes, compressed: bool) -> None:
        name, frame = maybe_compress(payload, "zlib")
        assert (name == "zlib") is compressed
        assert bytes(frame) == payload if not compressed else len(frame) <= 0.7 * len(payload)
        if not compressed:
            assert frame is payload

    def test_five_places_of_10_000_bytes_and_no_byte_twice(self, monkeypatch: pytest.MonkeyPatch) -> None:
        seen: list[bytes] = []
        codec = SimpleNamespace(compress=lambda data: seen.append(bytes(data)) or b"")
        monkeypatch.setattr("trio_dcore.protocol._compression._compressor", lambda name: codec.compress)
        large = os.urandom(1_000_000)
        maybe_compress(large, "any")
        assert seen == [b"".join(large[start : start + 10_000] for start in (0, 247_500, 495_000, 742_500, 990_000)), large]
        seen.clear()
        small = os.urandom(40_000)
        maybe_compress(small, "any")
        assert seen == [small, small]

    def test_same_payload_same_bytes(self) -> None:
        payload = os.urandom(5_000) + bytes(50_000)
        assert maybe_compress(payload, "lz4") == maybe_compress(payload, "lz4")

    def test_too_large_to_try(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("trio_dcore.protocol._compression._MAX_SIZE", 20_000)
        assert maybe_compress(bytes(20_000), "zlib")[0] == "zlib"
        assert maybe_compress(bytes(20_001), "zlib")[0] is None

    def test_any_item_size(self) -> None:
        import array

        payload = memoryview(array.array("d", range(10_000)))
        name, frame = maybe_compress(payload, "zlib")
        assert name == "zlib"
        assert zlib.decompress(frame) == payload.tobytes()

    def test_unknown_codec(self) -> None:
        with pytest.raises(LocalProtocolError, match="compression='brotli' is not known"):
            maybe_compress(b"", "brotli")


class TestPayload:
    def test_each_frame_for_itself(self) -> None:
        noise = os.urandom(20_000)
        names, frames = compress_payload([TEXT, noise, b""], "lz4")
        assert names == ["lz4", None, None]
        assert frames[1] is noise
        assert len(frames[0]) < len(TEXT)

    def test_no_codec(self) -> None:
        given_frames: list[Any] = [TEXT]
        assert compress_payload(given_frames, None) == ([None], [TEXT])

    def test_what_is_compressed_already_stays(self) -> None:
        names, frames = compress_payload([TEXT, TEXT], "lz4", ["zlib", None])
        assert names == ["zlib", "lz4"]
        assert frames[0] is TEXT
