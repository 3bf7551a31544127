from __future__ import annotations

import gzip
import hashlib

import pytest
import torch

from bnkit.training.idx import parse_idx, read_idx

# two images of 2 x 3 pixels
CONTENT = bytes.fromhex("00000803000000020000000200000003") + bytes(range(12))
EXPECTED = torch.arange(12, dtype=torch.uint8).reshape(2, 2, 3)


@pytest.mark.parametrize("compressed", [True, False])
def test_an_idx_file_is_read(tmp_path, compressed):
    path = tmp_path / ("images.gz" if compressed else "images")
    path.write_bytes(gzip.compress(CONTENT) if compressed else CONTENT)
    assert torch.equal(read_idx(path, sha256=hashlib.sha256(CONTENT).hexdigest()), EXPECTED)


def test_the_checksum_is_that_of_the_content_however_it_is_compressed(tmp_path):
    for level in (1, 9):
        (tmp_path / f"{level}.gz").write_bytes(gzip.compress(CONTENT, level, mtime=level))
        assert torch.equal(read_idx(tmp_path / f"{level}.gz", sha256=hashlib.sha256(CONTENT).hexdigest()), EXPECTED)


def test_a_wrong_checksum_names_the_file_and_the_cure(tmp_path):
    path = tmp_path / "images"
    path.write_bytes(CONTENT[:-1] + b"!")
    with pytest.raises(ValueError, match=r"images is damaged or another file: .* delete it and get it again"):
        read_idx(path, sha256=hashlib.sha256(CONTENT).hexdigest())


def test_a_broken_archive_names_the_file_and_the_cure(tmp_path):
    path = tmp_path / "images.gz"
    for content in (gzip.compress(CONTENT)[:-9], b"<html>not found</html>", b""):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"images\.gz is (no whole gzip file|no IDX file)"):
            read_idx(path)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"\x89PNG" + CONTENT, "no IDX file: it starts with 89504e47"),
        (b"", "no IDX file: it starts with nothing"),
        (CONTENT[:2] + b"\x0d" + CONTENT[3:], "type 0x0d; only unsigned bytes"),
        (CONTENT[:-1], r"cut short or damaged: 11 bytes follow the header, where its shape \(2, 2, 3\) needs 12"),
        (CONTENT + b"\0", "13 bytes follow the header"),
        (CONTENT[:10], "cut short or damaged"),
    ],
)
def test_what_is_no_idx_file_of_bytes_is_refused(content, reason):
    with pytest.raises(ValueError, match=f"some file is .*{reason}"):
        parse_idx(content, name="some file")
