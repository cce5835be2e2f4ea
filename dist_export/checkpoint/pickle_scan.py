"""Look a pickle over, opcode by opcode, before anything is built from it.

An allow-list of names does not bound what a pickle costs: nine bytes can claim a memo of 2**31 slots, a length
field can claim 2**60 bytes, and a tuple nested a million deep overflows the C stack when it is hashed. `prescan`
refuses those. It builds nothing and resolves no name.

The exact walk handles protocols 0 to 5. Large pickles of protocol 4 and 5 (a checkpoint's ``.metadata``) first
try a walk made of bulk operations on bytes, several times faster; where that cannot prove a pickle harmless it
leaves the verdict to the exact walk.
"""

from __future__ import annotations

from msgspec import Struct, field

from dist_export.checkpoint.pickle_bounds import (
    MalformedError,
    PickleSummary,
    ScanLimits,
    check_frame,
    counted_span,
    is_large_integer,
)
from dist_export.checkpoint.pickle_bulk_scan import bulk_scan
from dist_export.errors import ExportError

UNKNOWN_NAME = "?"
"""Stands in a summary for a module or attribute name that is not spelled out where it is used."""
_BULK_FROM = 1 << 16  # bytes; below it the exact walk is fast enough
_LONGEST_NUMBER = 4096  # characters of a decimal number in protocol 0; parsing one is quadratic
_LONGEST_NAME = 1024  # bytes of a string that could be a module or an attribute name


def prescan(
    data: bytes, *, origin: str, limits: ScanLimits | None = None, allow_trailing: bool = False
) -> PickleSummary:
    """Walk the first pickle in `data` and check every bound in `limits`; `origin` names it in errors.

    Raises `ExportError` for a cut or malformed pickle, for extension-registry and out-of-band opcodes (no
    checkpoint has them), and, unless `allow_trailing`, for bytes after the end.
    """
    limits = limits or ScanLimits()
    if len(data) > limits.max_bytes and not allow_trailing:
        raise ExportError(f"{origin}: a pickle of {len(data)} bytes, at most {limits.max_bytes} are accepted")
    try:
        summary = _scan(data, limits)
    except MalformedError as reason:
        raise ExportError(f"{origin}: not a pickle that can be trusted: {reason}") from None
    if summary.end != len(data) and not allow_trailing:
        raise ExportError(f"{origin}: {len(data) - summary.end} bytes follow the end of the pickle")
    return summary


def _scan(data: bytes, limits: ScanLimits) -> PickleSummary:
    if len(data) >= _BULK_FROM:
        summary = bulk_scan(data, limits)
        if summary is not None:
            return summary
    return _Walk(data, limits).run()


# What the walk does with each opcode: (action, size of the argument or of its length field).
_PUSH, _COUNTED, _LINE, _GET, _PUT, _MEMOIZE, _MARK, _TUPLE, _TUPLE_N, _FILL, _STORE = range(11)
_CALL, _NAME, _FROM_MARK, _FRAME, _STOP, _OTHER = range(11, 17)
_TABLE: dict[int, tuple[int, int]] = {
    **dict.fromkeys(b"N\x88\x89)]}\x8f", (_PUSH, 0)),
    **dict(zip(b"KMJG", ((_PUSH, 1), (_PUSH, 2), (_PUSH, 4), (_PUSH, 8)), strict=True)),
    **dict.fromkeys(b"\x8cUC\x8a", (_COUNTED, 1)),
    **dict.fromkeys(b"XTB\x8b", (_COUNTED, 4)),
    **dict.fromkeys(b"\x8d\x8e\x96", (_COUNTED, 8)),
    **dict.fromkeys(b"ILFSVP", (_LINE, 0)),
    **dict(zip(b"hjg", ((_GET, 1), (_GET, 4), (_GET, 0)), strict=True)),
    **dict(zip(b"qrp", ((_PUT, 1), (_PUT, 4), (_PUT, 0)), strict=True)),
    **dict(zip(b"\x85\x86\x87", ((_TUPLE_N, 1), (_TUPLE_N, 2), (_TUPLE_N, 3)), strict=True)),
    **dict.fromkeys(b"ld\x91o", (_FROM_MARK, 0)),
    **dict.fromkeys(b"eu\x90", (_FILL, 0)),  # APPENDS SETITEMS ADDITEMS
    **dict(zip(b"as", ((_STORE, 1), (_STORE, 2)), strict=True)),  # APPEND SETITEM
    **dict(zip(b"QRb\x81\x92", ((_CALL, 1), (_CALL, 2), (_CALL, 2), (_CALL, 2), (_CALL, 3)), strict=True)),
    **dict.fromkeys(b"ci\x93", (_NAME, 0)),
    **dict(zip(b"\x94(t.\x95", ((_MEMOIZE, 0), (_MARK, 0), (_TUPLE, 0), (_STOP, 0), (_FRAME, 8)), strict=True)),
    **dict.fromkeys(b"012\x80", (_OTHER, 0)),
}
_ACTIONS = [_TABLE.get(op) for op in range(256)]
_REFUSED = {
    **dict.fromkeys(b"\x82\x83\x84", "an extension-registry opcode, which no checkpoint has"),
    **dict.fromkeys(b"\x97\x98", "an out-of-band buffer, which no checkpoint has"),
}


class _Walk(Struct):
    """The exact walk. The stack holds each value's nesting depth, or ~i for the i-th short string."""

    data: bytes
    limits: ScanLimits
    pos: int = 0
    stack: list[int] = field(default_factory=list)
    marks: list[int] = field(default_factory=list)
    floor: int = 0
    """Stack height at the innermost mark: nothing below it can be popped."""
    memo: dict[int, int] = field(default_factory=dict)
    strings: list[bytes] = field(default_factory=list)
    names: set[tuple[str, str]] = field(default_factory=set)
    num_opcodes: int = 0
    large_integers: int = 0

    def run(self) -> PickleSummary:
        data, stack, memo, size = self.data, self.stack, self.memo, len(self.data)
        most = self.limits.max_opcodes
        while True:
            pos = self.pos
            if pos >= size:
                raise MalformedError(f"it is cut: no STOP in {size} bytes")
            self.num_opcodes += 1
            if self.num_opcodes > most:
                raise MalformedError(f"it has more than {most} opcodes")
            known = _ACTIONS[data[pos]]
            if known is None:
                raise MalformedError(self._refusal(pos))
            action, width = known
            self.pos = pos + 1 + width
            if action == _PUSH:
                stack.append(0)
            elif action == _MEMOIZE:
                memo[len(memo)] = self._top()
            elif action == _GET:
                stack.append(self._recall(pos, width))
            elif action == _COUNTED:
                self._counted(pos, width)
            elif action == _STOP:
                return self._finish()
            else:
                self._structure(action, pos, width)

    def _structure(self, action: int, pos: int, width: int) -> None:
        if action == _MARK:
            self._mark()
        elif action in (_TUPLE_N, _CALL):
            self.pos = pos + 1
            self._push(self._pop(width) + 1)
        elif action in (_TUPLE, _FROM_MARK):
            self._push(self._pop_mark() + 1)
        elif action == _FILL:
            depth = self._pop_mark() + 1
            self._push(max(depth, self._pop(1)))
        elif action == _STORE:
            self.pos = pos + 1
            depth = self._pop(width) + 1
            self._push(max(depth, self._pop(1)))
        elif action == _PUT:
            self._store(pos, width)
        elif action == _NAME:
            self._name(pos)
        elif action == _LINE:
            self._text(pos)
        elif action == _FRAME:
            self.pos = check_frame(self.data, pos)
        else:
            self._other(pos)

    def _other(self, pos: int) -> None:
        op = self.data[pos]
        if op == 0x80:  # PROTO
            self.pos = pos + 2
            if self.data[pos + 1 : pos + 2] > b"\x05":
                raise MalformedError(f"pickle protocol {self.data[pos + 1]}, known are 0 to 5")
        elif op == ord("2"):  # DUP
            self.stack.append(self._top())
        elif op == ord("1") or (len(self.stack) == self.floor and self.marks):  # POP_MARK
            self._pop_mark()
        else:
            self._pop(1)

    # The stack

    def _push(self, depth: int) -> None:
        if depth > self.limits.max_depth:
            raise MalformedError(f"it is nested deeper than {self.limits.max_depth} at byte {self.pos}")
        self.stack.append(depth)

    def _top(self) -> int:
        if len(self.stack) <= self.floor:
            raise MalformedError(f"the opcode at byte {self.pos - 1} takes a value that is not there")
        return self.stack[-1]

    def _pop(self, count: int) -> int:
        """Pop `count` values and return the greatest depth among them."""
        if len(self.stack) - count < self.floor:
            raise MalformedError(f"the opcode at byte {self.pos - 1} takes a value that is not there")
        depth = max(self.stack[-count:])
        del self.stack[-count:]
        return max(depth, 0)

    def _mark(self) -> None:
        if len(self.marks) >= self.limits.max_marks:
            raise MalformedError(f"more than {self.limits.max_marks} marks are open at byte {self.pos}")
        self.marks.append(self.floor)
        self.floor = len(self.stack)

    def _pop_mark(self) -> int:
        """Pop to the innermost mark and return the greatest depth of the values above it (0 when none)."""
        if not self.marks:
            raise MalformedError(f"the opcode at byte {self.pos - 1} needs a mark that is not there")
        depth = max(self.stack[self.floor :], default=0)
        del self.stack[self.floor :]
        self.floor = self.marks.pop()
        return max(depth, 0)

    # The memo

    def _index(self, pos: int, width: int) -> int:
        """The memo index of a GET or PUT opcode, whose argument has `width` bytes or is a line (0)."""
        if width:
            raw = self.data[pos + 1 : pos + 1 + width]
            if len(raw) < width:
                raise MalformedError(f"it is cut at byte {len(self.data)}")
            return int.from_bytes(raw, "little")
        line = self._line(pos + 1)
        if not line.isdigit() or len(line) > 10:
            raise MalformedError(f"a memo index at byte {pos} that is not a number")
        return int(line)

    def _recall(self, pos: int, width: int) -> int:
        index = self._index(pos, width)
        if index not in self.memo:
            raise MalformedError(f"memo entry {index} is read at byte {pos} and was never stored")
        return self.memo[index]

    def _store(self, pos: int, width: int) -> None:
        index = self._index(pos, width)
        if index > self.num_opcodes:
            raise MalformedError(f"memo index {index} at byte {pos}, after {self.num_opcodes} opcodes")
        self.memo[index] = self._top()

    # Strings, numbers and names

    def _counted(self, pos: int, width: int) -> None:
        start, self.pos = counted_span(self.data, pos, width)
        if is_large_integer(self.data, pos, start, self.pos):
            self.large_integers += 1
            if self.large_integers > self.limits.max_large_integers:
                raise MalformedError(f"more than {self.limits.max_large_integers} integers of more than 7 bytes")
        if self.data[pos] in b"\x8cX\x8d" and self.pos - start <= _LONGEST_NAME:
            self.strings.append(self.data[start : self.pos])
            self.stack.append(~(len(self.strings) - 1))
        else:
            self.stack.append(0)

    def _line(self, start: int) -> bytes:
        end = self.data.find(b"\n", start)
        if end < 0:
            raise MalformedError(f"it is cut: no end of the line at byte {start}")
        self.pos = end + 1
        return self.data[start:end]

    def _text(self, pos: int) -> None:
        line = self._line(pos + 1)
        if self.data[pos] in b"ILF" and len(line) > _LONGEST_NUMBER:
            raise MalformedError(f"a number of {len(line)} characters at byte {pos}")
        self.stack.append(0)

    def _name(self, pos: int) -> None:
        """GLOBAL, INST and STACK_GLOBAL: remember what they name."""
        depth = 0
        if self.data[pos] == 0x93:
            if len(self.stack) - 2 < self.floor:
                raise MalformedError(f"the name at byte {pos} is not on the stack")
            module, name = (self._string(value) for value in self.stack[-2:])
            del self.stack[-2:]
        else:
            module = self._line(pos + 1).decode(errors="replace")
            name = self._line(self.pos).decode(errors="replace")
            if self.data[pos] == ord("i"):
                depth = self._pop_mark() + 1
        self.names.add((module, name))
        if len(self.names) > self.limits.max_globals:
            raise MalformedError(f"it names more than {self.limits.max_globals} classes")
        self._push(depth)

    def _string(self, value: int) -> str:
        return self.strings[~value].decode(errors="replace") if value < 0 else UNKNOWN_NAME

    def _refusal(self, pos: int) -> str:
        op = self.data[pos]
        return f"{_REFUSED.get(op, f'byte {pos} is {op:#04x}, which is no opcode')} (byte {pos})"

    def _finish(self) -> PickleSummary:
        if len(self.stack) != 1 or self.marks:
            raise MalformedError(f"it ends with {len(self.stack)} values on the stack, expected 1")
        highest = max(self.memo, default=-1)
        return PickleSummary(self.pos, frozenset(self.names), highest, self.num_opcodes)
