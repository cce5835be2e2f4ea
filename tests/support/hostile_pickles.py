"""Pickles that mean harm, none of which may run anything or cost more than its own size."""

from __future__ import annotations

import io
import os
import pickle
import struct
import zipfile
from typing import Any

import torch

CANARY = "touch canary"
"""Leaves a file ``canary`` in the working directory."""


def saved_pickle(value: object) -> bytes:
    """The data.pkl that torch.save writes for `value`."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    with zipfile.ZipFile(buffer) as file:
        return file.read(next(name for name in file.namelist() if name.endswith("data.pkl")))


class Command:
    """Calls a function when it is unpickled."""

    def __init__(self, function: Any, *args: Any) -> None:
        self.call = function, args

    def __reduce__(self) -> tuple[Any, ...]:
        return self.call


def calls(module: str, name: str, argument: str = CANARY) -> bytes:
    """A pickle that calls a function with a text."""
    return f"c{module}\n{name}\n(S'{argument}'\ntR.".encode()


def _hostile() -> dict[str, bytes]:
    inside = {"a": [Command(os.system, CANARY)]}
    large = 1 << 60
    corpus = {f"os.system in protocol {p}": pickle.dumps(inside, p) for p in range(6)}
    corpus |= {f"eval in protocol {p}": pickle.dumps(Command(eval, "open('canary','w')"), p) for p in range(6)}
    for name in ("builtins exec", "builtins getattr", "builtins __import__", "builtins open", "subprocess Popen"):
        corpus[name] = calls(*name.split())
    for name in ("__builtin__ eval", "os.path join", "commands getoutput", "importlib import_module", "nt system"):
        corpus[name] = calls(*name.split())
    for name in ("operator attrgetter", "posix system", "pty spawn", "copyreg add_extension", "pickle loads"):
        corpus[name] = calls(*name.split())
    corpus |= {
        "INST": f"(S'{CANARY}'\nios\nsystem\n.".encode(),
        "OBJ": f"(cos\nsystem\nS'{CANARY}'\no.".encode(),
        "EXT1": b"\x80\x02\x82\x01.",
        "EXT4": b"\x80\x02\x84\x01\x00\x00\x00.",
        "STACK_GLOBAL": b"\x80\x04\x8c\x02os\x8c\x06system\x93(" + b"\x8c\x0c" + CANARY.encode() + b"tR.",
        "memo bomb": b"\x80\x02Nr\xff\xff\xff\x7f.",
        "memo bomb in text": b"Np4000000000\n.",
        "memo bomb, negative": b"Np-1\n.",
        "BINBYTES8": b"\x80\x04\x8e" + struct.pack("<Q", large) + b".",
        "BINUNICODE8": b"\x80\x04\x8d" + struct.pack("<Q", large) + b".",
        "BYTEARRAY8": b"\x80\x05\x96" + struct.pack("<Q", 1 << 40) + b".",
        "BINBYTES": b"\x80\x03B\xff\xff\xff\xff.",
        "LONG4": b"\x80\x02\x8b\xff\xff\xff\x7f.",
        "LONG4, negative": b"\x80\x02\x8b\xff\xff\xff\xff.",
        "FRAME": b"\x80\x04\x95" + struct.pack("<Q", large) + b"N.",
        "out-of-band buffer": b"\x80\x05\x97.",
        "protocol 200": b"\x80\xc8N.",
        "tuples as a key": b"\x80\x02})" + b"\x85" * 400_000 + b"Ns.",
        "tuples as a key, protocol 4": b"\x80\x04})" + b"\x85" * 400_000 + b"Ns.",
        "lists": b"]" * 1000 + b"a" * 999 + b".",
        "marks": b"(" * 1_000_000 + b".",
        "bytearray(N)": b"cbuiltins\nbytearray\nI1099511627776\n\x85R.",
        "list(range(N))": b"cbuiltins\nlist\ncbuiltins\nrange\nI1099511627776\n\x85R\x85R.",
        "Decimal(N)": b"cdecimal\nDecimal\nS'1e999999999'\n\x85R.",
        "encode again and again": b"(c_codecs\nencode\np0\nS'" + b"a" * 100_000 + b"'\n\x85p1\n0"
        + b"g0\ng1\nR" * 20_000 + b"t.",
        "OrderedDict of pairs": b"ccollections\nOrderedDict\n](]K\x01aK\x02ae\x85R.",
        "keys with one hash": b"\x80\x02}("
        + b"".join(b"\x8a\x0a" + (i * (2**61 - 1)).to_bytes(10, "little") + b"N" for i in range(1, 60_000)) + b"u.",
        "long number": b"I" + b"9" * 1_000_000 + b"\n.",
        "a million names": b"".join(b"ca%d\nb\n0" % i for i in range(100_000)) + b"N.",
        "sets": b"\x80\x04(" + b"\x8f" * 3_000_000 + b"l.",
        "state of a function": b"ctorch\nSize\n}S'__call__'\nI1\nsb.",
        "slots of a function": b"ctorch\nSize\n(N}S'function'\nI1\nstb.",
        "state of a dtype": b"ctorch\nfloat32\n}S'a'\nI1\nsb.",
        "slots of a class": b"cx\nY\n(N}S'__new__'\nI1\nstb.",
        "slots of a tensor": saved_pickle(torch.zeros(2))[:-1] + b"(N}X\x05\x00\x00\x00shapeNstb.",
        "slots of a storage class": b"ctorch\nFloatStorage\n(N}S'dtype'\nI1\nstb.",
        "persistent id": b"Pos.system\n.",
        "unhashable key": b"\x80\x02}]Ns.",
        "odd items": b"\x80\x02}(Nu.",
        "negative size": b"ctorch._utils\n_rebuild_tensor_v2\n(NI0\n(I-1\nt(I1\nt\x89NtR.",
        "no STOP": b"\x80\x04N",
        "nothing": b"",
    }
    return corpus


HOSTILE = _hostile()
