"""Files that are damaged or made to do harm: a plain error, little memory, and nothing left in the cache."""

import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from sae_models import load

FIXTURES = Path(__file__).parent / "fixtures"
NPZ = FIXTURES / "gemma_scope/res/gemma-scope-2b-pt-res/layer_3/width_16k/average_l0_71"
SAFETENSORS = FIXTURES / "gemma_scope_2/resid_post/gemma-scope-2-1b-pt/resid_post/layer_3_width_65k_l0_medium"
OPENMOSS = FIXTURES / "llamascopium/relu/sae"

MOST_ADDED_KIB = 32 * 1024
"""What refusing a file may add to the memory of a process that has loaded an SAE."""

LOAD = """
import json, os, re, sys
from pathlib import Path
from sae_models import SAEFormatError, load

def kib(name):
    return int(re.search(name + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

def growth(action):
    Path("/proc/self/clear_refs").write_text("5")  # the highest resident size is measured from here on
    before = kib("VmRSS")
    answer = action()
    return answer, kib("VmHWM") - before

def refusal(folder):
    try:
        load(folder)
    except SAEFormatError as refused:
        return str(refused)

good, *bad = sys.argv[1:]
load(good)
print(json.dumps(growth(lambda: len(bytearray(b"1") * (1 << 27)))))
for folder in bad:
    os.environ["STEER_SERVER_CACHE"] = folder + "-cache"
    print(json.dumps(growth(lambda: refusal(folder))))
"""


def npz(folder: Path, change=None) -> Path:
    """A Gemma Scope SAE whose arrays `change` alters."""
    with np.load(NPZ / "params.npz") as archive:
        arrays = {name: archive[name] for name in archive.files}
    np.savez(folder / "params.npz", **(arrays | (change or {})))
    return folder / "params.npz"


def zipped(folder: Path, members, compression=zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(folder / "params.npz", "w", compression) as archive:
        for name, data in members:
            with archive.open(name, "w", force_zip64=True) as member:
                for chunk in data:
                    member.write(chunk)


def header(shape, dtype="<f4", fortran=False) -> bytes:
    text = repr({"descr": dtype, "fortran_order": fortran, "shape": shape}).encode()
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text


def bomb(folder: Path) -> None:
    """1 GiB of zeros in an archive of 1 MiB."""
    zeros = bytes(1 << 20)
    zipped(folder, [("W_enc.npy", [header((1 << 14, 1 << 14)), *[zeros] * 1024])], zipfile.ZIP_DEFLATED)


def many(folder: Path) -> None:
    zipped(folder, [(f"a{i}.npy", [header((0,))]) for i in range(10_000)])


def claims_more_than_it_has(folder: Path) -> None:
    zipped(folder, [("W_enc.npy", [header((1 << 20, 1 << 20)), bytes(64)])])


def overstates_a_member(folder: Path) -> None:
    """The archive's directory says 64 bytes more than the member has."""
    path = npz(folder)
    data = bytearray(path.read_bytes())
    at = data.rindex(b"PK\x01\x02")
    (size,) = struct.unpack_from("<I", data, at + 24)
    struct.pack_into("<II", data, at + 20, size + 64, size + 64)
    path.write_bytes(data)


def pickled(folder: Path) -> None:
    class Harm:
        def __reduce__(self):
            return (os.mkdir, (str(folder / "harmed"),))

    npz(folder, {"b_enc": np.array([Harm()] * 48, dtype=object)})


def pickled_alone(folder: Path) -> None:
    class Harm:
        def __reduce__(self):
            return (os.mkdir, (str(folder / "harmed"),))

    (folder / "params.npz").write_bytes(pickle.dumps(Harm()))


def truncated(folder: Path) -> None:
    path = npz(folder)
    path.write_bytes(path.read_bytes()[:-200])


def cut_inside(folder: Path) -> None:
    """The directory at the end stands, and some of what it lists is gone."""
    path = npz(folder)
    data = path.read_bytes()
    path.write_bytes(data[:200] + data[3000:])


def by_columns(folder: Path) -> None:
    with np.load(NPZ / "params.npz") as archive:
        npz(folder, {"W_enc": np.asfortranarray(archive["W_enc"])})


def integers(folder: Path) -> None:
    npz(folder, {"threshold": np.zeros(48, np.int64)})


def nan_values(folder: Path) -> None:
    npz(folder, {"threshold": np.full(48, np.nan, np.float32)})


def transposed(folder: Path) -> None:
    with np.load(NPZ / "params.npz") as archive:
        npz(folder, {"W_dec": np.ascontiguousarray(archive["W_dec"].T)})


def safetensors(folder: Path, data: bytes) -> None:
    (folder / "params.safetensors").write_bytes(data)


def whole() -> bytes:
    return (SAFETENSORS / "params.safetensors").read_bytes()


def ten_gigabytes_of_header(folder: Path) -> None:
    safetensors(folder, struct.pack("<Q", 10 * 2**30) + whole()[8:])


def a_tensor_of_a_terabyte(folder: Path) -> None:
    text = json.dumps({"w_enc": {"dtype": "F32", "shape": [1 << 19, 1 << 19], "data_offsets": [0, 1 << 40]}}).encode()
    safetensors(folder, struct.pack("<Q", len(text)) + text)


def cut_short(folder: Path) -> None:
    safetensors(folder, whole()[:-100])


def nan_in_safetensors(folder: Path) -> None:
    shutil.copy(SAFETENSORS / "config.json", folder)
    state = load_file(SAFETENSORS / "params.safetensors") | {"b_enc": torch.full((48,), float("nan"))}
    save_file(state, folder / "params.safetensors")


def deep_json(folder: Path) -> None:
    for name in ("config.json", "sae_weights.safetensors"):
        (folder / name).write_bytes((OPENMOSS / name).read_bytes())
    (folder / "config.json").write_text("[" * 100_000)


def long_json(folder: Path) -> None:
    deep_json(folder)
    (folder / "config.json").write_text(" " * (2 << 20))


def immense_width(folder: Path) -> None:
    deep_json(folder)
    config = json.loads((OPENMOSS / "config.json").read_text()) | {"expansion_factor": 1e300}
    (folder / "config.json").write_text(json.dumps(config))


REFUSED = (
    (bomb, "weights do not compress so"),
    (many, "10000 arrays; an SAE has between 1 and 64"),
    (claims_more_than_it_has, "claims 4398046511104 bytes and has"),
    (overstates_a_member, "not a readable npz archive"),
    (pickled, "b_enc.npy has dtype object"),
    (pickled_alone, "not a readable npz archive"),
    (truncated, "not a readable npz archive"),
    (cut_inside, "not a readable npz archive"),
    (by_columns, "stored column by column"),
    (integers, "threshold.npy has dtype int64"),
    (nan_values, "threshold holds values that are not finite"),
    (transposed, "expected [48, 16] (it is transposed)"),
    (ten_gigabytes_of_header, "not a readable safetensors file"),
    (a_tensor_of_a_terabyte, "not a readable safetensors file"),
    (cut_short, "not a readable safetensors file"),
    (nan_in_safetensors, "b_enc holds values that are not finite"),
    (deep_json, "not JSON"),
    (long_json, "a configuration has at most 1048576"),
    (immense_width, "expansion_factor must be a number over 0, got 1e+300"),
)


@pytest.fixture(scope="module")
def refusals(tmp_path_factory):
    """(folder, error, KiB that the process grew by) of each file, one loaded after the other in one process."""
    root, folders = tmp_path_factory.mktemp("hostile"), {}
    for make, _ in REFUSED:
        folders[make] = root / make.__name__ / "gemma-scope-2b-pt-res" / "layer_3" / "width_16k" / "x"
        folders[make].mkdir(parents=True)
        make(folders[make])
    before = {make: sorted(folder.iterdir()) for make, folder in folders.items()}
    done = subprocess.run(
        [sys.executable, "-c", LOAD, SAFETENSORS, *folders.values()],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert before == {make: sorted(folder.iterdir()) for make, folder in folders.items()}
    (_, grown), *answers = map(json.loads, done.stdout.splitlines())
    assert grown > MOST_ADDED_KIB
    return {make: (folders[make], *answer) for make, answer in zip(folders, answers, strict=True)}


@pytest.mark.parametrize(("make", "says"), REFUSED)
def test_refused_in_little_memory_with_nothing_left(refusals, make, says):
    folder, error, added = refusals[make]
    assert says in error
    assert added < MOST_ADDED_KIB
    assert [path for path in Path(f"{folder}-cache").rglob("*") if path.is_file()] == []


def test_a_good_archive_stays_in_the_cache_once(tmp_path, monkeypatch):
    monkeypatch.setenv("STEER_SERVER_CACHE", str(tmp_path))
    assert load(NPZ).sha256 == load(NPZ).sha256
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 1
