"""The files of a GGUF build in several parts, by the names that ``gguf-split`` gives them."""

import re
from pathlib import Path

_SPLIT = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.gguf", re.S)
_MOST_SPLITS = 1000


def split_files(path: Path) -> tuple[Path, ...]:
    """The files of a build by the name of its first one; the path alone when it is whole."""
    found = _SPLIT.fullmatch(path.name)
    if found is None or not 1 < int(found[3]) <= _MOST_SPLITS:
        return (path,)
    count = int(found[3])
    return tuple(
        path.with_name(f"{found[1]}-{i:05d}-of-{count:05d}.gguf") for i in range(1, count + 1)
    )
