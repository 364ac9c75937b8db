"""The reader of torch.save's files: what torch reads, and archives and pickles that claim more than they hold."""

from __future__ import annotations

import pickle
import pickletools
import struct
import tracemalloc
import zipfile
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from qfae_train import torch_archive, torch_pickle
from qfae_train.torch_archive import TorchFileError
from qfae_train.torch_file import read_torch_file

from .checkpoint_files import refusal, rewrite, with_pickle

# ---------- what must still open


KINDS = [torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.uint8, torch.int64, torch.bool]


@pytest.mark.parametrize("legacy", [False, True])
def test_the_reader_reads_what_torch_reads(legacy: bool, tmp_path: Path) -> None:
    base = torch.arange(24.0).view(4, 6)
    module = torch.nn.Linear(3, 2)
    content = {
        "kinds": [base.to(kind) for kind in KINDS],
        "views": {"transposed": base.T, "part": base[1:3, ::2], "base": base},
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(3.5),
        "parameter": module.weight,
        "module": module.state_dict(),
        "ordered": OrderedDict(a=1, b=None),
        "plain": [True, -1, 2**40, -(2**63), 0.25, 1e300, float("inf"), "text", (1, 2), {3: "three"}],
    }
    path = tmp_path / "file.pt"
    torch.save(content, path, _use_new_zipfile_serialization=not legacy)
    mine, theirs = read_torch_file(path), torch.load(path, weights_only=True)
    assert mine["plain"] == theirs["plain"]
    assert mine["ordered"] == dict(theirs["ordered"])
    for one, other in zip(mine["kinds"], theirs["kinds"], strict=True):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    for part in ("views", "module"):
        assert mine[part].keys() == theirs[part].keys()
        assert all(torch.equal(mine[part][name], tensor) for name, tensor in theirs[part].items())
    assert mine["views"]["base"].data_ptr() == mine["views"]["transposed"].data_ptr()
    for name in ("empty", "scalar", "parameter"):
        assert torch.equal(mine[name], theirs[name])


# ---------- archives


def test_compressed_entries(saved: Path) -> None:
    def swell(name: str, content: bytes) -> bytes:
        return bytes(2**24) if name.endswith("/data/0") else content

    rewrite(saved, swell, zipfile.ZIP_DEFLATED)
    tracemalloc.start()
    text = refusal(saved)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert text.startswith("its part '.tiny.pt/data.pkl' is compressed, ")
    assert text.endswith("torch.save compresses nothing")
    assert peak < 2**22


def test_the_same_entry_twice(saved: Path) -> None:
    with zipfile.ZipFile(saved, "a") as archive, pytest.warns(UserWarning, match="Duplicate name"):
        archive.writestr(".tiny.pt/data/0", b"")
    assert refusal(saved) == "it holds two parts of the same name; torch.save writes each once"


def test_entries_that_lie_on_each_other(saved: Path) -> None:
    """The directory's second storage points at the first one's bytes, as a zip bomb without compression does."""
    content = bytearray(saved.read_bytes())
    at, found = 0, {}
    while (at := content.find(b"PK\1\2", at)) >= 0:
        length = struct.unpack_from("<H", content, at + 28)[0]
        found[bytes(content[at + 46 : at + 46 + length]).decode()] = at
        at += 46
    first, second = found[".tiny.pt/data/0"], found[".tiny.pt/data/1"]
    content[second + 42 : second + 46] = content[first + 42 : first + 46]
    saved.write_bytes(content)
    assert "lies on another" in refusal(saved) or "is not what its directory says" in refusal(saved)


def test_a_second_directory_is_not_looked_for(saved: Path) -> None:
    saved.write_bytes(saved.read_bytes() + b"a comment that nobody announced")
    assert refusal(saved) == "not a file that torch.save wrote, or cut short"
    with zipfile.ZipFile(saved.with_name("other.pt"), "w") as archive:
        archive.comment = b"announced"
        archive.writestr("x/data.pkl", pickle.dumps({}, 2))
    assert refusal(saved.with_name("other.pt")) == "not a file that torch.save wrote, or cut short"


def test_a_directory_longer_than_any(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_archive, "LARGEST_DIRECTORY", 100)
    assert refusal(saved).endswith("bytes; accepted are up to 100")


def test_a_torchscript_program(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "program.pt", "w") as archive:
        for name in ("data.pkl", "code/__torch__.py", "constants.pkl"):
            archive.writestr(f"program/{name}", pickle.dumps({}, 2))
    assert refusal(tmp_path / "program.pt") == "it holds a TorchScript program; only plain tensors are read"


def test_numbers_of_another_byte_order(saved: Path) -> None:
    rewrite(saved, lambda name, content: b"big" if name.endswith("/byteorder") else content)
    assert refusal(saved) == "its numbers are in the byte order b'big', this machine's are little"


# ---------- pickles


def bomb(levels: int) -> Any:
    """Lists of the list below, ten times: ten to the power of `levels` values, in a few hundred bytes."""
    value: Any = [0]
    for _ in range(levels):
        value = [value] * 10
    return value


def nested(depth: int) -> bytes:
    return b"\x80\x02" + b"]" * depth + b"a" * (depth - 1) + b"."


PICKLES: dict[str, tuple[bytes, str]] = {
    "endless": (b"\x80\x02" + b"N0" * 600_000 + b".", "it holds pickled objects, which could run code; only plain"),
    "long": (b"\x80\x02" + b"N" * 1_100_000 + b".", "its table of contents is longer than 1000000 instructions"),
    "large": (b"\x80\x02" + bytes(17 * 2**20), "its table of contents has 17825794 bytes; accepted are up to 16777216"),
    "a text longer than the file": (b"\x80\x02X\xff\xff\xff\x7fabc.", "not a file that torch.save wrote, or cut short"),
    "a place of the memo beyond all": (b"\x80\x02}r\xff\xff\xff\x7f.", "not written by qfae-train (format, config,"),
    "a number of a million digits": (
        b"\x80\x02\x8b" + struct.pack("<I", 2**18) + b"\x7f" * 2**18 + b".",
        "it holds pickled objects, which could run code; only plain tensors are read",
    ),
    "a number of 100 bytes": (b"\x80\x02\x8a\x64" + b"\x7f" * 100 + b".", "it holds a number of more than 64 bits"),
    "nested": (nested(100_000), "its tables are nested more than 32 deep"),
    "shared": (pickle.dumps(bomb(30), 2), "its tables hold more than 1000000 values"),
    "within itself": (b"\x80\x02]q\x00h\x00a.", "its tables are nested more than 32 deep"),
    "a key that is a tuple": (b"\x80\x02})Ns.", "it holds a table with a tuple for a key"),
    "nothing on the stack": (b"\x80\x02.", "not a file that torch.save wrote, or cut short"),
    "a call": (pickle.dumps(Path("x"), 2), "it holds pickled objects, which could run code; only plain"),
    "an attribute set": (
        b"\x80\x02ccollections\nOrderedDict\nq\x00)Rq\x01}X\x05\x00\x00\x00itemsNsb.",
        "not written by qfae-train (format, config,",
    ),
}


@pytest.mark.parametrize("kind", PICKLES)
def test_pickles(kind: str, saved: Path) -> None:
    pickled, expected = PICKLES[kind]
    assert refusal(with_pickle(saved, pickled)).startswith(expected)


def test_every_instruction_that_is_not_needed_is_refused() -> None:
    for opcode in pickletools.opcodes:
        if opcode.name in ("INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4", "PERSID", "DUP", "POP"):
            with pytest.raises(TorchFileError, match="could run code"):
                torch_pickle._Machine().step(opcode.name, None)


@pytest.mark.parametrize("end", [0.05, 0.3, 0.6, 0.95])
def test_a_legacy_file_cut_short(end: float, tmp_path: Path) -> None:
    path = tmp_path / "old.pth"
    torch.save({"a": torch.ones(1000), "b": torch.ones(10)}, path, _use_new_zipfile_serialization=False)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * end)])
    with pytest.raises(TorchFileError, match=r"^not a file that torch\.save wrote, or cut short$"):
        read_torch_file(path)


def test_a_legacy_file_holds_the_same_bounds(tmp_path: Path) -> None:
    path = tmp_path / "old.pth"
    torch.save({"a": torch.zeros(1).expand(2**40)}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(TorchFileError, match="claims more than its storage of 1 values"):
        read_torch_file(path)
    torch.save({"a": Counter()}, path, _use_new_zipfile_serialization=False)
    with pytest.raises(TorchFileError, match="could run code"):
        read_torch_file(path)
