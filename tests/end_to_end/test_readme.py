"""The README's commands run, and its numbers match the records."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import av
import pytest
from PIL import Image

from benchmarks.__main__ import main

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
WEIGHTS = ROOT / "petseg" / "weights" / "edge.safetensors"
SAMPLES = ROOT / "runtime" / "petseg_runtime" / "models" / "samples"

#: Options that make a command short enough for a test; the last of two equal options wins.
#: The training is just long enough for masks that are not constant, which the parity test would reject.
SHORTER = {
    "benchmark": ["--seconds", "0.2"],
    "train": ["--epochs", "24", "--width", "4", "--size", "64x64", "--batch", "4", "--device", "cpu"],
    "export": ["--split", "test"],
}
#: In points of IoU: with one toy photo, one pixel of 32 x 32 makes a difference, whatever the compute precision.
INT8 = ["--int8-judges", "1", "--int8-budget", "5"]
#: For a training whose result is not used.
ONE_EPOCH = ["--epochs", "1"]


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


@pytest.fixture(scope="module")
def home(oxford_root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's folder with the files that the README names: cat.jpg, beach.jpg, clip.mp4, photos/ and data/."""
    folder = tmp_path_factory.mktemp("home")
    shutil.copy(SAMPLES / "chelsea.jpg", folder / "cat.jpg")
    shutil.copy(SAMPLES / "chelsea.jpg", folder / "beach.jpg")
    write_clip(folder / "clip.mp4")
    shutil.copytree(SAMPLES, folder / "photos")
    shutil.copytree(oxford_root, folder / "data")
    return folder


def write_clip(path: Path) -> None:
    """Write 1.5 s of video that zooms in on a cat."""
    with Image.open(SAMPLES / "chelsea.jpg") as photo, av.open(str(path), "w") as file:
        stream: Any = file.add_stream("libx264", rate=30)
        stream.width, stream.height, stream.pix_fmt = 192, 128, "yuv420p"
        for number in range(45):
            box = (number, number / 2, photo.width - number, photo.height - number / 2)
            file.mux(stream.encode(av.VideoFrame.from_image(photo.convert("RGB").resize((192, 128), box=box))))
        file.mux(stream.encode(None))


def of_training(block: str) -> bool:
    """Whether a block is about training your own model; such blocks use the files of earlier ones."""
    return "data" in block or "mine" in block


def plain(*words: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run `petseg WORDS` as in a shell."""
    command = [sys.executable, "-m", "petseg.cli", *words]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=600, check=False)


@pytest.mark.timeout(1500)  # thirty processes, half of which train or export: minutes on a slow, busy machine
@pytest.mark.parametrize("training", [False, True], ids=["built-in model", "trained model"])
def test_the_commands_run_in_order(home: Path, forks: Any, training: bool) -> None:
    lines = [
        line for block in blocks("sh") if of_training(block) == training for line in block.splitlines() if line.strip()
    ]
    assert len(lines) > 10
    run = forks if training else plain
    for line in lines:
        words = shlex.split(line, comments=True)
        assert words[0] == "petseg", line
        if words[1:3] == ["data", "download"]:
            continue  # 0.8 GB from the network; tests/petseg/test_download.py runs it against a local server
        shorter = [] if "--list" in words else SHORTER.get(words[1], [])
        shorter = [*shorter, *(INT8 if "int8" in words else []), *(ONE_EPOCH if "runs/edge" in words else [])]
        done = run(*words[1:], *shorter, cwd=home)
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"


@pytest.mark.timeout(300)
def test_the_commands_of_the_runtimes_page_run(home: Path) -> None:
    """In a shell, because one of them redirects the streams."""
    (block,) = re.findall(r"```sh\n(.*?)```", (ROOT / "runtime" / "README.md").read_text(encoding="utf-8"), re.DOTALL)
    lines = block.splitlines()
    assert len(lines) > 5
    for line in lines:
        command = f'petseg() {{ {sys.executable} -m petseg.cli "$@"; }}\n{line}'
        done = subprocess.run(
            ["bash", "-c", command], cwd=home, capture_output=True, text=True, timeout=60, check=False
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    with Image.open(home / "cat.png") as cutout:
        assert cutout.mode == "RGBA"


@pytest.mark.timeout(300)
@pytest.mark.skipif(not WEIGHTS.exists(), reason="petseg/weights is not in the sdist")
def test_the_commands_for_fine_tuning_run(folder_root: Path, forks: Any, tmp_path: Path) -> None:
    mine = Path(shutil.copytree(folder_root, tmp_path / "mine"))
    (mine / "val.txt").write_text("own_07\nown_08\n")
    (tmp_path / "petseg").symlink_to(ROOT / "petseg")  # the commands are typed in a checkout
    page = (ROOT / "petseg" / "README.md").read_text(encoding="utf-8")
    section = page.partition("## Fine-tune on your own photos\n")[2].partition("\n## ")[0]
    lines = re.findall(r"^    (petseg .*)$", section.replace("\\\n", " "), re.MULTILINE)
    assert [shlex.split(line)[1] for line in lines] == ["data", "train", "evaluate", "evaluate"]
    for line in lines:
        words = shlex.split(line, comments=True)[1:]
        shorter = [*ONE_EPOCH, "--batch", "4", "--size", "64x64"] if words[0] == "train" else []
        done = forks(*words, *shorter, cwd=tmp_path)
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"


@pytest.mark.skipif(not WEIGHTS.exists(), reason="petseg/weights is not in the sdist")
def test_the_python_examples_run(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copy(WEIGHTS, home / "best.safetensors")
    monkeypatch.chdir(home)
    for block in blocks("python"):
        exec(compile(block, "README.md", "exec"), {})
    assert (home / "cutout.png").stat().st_size > 0


def test_the_two_commands_of_the_readme_are_targets_of_the_makefile() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    targets = re.findall(r"^    make (\w+)$", README, re.MULTILINE)
    assert targets == ["demo", "test"]
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


PAGES = [
    "README.md",
    "CONTRIBUTING.md",
    "petseg/README.md",
    "export/README.md",
    "runtime/README.md",
    "runtime/petseg_runtime/models/README.md",
    "benchmarks/RESULTS.md",
]


def heading(line: str) -> str:
    """The anchor of a heading on the rendered page."""
    return re.sub(r"[^\w -]", "", line.lstrip("#").strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES)
def test_every_local_link_resolves(page: str) -> None:
    here = ROOT / page
    if not here.exists():
        pytest.skip(f"{page} is not in the sdist")
    for link in re.findall(r"\]\(([^)]+)\)", here.read_text(encoding="utf-8")):
        if link.startswith("http"):
            continue
        path, _, anchor = link.partition("#")
        there = here.parent / path if path else here
        assert there.exists(), link
        if anchor:
            lines = there.read_text(encoding="utf-8").splitlines()
            assert anchor in [heading(line) for line in lines if line.startswith("#")], link


@pytest.mark.skipif(not (ROOT / "benchmarks" / "results").is_dir(), reason="benchmarks/results is not in the sdist")
def test_the_numbers_match_the_records(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """`python -m benchmarks report --check`, in this process: a new one would import PyTorch again."""
    monkeypatch.chdir(ROOT)
    with pytest.raises(SystemExit) as ended:
        main(["report", "--check"])
    assert not ended.value.code, capsys.readouterr().err
