"""Where the pictures of a file go. Each gets there, whatever the file is called; its row says under which name.

What the file system says of a name is believed: paths may be too long as a whole, other systems allow shorter names or
fewer characters, something may be in the way. Such a picture goes to a short name in the folder `~`.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from qfae_runtime.writers.folder import make_parent
from qfae_runtime.writers.names import frame_path, spare_name

# What an operating system answers when it is the name that does not do. A full disk is none of these.
_NAME_FAULTS = frozenset(
    {
        errno.ENAMETOOLONG,
        errno.ENOTDIR,
        errno.EISDIR,
        errno.EEXIST,
        errno.ENOTEMPTY,
        errno.EILSEQ,
        errno.EINVAL,
    }
)


@dataclass(frozen=True)
class Place:
    """Where the pictures of one file go: to `folder / name`; each frame's is named after it by `frame_path`.

    `folder` is heatmaps/ or maps/ in a results folder, `source` what the file is called in rows.
    """

    folder: Path
    name: str
    source: str

    def write(self, frame: int | None, save: Callable[[Path], None]) -> str:
        """Let `save` write the picture of a frame, None for that of a file of one picture.

        Returns:
            Its path below the results folder, with forward slashes.

        Raises:
            OSError: it cannot be written, and not because of its name.
            OutputError: a link would lead it out of the results folder.

        """
        own = frame_path(self.folder / self.name, frame)
        try:
            return self._write(own, save)
        except OSError as error:
            if error.errno not in _NAME_FAULTS:
                raise
        return self._write(frame_path(self.folder / spare_name(self.source, own.suffix), frame), save)

    def _write(self, path: Path, save: Callable[[Path], None]) -> str:
        root = self.folder.parent
        make_parent(path, root)
        save(path)
        return path.relative_to(root).as_posix()
