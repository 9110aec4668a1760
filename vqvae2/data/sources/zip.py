"""A .zip archive of images."""

import struct
import zipfile
import zlib
from contextlib import suppress
from typing import Any

from vqvae2.data.image_io import UnreadableImageError
from vqvae2.data.index import ImageIndex
from vqvae2.data.sources.archive import RangeReader, archive_stamp, open_archive
from vqvae2.data.sources.base import Source, is_hidden, is_image, member_name, require_images, warn_skipped
from vqvae2.errors import UserError

_MAX_INT64 = 2**63 - 1
# A member is decompressed up to the larger of these: real images of a few MiB have been compressed already.
_FREE_BYTES, _MAX_RATIO = 64 * 2**20, 100
_ZIP_ERRORS = (zipfile.BadZipFile, OSError, ValueError, NotImplementedError, OverflowError, struct.error)
_UTF8_FLAG = 0x800
_LOCAL_HEADER_BYTES = 30  # fixed part; ends with the lengths of name and extra field, 2 bytes each


class ZipSource(Source):
    """Images in a .zip archive, stored or deflated, named by their paths in the archive."""

    def __init__(self, path: str, index: ImageIndex) -> None:
        super().__init__(path, index)
        self._read = RangeReader(path)

    @classmethod
    def matches(cls, path: str) -> bool:
        return path.lower().endswith(".zip")

    @classmethod
    def scan(cls, path: str) -> ImageIndex:
        stamp = archive_stamp([path])
        try:
            with open_archive(path) as file, zipfile.ZipFile(file) as archive:
                files = {_name(entry): entry for entry in archive.infolist() if not _is_folder(entry)}
        except UserError:
            raise
        except _ZIP_ERRORS as error:
            raise UserError(f"data.path: {path} is not a readable .zip archive ({error}). Create it again.") from None
        files = {name: entry for name, entry in files.items() if not is_hidden(name.rpartition("/")[0])}
        members = {name: entry for name, entry in files.items() if is_image(name)}
        require_images(list(members), path)
        warn_skipped((name for name in files if name not in members), path)
        found = list(members.values())
        for entry in found:
            if entry.flag_bits & 1 or entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise UserError(
                    f"data.path: {path}: {entry.filename} is encrypted or uses an unsupported compression. Unpack it."
                )
        columns = {
            "offset": [min(entry.header_offset, _MAX_INT64) for entry in found],
            "length": [min(entry.compress_size, _MAX_INT64) for entry in found],
            "size": [min(entry.file_size, _MAX_INT64) for entry in found],
            "method": [entry.compress_type for entry in found],
            "crc": [entry.CRC for entry in found],
        }
        return ImageIndex.build(list(members), columns=columns, stamp=stamp)

    @classmethod
    def is_unchanged(cls, path: str, stamp: dict[str, Any]) -> bool:
        return stamp == archive_stamp([path])

    def open(self, number: int, size: tuple[int, int]) -> bytes:
        del size
        offset, length, full, method, crc = (int(self.index.columns[name][number]) for name in _COLUMNS)
        header = self._read(offset, _LOCAL_HEADER_BYTES)
        try:
            name, extra = struct.unpack_from("<HH", header, _LOCAL_HEADER_BYTES - 4)
            data = self._read(offset + _LOCAL_HEADER_BYTES + name + extra, length)
            if method == zipfile.ZIP_DEFLATED:
                if full > max(_FREE_BYTES, _MAX_RATIO * len(data)):
                    reason = f"{full:,} bytes compressed to {len(data):,}, a possible decompression bomb"
                    raise UnreadableImageError(self.describe(number), reason)
                # One byte more than declared, because a limit of 0 would mean no limit.
                data = zlib.decompressobj(-15).decompress(data, full + 1)
        except (struct.error, zlib.error) as error:
            raise UnreadableImageError(self.describe(number), error) from None
        if zlib.crc32(data) != crc:
            raise UnreadableImageError(self.describe(number), "checksum mismatch")
        return data


def _is_folder(entry: zipfile.ZipInfo) -> bool:
    return entry.filename.endswith(("/", "\\"))


def _name(entry: zipfile.ZipInfo) -> str:
    """Return the name of a member with `/` as separator. Some programs on Windows write `\\`."""
    name = entry.filename
    if not entry.flag_bits & _UTF8_FLAG:
        with suppress(UnicodeError):  # zipfile decodes as CP437, but many programs write UTF-8 without the flag
            name = name.encode("cp437").decode("utf-8")
    return member_name(name.replace("\\", "/"))


_COLUMNS = ("offset", "length", "size", "method", "crc")
