"""Recognise files that are often found in place of a network, a checkpoint or a zip, to say so in one sentence."""

import os

from dnnlib.download import is_web_page
from dnnlib.text import shown

_LFS = b"version https://git-lfs.github.com/spec/"
_ARCHIVES = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bzip2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
    b"7z\xbc\xaf\x27\x1c": "7-Zip",
    b"Rar!": "RAR",
}
_HEAD_BYTES = 4096


def explain_kind(path: str | os.PathLike[str], expected: str, is_text: bool = False) -> str | None:
    """Return the rest of a sentence on what a file is instead of `expected`; None if its first bytes do not tell.

    With `is_text`, text is expected.

    Raises OSError if the file cannot be read.
    """
    with open(path, "rb") as file:
        head = file.read(_HEAD_BYTES)
    if not head and is_text:
        return None
    if not head:
        return "is damaged: it is empty; copy or download it again"
    if head.startswith(_LFS):
        return f"is a pointer of git-lfs, expected {expected}: fetch the file that it stands for (git lfs pull)"
    if is_web_page(head):
        return f"is a web page, expected {expected}: download the file that the page is about"
    for magic, name in _ARCHIVES.items():
        if head.startswith(magic):
            return f"is compressed by {name}, expected {expected}: unpack it"
    if head[257:262] == b"ustar":
        return f"is a tar archive, expected {expected}: unpack it"
    if not is_text and head.lstrip()[:1] in (b"{", b"<") and b"\0" not in head[:16]:
        begin = shown(head.decode("utf-8", "replace"))
        return f"is text, expected {expected}: it begins with {begin}; copy or download the file again"
    return None
