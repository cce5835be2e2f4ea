"""The fast half of `prescan`: checks a large pickle with bulk operations on bytes.

It understands what Python's own pickler writes in protocols 4 and 5 and no more. `bulk_scan` returns a summary
only when it has proved every bound; None means "not shown here", and the exact walk decides.

How depth is bounded without a stack: blocks of the pickle are cut into tokens by one regular expression, and
their arguments dropped, so that one letter is left per opcode, V for "pushes a value". Rewriting then folds each
construct whose operands are V into one V, in passes of `bytes.replace`, until a single V is left. A pass does not
look at its own results again, so it deepens any chain of containers by one level at most, and a pickle that folds
in n passes is nested at most n deep. Values fetched from the memo count as V; that is sound as long as no fetched
entry is a tuple, which is checked (other containers are hashed by identity or not at all). An entry fetched before
it is stored is left to the unpickler, which refuses it at that point.
"""

from __future__ import annotations

import re

from msgspec import Struct, field

from dist_export.checkpoint.pickle_bounds import (
    MalformedError,
    PickleSummary,
    ScanLimits,
    check_frame,
    counted_span,
    is_large_integer,
)

_BLOCK = 1 << 12  # bytes tokenised at once; larger blocks leave the processor's caches
_MAX_SINGLE_STEPS = 1000  # opcodes that the expression below leaves to `_step`, and two more per block: frames
_MAX_NAMES = 512  # STACK_GLOBAL opcodes

_PLAIN = b"()N\x88\x89]}\x81\x85\x86\x87\x93\x94Rbtuesa"  # opcodes without an argument
_PLAIN_SET = frozenset(_PLAIN)
_VALUE = b"V"


def _counted(opcode: bytes, lengths: range) -> bytes:
    """An expression for `opcode`, a length byte out of `lengths`, and so many bytes."""
    choices = b"|".join(re.escape(bytes([n])) + b".{%d}" % n for n in lengths)
    return re.escape(opcode) + b"(?:" + choices + b")"


_TOKEN = re.compile(
    b"|".join(
        (
            b"[" + re.escape(_PLAIN) + b"]+",
            b"[hK].",
            b"j.{4}",
            b"M..",
            _counted(b"\x8a", range(8)),
            b"J.{4}",
            _counted(b"\x8c", range(256)),
            b"G.{8}",
            b".",  # anything else, or an argument cut by the end of the block: one byte, see _UNREAD
        )
    ),
    re.DOTALL,
)
_UNREAD = frozenset(bytes([op]) for op in range(256) if op not in _PLAIN_SET)
"""Tokens of one byte that are not opcodes without an argument: the tokens from there on mean nothing."""

# Letters for folding: B takes two values and leaves one, C three, M a mark's values, E a mark's values and one more.
_LETTERS = bytes.maketrans(b"N\x88\x89)]}\x85\x86\x87\x93\x81Rbasteu", b"VVVVVV1BCBBBBBCMEE")
_SHORT_FOLDS = (
    (b"VVB", _VALUE),
    (b"V1", _VALUE),
    (b"VVVC", _VALUE),
    *((b"(" + _VALUE * n + b"M", _VALUE) for n in (4, 5)),
    *((b"V(" + _VALUE * n + b"E", _VALUE) for n in (4, 6, 8)),
)
"""The shapes a ``.metadata`` is full of; the two expressions below fold the rest."""
_LONG_FOLDS = (re.compile(rb"\(V*M"), re.compile(rb"V(?:\(V*E)+"))
_FOLD_WORK = 8  # times the letters may be gone over; honest pickles shrink by a third and more each time
_MEMOIZED_TUPLE = re.compile(b"[t\x85\x86\x87]\x94")


def bulk_scan(data: bytes, limits: ScanLimits) -> PickleSummary | None:
    """The summary of the first pickle in `data`, or None where the exact walk has to look."""
    if data[:1] != b"\x80" or data[1:2] not in (b"\x04", b"\x05"):
        return None
    scan = _BulkScan(data, limits)
    try:
        end = scan.tokenise()
    except MalformedError:
        return None  # the exact walk says it better
    opcodes = b"".join(scan.pieces)
    scan.pieces.clear()
    num_opcodes = len(opcodes) + scan.num_frames + 2  # PROTO and STOP
    if num_opcodes > limits.max_opcodes or _recalls_tuple(opcodes, scan.recalled):
        return None
    if not _folds(opcodes.translate(_LETTERS, b"\x94"), limits.max_depth):
        return None
    return PickleSummary(end, frozenset(scan.names), scan.num_memoized - 1, num_opcodes)


class _BulkScan(Struct):
    data: bytes
    limits: ScanLimits
    pieces: list[bytes] = field(default_factory=list)
    """The opcodes so far, one letter each: plain ones as they are, V for those with an argument."""
    recalled: set[bytes] = field(default_factory=set)
    """Different GET tokens so far."""
    names: set[tuple[str, str]] = field(default_factory=set)
    name_strings: dict[int, bytes] = field(default_factory=dict)
    """Memo index -> string, of strings that were part of a name."""
    recent: list[bytes] = field(default_factory=list)
    """The last tokens of the blocks before."""
    num_single_steps: int = 0
    num_frames: int = 0
    num_memoized: int = 0
    large_integers: int = 0
    num_names: int = 0

    def tokenise(self) -> int:
        """Fill `pieces`; return the position after STOP. Raises `MalformedError` for anything it does not know."""
        pos, size = 2, len(self.data)
        while True:
            end = min(pos + _BLOCK, size)
            tokens = _TOKEN.findall(self.data, pos, end)
            different = set(tokens)
            unread = different & _UNREAD
            if unread:
                first = min(tokens.index(token) for token in unread)
                end -= sum(map(len, tokens[first:]))
                del tokens[first:]
                different = set(tokens)
            if len(tokens) > 1 and end < size and tokens[-1][0] in _PLAIN_SET:
                end -= len(tokens.pop())  # perhaps cut in two by the end of the block
            self._take(tokens, different, named=self.data.find(b"\x93", pos, end) >= 0)
            pos = end
            if not tokens:
                if self.data[pos : pos + 1] == b".":
                    return pos + 1
                pos = self._step(pos)

    def _take(self, tokens: list[bytes], different: set[bytes], *, named: bool) -> None:
        plain, value = _PLAIN_SET, _VALUE
        if named and any(b"\x93" in token and token[0] in plain for token in different):
            self._resolve_names(tokens)
        self.recent = (self.recent + tokens[-3:])[-3:]
        self.recalled.update([token for token in different if token[0] in b"hj"])
        piece = b"".join([token if token[0] in plain else value for token in tokens])
        self.num_memoized += piece.count(b"\x94")
        self.pieces.append(piece)

    def _step(self, pos: int) -> int:
        """One opcode that the expression does not read. Returns the position after it."""
        self.num_single_steps += 1
        if self.num_single_steps > _MAX_SINGLE_STEPS + 2 * pos // _BLOCK or pos >= len(self.data):
            raise MalformedError("left to the exact walk")
        op = self.data[pos]
        if op == 0x95:
            self.num_frames += 1
            return check_frame(self.data, pos)
        if op not in b"X\x8a\x8c":
            raise MalformedError("left to the exact walk")
        start, end = counted_span(self.data, pos, 4 if op == ord("X") else 1)
        if is_large_integer(self.data, pos, start, end):
            self.large_integers += 1
            if self.large_integers > self.limits.max_large_integers:
                raise MalformedError("left to the exact walk")
        self.pieces.append(_VALUE)
        self.recent.append(b"?")
        return end

    def _resolve_names(self, tokens: list[bytes]) -> None:
        """Find what each STACK_GLOBAL in `tokens` names: two strings pushed, and perhaps memoized, before it."""
        memo = self.num_memoized
        for at, token in enumerate(tokens):
            if token[0] not in _PLAIN_SET:
                continue
            if b"\x93" in token:
                before = tokens[at - 3 : at] if at >= 3 else self.recent[-3 + at :] + tokens[:at]
                self._resolve_name(before, token, memo)
            memo += token.count(b"\x94")

    def _resolve_name(self, before: list[bytes], token: bytes, memo: int) -> None:
        self.num_names += 1
        if self.num_names > _MAX_NAMES or token.count(b"\x93") > 1 or token.find(b"\x93") > 1:
            raise MalformedError("left to the exact walk")
        if token.startswith(b"\x94\x93") and before:
            self._keep(memo, before[-1])
        pushes = list(before)
        if len(pushes) > 1 and pushes[-2] == b"\x94":  # module, MEMOIZE, name
            del pushes[-2]
            self._keep(memo - 1, pushes[-2] if len(pushes) > 1 else b"")
        if len(pushes) < 2:
            raise MalformedError("left to the exact walk")
        self.names.add((self._text(pushes[-2]), self._text(pushes[-1])))

    def _keep(self, index: int, token: bytes) -> None:
        if token[:1] == b"\x8c":
            self.name_strings[index] = token[2:]

    def _text(self, token: bytes) -> str:
        if token[:1] == b"\x8c":
            return token[2:].decode(errors="replace")
        index = int.from_bytes(token[1:], "little")
        if token[:1] not in (b"h", b"j") or index not in self.name_strings:
            raise MalformedError("left to the exact walk")
        return self.name_strings[index].decode(errors="replace")


def _recalls_tuple(opcodes: bytes, tokens: set[bytes]) -> bool:
    """Whether any entry that the GET `tokens` fetch from the memo is a tuple, or cannot be told to be none."""
    if b"\x94\x94" in opcodes or opcodes[:1] == b"\x94":
        return True
    recalled = {int.from_bytes(token[1:], "little") for token in tokens}
    memo, counted = 0, 0  # MEMOIZE opcodes before position `counted`
    for match in _MEMOIZED_TUPLE.finditer(opcodes):
        start = match.start()
        memo += opcodes.count(b"\x94", counted, start)
        counted = start
        if memo in recalled:
            return True
    return max(recalled, default=-1) >= opcodes.count(b"\x94")


def _folds(letters: bytes, max_passes: int) -> bool:
    """Whether `letters` folds to one value within `max_passes` passes."""
    passes, work = 0, _FOLD_WORK * len(letters) + (1 << 20)
    while letters != _VALUE:
        before = len(letters)
        work -= before
        for short, value in _SHORT_FOLDS:
            if short in letters:
                letters = letters.replace(short, value)
                passes += 1
        for long in _LONG_FOLDS:
            letters, count = long.subn(_VALUE, letters)
            passes += bool(count)
        if len(letters) == before or passes > max_passes or work < 0:
            return False
    return True
