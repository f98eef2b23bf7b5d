"""Files that appear whole, explain themselves, hold no pickles and are equal for equal content."""

import errno
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from wmdd_core.artifacts import (
    canonical,
    digest,
    make_header,
    read_array,
    read_arrays,
    read_json,
    read_tensors,
    replacing,
    write_arrays,
    write_json,
    write_tensors,
    write_text,
)
from wmdd_core.errors import UserError
from wmdd_core.seeding import torch_generator

HEADER = {"rule": "recover_images", "settings": {"λ": 10, "name": "Zürich ✓"}, "lineage": {"a": "1"}}


def header_of(rule: str, settings: dict, inputs=(), code="c0de", **wildcards) -> dict:
    return make_header(rule, wildcards, settings, code, inputs)


# ---- appearing whole ---------------------------------------------------------------------------


def test_a_disk_that_takes_no_more_is_told_with_the_files_name(tmp_path):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(OSError) as told:
            write_tensors(tmp_path / "a.safetensors", {"a": np.zeros(100_000)}, HEADER)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert told.value.errno == errno.EFBIG and told.value.filename == str(tmp_path / "a.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_a_file_is_replaced_at_the_end_and_not_before(tmp_path):
    path = tmp_path / "deep" / "er" / "file.txt"
    write_text(path, "old")
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
        assert temporary.parent == path.parent  # the same file system, so that the rename is atomic
    assert path.read_text() == "new"
    assert os.listdir(path.parent) == ["file.txt"]


@pytest.mark.parametrize("stop", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_exception_leaves_the_old_file_and_nothing_else(tmp_path, stop):
    path = tmp_path / "file.txt"
    write_text(path, "old")
    with pytest.raises(stop), replacing(path) as temporary:
        temporary.write_text("half of the n")
        raise stop
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["file.txt"]


def test_an_exception_before_anything_is_written_leaves_nothing(tmp_path):
    with pytest.raises(RuntimeError), replacing(tmp_path / "file.txt"):
        raise RuntimeError
    assert os.listdir(tmp_path) == []


def write_folder(folder: Path, names: list[str]) -> None:
    (folder / "inner").mkdir(parents=True)
    for name in names:
        (folder / "inner" / name).write_text(name)


def test_a_folder_is_replaced_whole(tmp_path):
    path = tmp_path / "png"
    with replacing(path) as temporary:
        write_folder(temporary, ["a", "b"])
    with replacing(path) as temporary:
        write_folder(temporary, ["c"])
    assert [p.name for p in (path / "inner").iterdir()] == ["c"]  # nothing of the first try is left
    with pytest.raises(RuntimeError), replacing(path) as temporary:
        write_folder(temporary, ["d"])
        raise RuntimeError
    assert [p.name for p in (path / "inner").iterdir()] == ["c"] and os.listdir(tmp_path) == ["png"]


@pytest.mark.parametrize("folder", [False, True])
def test_what_a_killed_process_left_is_gone_after_the_next_try(tmp_path, folder):
    """SIGKILL runs no clean-up; a rerun must still end with the same files as an undisturbed run."""
    write = "t.mkdir(); (t / 'half').write_text('x')" if folder else "t.write_text('half')"
    code = (
        "import os, signal, sys; from wmdd_core.artifacts import replacing\n"
        f"with replacing(sys.argv[1]) as t:\n    {write}; os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    path = tmp_path / "out"
    killed = subprocess.run([sys.executable, "-c", code, path], cwd=Path(__file__).parent.parent)
    assert killed.returncode == -9 and not path.exists()
    with replacing(path) as temporary:
        if folder:
            write_folder(temporary, ["a"])
        else:
            temporary.write_text("whole")
    assert os.listdir(tmp_path) == ["out"]
    if folder:
        assert [p.name for p in path.iterdir()] == ["inner"]


# ---- contents ----------------------------------------------------------------------------------


def contents() -> tuple[dict[str, np.ndarray], dict[str, torch.Tensor]]:
    tensors = {
        "images": torch.randn(3, 3, 4, 4, generator=torch_generator("a")).to(
            memory_format=torch.channels_last
        ),
        "half": torch.arange(5).half(),
        "bytes": torch.arange(6, dtype=torch.uint8).view(2, 3).T,
        "weights": torch.rand(4, dtype=torch.float64, generator=torch_generator("b")),
        "scalar": torch.tensor(7),
        "empty": torch.zeros(0, 2),
    }
    return {n: t.numpy() for n, t in tensors.items()}, tensors


def test_arrays_and_header_survive(tmp_path):
    arrays, _ = contents()
    write_arrays(tmp_path / "x.npz", arrays, HEADER)
    read, header = read_arrays(tmp_path / "x.npz")
    assert header == HEADER and read.keys() == arrays.keys()
    for name, array in arrays.items():
        assert read[name].dtype == array.dtype
        np.testing.assert_array_equal(read[name], array)


def test_tensors_and_header_survive(tmp_path):
    _, tensors = contents()
    write_tensors(tmp_path / "x.safetensors", tensors, HEADER)
    read, header = read_tensors(tmp_path / "x.safetensors")
    assert header == HEADER and read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype and torch.equal(read[name], tensor)


def test_an_array_is_mapped_for_reading(tmp_path):
    np.save(tmp_path / "x.npy", np.arange(6).reshape(2, 3))
    found = read_array(tmp_path / "x.npy")
    assert isinstance(found, np.memmap) and found.tolist() == [[0, 1, 2], [3, 4, 5]]
    with pytest.raises(ValueError, match="read-only"):
        found[0] = 7


def test_json_and_header_survive(tmp_path):
    write_json(tmp_path / "x.json", {"classes": ["é", "b"], "top1": 12.5}, HEADER)
    assert read_json(tmp_path / "x.json") == {"classes": ["é", "b"], "top1": 12.5, "header": HEADER}
    assert "é" in (tmp_path / "x.json").read_text(encoding="utf-8")


def test_parts_of_one_tensor_can_be_written(tmp_path):
    """Statistics come as views of one tensor of sums."""
    whole = torch.arange(12.0).view(2, 6)
    mean, var = whole.unbind(0)
    write_tensors(tmp_path / "x.safetensors", {"mean": mean, "var": var}, HEADER)
    read, _ = read_tensors(tmp_path / "x.safetensors")
    assert torch.equal(read["mean"], mean) and torch.equal(read["var"], var)


def test_no_file_holds_a_pickle(tmp_path):
    arrays, _ = contents()
    write_arrays(tmp_path / "x.npz", arrays, HEADER)
    with np.load(tmp_path / "x.npz", allow_pickle=False) as file:
        for name in file.files:
            assert file[name].dtype != object
    with pytest.raises(ValueError):
        write_arrays(tmp_path / "y.npz", {"names": np.array(["a", None], dtype=object)}, HEADER)
    assert os.listdir(tmp_path) == ["x.npz"]


def test_equal_content_gives_equal_bytes(tmp_path):
    arrays, tensors = contents()

    def write(folder: Path, order: int) -> list[bytes]:
        header = dict(list(HEADER.items())[::order])
        write_arrays(folder / "x.npz", arrays, header)
        write_tensors(folder / "x.safetensors", dict(list(tensors.items())[::order]), header)
        write_json(folder / "x.json", {"a": 1}, HEADER)
        write_text(folder / "x.txt", "a")
        return [p.read_bytes() for p in sorted(folder.iterdir())]

    first = write(tmp_path / "1", 1)
    time.sleep(0.01)
    os.environ["TZ"] = "Asia/Tokyo"
    try:
        assert write(tmp_path / "2", 1) == first
        assert write(tmp_path / "3", -1)[2] == first[2]  # safetensors: the order does not matter either
    finally:
        del os.environ["TZ"]


# ---- headers -----------------------------------------------------------------------------------


def test_canonical_text_depends_on_content_alone():
    assert (
        canonical({"b": [1, 2.5], "a": "é"})
        == canonical({"a": "é", "b": (1, 2.5)})
        == '{"a":"é","b":[1,2.5]}'
    )
    assert digest({"a": 1, "b": 2}) != digest({"a": 2, "b": 1})
    assert len(digest({})) == 16


def test_a_header_says_what_made_it_and_is_json():
    header = make_header("gather_images", {"ipc": "10"}, {"seed": 0}, "c0de", [], classes=["a", "b"])
    assert json.loads(canonical(header)) == header
    assert header["wildcards"] == {"ipc": "10"} and header["settings"] == {"seed": 0}
    assert header["code"] == "c0de" and header["classes"] == ["a", "b"]
    assert {"python", "torch", "numpy", "POT"} <= header["versions"].keys()
    assert header["versions"]["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert make_header("gather_images", {"ipc": "10"}, {"seed": 0}, "c0de", [], classes=["a", "b"]) == header


def test_a_header_names_the_device_of_each_rule():
    teacher = make_header("pretrain_teacher", {"teacher": "convnet"}, {}, "", [], "cuda")
    shards = [make_header("recover_images", {"shard": d}, {}, "", [teacher], d) for d in ("cuda", "cpu")]
    assert make_header("gather_images", {}, {}, "", shards)["devices"] == {
        "pretrain_teacher (convnet)": "cuda",
        "recover_images": "cpu, cuda",
    }
    assert make_header("describe_dataset", {}, {}, "")["devices"] == {}


def test_lineage_holds_every_rule_upstream_and_changes_with_settings_and_code():
    def evaluated(lr: float = 0.1, code: str = "c0de", seed: int = 0) -> dict:
        data = header_of("describe_dataset", {"seed": seed})
        teacher = header_of("pretrain_teacher", {"lr": lr}, [data], code)
        features = header_of("extract_features", {}, [data, teacher])
        return header_of("recover_images", {"lambda_bn": 1}, [data, teacher, features])["lineage"]

    same = evaluated()
    assert list(same) == ["describe_dataset", "pretrain_teacher", "extract_features", "recover_images"]
    for other in (evaluated(lr=0.2), evaluated(code="beef")):
        assert {rule for rule in same if same[rule] != other[rule]} == {"pretrain_teacher"}
    assert {rule for rule in same if same[rule] != evaluated(seed=1)[rule]} == {"describe_dataset"}


def test_inputs_that_do_not_belong_together_are_refused_by_the_rules_name():
    old = header_of("extract_features", {}, [header_of("pretrain_teacher", {"lr": 0.1})])
    new = header_of("compute_barycenter", {}, [header_of("pretrain_teacher", {"lr": 0.2})])
    with pytest.raises(UserError, match="inputs of recover_images .* of pretrain_teacher"):
        header_of("recover_images", {}, [old, new])


def test_shards_of_one_set_are_gathered_and_a_stray_one_is_not():
    """Which members a shard has follows from its number, a wildcard, and is no setting."""
    shards = [header_of("recover_images", {"lambda_bn": 1}, shard=str(number)) for number in range(3)]
    lineage = header_of("gather_images", {}, shards)["lineage"]
    assert list(lineage) == ["recover_images", "gather_images"]
    stray = header_of("recover_images", {"lambda_bn": 2}, shard="3")
    with pytest.raises(UserError, match="of recover_images"):
        header_of("gather_images", {}, [*shards, stray])


def test_two_teachers_may_meet():
    """A method may recover from another teacher than the one that labels; both are upstream of the labels."""
    data = header_of("describe_dataset", {"seed": 0})
    labeller = header_of("pretrain_teacher", {"architecture": "convnet"}, [data], teacher="convnet")
    teacher = header_of("pretrain_teacher", {"architecture": "resnet18"}, [data], teacher="resnet18")
    distilled = header_of("gather_images", {}, [data, header_of("recover_images", {}, [data, teacher])])
    header_of("relabel_images", {}, [data, labeller, distilled])


def save_array(path: Path, arrays: dict, _header: dict) -> None:
    np.save(path, arrays["x"])


def save_json(path: Path, arrays: dict, header: dict) -> None:
    write_json(path, {"x": arrays["x"].tolist()}, header)


@pytest.mark.parametrize(
    ("suffix", "write", "read"),
    [
        (".npz", write_arrays, read_arrays),
        (".npy", save_array, read_array),
        (".safetensors", write_tensors, read_tensors),
        (".json", save_json, read_json),
    ],
)
@pytest.mark.parametrize("kept", [0, 40, 200])
def test_a_truncated_file_is_named(tmp_path, suffix, write, read, kept):
    path = tmp_path / f"images{suffix}"
    write(path, {"x": np.arange(100.0)}, {"rule": "test"})
    os.truncate(path, kept)
    with pytest.raises(UserError, match=f"images{suffix} is damaged .* delete it and run snakemake again"):
        read(path)
