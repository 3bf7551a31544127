"""Read IDX files, the format of MNIST and its successors (Y. LeCun, http://yann.lecun.com/exdb/mnist)."""

from __future__ import annotations

import gzip
import hashlib
import math
import zlib
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from pathlib import Path

_UNSIGNED_BYTE = 0x08


def read_idx(path: Path, *, sha256: str | None = None) -> torch.Tensor:
    """Read an IDX file of unsigned bytes, gzip-compressed or plain.

    Args:
        path: The file; compressed if its name ends in ``.gz``.
        sha256: SHA-256 of the *uncompressed* content, in hexadecimal: archives compress the same content differently.
            ``None`` checks nothing.

    Returns:
        A uint8 tensor of the shape that the file states.

    Raises:
        ValueError: When the file cannot be decompressed, is not what ``sha256`` says, or is no IDX file of unsigned
            bytes whose length is that of its shape.
    """
    content = path.read_bytes()
    if path.suffix == ".gz":
        try:
            content = gzip.decompress(content)
        except (OSError, EOFError, zlib.error) as error:
            raise ValueError(f"{path} is no whole gzip file ({error}); delete it and get it again.") from error
    if sha256 is not None and (found := hashlib.sha256(content).hexdigest()) != sha256:
        raise ValueError(
            f"{path} is damaged or another file: its uncompressed content has SHA-256 {found}, expected {sha256}; "
            f"delete it and get it again."
        )
    return parse_idx(content, name=str(path))


def parse_idx(content: bytes, *, name: str) -> torch.Tensor:
    """Turn the uncompressed content of an IDX file into a uint8 tensor; ``name`` stands in the errors.

    The header is the magic number (two zero bytes, the type, the number of dimensions), then each dimension as a
    big-endian 32-bit number.

    Raises:
        ValueError: When it is no IDX file of unsigned bytes, or its length is not that of its shape.
    """
    if len(content) < 4 or content[:2] != b"\0\0":
        raise ValueError(f"{name} is no IDX file: it starts with {content[:4].hex() or 'nothing'}, not with 0000.")
    kind, dimensions = content[2], content[3]
    if kind != _UNSIGNED_BYTE:
        raise ValueError(f"{name} is an IDX file of type 0x{kind:02x}; only unsigned bytes (0x08) are read.")
    start = 4 + 4 * dimensions
    shape = [int.from_bytes(content[i : i + 4], "big") for i in range(4, start, 4)]
    if len(content) - start != math.prod(shape):
        raise ValueError(
            f"{name} is cut short or damaged: {max(len(content) - start, 0)} bytes follow the header, "
            f"where its shape {tuple(shape)} needs {math.prod(shape)}."
        )
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)[start:].reshape(shape)
