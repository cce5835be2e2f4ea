"""What a verification found: findings, and the report that people, exit codes and CI read."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping

from msgspec import Struct, field, to_builtins

from dist_export.errors import Faults
from dist_export.runtime.progress import format_bytes, format_rate

PLAN, CHECKSUMS, COVERAGE, REBUILD = "plan", "checksums", "coverage", "rebuild"
LEVELS = (CHECKSUMS, COVERAGE, REBUILD)
"""What a user chooses from, cheapest first. The plan is always compared: it costs no data."""


class Finding(Struct, frozen=True):
    """Something wrong with an export."""

    level: str
    where: str
    """File, or file and tensor."""
    message: str

    def __str__(self) -> str:
        return f"{self.where}: {self.message}"


class VerifyReport(Struct, frozen=True, kw_only=True):
    """The verdict on one output folder; the same on every rank. Frozen; prints as text, dumps as JSON."""

    output: str
    target: str
    levels: tuple[str, ...]
    faults: tuple[Finding, ...] = ()
    warnings: tuple[str, ...] = ()
    """Worth a look, but as the checkpoint has it or harmless to whoever loads the export."""
    num_tensors: int = 0
    num_bytes_checked: int = 0
    """Output bytes whose checksum was computed."""
    num_bytes_compared: int = 0
    """Output bytes compared with the checkpoint, copies on several ranks included."""
    elements_left_out: Mapping[str, int] = field(default_factory=dict)
    """Reason -> source elements that come back from nowhere."""
    sha256: Mapping[str, str] = field(default_factory=dict)
    """File -> SHA-256, where asked for."""
    seconds: Mapping[str, float] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong."""
        return not self.faults

    def to_json(self) -> str:
        """Everything, as a JSON object with ``ok`` in front."""
        return json.dumps({"ok": self.ok, **to_builtins(self)}, indent=1)

    @staticmethod
    def from_json(text: str) -> VerifyReport:
        """What `to_json` made."""
        values = json.loads(text)
        values.pop("ok")
        values["faults"] = tuple(Finding(**fault) for fault in values["faults"])
        return VerifyReport(**{**values, "levels": tuple(values["levels"]), "warnings": tuple(values["warnings"])})

    def __str__(self) -> str:
        lines = [str(self._listed()) if self.faults else f"{self.output}: verified"]
        lines += [f"  {line}" for line in self._counts()]
        lines += [f"  sha256 {digest}  {name}" for name, digest in self.sha256.items()]
        lines += [f"  left out: {count} elements, {reason}" for reason, count in self.elements_left_out.items()]
        return "\n".join([*lines, *(f"note: {warning}" for warning in self.warnings)])

    def _listed(self) -> Faults:
        faults = Faults(f"{self.output}: the export is not right")
        faults.extend(str(fault) for fault in self.faults)
        return faults

    def _counts(self) -> Iterable[str]:
        yield f"{self.num_tensors} tensors; levels: {', '.join(self.levels)}"
        for level, what, count in (
            (CHECKSUMS, "checksummed", self.num_bytes_checked),
            (REBUILD, "equal to the checkpoint" if self.ok else "compared with the checkpoint",
             self.num_bytes_compared),
        ):  # fmt: skip
            if level in self.levels:
                taken = self.seconds.get(level, 0.0)
                rate = f", {format_rate(count / taken)}" if taken > 0 else ""
                yield f"{format_bytes(count)} {what} in {taken:.2f} s{rate}"
