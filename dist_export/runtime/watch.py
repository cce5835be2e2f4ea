"""What a process's work reports to its group while it goes on."""

from __future__ import annotations

from msgspec import Struct

from dist_export.runtime.group import Group


class Watcher(Struct, frozen=True):
    """Counts progress, and stops the work when another rank has failed."""

    group: Group

    def progress(self, num_bytes_read: int, num_bytes_written: int) -> None:
        """Called after each piece of work, from any thread. Raises PeerFailedError."""
        self.group.progress.add(bytes_read=num_bytes_read, bytes_written=num_bytes_written)
        self.group.check()
