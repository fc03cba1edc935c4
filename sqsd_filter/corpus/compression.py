"""Compressed text: gzip and zstandard, decompressed in small steps, and never without end."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Protocol

from sqsd_filter.corpus.files import SourceFile
from sqsd_filter.errors import InputError

PIECE = 1 << 10  # compressed bytes at a time: zstandard can make 32 MiB of them
TRUSTED = 1 << 30  # bytes to which a file may be decompressed whatever its size,
RATIO = 1000  # and how many times its size beyond that; text is rarely compressed to a fiftieth


class Decompressor(Protocol):
    """One compressed stream, as zlib and zstandard decompress it."""

    @property
    def eof(self) -> bool: ...

    @property
    def unused_data(self) -> bytes: ...

    def decompress(self, data: bytes, /) -> bytes: ...


def _gzip_stream() -> Decompressor:
    return zlib.decompressobj(wbits=31)


def _zstd_stream() -> Decompressor:
    import zstandard

    return zstandard.ZstdDecompressor(max_window_size=1 << 31).decompressobj()


COMPRESSED: dict[str, Callable[[], Decompressor]] = {".gz": _gzip_stream, ".zst": _zstd_stream}


def decompress(file: SourceFile, blocks: Iterable[bytes]) -> Iterator[bytes]:
    """Decompress stream after stream, as `cat a.gz b.gz` joins them; zstandard's own reader accepts truncated ones."""
    new_stream = COMPRESSED.get(file.compression)
    if new_stream is None:
        yield from blocks
        return
    stream: Decompressor | None = None
    position = size = 0
    for block in blocks:
        for at in range(0, len(block), PIECE):
            rest = block[at : at + PIECE]
            while rest:
                if stream is None:
                    rest = rest.lstrip(b"\0") if position + at else rest  # padding
                    if not rest:
                        break
                    stream = new_stream()
                try:
                    data = stream.decompress(rest)
                except Exception as error:  # zlib.error and zstandard.ZstdError share no base
                    raise InputError(
                        f"{file} is corrupt: {file.compression} data breaks between bytes {position} and "
                        f"{position + len(block)} ({error}); fetch or compress it again."
                    ) from error
                size += len(data)
                if size > max(TRUSTED, RATIO * (position + at + PIECE)):
                    raise InputError(
                        f"{file} is a decompression bomb: its first {position + at + PIECE:,} bytes become {size:,}. "
                        "If you trust it, decompress it and name the result."
                    )
                if data:
                    yield data
                rest = b""
                if stream.eof:
                    rest, stream = stream.unused_data, None
        position += len(block)
    if stream is not None:
        raise InputError(
            f"{file} is truncated: its {file.compression} data ends in the middle, at byte {position}; fetch it again."
        )
