"""A .zip archive of images."""

import struct
import zipfile
import zlib
from typing import Any

from vqvae2.data.image_io import UnreadableImageError
from vqvae2.data.index import ImageIndex
from vqvae2.data.sources.archive import RangeReader, archive_stamp, open_archive
from vqvae2.data.sources.base import Source, is_image, require_images
from vqvae2.errors import UserError

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
                members = {entry.filename: entry for entry in archive.infolist() if is_image(entry.filename)}
        except (zipfile.BadZipFile, OSError) as error:
            raise UserError(f"data.path: {path} is not a readable .zip archive ({error}). Create it again.") from None
        require_images(list(members), path)
        found = list(members.values())
        for entry in found:
            if entry.flag_bits & 1 or entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise UserError(
                    f"data.path: {path}: {entry.filename} is encrypted or uses an unsupported compression. Unpack it."
                )
        columns = {
            "offset": [entry.header_offset for entry in found],
            "length": [entry.compress_size for entry in found],
            "size": [entry.file_size for entry in found],
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
                data = zlib.decompressobj(-15).decompress(data, full)
        except (struct.error, zlib.error) as error:
            raise UnreadableImageError(self.describe(number), error) from None
        if zlib.crc32(data) != crc:
            raise UnreadableImageError(self.describe(number), "checksum mismatch")
        return data


_COLUMNS = ("offset", "length", "size", "method", "crc")
