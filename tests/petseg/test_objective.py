"""The training objective, and a network that learns from the features of another."""

from __future__ import annotations

import signal
from pathlib import Path

import pytest
import torch
from torch import Tensor

from petseg.checkpoint import load, load_model, save_checkpoint
from petseg.cli import run
from petseg.distributed import Ranks
from petseg.losses import bce_dice
from petseg.model import AttentionUNet, AttentionUNetConfig, normalize
from petseg.objective import Distillation, Objective
from petseg.run_state import BEST, LAST
from petseg.train import Trainer
from petseg.train_set import UNKNOWN, target_of
from petseg_export import OnnxConfig, export
from petseg_runtime.errors import CheckpointError, TrainingError
from tiny_runs import CPU, Recorder, Run, assert_same_run, at, same_tensors, tiny

TAUGHT = ("loss.features=0.5", "loss.teacher=0.3")


@pytest.fixture(scope="module")
def taught(oxford_root: Path, tmp_path_factory: pytest.TempPathFactory, whole: Run) -> Run:
    """An uninterrupted run with a teacher's features. Read only."""
    folder, observer = tmp_path_factory.mktemp("taught"), Recorder()
    teacher = whole.folder / BEST
    trainer = Trainer(tiny(*TAUGHT), oxford_root, folder, device=CPU, teacher=teacher, observer=observer)
    trainer.fit()
    return Run(folder, observer, trainer)


def distillation(*settings: str, teacher: AttentionUNetConfig | None = None) -> Distillation:
    torch.manual_seed(0)
    config = tiny(*settings)
    network = AttentionUNet(config.model)
    return Distillation(config, Ranks(), network, AttentionUNet(teacher or config.model), CPU)


def a_batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.randn(4, 3, 32, 32), torch.randint(1, 4, (4, 32, 32), dtype=torch.uint8)


# the loss


def test_without_features_the_loss_is_that_of_the_target() -> None:
    config, (image, labels) = tiny("data.border_target=0.2", "loss.bce=0.3", "loss.dice=0.6"), a_batch()
    network = AttentionUNet(config.model)
    objective = Objective(config, Ranks())
    assert objective.student(network) is network
    assert not list(objective.hints.parameters())
    expected = bce_dice(network(image), target_of(labels, 0.2), 0.3, 0.6)
    assert torch.equal(objective(network, image, labels), expected)


def test_the_loss_is_that_of_truth_and_teacher_and_the_mean_distance_of_three_blocks() -> None:
    objective, (image, labels) = distillation("loss.features=0.7", "loss.teacher=0.25"), a_batch()
    network = AttentionUNet(tiny().model).eval()
    said, inside = objective.teacher.with_features(image)
    logits, own = network.with_features(image)
    target = 0.75 * target_of(labels, 0.0) + 0.25 * torch.sigmoid(said)
    distances = []
    for hint, name in zip(objective.hints, ("down2", "bottom", "up2"), strict=True):
        wanted = torch.nn.functional.batch_norm(inside[name], None, None, training=True)
        distances.append((hint(own[name]) - wanted).square().mean())
    expected = bce_dice(logits, target) + 0.7 * sum(distances) / 3
    found = objective(objective.student(network), image, labels)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert found.dtype == torch.float32


def test_the_target_of_a_mixed_photo_comes_from_the_teacher_only() -> None:
    objective, (image, labels) = distillation("loss.teacher=0.25", "data.border_target=0.2"), a_batch()
    labels[1:3] = UNKNOWN
    network = AttentionUNet(tiny().model).eval()
    said = torch.sigmoid(objective.teacher(image))
    target = 0.75 * target_of(labels, 0.2) + 0.25 * said
    target[1:3] = said[1:3]
    found = objective(objective.student(network), image, labels)  # loss.features is 0: no distance
    torch.testing.assert_close(found, bce_dice(network(image), target), rtol=1e-4, atol=1e-5)


def test_gradients_of_the_features_reach_the_network_through_the_hints_and_never_the_teacher() -> None:
    objective, (image, labels) = distillation("loss.features=1"), a_batch()
    network = AttentionUNet(tiny().model)
    before = {name: tensor.clone() for name, tensor in objective.teacher.state_dict().items()}
    _, hinted = objective.student(network)(image)
    for block, name in zip(hinted, ("down2", "bottom", "up2"), strict=True):
        network.zero_grad()
        block.square().sum().backward(retain_graph=True)
        reached = {part for part, p in network.named_parameters() if p.grad is not None and p.grad.any()}
        assert any(part.startswith("down1.") for part in reached), "the first block serves them all"
        assert any(part.startswith(f"{name}.") for part in reached)
        assert not any(part.startswith(("up1.", "head.")) for part in reached), "they come after"
    objective(objective.student(network), image, labels).backward()
    assert all(p.grad is None for p in objective.teacher.parameters())
    assert same_tensors(before, objective.teacher.state_dict())


@pytest.mark.parametrize(
    "teacher",
    [
        AttentionUNetConfig(width=6, levels=(1, 2, 3)),
        AttentionUNetConfig(width=4, levels=(1, 2, 4), stem="strided"),  # its blocks are half as large
        AttentionUNetConfig(width=2, levels=(1, 2)),  # and these twice as large
    ],
    ids=str,
)
def test_a_teacher_of_another_shape_teaches(teacher: AttentionUNetConfig) -> None:
    objective, (image, labels) = distillation("loss.features=1", teacher=teacher), a_batch()
    network = AttentionUNet(tiny().model)
    assert objective(objective.student(network), image, labels).isfinite()
    last = len(teacher.channels)
    assert [hint.weight.shape[0] for hint in objective.hints] == [
        teacher.channels[last - 2],
        teacher.channels[last - 1],
        teacher.channels[last - 2],
    ]


def test_making_the_objective_leaves_the_network_as_it_is() -> None:
    """Its blocks are measured on a black photo, which must not get into BatchNorm's statistics."""
    config = tiny("loss.features=1")
    network = AttentionUNet(config.model)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    Distillation(config, Ranks(), network, AttentionUNet(config.model), CPU)
    assert same_tensors(before, network.state_dict())
    assert all(module.training for module in network.modules())


def test_a_teachers_block_is_brought_to_the_size_of_the_networks() -> None:
    objective, (image, labels) = distillation("loss.features=1"), a_batch()
    network = AttentionUNet(tiny().model).eval()
    assert network.with_features(image)[1]["bottom"].shape == (4, 16, 8, 8)
    with torch.no_grad():
        objective.hints[1].weight *= 100  # otherwise the output of a new network hardly differs between positions

    def loss_at(block: Tensor) -> Tensor:
        made = {"down2": torch.ones(4, 8, 16, 16), "bottom": block, "up2": torch.ones(4, 8, 16, 16)}
        objective.teacher.with_features = lambda image: (torch.zeros(4, 1, 32, 32), made)  # type: ignore[method-assign]
        return objective(objective.student(network), image, labels)

    coarse = torch.randn(4, 16, 4, 4)
    eight = coarse.repeat_interleave(2, 2).repeat_interleave(2, 3)
    noise = torch.randn(4, 16, 8, 8).repeat_interleave(2, 2).repeat_interleave(2, 3)
    checks = noise * torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).repeat(8, 8)  # which a 2 x 2 mean removes
    fine = coarse.repeat_interleave(4, 2).repeat_interleave(4, 3) + checks
    torch.testing.assert_close(loss_at(fine), loss_at(eight))
    torch.testing.assert_close(loss_at(coarse), loss_at(eight))
    assert not torch.allclose(loss_at(eight.flip(3)), loss_at(eight))


def test_a_constant_channel_does_not_blow_up() -> None:
    block = torch.randn(4, 3, 5, 5) * torch.tensor([1.0, 100.0, 0.0])[:, None, None] + 7
    standard = distillation()._standardized(block)
    torch.testing.assert_close(standard.mean((0, 2, 3)), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(standard.std((0, 2, 3), correction=0), torch.tensor([1.0, 1.0, 0.0]), atol=1e-3, rtol=0)


# a run


def test_a_network_comes_nearer_to_its_teachers_features(taught: Run, whole: Run) -> None:
    """Measured by a newly fitted 1x1 convolution, so that it is the network that came closer, not the hints."""
    teacher = whole.trainer.model
    photo, _, _ = next(iter(taught.trainer.loader))
    image = normalize(photo)
    left = []
    for network in (taught.trainer.first_network(None), taught.trainer.model):
        with torch.no_grad():
            own, theirs = (each.eval().with_features(image)[1]["bottom"] for each in (network, teacher))
        x, y = (each.permute(0, 2, 3, 1).flatten(0, 2) for each in (own, theirs))
        x = torch.cat((x, torch.ones(len(x), 1)), dim=1)
        fitted = x @ torch.linalg.lstsq(x, y, driver="gelsd").solution
        left.append(((y - fitted).square().mean() / y.var(0, correction=0).mean()).item())
    assert left[1] < 0.9 * left[0], left


def test_a_run_keeps_its_hints_in_its_state_alone_and_names_the_teacher(taught: Run, whole: Run) -> None:
    assert load(taught.folder / BEST).meta["teacher"] == {"file": BEST, "identity": whole.best.sha256}
    hints = {name for name in taught.last.tensors if name.startswith("hints/")}
    assert hints == {f"hints/{i}.{what}" for i in range(3) for what in ("weight", "bias")}
    moments = [name for name in taught.last.tensors if name.endswith("/exp_avg_sq")]
    assert len(moments) == len(list(taught.trainer.model.parameters())) + len(hints), "they are trained"
    assert taught.best.tensors.keys() == whole.best.tensors.keys()
    load_model(taught.folder / BEST)


def test_a_run_with_hints_that_was_stopped_and_resumed_is_the_same_run(
    oxford_root: Path, tmp_path: Path, taught: Run, whole: Run
) -> None:
    stop, teacher = Recorder(at_step=at(7, lambda: signal.raise_signal(signal.SIGTERM))), whole.folder / BEST
    with pytest.raises(KeyboardInterrupt):
        Trainer(tiny(*TAUGHT), oxford_root, tmp_path, device=CPU, teacher=teacher, observer=stop).fit()
    go_on = Recorder()
    Trainer(tiny(*TAUGHT), oxford_root, tmp_path, device=CPU, teacher=teacher, resume=True, observer=go_on).fit()
    assert stop.losses + go_on.losses == taught.observer.losses
    assert_same_run(tmp_path, taught)


class Frozen(Trainer):
    """Trains all but its first block."""

    def first_network(self, init: Path | None) -> AttentionUNet:
        network = super().first_network(init)
        network.get_submodule("down1").requires_grad_(False)
        return network


def test_a_run_of_which_a_part_is_frozen_continues(oxford_root: Path, tmp_path: Path) -> None:
    Frozen(tiny(), oxford_root, tmp_path / "whole", device=CPU).fit()
    stop = Recorder(at_step=at(7, lambda: signal.raise_signal(signal.SIGTERM)))
    with pytest.raises(KeyboardInterrupt):
        Frozen(tiny(), oxford_root, tmp_path / "run", device=CPU, observer=stop).fit()
    Frozen(tiny(), oxford_root, tmp_path / "run", device=CPU, resume=True).fit()
    assert same_tensors(load(tmp_path / "run" / LAST).tensors, load(tmp_path / "whole" / LAST).tensors)


def test_a_state_without_its_hints_is_damaged(oxford_root: Path, tmp_path: Path, taught: Run, whole: Run) -> None:
    kept = {name: tensor for name, tensor in taught.last.tensors.items() if not name.startswith("hints/1")}
    save_checkpoint(tmp_path / LAST, kept, taught.last.meta)
    with pytest.raises(CheckpointError, match=r"last\.safetensors: the state in it is damaged or incomplete"):
        Trainer(tiny(*TAUGHT), oxford_root, tmp_path, device=CPU, teacher=whole.folder / BEST, resume=True)


def test_the_teacher_sees_the_photos_as_the_network_does(
    oxford_root: Path, tmp_path: Path, whole: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[int, list[Tensor]] = {}
    with_features = AttentionUNet.with_features

    def spy(network: AttentionUNet, image: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        seen.setdefault(id(network), []).append(image)
        return with_features(network, image)

    config = tiny("epochs=1", *TAUGHT)
    trainer = Trainer(config, oxford_root, tmp_path, device=CPU, teacher=whole.folder / BEST)
    monkeypatch.setattr(AttentionUNet, "with_features", spy)
    photo, trimap, _ = next(iter(trainer.loader))
    assert trimap.ndim == 3, "nothing was asked in advance"
    trainer._step(photo, trimap, 1e-3)
    own, theirs = seen[id(trainer.model)], seen[id(trainer.objective.teacher)]  # type: ignore[attr-defined]
    assert len(own) == len(theirs) == 1
    assert torch.equal(own[0], theirs[0])


def test_a_run_mixes_photos_and_is_the_same_run_if_it_was_stopped(
    oxford_root: Path, tmp_path: Path, taught: Run, whole: Run
) -> None:
    config, teacher = tiny(*TAUGHT, "augment.mix=0.5", "augment.mix_until=0.5"), whole.folder / BEST
    mixed, stop = Recorder(), Recorder(at_step=at(7, lambda: signal.raise_signal(signal.SIGTERM)))
    trainer = Trainer(config, oxford_root, tmp_path / "whole", device=CPU, teacher=teacher, observer=mixed)
    mixes = []
    for trainer.sampler.epoch in range(config.epochs):
        mixes.append(any((trimap == UNKNOWN).all() for _, batch, _ in trainer.loader for trimap in batch))
    assert mixes == [epoch < config.epochs / 2 for epoch in range(config.epochs)]
    trainer.fit()
    with pytest.raises(KeyboardInterrupt):
        Trainer(config, oxford_root, tmp_path / "run", device=CPU, teacher=teacher, observer=stop).fit()
    go_on = Recorder()
    Trainer(config, oxford_root, tmp_path / "run", device=CPU, teacher=teacher, resume=True, observer=go_on).fit()
    assert stop.losses + go_on.losses == mixed.losses != taught.observer.losses


@pytest.mark.parametrize(
    ("setting", "said"), [("augment.mix=0.25", "mix was 0.5, now 0.25"), ("augment.mix=0.0", "now 0.0")]
)
def test_a_run_that_mixes_continues_as_it_began(
    oxford_root: Path, tmp_path: Path, whole: Run, setting: str, said: str
) -> None:
    config, teacher = (*TAUGHT, "augment.mix=0.5"), whole.folder / BEST
    stop = Recorder(at_step=at(2, lambda: signal.raise_signal(signal.SIGTERM)))
    with pytest.raises(KeyboardInterrupt):
        Trainer(tiny(*config), oxford_root, tmp_path, device=CPU, teacher=teacher, observer=stop).fit()
    with pytest.raises(TrainingError, match=said):
        Trainer(tiny(*config, setting), oxford_root, tmp_path, device=CPU, teacher=teacher, resume=True)


@pytest.mark.parametrize(("share", "epochs", "mixed"), [(0.55, 100, 55), (0.5, 3, 2), (1.0, 7, 7), (0.001, 7, 1)])
def test_a_share_of_the_epochs_is_mixed_rounded_up(
    oxford_root: Path, tmp_path: Path, whole: Run, share: float, epochs: int, mixed: int
) -> None:
    config = tiny(*TAUGHT, "augment.mix=1", f"augment.mix_until={share}", f"epochs={epochs}")
    trainer = Trainer(config, oxford_root, tmp_path, device=CPU, teacher=whole.folder / BEST)
    photos = trainer.photos.train
    unknown = [bool((photos[epoch * len(photos)][1] == UNKNOWN).all()) for epoch in (mixed - 1, mixed)]
    assert unknown == [True, False]


@pytest.mark.parametrize("taught_once", [True, False], ids=["a teacher asked once", "no teacher"])
def test_nothing_is_mixed_without_a_teacher_of_features(
    oxford_root: Path, tmp_path: Path, whole: Run, taught_once: bool
) -> None:
    teacher = whole.folder / BEST if taught_once else None
    trainer = Trainer(tiny("augment.mix=1"), oxford_root, tmp_path, device=CPU, teacher=teacher)
    assert not any((labels == UNKNOWN).all() for _, batch, _ in trainer.loader for labels in batch)


def test_distillation_works_in_bf16(oxford_root: Path, tmp_path: Path, whole: Run) -> None:
    observer = Recorder()
    config = tiny("amp=bf16", "epochs=1", *TAUGHT)
    Trainer(config, oxford_root, tmp_path, device=CPU, teacher=whole.folder / BEST, observer=observer).fit()
    assert observer.losses[-1] < observer.losses[0]
    assert {t.dtype for n, t in load(tmp_path / LAST).tensors.items() if n.startswith("hints/")} == {torch.float32}


def test_the_state_of_a_run_cannot_be_a_teacher_of_features(oxford_root: Path, tmp_path: Path, whole: Run) -> None:
    with pytest.raises(CheckpointError, match=r"last\.safetensors: the state of a run, not a model; give the best"):
        Trainer(tiny(*TAUGHT), oxford_root, tmp_path, device=CPU, teacher=whole.folder / LAST)


def test_features_of_an_exported_file_are_rejected(
    oxford_root: Path, tmp_path: Path, whole: Run, known_graph: None
) -> None:
    exported = tmp_path / "teacher.onnx"
    export(whole.folder / BEST, OnnxConfig(output=exported, data=oxford_root, split="test", photos=4))
    with pytest.raises(CheckpointError, match=r"teacher\.onnx: an exported file, .* or --set loss\.features=0"):
        Trainer(tiny(*TAUGHT), oxford_root, tmp_path / "run", device=CPU, teacher=exported)


@pytest.mark.parametrize("teacher", [True, False], ids=["a teacher asked once", "no teacher"])
def test_mixing_without_a_teacher_of_features_is_rejected(
    oxford_root: Path, tmp_path: Path, whole: Run, capsys: pytest.CaptureFixture[str], teacher: bool
) -> None:
    args = ["train", "--data", str(oxford_root), "--output", str(tmp_path / "run"), "--set", "augment.mix=0.5"]
    assert run([*args, *(["--teacher", str(whole.folder / BEST)] if teacher else ())]) == 2
    told = capsys.readouterr().err
    assert "augment.mix is 0.5, which has no effect without --teacher FILE and loss.features above 0" in told


def test_features_without_a_teacher_are_rejected(
    oxford_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    args = ["train", "--data", str(oxford_root), "--output", str(tmp_path), "--set", "loss.features=0.25"]
    assert run(args) == 2
    assert "loss.features is 0.25, which has no effect without --teacher FILE" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.filterwarnings("default")  # about forks beside CUDA's threads and about TF32; they differ between versions
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU that PyTorch can use")
@pytest.mark.parametrize("settings", [("amp=fp16",), ("amp=auto", "compile=true"), ("amp=fp32",)], ids=str)
def test_features_are_taught_on_a_gpu(oxford_root: Path, tmp_path: Path, whole: Run, settings: tuple[str, ...]) -> None:
    config, where, teacher = tiny(*TAUGHT, *settings), torch.device("cuda"), whole.folder / BEST
    stop = Recorder(at_step=at(7, lambda: signal.raise_signal(signal.SIGTERM)))
    with pytest.raises(KeyboardInterrupt):
        Trainer(config, oxford_root, tmp_path, device=where, teacher=teacher, observer=stop).fit()
    go_on = Recorder()
    Trainer(config, oxford_root, tmp_path, device=where, teacher=teacher, observer=go_on, resume=True).fit()
    assert go_on.losses[-1] < stop.losses[0]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU that PyTorch can use")
def test_a_step_with_features_waits_for_nothing(oxford_root: Path, tmp_path: Path, whole: Run) -> None:
    config, where = tiny("amp=auto", *TAUGHT), torch.device("cuda")
    trainer = Trainer(config, oxford_root, tmp_path, device=where, teacher=whole.folder / BEST)
    photo, trimap, _ = next(iter(trainer.loader))
    trainer._step(photo, trimap, 1e-3).read()  # one-time initialisation is done
    torch.cuda.set_sync_debug_mode("error")
    try:
        step = trainer._step(photo, trimap, 1e-3)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert step.read()[0] > 0
