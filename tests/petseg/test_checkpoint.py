from __future__ import annotations

import errno
import hashlib
import json
import os
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from petseg.checkpoint import load, load_model, peek, save_checkpoint
from petseg.config import TrainConfig, to_dict
from petseg.model import AttentionUNet, AttentionUNetConfig
from petseg_runtime.errors import CheckpointError, OutputError

SPEC = {"height": 32, "width": 48, "threshold": 0.5, "cutout_threshold": 0.4}
META = {"kind": "model", "model": {"width": 2}, "spec": SPEC}


def network(seed: int = 0, width: int = 2) -> AttentionUNet:
    torch.manual_seed(seed)
    return AttentionUNet(AttentionUNetConfig(width=width)).eval()


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "good.safetensors"
    save_checkpoint(path, network().state_dict(), META)
    return path


def raw_header(path: Path, header: Any, tensors: dict[str, Tensor] | None = None) -> Path:
    """A safetensors file with any text for petseg's JSON."""
    text = header if isinstance(header, str) else json.dumps(header)
    save_file(tensors if tensors is not None else network().state_dict(), path, metadata={"petseg": text})
    return path


def test_what_was_saved_is_loaded(tmp_path: Path) -> None:
    tensors = {
        "weight": torch.randn(3, 4, 5),
        "half": torch.randn(7).half(),
        "brain": torch.randn(2, 2).bfloat16(),
        "count": torch.tensor(12345678901),
        "nothing": torch.empty(0, 3),
        "turned": torch.randn(4, 6).t(),
        "channels_last": torch.randn(2, 3, 4, 4).to(memory_format=torch.channels_last),
        "learnt": torch.randn(3, requires_grad=True),
    }
    meta = {**META, "validation": {"iou": 0.9}, "note": "Kätzchen", "list": [1, None, True]}
    path = tmp_path / "new" / "folder" / "x.safetensors"
    save_checkpoint(path, tensors, meta)
    loaded = load(path)
    assert equal(loaded.tensors, tensors)
    assert loaded.meta == meta
    assert loaded.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert loaded.model_config == AttentionUNetConfig(width=2)


def test_the_same_content_gives_the_same_bytes(tmp_path: Path) -> None:
    tensors = network().state_dict()
    turned = dict(reversed(META.items()))
    first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    save_checkpoint(first, tensors, META)
    save_checkpoint(second, tensors, turned)
    assert first.read_bytes() == second.read_bytes()


def test_a_model_comes_back_ready_to_use(good: Path) -> None:
    before = torch.random.get_rng_state()
    model, checkpoint = load_model(str(good))
    assert not model.training
    assert checkpoint.meta == META
    x = torch.randn(1, 3, 32, 32)
    torch.random.set_rng_state(before)
    with torch.inference_mode():
        assert torch.equal(model(x), network()(x))


def test_a_half_precision_checkpoint_becomes_float32(tmp_path: Path) -> None:
    path = tmp_path / "half.safetensors"
    half = {n: t.half() if t.is_floating_point() else t for n, t in network().state_dict().items()}
    save_checkpoint(path, half, META)
    model, _ = load_model(path)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert torch.equal(model.head.weight, half["head.weight"].float())


def test_of_a_training_state_the_moving_average_is_taken(tmp_path: Path) -> None:
    raw, average = network(0).state_dict(), network(1).state_dict()
    tensors = {**raw, **{f"ema/{n}": t for n, t in average.items()}, "optimizer/0/step": torch.tensor(3.0)}
    save_checkpoint(tmp_path / "last.safetensors", tensors, {**META, "kind": "training"})
    model, _ = load_model(tmp_path / "last.safetensors")
    assert equal(model.state_dict(), average)
    assert not equal(model.state_dict(), raw)


# writing


def fail_sync(fd: int) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def fail_rename(self: Path, target: Path) -> Path:
    raise OSError(errno.EACCES, os.strerror(errno.EACCES))


@pytest.mark.parametrize(
    ("place", "name", "failure", "said"),
    [(os, "fsync", fail_sync, "No space left"), (Path, "replace", fail_rename, "Permission denied")],
)
def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(
    good: Path, monkeypatch: pytest.MonkeyPatch, place: Any, name: str, failure: Callable[..., Any], said: str
) -> None:
    before = good.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(place, name, failure)
        with pytest.raises(OutputError, match=rf"good\.safetensors: .*{said}"):
            save_checkpoint(good, network(1).state_dict(), META)
    assert good.read_bytes() == before
    assert list(good.parent.iterdir()) == [good]


def test_the_file_is_on_the_disk_before_it_is_renamed(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    sync, replace = os.fsync, Path.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (done.append("sync"), sync(fd))[1])
    monkeypatch.setattr(Path, "replace", lambda self, to: (done.append("rename"), replace(self, to))[1])
    save_checkpoint(good, network(1).state_dict(), META)
    assert done == ["sync", "rename"]


def test_an_interrupt_while_writing_leaves_the_old_file(good: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(fd: int) -> None:
        raise KeyboardInterrupt

    before = good.read_bytes()
    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        save_checkpoint(good, network(1).state_dict(), META)
    assert good.read_bytes() == before
    assert list(good.parent.iterdir()) == [good]


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OutputError, match=r"x\.safetensors: the checkpoint cannot be written"):
        save_checkpoint(tmp_path / "file" / "x.safetensors", {}, META)


# reading damaged or foreign files


def refused(path: Path, said: str = "") -> None:
    for read in (load, load_model):
        with pytest.raises(CheckpointError) as caught:
            read(path)
        assert path.name in str(caught.value)
        assert said in str(caught.value)


def test_a_missing_file_or_a_folder_is_rejected(tmp_path: Path) -> None:
    refused(tmp_path / "none.safetensors", "no such file")
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", "not a regular file")
    refused(tmp_path, "a folder; give the checkpoint in it (in a run's folder, best.safetensors)")


def test_an_exported_file_is_no_checkpoint(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"\x08\x0a")
    with pytest.raises(CheckpointError, match=r"give the \.safetensors file that it was made from"):
        load(path)


def test_a_truncated_file_is_rejected_at_every_length(good: Path) -> None:
    whole = good.read_bytes()
    header = 8 + struct.unpack("<Q", whole[:8])[0]
    lengths = {*range(16), header - 1, header, header + 1, len(whole) - 1, *range(0, len(whole), len(whole) // 50)}
    path = good.with_name("cut.safetensors")
    for length in sorted(lengths - {len(whole)}):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"cut\.safetensors: not a readable"):
            load(path)


def test_bytes_appended_are_rejected(good: Path) -> None:
    good.write_bytes(good.read_bytes() + b"\0" * 100)
    refused(good, "not a readable")


@pytest.mark.parametrize("seed", range(5))
def test_random_bytes_are_rejected(tmp_path: Path, seed: int) -> None:
    path = tmp_path / "noise.safetensors"
    path.write_bytes(torch.randint(0, 256, (4096,), generator=torch.Generator().manual_seed(seed)).byte().numpy())
    refused(path, "not a readable")


class Bomb:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return (os.mkdir, (str(self.target),))

    def __init__(self, target: Path) -> None:
        self.target = target


def test_a_pickle_is_rejected_and_never_run(tmp_path: Path) -> None:
    target = tmp_path / "it_ran"
    path = tmp_path / "model.safetensors"
    path.write_bytes(pickle.dumps(Bomb(target)))
    refused(path)
    torch.save({"model": Bomb(target)}, path)
    refused(path)
    assert not target.exists()


def test_flipped_bytes_in_the_header_are_rejected_or_harmless(good: Path) -> None:
    whole = good.read_bytes()
    start = whole.index(b"__metadata__")
    path = good.with_name("flipped.safetensors")
    caught = 0
    for position in [*range(8), *range(start, start + 160), *range(400, len(whole), len(whole) // 40)]:
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x1F]) + whole[position + 1 :])
        try:
            load(path)
        except CheckpointError as error:
            caught += 1
            assert "flipped" in str(error)  # noqa: PT017
    assert caught > 30


def test_a_foreign_safetensors_file_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "foreign.safetensors"
    save_file(network().state_dict(), path)
    refused(path, "not a petseg checkpoint")
    save_file(network().state_dict(), path, metadata={"format": "pt"})
    refused(path, "not a petseg checkpoint")


@pytest.mark.parametrize("header", ["", "{", "nonsense", "null", "3", '"text"', "{}", '{"kind": "model"}'])
def test_a_damaged_header_is_rejected(tmp_path: Path, header: str) -> None:
    refused(raw_header(tmp_path / "bad.safetensors", header), "JSON header is damaged")


@pytest.mark.parametrize("levels", [40, 100_000])
@pytest.mark.parametrize(("opens", "closes"), [('{"a": ', "}"), ("[", "]")])
def test_a_header_that_is_nested_too_deeply_is_rejected(tmp_path: Path, levels: int, opens: str, closes: str) -> None:
    deep = f'{{"schema_version": 1, "note": {opens * levels}1{closes * levels}}}'
    refused(raw_header(tmp_path / "deep.safetensors", deep), "JSON header is damaged")


def test_a_header_that_is_a_list_is_rejected(tmp_path: Path) -> None:
    refused(raw_header(tmp_path / "bad.safetensors", "[1]"), "JSON header is damaged")


@pytest.mark.parametrize("version", [0, 2, 99, "1", None, [1]])
def test_another_schema_version_is_rejected_with_both_numbers(tmp_path: Path, version: Any) -> None:
    path = raw_header(tmp_path / "newer.safetensors", {"schema_version": version, **META})
    refused(path, f"schema_version {version!r}, but this version of petseg reads 1")


@pytest.mark.parametrize("width", [4, 16])
def test_tensors_of_another_width_are_rejected(tmp_path: Path, width: int) -> None:
    path = tmp_path / "wide.safetensors"
    save_checkpoint(path, network(width=width).state_dict(), META)
    with pytest.raises(CheckpointError, match=r"wide\.safetensors: its tensors do not fit"):
        load_model(path)


def test_a_tensor_missing_or_left_over_is_rejected_by_name(tmp_path: Path) -> None:
    path = tmp_path / "odd.safetensors"
    state = network().state_dict()
    save_checkpoint(path, {n: t for n, t in state.items() if n != "head.bias"}, META)
    with pytest.raises(CheckpointError, match=r"odd\.safetensors[\s\S]*head\.bias"):
        load_model(path)
    save_checkpoint(path, {**state, "extra": torch.zeros(1)}, META)
    with pytest.raises(CheckpointError, match=r"odd\.safetensors[\s\S]*extra"):
        load_model(path)
    save_checkpoint(path, state, {**META, "kind": "training"})  # has no EMA weights
    with pytest.raises(CheckpointError, match=r"odd\.safetensors"):
        load_model(path)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", ["down3.0.weight", "bottom.1.running_var", "head.bias"])
def test_a_weight_that_is_no_number_is_rejected_by_name(tmp_path: Path, name: str, value: float) -> None:
    state = network().state_dict()
    state[name].view(-1)[-1] = value
    path = tmp_path / "nan.safetensors"
    save_checkpoint(path, state, META)
    with pytest.raises(CheckpointError, match=rf"nan\.safetensors: NaN or infinity in {name}"):
        load_model(path)


def test_the_shape_of_another_member_of_the_family_comes_back(tmp_path: Path) -> None:
    config = AttentionUNetConfig(width=2, levels=(1, 3, 2), stem="strided", ungated=(2,), decoder_convs=1)
    edge = AttentionUNet(config).eval()
    meta = {**META, "model": to_dict(TrainConfig(model=config))["model"]}
    save_checkpoint(tmp_path / "x.safetensors", edge.state_dict(), meta)
    model, checkpoint = load_model(tmp_path / "x.safetensors")
    assert checkpoint.model_config == model.config == config
    x = torch.randn(1, 3, 32, 48)
    with torch.inference_mode():
        assert torch.equal(model(x), edge(x))


BAD = [None, 3, {}, {"width": 3}, {"width": "2"}, {"width": None}, {"height": 2}, [2]]
BAD_SHAPES = [{"levels": 3}, {"levels": ["a", "b"]}, {"stem": 1}, {"ungated": [9]}, {"decoder_convs": [1]}]
BAD_SHAPES += [{"levels": [float("nan"), 2]}]  # valid in Python's JSON


@pytest.mark.parametrize("model", [*BAD, *({"width": 2, **bad} for bad in BAD_SHAPES)])
def test_a_header_without_a_network_is_rejected(tmp_path: Path, model: Any) -> None:
    save_checkpoint(tmp_path / "x.safetensors", network().state_dict(), {**META, "model": model})
    with pytest.raises(CheckpointError, match="network"):
        load_model(tmp_path / "x.safetensors")


def test_a_header_without_a_network_is_rejected_by_file(tmp_path: Path) -> None:
    save_checkpoint(tmp_path / "x.safetensors", network().state_dict(), {"kind": "model"})
    with pytest.raises(CheckpointError, match=r"x\.safetensors"):
        load_model(tmp_path / "x.safetensors")


INFINITE, NO_NUMBER = float("inf"), float("nan")


@pytest.mark.parametrize(
    "damage",
    [
        *(
            {name: value}
            for name in ("threshold", "cutout_threshold")
            for value in (INFINITE, NO_NUMBER, 0, 7, "x", [])
        ),
        *({name: value} for name in ("height", "width") for value in (33, 0, -16, 32.0, True, None, "32")),
        *({"border_target": value} for value in (NO_NUMBER, "soft")),
        {"colour": "red"},
    ],
    ids=str,
)
def test_the_specification_of_a_model_is_checked_when_it_is_loaded(tmp_path: Path, damage: dict[str, Any]) -> None:
    path = tmp_path / "x.safetensors"
    save_checkpoint(path, network().state_dict(), {**META, "spec": {**SPEC, **damage}})
    with pytest.raises(CheckpointError, match=r"x\.safetensors: its specification is damaged"):
        load_model(path)


@pytest.mark.parametrize(
    "spec", [*({name: SPEC[name] for name in SPEC if name != missing} for missing in SPEC), {}, 5, [1], "spec"], ids=str
)
def test_a_model_without_a_size_or_a_threshold_is_rejected(tmp_path: Path, spec: Any) -> None:
    path = tmp_path / "x.safetensors"
    save_checkpoint(path, network().state_dict(), {**META, "spec": spec})
    with pytest.raises(CheckpointError, match=r"x\.safetensors: its specification is damaged"):
        load_model(path)


@pytest.mark.parametrize("width", [2.0, 10**12])
def test_a_width_that_cannot_be_is_rejected(tmp_path: Path, width: float) -> None:
    save_checkpoint(tmp_path / "x.safetensors", network().state_dict(), {**META, "model": {"width": width}})
    with pytest.raises(CheckpointError):
        load_model(tmp_path / "x.safetensors")


def test_a_peek_returns_the_header_without_the_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "a.safetensors"
    save_checkpoint(path, {"weight": torch.zeros(3)}, {"kind": "model", "model": {}})
    monkeypatch.setattr("hashlib.file_digest", lambda *_: pytest.fail("all of it was read"))
    assert peek(path) == {"kind": "model", "model": {}}
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match=r"a\.safetensors: not a readable safetensors checkpoint"):
        peek(path)
