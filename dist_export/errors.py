"""Errors that reach the user.

Every fault in what the user gave us (a checkpoint, an option, an environment) is an `ExportError`
whose text stands alone: what is wrong, where, what was expected, what to do. It carries no traceback
to the user. Anything else that escapes is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

from collections.abc import Iterable


class ExportError(Exception):
    """A fault the user can act on. The message is complete; it survives pickling and crossing ranks."""


class Faults:
    """Collects faults so that a run reports all of them at once instead of the first."""

    #: Messages shown in full; the rest are counted. A broken checkpoint can fault once per tensor.
    SHOWN = 20

    def __init__(self, heading: str) -> None:
        self.heading = heading
        self.messages: list[str] = []

    def add(self, message: str) -> None:
        """Remember one fault; raises nothing."""
        self.messages.append(message)

    def extend(self, messages: Iterable[str]) -> None:
        """Remember several faults."""
        self.messages.extend(messages)

    def __bool__(self) -> bool:
        return bool(self.messages)

    def __str__(self) -> str:
        shown = self.messages[: self.SHOWN]
        lines = [f"{self.heading}: {len(self.messages)} fault{'s' if len(self.messages) > 1 else ''}"]
        lines += [f"  - {message}" for message in shown]
        if len(self.messages) > self.SHOWN:
            lines.append(f"  … and {len(self.messages) - self.SHOWN} more")
        return "\n".join(lines)

    def raise_if_any(self) -> None:
        """Raise one `ExportError` naming every fault, or return when there is none."""
        if self.messages:
            raise ExportError(str(self) if len(self.messages) > 1 else f"{self.heading}: {self.messages[0]}")
