"""Post-training int8: calibrated on photos, judged on the task; the layers that hurt stay in float.

The result is a graph with QuantizeLinear and DequantizeLinear nodes ("Q/DQ") that every compiler takes as it is:
symmetric int8 with zero points of 0, weights per output channel, activations per tensor, and biases in float, because
TensorRT dequantizes no int32. ONNX Runtime does: it makes an int32 of a bias, in steps of the two scales' product, and
does not look whether it fits. So where a channel's weights are next to nothing, its scale is what its bias wants.

An activation is rounded where it is made, and what lies behind it takes the rounded one, gates and concatenations
too: it is then kept in one byte only. Convolutions that are left in float are the exception: they take what they
always took.

Weights have seven bits, -64 to 64: x86 CPUs without VNNI add two products of bytes in 16 bits and cut off what is too
large, and the masks of a file with eight were ruined there while it passed its parity test on newer ones. What the bit
costs is lost in chance (benchmarks/LOG.md).

Two things are there for OpenVINO alone, and change no value (but -128, which becomes -127). It forgets the scale of
int8 activations where a MaxPool or a Concat lies between the rounding and the convolution, or a Concat right before
the rounding: 2025.3 and 2026.4 do, without a word, and the masks are ruined. So what comes out of a MaxPool is rounded
once more, at the same scale, and what comes out of a Concat is clipped to the range before it is rounded.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, Final, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx
from onnx import ModelProto, NodeProto, TensorProto, checker, helper, numpy_helper

from petseg_export.config import QuantizeConfig
from petseg_export.onnx import Session
from petseg_export.parity import Photos
from petseg_export.registry import Watch
from petseg_runtime.artifact import OUTPUT
from petseg_runtime.errors import DataError, ModelError, ParityTolerance

__all__ = [
    "METHODS",
    "Magnitudes",
    "Quantized",
    "calibrate",
    "int8_weight",
    "judge_on",
    "layers_of",
    "quantize",
    "with_int8",
]

U8: TypeAlias = npt.NDArray[np.uint8]
I8: TypeAlias = npt.NDArray[np.int8]
F32: TypeAlias = npt.NDArray[np.float32]
#: IoU in [0, 1] of a serialised graph on labelled photos.
Judge: TypeAlias = Callable[[bytes], float]

#: The largest int8 of an activation's symmetric scale; -128 is not used.
LARGEST: Final = 127
#: The largest int8 of a weight: two products with an unsigned byte fit 16 bits, 2 x 255 x 64 = 32,640. ("Saturation
#: (overflow) issue workaround", OpenVINO's documentation; "Nuances of int8 computations", oneDNN's.)
LARGEST_WEIGHT: Final = 64
#: The largest int32 that a bias becomes; the products that are added to it have room above.
LARGEST_BIAS: Final = 2**30
#: Bins of a histogram of magnitudes; at least half of them lie below the largest magnitude.
BINS: Final = 4096
#: What never exceeds this is taken for zero: the product of two scales must stay a normal float32.
NOTHING: Final = 1e-15
#: Share of the magnitudes that `percentile` keeps.
KEPT: Final = 0.9999
#: At most so many calibration photos show how far answers have changed.
PROBES: Final = 16
#: At least this share of the layers is in int8, or the file is not what it says it is.
FEWEST: Final = 0.25
#: Layers that are tried in int8 once more after the search; each costs a judgement.
SECOND_TRIES: Final = 8


@dataclass(frozen=True)
class Quantized:
    """An int8 graph that is within the budget.

    Attributes:
        graph: The Q/DQ ONNX graph, without metadata.
        choice: How it was chosen, for the receipt; JSON values. ``loss`` is in points (hundredths) of IoU on the
            labelled photos; ``change`` is the mean absolute change of the answers on calibration photos, in levels of
            255; ``sensitivity`` is that change with one layer alone in int8, the most harmful first; ``search`` is
            how many layers were in float at each judgement, and the loss.
    """

    graph: bytes
    choice: dict[str, Any]


@dataclass(frozen=True)
class Verdict:
    """How far a graph is from the float one; see :class:`Quantized`."""

    loss: float
    change: float

    def as_dict(self) -> dict[str, float]:
        """JSON values."""
        return {"loss": round(self.loss, 4), "change": round(self.change, 4)}


@dataclass(frozen=True)
class _Search:
    """For the fewest layers in float.

    Attributes:
        order: All layers, the most harmful first.
        loss: Judges the graph with some layers in float and all others in int8.
        budget: The largest loss.
        judged: The losses so far, by the layers in float.
    """

    order: tuple[str, ...]
    loss: Callable[[frozenset[str]], float]
    budget: float
    judged: dict[frozenset[str], float]

    def fewest_in_float(self) -> frozenset[str]:
        """A bisection over the order, then a second try of layers that may have been left in float for nothing.

        Raises:
            ParityTolerance: It takes too many of them.
        """
        if self._within(0):
            return frozenset()
        fails, works = 0, len(self.order) - math.ceil(FEWEST * len(self.order))
        if not self._within(works):
            raise ParityTolerance(self._refusal(works))
        while works - fails > 1:
            middle = (fails + works) // 2
            fails, works = (fails, middle) if self._within(middle) else (middle, works)
        kept = frozenset(self.order[:works])
        for layer in self.order[works - 2 :: -1][:SECOND_TRIES] if works > 1 else ():
            if self._lost(kept - {layer}) <= self.budget:
                kept -= {layer}
        return kept

    def as_dict(self, in_float: frozenset[str]) -> dict[str, Any]:
        """What was found, and every judgement on the way; JSON values."""
        return {
            "loss": round(self.judged[in_float], 4),
            "budget": self.budget,
            "layers": len(self.order),
            "layers_int8": len(self.order) - len(in_float),
            "in_float": [layer for layer in self.order if layer in in_float],
            "search": [{"in_float": len(left), "loss": round(lost, 4)} for left, lost in self.judged.items()],
        }

    def _within(self, first: int) -> bool:
        """Whether it is enough to leave the first few of the order in float."""
        return self._lost(frozenset(self.order[:first])) <= self.budget

    def _lost(self, in_float: frozenset[str]) -> float:
        if in_float not in self.judged:
            self.judged[in_float] = self.loss(in_float)
        return self.judged[in_float]

    def _refusal(self, first: int) -> str:
        every, some = self._lost(frozenset()), self._lost(frozenset(self.order[:first]))
        return (
            f"int8 loses {every:.2f} points of IoU, and still {some:.2f} with {first} of the {len(self.order)} layers "
            f"left in float; the budget is {self.budget:g}: give it more, or export as fp16"
        )


def quantize(
    graph: bytes, calibration: Sequence[U8] | U8, judge: Judge, config: QuantizeConfig, watch: Watch | None = None
) -> Quantized:
    """Put as many convolutions into int8 as the budget allows.

    Every method is judged with all layers in int8, and the best is kept. If that is over the budget, the layers that
    change the answers most are left in float, as few as possible.

    Args:
        graph: The float32 graph, ``image`` uint8 [N, H, W, 3] to ``probability`` uint8 [N, H, W].
        calibration: Photos for the ranges of activations, uint8 [H, W, 3] each, in the size of the graph.
        judge: The task; see :func:`judge_on`.
        config: The budget and the methods.
        watch: Told about progress.

    Raises:
        DataError: No calibration photos, or labelled photos on which the float graph finds nothing.
        ModelError: The graph has no convolution with stored weights, or its activations are not finite.
        ParityTolerance: The budget cannot be met unless most layers are left in float.
    """
    if not len(calibration):
        raise DataError("int8 needs photos to calibrate on, and there are none")
    tell: Watch = watch or (lambda what, done, total: None)
    proto = onnx.load_from_string(graph)
    layers = frozenset(layers_of(proto))
    magnitudes = calibrate(proto, calibration, tell)
    ranges = {name: {of: METHODS[name](seen) for of, seen in magnitudes.items()} for name in config.methods}
    change = _change_from(graph, calibration)
    tell("judging the float graph", 0, 0)
    reference = judge(graph)
    if not reference > 0:
        raise DataError(f"the float graph has an IoU of {reference} on the labelled photos: nothing can be lost")

    def loss(candidate: bytes) -> float:
        return 100 * (reference - judge(candidate))

    verdicts: dict[str, Verdict] = {}
    for name in _told("judging calibration methods", config.methods, tell):
        candidate = with_int8(proto, layers, ranges[name])
        verdicts[name] = Verdict(loss(candidate), change(candidate))
    method = _best(verdicts)
    alone = {
        layer: change(with_int8(proto, {layer}, ranges[method]))
        for layer in _told("sensitivity of the layers", layers_of(proto), tell)
    }

    def loss_without(in_float: frozenset[str]) -> float:
        tell("choosing layers", 0, 0)
        return loss(with_int8(proto, layers - in_float, ranges[method]))

    order = tuple(sorted(alone, key=lambda layer: -alone[layer]))
    search = _Search(order, loss_without, config.budget, {frozenset(): verdicts[method].loss})
    in_float = search.fewest_in_float()
    result = with_int8(proto, layers - in_float, ranges[method])
    checker.check_model(onnx.load_from_string(result), full_check=True)
    return Quantized(
        result,
        {
            "method": method,
            "iou": {"float": reference, "int8": reference - search.judged[in_float] / 100},
            "methods": {name: verdict.as_dict() for name, verdict in verdicts.items()},
            **search.as_dict(in_float),
            "sensitivity": {layer: round(alone[layer], 4) for layer in order},
        },
    )


def judge_on(photos: Photos) -> Judge:
    """The headline metric on labelled photos, in ONNX Runtime on the CPU.

    It computes a Q/DQ graph in float32 with all operands of the quantized convolutions on the int8 grid, and biases in
    such fine steps (see above) that no rounding of its own counts beside that.

    Raises:
        DataError: They are not labelled.
    """
    labels = photos.labels
    if labels is None:
        raise DataError("int8 is judged on labelled photos, and these have no labels")
    return lambda graph: labels.iou(np.stack(list(_answers(graph, photos.images))))


class Magnitudes:
    """How often each magnitude occurs in a tensor: a histogram that grows with what it sees.

    Zeros are not counted: they are exact at every range, and half of what comes out of a ReLU. The top of the
    histogram is a power of two, so that the same values give the same counts in whatever order they come, and memory
    is bounded however many come.

    Attributes:
        counts: int64 [BINS], of equal width from 0 to ``top``.
        top: A power of two above ``peak``.
        peak: The largest magnitude.
    """

    def __init__(self) -> None:
        self.counts: npt.NDArray[np.int64] = np.zeros(BINS, np.int64)
        self.top = NOTHING
        self.peak = 0.0

    def add(self, values: F32) -> None:
        """Count values, float32 of any shape.

        Raises:
            ModelError: One of them is NaN or infinite.
        """
        sizes = np.abs(values[values != 0])
        peak = float(sizes.max(initial=0))
        if not math.isfinite(peak):
            raise ModelError("an activation is NaN or infinite: train or export the float network again")
        if peak <= NOTHING:
            return
        self.peak = max(self.peak, peak)
        if not self.counts.any():
            self.top = 2.0 ** math.frexp(peak)[1]
        while self.top <= peak:
            self.counts = np.concatenate([self.counts.reshape(-1, 2).sum(1), np.zeros(BINS // 2, np.int64)])
            self.top *= 2
        self.counts += np.bincount((sizes * np.float32(BINS / self.top)).astype(np.int64), minlength=BINS)

    @property
    def used(self) -> int:
        """The number of bins up to the last one with something in it."""
        return int(np.flatnonzero(self.counts)[-1]) + 1 if self.counts.any() else 0

    def edge(self, bins: int) -> float:
        """The upper edge of that many bins, but not more than the peak."""
        return min(self.peak, bins * self.top / BINS)


def minmax(seen: Magnitudes) -> float:
    """The largest magnitude: nothing is clipped."""
    return seen.peak


def percentile(seen: Magnitudes) -> float:
    """The magnitude that only one in ten thousand exceeds."""
    total = seen.counts.cumsum()
    return seen.edge(int(np.searchsorted(total, KEPT * total[-1])) + 1)


def entropy(seen: Magnitudes) -> float:
    """The range with the least information lost, as Kullback-Leibler divergence.

    Migacz, "8-bit Inference with TensorRT", GTC 2017 (S7310). For each candidate, what lies above it is added to its
    last bin, and this is compared with the same bins after merging them into the levels of int8.
    """
    counts = seen.counts[: seen.used].astype(np.float64)
    levels = LARGEST + 1
    if len(counts) <= levels:
        return seen.peak
    step = max(1, BINS // 1024)  # finer than the histogram of the talk, and a second for a whole network
    candidates = range(len(counts), levels - 1, -step)  # equal ones: the widest
    return seen.edge(min(candidates, key=lambda bins: _divergence(counts, bins, levels)))


def _divergence(counts: npt.NDArray[np.float64], bins: int, levels: int) -> float:
    """Of the first ``bins`` counts, with the rest clipped into the last, from their own merging into levels."""
    kept = counts[:bins]
    p = kept.copy()
    p[-1] += counts[bins:].sum()
    starts = np.arange(levels) * bins // levels
    filled = np.add.reduceat((kept > 0).astype(np.float64), starts)
    means = np.add.reduceat(kept, starts) / np.maximum(filled, 1)
    q = np.where(kept > 0, np.repeat(means, np.diff(starts, append=bins)), 0)
    p, q = p / p.sum(), q / max(q.sum(), 1)
    seen = p > 0
    return float((p[seen] * np.log(p[seen] / np.maximum(q[seen], 1e-12))).sum())


#: How the range of a tensor follows from its magnitudes; the order is that of `QuantizeConfig.methods`.
METHODS: Final[Mapping[str, Callable[[Magnitudes], float]]] = {
    "minmax": minmax,
    "percentile": percentile,
    "entropy": entropy,
}


def calibrate(proto: ModelProto, photos: Sequence[U8] | U8, watch: Watch) -> dict[str, Magnitudes]:
    """Magnitudes of what each convolution takes, by the tensor's name; of what comes before, if that is a MaxPool.

    One photo at a time, and of each photo only the histograms are kept. (onnxruntime's calibrators keep all
    activations of all photos, run once per method, and at their default of 128 bins its entropy is its min-max.)

    Args:
        proto: The float graph.
        photos: uint8 [H, W, 3] each.
        watch: Told about progress.

    Raises:
        ModelError: An activation is NaN or infinite.
    """
    names = list(dict.fromkeys(_source(proto, conv.input[0]) for conv in _convolutions(proto)))
    opened = ModelProto.FromString(proto.SerializeToString())
    del opened.graph.output[:]
    opened.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names)
    magnitudes = {name: Magnitudes() for name in names}
    session = Session(opened.SerializeToString())
    for done, photo in enumerate(photos):
        watch("calibrating", done, len(photos))
        for name, values in zip(names, session.run(names, photo), strict=True):
            magnitudes[name].add(values)
    return magnitudes


def with_int8(proto: ModelProto, layers: Set[str], ranges: Mapping[str, float]) -> bytes:
    """The graph with some layers in int8, without metadata.

    Args:
        proto: The float graph; it is left as it is.
        layers: Those layers.
        ranges: The largest magnitude of each activation; see :func:`calibrate`.
    """
    chosen = {weight for layer, weight in layers_of(proto).items() if layer in layers}
    convolutions = [conv for conv in _convolutions(proto) if conv.input[1] in chosen]
    rounded = {conv.input[0] for conv in convolutions}
    stored = {tensor.name: tensor for tensor in proto.graph.initializer}
    takes_rounded = _takers(proto, chosen)
    parts: list[NodeProto | TensorProto] = []
    least = _least_scales(proto, convolutions, stored, ranges)
    for weight in dict.fromkeys(conv.input[1] for conv in convolutions):
        parts += _dequantized(weight, numpy_helper.to_array(stored[weight]), least[weight])
    for node in proto.graph.node:
        copy = NodeProto.FromString(node.SerializeToString())
        for i, name in enumerate(node.input):
            if name in chosen or (name in rounded and takes_rounded(node)):
                copy.input[i] = f"{name}_rounded"
        parts.append(copy)
        for name in rounded.intersection(node.output):
            scale = _activation_scale(proto, name, ranges)
            parts += _clipped_and_rounded(name, scale) if node.op_type == "Concat" else _rounded(name, name, scale)
    return _rebuilt(proto, parts)


def int8_weight(weight: F32, least: F32 | None = None) -> tuple[I8, F32]:
    """A convolution's weights in int8 with a scale per output channel.

    Args:
        weight: float32 [O, I, h, w].
        least: What the scale of each channel is at least, float32 [O]. A channel of zeros has that, or 1.

    Returns:
        int8 [O, I, h, w], from -64 to 64, and its scales, float32 [O].
    """
    largest = np.abs(weight).max(axis=(1, 2, 3))
    scales = _scale(largest, LARGEST_WEIGHT)
    if least is not None:
        scales = np.where(largest > NOTHING, np.maximum(scales, least), np.where(least > 0, least, scales))
    values = np.rint(weight / scales.reshape(-1, 1, 1, 1))
    return np.clip(values, -LARGEST_WEIGHT, LARGEST_WEIGHT).astype(np.int8), scales


def _scale(largest: Any, levels: int) -> F32:
    """The scale that gives a largest magnitude that many levels; of an array, each: float32, always above zero."""
    return np.where(largest > NOTHING, largest / np.float32(levels), np.float32(1)).astype(np.float32)


def _activation_scale(proto: ModelProto, name: str, ranges: Mapping[str, float]) -> F32:
    return _scale(np.float32(ranges[_source(proto, name)]), LARGEST)


def _least_scales(
    proto: ModelProto, convolutions: Sequence[NodeProto], stored: Mapping[str, TensorProto], ranges: Mapping[str, float]
) -> dict[str, F32]:
    """For each weight, the scales of its channels, float32 [O], below which a bias would not fit an int32."""
    least: dict[str, F32] = {}
    for conv in convolutions:
        source, weight, *rest = conv.input
        channels = stored[weight].dims[0]
        bias = numpy_helper.to_array(stored[rest[0]]) if rest else np.zeros(channels, np.float32)
        sizes = np.abs(bias).astype(np.float32)
        needed = np.where(sizes > NOTHING, sizes / (_activation_scale(proto, source, ranges) * LARGEST_BIAS), 0)
        least[weight] = np.maximum(least.get(weight, np.float32(0)), needed).astype(np.float32)
    return least


def _convolutions(proto: ModelProto) -> list[NodeProto]:
    """Those whose weights are stored in the graph."""
    stored = {tensor.name for tensor in proto.graph.initializer}
    return [node for node in proto.graph.node if node.op_type == "Conv" and node.input[1] in stored]


def layers_of(proto: ModelProto) -> dict[str, str]:
    """The layers that int8 may be chosen for: the name of each in the network, and of its weights in the graph.

    Raises:
        ModelError: There are none.
    """
    weights = [conv.input[1] for conv in _convolutions(proto)]
    if not weights:
        raise ModelError("no convolution with stored weights in the graph: there is nothing to quantize")
    return {weight.removeprefix("network.").removesuffix(".weight"): weight for weight in weights}


def _source(proto: ModelProto, name: str) -> str:
    """The tensor that has the range of this one: the one before all MaxPools."""
    makers = {output: node for node in proto.graph.node for output in node.output}
    while name in makers and makers[name].op_type == "MaxPool":
        name = makers[name].input[0]
    return name


def _takers(proto: ModelProto, chosen: Set[str]) -> Callable[[NodeProto], bool]:
    """Whether a node takes a rounded activation: all do, except the way to convolutions in float."""

    def takes(node: NodeProto) -> bool:
        if node.op_type == "Conv":
            return node.input[1] in chosen
        if node.op_type == "MaxPool":
            return any(takes(other) for other in proto.graph.node if node.output[0] in other.input)
        return True

    return takes


def _dequantized(weight: str, values: F32, least: F32) -> Iterator[NodeProto | TensorProto]:
    """Weights, float32 [O, I, h, w], in int8, and the node that makes ``{weight}_rounded`` of them."""
    stored, scales = int8_weight(values, least)
    yield numpy_helper.from_array(stored, f"{weight}_int8")
    yield from _parameters(weight, scales)
    yield _linear("Dequantize", f"{weight}_int8", weight, f"{weight}_rounded", axis=0)


def _rounded(source: str, name: str, scale: F32) -> Iterator[NodeProto | TensorProto]:
    """The pair of nodes that makes ``{name}_rounded`` of a tensor."""
    yield from _parameters(name, scale)
    yield _linear("Quantize", source, name, f"{name}_int8")
    yield _linear("Dequantize", f"{name}_int8", name, f"{name}_rounded")


def _clipped_and_rounded(name: str, scale: F32) -> Iterator[NodeProto | TensorProto]:
    """The same, with a Clip before it; see the module's docstring."""
    lowest, highest, clipped = f"{name}_lowest", f"{name}_highest", f"{name}_clipped"
    yield numpy_helper.from_array(-LARGEST * scale, lowest)
    yield numpy_helper.from_array(LARGEST * scale, highest)
    yield helper.make_node("Clip", [name, lowest, highest], [clipped], clipped)
    yield from _rounded(clipped, name, scale)


def _linear(kind: str, name: str, of: str, output: str, **attributes: Any) -> NodeProto:
    inputs = [name, f"{of}_scale", f"{of}_zero"]
    return helper.make_node(f"{kind}Linear", inputs, [output], f"{of}_{kind}", **attributes)


def _parameters(of: str, scales: F32) -> Iterator[TensorProto]:
    yield numpy_helper.from_array(scales, f"{of}_scale")
    yield numpy_helper.from_array(np.zeros(scales.shape, np.int8), f"{of}_zero")


def _rebuilt(proto: ModelProto, parts: Sequence[NodeProto | TensorProto]) -> bytes:
    """The graph with other nodes, in order, and more constants; without those that are no longer used."""
    nodes = [part for part in parts if isinstance(part, NodeProto)]
    used = {name for node in nodes for name in node.input}
    constants = [part for part in (*proto.graph.initializer, *parts) if isinstance(part, TensorProto)]
    kept = [tensor for tensor in constants if tensor.name in used]
    graph = helper.make_graph(nodes, proto.graph.name, proto.graph.input, proto.graph.output, kept)
    model = helper.make_model(graph, opset_imports=proto.opset_import, ir_version=proto.ir_version)
    model.producer_name, model.producer_version = proto.producer_name, proto.producer_version
    return model.SerializeToString()  # type: ignore[no-any-return]


def _answers(graph: bytes, photos: Sequence[U8] | U8) -> Iterator[U8]:
    """Probabilities, uint8 [H, W] for each photo."""
    session = Session(graph)
    return (session.run([OUTPUT], photo)[0][0] for photo in photos)


def _change_from(graph: bytes, photos: Sequence[U8] | U8) -> Callable[[bytes], float]:
    """What measures the mean absolute change of a graph's answers from those of this one, in levels of 255.

    Although answers are whole levels, it is sharp far below one: of many pixels, as many change by a level as lie
    within the change from the middle between two.
    """
    probes = photos[:: math.ceil(len(photos) / PROBES)]  # from all over: photos sorted by name begin with one breed
    before = list(_answers(graph, probes))

    def change(other: bytes) -> float:
        pairs = zip(_answers(other, probes), before, strict=True)
        return float(np.mean([np.abs(after.astype(np.int16) - answer).mean() for after, answer in pairs]))

    return change


def _told(what: str, items: Collection[str], tell: Watch) -> Iterator[str]:
    """The items one by one, with progress."""
    for done, item in enumerate(items):
        tell(what, done, len(items))
        yield item


def _best(verdicts: Mapping[str, Verdict]) -> str:
    """The method that loses fewest points.

    A gain is no merit, and a tenth of a point on a few hundred photos is chance: between such, the method that stays
    closest to the float graph.
    """
    return min(verdicts, key=lambda name: (round(max(0.0, verdicts[name].loss), 1), verdicts[name].change))
