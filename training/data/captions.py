"""Read descriptions of clips: `captions.json` in the root of a dataset, or those of a published layout.

The file is an object that maps clips, or their first folders, to a text or to a list of texts that say the same.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path

from dnnlib.json_file import JsonError, either, listed, mapped, read_json, text
from dnnlib.text import one_line
from training.data.shards import Clip

CAPTIONS_FILE = "captions.json"
_check = mapped(either([text, listed(text)], "a text or a list of texts"))


def read_captions(
    root: Path, clips: Sequence[Clip], given: Mapping[str, Sequence[str]] | None = None
) -> list[list[str]]:
    """Return the descriptions of each clip, at least one; those that are `given` by clip are taken before the file's.

    Raises `ValueError` if the file cannot be read, or if a clip has none.
    """
    path = root / CAPTIONS_FILE
    known: dict[str, str | list[str]] = {}
    if path.exists():
        try:
            known = read_json(path, _check)
        except (OSError, JsonError) as error:
            reason = str(error).replace(f"{path} ", "it ", 1)
            raise ValueError(
                f"{path} is no object that maps clips to texts ({reason}); write one such as "
                '{"clip": "a horse runs", "folder": ["a bike", "somebody rides a bike"]}'
            ) from error
    found = []
    for clip in clips:
        own = (given or {}).get(clip.path) or known.get(clip.path, known.get(clip.path.partition("/")[0]))
        texts = [own] if isinstance(own, str) else list(own or ())
        if not texts:
            raise ValueError(
                f"clip {one_line(clip.path)} of {root} has no description; give {path} an entry for it or for its "
                "first folder"
            )
        found.append(texts)
    return found
