"""A .zip archive of images."""

import struct
import zipfile
import zlib
from typing import Any

from vqvae2.data.image_io import UnreadableImageError
from vqvae2.data.index import ImageIndex
from vqvae2.data.sources.archive import ReadAt, open_archive, state
from vqvae2.data.sources.base import Source, is_image, require
from vqvae2.errors import UserError

_LOCAL_HEADER = 30  # bytes before a member's name; the lengths of name and extra field are its last four


class ZipSource(Source):
    """The images in a .zip archive, stored or deflated, named by their paths in it."""

    def __init__(self, path: str, index: ImageIndex) -> None:
        super().__init__(path, index)
        self._read = ReadAt(path)

    @classmethod
    def matches(cls, path: str) -> bool:
        return path.lower().endswith(".zip")

    @classmethod
    def scan(cls, path: str) -> ImageIndex:
        stamp = state([path])
        try:
            with open_archive(path) as file, zipfile.ZipFile(file) as archive:
                members = {entry.filename: entry for entry in archive.infolist() if is_image(entry.filename)}
        except (zipfile.BadZipFile, OSError) as error:
            raise UserError(f"data.path: {path} is no readable .zip archive ({error}); make it again") from None
        require(list(members), path)
        found = list(members.values())
        for entry in found:
            if entry.flag_bits & 1 or entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                raise UserError(f"data.path: {path}: {entry.filename} is encrypted or packed in a rare way; unpack it")
        columns = {
            "offset": [entry.header_offset for entry in found],
            "length": [entry.compress_size for entry in found],
            "size": [entry.file_size for entry in found],
            "method": [entry.compress_type for entry in found],
            "crc": [entry.CRC for entry in found],
        }
        return ImageIndex.build(list(members), columns=columns, stamp=stamp)

    @classmethod
    def unchanged(cls, path: str, stamp: dict[str, Any]) -> bool:
        return stamp == state([path])

    def open(self, number: int, size: tuple[int, int]) -> bytes:
        del size
        offset, length, full, method, crc = (int(self.index.columns[name][number]) for name in _COLUMNS)
        header = self._read(offset, _LOCAL_HEADER)
        try:
            name, extra = struct.unpack_from("<HH", header, _LOCAL_HEADER - 4)
            data = self._read(offset + _LOCAL_HEADER + name + extra, length)
            if method == zipfile.ZIP_DEFLATED:
                data = zlib.decompressobj(-15).decompress(data, full)
        except (struct.error, zlib.error) as error:
            raise UnreadableImageError(self.describe(number), error) from None
        if zlib.crc32(data) != crc:
            raise UnreadableImageError(self.describe(number), "its checksum is wrong")
        return data


_COLUMNS = ("offset", "length", "size", "method", "crc")
