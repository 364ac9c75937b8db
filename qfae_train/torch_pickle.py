"""The pickle in a file of `torch.save`, interpreted without Python's unpickler or torch's: nothing in it can run.

Known are the instructions and the few names that a table of plain tensors, numbers and strings needs. The result holds
claims in place of tensors: what storage, size and strides a tensor says it has. `torch_file` compares them with the
bytes that are there.
"""

from __future__ import annotations

import pickletools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, BinaryIO

import torch

from qfae_train.torch_archive import LARGEST_PICKLE, NOT_TORCH, TorchFileError

MOST_INSTRUCTIONS = 1_000_000
"""Of a pickle. That of demo.pt has 5,000; the full BraTS model's with its optimiser's state, 60,000."""

MOST_DIMENSIONS = 16
LARGEST_NUMBER = 2**63

CODE = "it holds pickled objects, which could run code; only plain tensors are read"

KINDS: dict[str, torch.dtype] = {
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "BFloat16Storage": torch.bfloat16,
    "DoubleStorage": torch.float64,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "ShortStorage": torch.int16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "BoolStorage": torch.bool,
    "ComplexFloatStorage": torch.complex64,
    "ComplexDoubleStorage": torch.complex128,
}
"""Types of storages by torch's names. What of them a model accepts is decided where it is read."""

_OTHER_TENSORS = {
    "_rebuild_sparse_tensor": "a sparse tensor",
    "_rebuild_sparse_csr_tensor": "a sparse tensor",
    "_rebuild_meta_tensor_no_storage": "a meta tensor, which has no values",
    "_rebuild_qtensor": "a quantised tensor",
    "_rebuild_nested_tensor": "a nested tensor",
    "_rebuild_device_tensor_from_numpy": "a tensor of another device",
    "_rebuild_device_tensor_from_cpu_tensor": "a tensor of another device",
    "_rebuild_wrapper_subclass": "a tensor of another class",
}


@dataclass(frozen=True)
class Storage:
    """What a pickle says of a storage: its type, its key in the file, and how many values it holds."""

    dtype: torch.dtype
    key: str
    count: int


@dataclass(frozen=True, eq=False)
class Claim:
    """What a pickle says of a tensor."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]


@dataclass(frozen=True)
class _Name:
    """A name that a pickle may use; `make` is what calling it comes to. None of them copies what it is handed."""

    make: Callable[..., Any]


class _Mark:
    """The bottom of a group on the stack."""


def interpret(file: BinaryIO) -> Any:
    """Return what the pickle at the file's position holds, and leave the position behind it.

    Dicts have strings and whole numbers for keys; tensors are `Claim`s.

    Raises:
        TorchFileError: it is none, too long, or holds anything but tables, lists, numbers, strings and plain tensors.

    """
    machine = _Machine()
    began = file.tell()
    try:
        for count, (opcode, argument, _) in enumerate(pickletools.genops(file)):
            if count >= MOST_INSTRUCTIONS or file.tell() - began > LARGEST_PICKLE:
                raise TorchFileError(
                    f"its table of contents is longer than {MOST_INSTRUCTIONS} instructions or {LARGEST_PICKLE} bytes"
                )
            if opcode.name == "STOP":
                return machine.result()
            machine.step(opcode.name, argument)
    except TorchFileError:
        raise
    except (ValueError, IndexError, KeyError, TypeError, AttributeError, OverflowError):
        pass  # of pickletools at bytes that are no pickle, of the machine at instructions that do not fit
    raise TorchFileError(NOT_TORCH)


class _Machine:
    """A stack and a memo, as pickle's own has them."""

    def __init__(self) -> None:
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}

    def result(self) -> Any:
        [value] = self.stack
        if isinstance(value, _Mark | _Name):
            raise TorchFileError(CODE)
        return value

    def step(self, name: str, argument: Any) -> None:
        """Carry out one instruction.

        Raises:
            TorchFileError: it is not among those that plain tensors need.
            IndexError, KeyError, TypeError, ValueError, AttributeError: it does not fit what is on the stack.

        """
        stack = self.stack
        if name == "PROTO":
            return
        if name in _CONSTANTS:
            stack.append(_CONSTANTS[name]())
        elif name in ("BININT", "BININT1", "BININT2", "LONG1", "BINFLOAT"):
            if isinstance(argument, int) and abs(argument) > LARGEST_NUMBER:
                raise TorchFileError("it holds a number of more than 64 bits")
            stack.append(argument)
        elif name == "BINUNICODE":
            stack.append(argument)
        elif name in ("BINPUT", "LONG_BINPUT"):
            self.memo[argument] = stack[-1]
        elif name in ("BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif name.startswith("TUPLE"):
            items = self._group() if name == "TUPLE" else [stack.pop() for _ in range(int(name[5:]))][::-1]
            stack.append(tuple(items))
        elif name in ("APPEND", "APPENDS"):
            items = self._group() if name == "APPENDS" else [stack.pop()]
            _of(list, stack[-1]).extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            items = self._group() if name == "SETITEMS" else [stack.pop() for _ in range(2)][::-1]
            _fill(_of(dict, stack[-1]), items)
        elif name == "GLOBAL":
            stack.append(_named(*argument.split(" ")))
        elif name == "BINPERSID":
            stack.append(_storage(*stack.pop()))
        elif name == "REDUCE":
            arguments, called = stack.pop(), stack.pop()
            stack.append(_of(_Name, called).make(*_of(tuple, arguments)))
        elif name == "BUILD":  # the `_metadata` of a module's state dict: versions that nobody here reads
            stack.pop()
            _of(dict, stack[-1])
        else:
            raise TorchFileError(CODE)

    def _group(self) -> list[Any]:
        """Take everything above the last mark off the stack, and the mark."""
        items: list[Any] = []
        while not isinstance(top := self.stack.pop(), _Mark):
            items.append(top)
        return items[::-1]


_CONSTANTS: dict[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "MARK": _Mark,
    "EMPTY_LIST": list,
    "EMPTY_DICT": dict,
    "EMPTY_TUPLE": tuple,
}


def _of(kind: type, value: Any) -> Any:
    if type(value) is not kind:
        raise TypeError(f"expected a {kind.__name__}, got a {type(value).__name__}")
    return value


def _fill(table: dict[Any, Any], items: list[Any]) -> None:
    if len(items) % 2:
        raise ValueError("a key without a value")
    for key, value in zip(items[::2], items[1::2], strict=True):
        if type(key) not in (str, int):
            raise TorchFileError(f"it holds a table with a {type(key).__name__} for a key")
        table[key] = value


def _named(module: str, name: str) -> _Name:
    """Return what a name of the pickle stands for here."""
    if module == "torch" and name in KINDS:
        dtype = KINDS[name]
        return _Name(lambda: dtype)
    known: dict[tuple[str, str], Callable[..., Any]] = {
        ("collections", "OrderedDict"): _empty,
        ("torch", "Size"): lambda sides: _of(tuple, sides),
        ("torch._utils", "_rebuild_tensor"): _claim,
        ("torch._utils", "_rebuild_tensor_v2"): _claim,
        ("torch._utils", "_rebuild_parameter"): lambda data, _grad, _hooks: _of(Claim, data),
    }
    if (module, name) in known:
        return _Name(known[module, name])
    if module == "torch._utils" and name in _OTHER_TENSORS:
        raise TorchFileError(f"it holds {_OTHER_TENSORS[name]}; only plain tensors are read")
    raise TorchFileError(CODE)


def _empty() -> dict[Any, Any]:
    """Return what an OrderedDict is here; torch fills it afterwards."""
    return {}


def _storage(tag: str, kind: Any, key: str, _location: str, count: int, view: Any = None) -> Storage:
    if tag != "storage" or type(count) is not int or count < 0 or view is not None:
        raise ValueError("no storage")
    return Storage(_of(_Name, kind).make(), _of(str, key), count)


def _claim(
    storage: Any, offset: Any, shape: Any, strides: Any, _grad: Any = False, hooks: Any = None, metadata: Any = None
) -> Claim:
    if not len(_of(tuple, shape)) == len(_of(tuple, strides)) <= MOST_DIMENSIONS or hooks or metadata:
        raise ValueError("no plain tensor")
    if not all(type(number) is int and number >= 0 for number in (offset, *shape, *strides)):
        raise ValueError("sizes and strides are whole numbers")
    return Claim(_of(Storage, storage), offset, shape, strides)
