"""Post-training int8 quantization: calibrated on photos, evaluated by IoU; layers that lose too much stay in float.

The result is a QDQ graph (QuantizeLinear and DequantizeLinear nodes) that every compiler accepts unchanged: symmetric
int8 with zero points of 0, per-channel weights, per-tensor activations. Biases stay in float, because TensorRT does
not dequantize int32. ONNX Runtime itself quantizes a bias to int32, with the product of the input's and the weight's
scale as its scale, and does not check for overflow. So where the weights of a channel are nearly zero, their scale is
raised until the bias fits.

An activation is quantized where it is produced, and all its consumers read the quantized tensor, attention gates and
concatenations included, so that one byte per value is stored. Only convolutions that stay in float read the original.

Weights have seven bits, -64 to 64: x86 CPUs without VNNI add two products of bytes in saturating 16-bit arithmetic.
With eight bits, a file gave useless masks there although it had passed its parity test on newer CPUs. The accuracy
lost with the eighth bit is within noise (benchmarks/LOG.md).

Two workarounds are for OpenVINO alone and change no value (except -128, which becomes -127). It loses the scale of
int8 activations where a MaxPool or a Concat lies between the quantization and the convolution, or a Concat directly
precedes the quantization: versions 2025.3 and 2026.4 do so silently, and the masks are useless. So the output of a
MaxPool is quantized again at the same scale, and the output of a Concat is clipped to the range before quantization.
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
#: Computes the IoU, in [0, 1], of a serialized graph on labelled photos.
Judge: TypeAlias = Callable[[bytes], float]

#: Largest quantized activation; symmetric, so -128 is not used.
LARGEST: Final = 127
#: Largest quantized weight: two products with an unsigned byte fit 16 bits, 2 x 255 x 64 = 32,640. ("Saturation
#: (overflow) issue workaround", OpenVINO's documentation; "Nuances of int8 computations", oneDNN's.)
LARGEST_WEIGHT: Final = 64
#: Largest int32 of a quantized bias; leaves room for the products that are added to it.
LARGEST_BIAS: Final = 2**30
#: Bins of a histogram of magnitudes; at least half of them lie below the largest magnitude.
BINS: Final = 4096
#: Magnitudes and scales up to this count as zero: the product of two scales must stay a normal float32. A power of two.
NEGLIGIBLE: Final = 2.0**-50
#: Share of the magnitudes that `percentile` does not clip.
KEPT: Final = 0.9999
#: Largest number of calibration photos on which the change of the output is measured.
PROBES: Final = 16
#: At least this share of the layers must be in int8, else the file could hardly be called int8.
FEWEST: Final = 0.25
#: Layers that are tried in int8 again after the bisection; each costs an evaluation.
SECOND_TRIES: Final = 8


@dataclass(frozen=True)
class Quantized:
    """An int8 graph whose loss of IoU is within the budget.

    Attributes:
        graph: The QDQ ONNX graph, without metadata.
        choice: How method and layers were chosen, for the receipt; JSON values. ``loss`` is in points (hundredths) of
            IoU on the labelled photos; ``change`` is the mean absolute change of the output on calibration photos, in
            steps of 1/255; ``sensitivity`` is that change with one layer alone in int8, most harmful layer first;
            ``search`` lists the number of layers in float and the loss of each evaluation.
    """

    graph: bytes
    choice: dict[str, Any]


@dataclass(frozen=True)
class Verdict:
    """How far a graph is from the float graph; see :class:`Quantized`."""

    loss: float
    change: float

    def as_dict(self) -> dict[str, float]:
        """JSON values."""
        return {"loss": round(self.loss, 4), "change": round(self.change, 4)}


@dataclass(frozen=True)
class _Search:
    """The search for the fewest layers that must stay in float.

    Attributes:
        order: All layers, most harmful first.
        loss: Evaluates the graph with the given layers in float and all others in int8.
        budget: Largest allowed loss.
        judged: The losses so far, keyed by the layers in float.
    """

    order: tuple[str, ...]
    loss: Callable[[frozenset[str]], float]
    budget: float
    judged: dict[frozenset[str], float]

    def fewest_in_float(self) -> frozenset[str]:
        """Bisect over the order, then try again in int8 some of the layers that stayed in float.

        Raises:
            ParityTolerance: Too many layers would have to stay in float.
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
        for layer in reversed(self.order[: works - 1][-SECOND_TRIES:]):
            if self._lost(kept - {layer}) <= self.budget:
                kept -= {layer}
        return kept

    def as_dict(self, in_float: frozenset[str]) -> dict[str, Any]:
        """The result and every evaluation of the search; JSON values."""
        return {
            "loss": round(self.judged[in_float], 4),
            "budget": self.budget,
            "layers": len(self.order),
            "layers_int8": len(self.order) - len(in_float),
            "in_float": [layer for layer in self.order if layer in in_float],
            "search": [{"in_float": len(left), "loss": round(lost, 4)} for left, lost in self.judged.items()],
        }

    def _within(self, first: int) -> bool:
        """Whether the loss is within the budget with the first ``first`` layers of the order in float."""
        return self._lost(frozenset(self.order[:first])) <= self.budget

    def _lost(self, in_float: frozenset[str]) -> float:
        if in_float not in self.judged:
            self.judged[in_float] = self.loss(in_float)
        return self.judged[in_float]

    def _refusal(self, first: int) -> str:
        every, some = self._lost(frozenset()), self._lost(frozenset(self.order[:first]))
        return (
            f"int8 loses {every:.2f} points of IoU, and still {some:.2f} with {first} of the {len(self.order)} layers "
            f"left in float; the budget is {self.budget:g}: raise it with --int8-budget, or export as fp16"
        )


def quantize(
    graph: bytes, calibration: Sequence[U8] | U8, judge: Judge, config: QuantizeConfig, watch: Watch | None = None
) -> Quantized:
    """Quantize as many convolutions to int8 as the budget allows.

    Every calibration method is evaluated with all layers in int8, and the best one is kept. If its loss exceeds the
    budget, the layers that change the output most stay in float, as few as possible.

    Args:
        graph: The float32 graph, ``image`` uint8 [N, H, W, 3] to ``probability`` uint8 [N, H, W].
        calibration: Photos for the activation ranges, uint8 [H, W, 3] each, in the size of the graph.
        judge: Computes the IoU of a graph; see :func:`judge_on`.
        config: The budget and the methods.
        watch: Called with progress.

    Raises:
        DataError: There are no calibration photos, or the IoU of the float graph is 0.
        ModelError: The graph has no convolution with stored weights, or an activation is not finite.
        ParityTolerance: The budget cannot be met, even with most layers in float.
    """
    if not len(calibration):
        raise DataError("int8 needs photos to calibrate on: the training split has none")
    tell: Watch = watch or (lambda what, done, total: None)
    proto = onnx.load_from_string(graph)
    layers = frozenset(layers_of(proto))
    magnitudes = calibrate(proto, calibration, tell)
    ranges = {name: {of: METHODS[name](seen) for of, seen in magnitudes.items()} for name in config.methods}
    change = _change_from(graph, calibration)
    tell("evaluating the float graph", 0, 0)
    reference = judge(graph)
    if not reference > 0:
        raise DataError(f"the float graph has an IoU of {reference} on the labelled photos, so no loss can be measured")

    def loss(candidate: bytes) -> float:
        return 100 * (reference - judge(candidate))

    verdicts: dict[str, Verdict] = {}
    for name in _with_progress("evaluating calibration methods", config.methods, tell):
        candidate = with_int8(proto, layers, ranges[name])
        verdicts[name] = Verdict(loss(candidate), change(candidate))
    method = _best(verdicts)
    alone = {
        layer: change(with_int8(proto, {layer}, ranges[method]))
        for layer in _with_progress("measuring the sensitivity of layers", layers_of(proto), tell)
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
    """Return a function that computes a graph's IoU, the headline metric, in ONNX Runtime on the CPU.

    It computes a QDQ graph in float32 with all operands of the quantized convolutions on the int8 grid, and biases in
    such fine steps (see above) that its own rounding is negligible.

    Raises:
        DataError: The photos have no labels.
    """
    labels = photos.labels
    if labels is None:
        raise DataError("int8 is evaluated on labelled photos, and these have no labels")
    return lambda graph: labels.iou(np.stack(list(_answers(graph, photos.images))))


class Magnitudes:
    """A histogram of the magnitudes in a tensor, whose range grows with the values.

    Zeros are not counted: every scale represents them exactly, and they are half of a ReLU's output. The upper end is
    a power of two, so the counts do not depend on the order of the values, and memory is bounded for any number.

    Attributes:
        counts: int64 [BINS], in bins of equal width from 0 to ``top``.
        top: A power of two above ``peak``.
        peak: The largest magnitude.
    """

    def __init__(self) -> None:
        self.counts: npt.NDArray[np.int64] = np.zeros(BINS, np.int64)
        self.top = NEGLIGIBLE
        self.peak = 0.0

    def add(self, values: F32) -> None:
        """Add values, float32 of any shape.

        Raises:
            ModelError: A value is NaN or infinite.
        """
        sizes = np.abs(values[values != 0])
        peak = float(sizes.max(initial=0))
        if not math.isfinite(peak):
            raise ModelError("an activation of the float network is NaN or infinite: train or export it again")
        if peak <= NEGLIGIBLE:
            return
        self.peak = max(self.peak, peak)
        while self.top <= peak:
            self.counts = np.concatenate([self.counts.reshape(-1, 2).sum(1), np.zeros(BINS // 2, np.int64)])
            self.top *= 2
        self.counts += np.bincount((sizes * np.float32(BINS / self.top)).astype(np.int64), minlength=BINS)

    @property
    def used(self) -> int:
        """The number of bins up to and including the last non-empty one."""
        return int(np.flatnonzero(self.counts)[-1]) + 1 if self.counts.any() else 0

    def edge(self, bins: int) -> float:
        """The upper edge of the first ``bins`` bins, but at most the peak."""
        return min(self.peak, bins * self.top / BINS)


def minmax(seen: Magnitudes) -> float:
    """Range by min-max: the largest magnitude, so nothing is clipped."""
    return seen.peak


def percentile(seen: Magnitudes) -> float:
    """Range by percentile: the magnitude that only one value in ten thousand exceeds."""
    total = seen.counts.cumsum()
    return seen.edge(int(np.searchsorted(total, KEPT * total[-1])) + 1)


def entropy(seen: Magnitudes) -> float:
    """Range by entropy: the one that loses the least information, measured as Kullback-Leibler divergence.

    Migacz, "8-bit Inference with TensorRT", GTC 2017 (S7310). For each candidate, the counts above it are added to its
    last bin, and this histogram is compared with the same bins merged into the levels of int8.
    """
    counts = seen.counts[: seen.used].astype(np.float64)
    levels = LARGEST + 1
    if len(counts) <= levels:
        return seen.peak
    step = max(1, BINS // 1024)  # finer than the histogram in the talk; takes a second for the whole network
    candidates = range(len(counts), levels - 1, -step)  # descending: of equals, the widest is kept
    return seen.edge(min(candidates, key=lambda bins: _divergence(counts, bins, levels)))


def _divergence(counts: npt.NDArray[np.float64], bins: int, levels: int) -> float:
    """Divergence of the first ``bins`` counts, with the rest clipped into the last, from their merge into levels."""
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


#: Calibration methods: each computes a tensor's range from its magnitudes. In the order of `QuantizeConfig.methods`.
METHODS: Final[Mapping[str, Callable[[Magnitudes], float]]] = {
    "minmax": minmax,
    "percentile": percentile,
    "entropy": entropy,
}


def calibrate(proto: ModelProto, photos: Sequence[U8] | U8, watch: Watch) -> dict[str, Magnitudes]:
    """Collect the magnitudes of each convolution's input, by tensor name; for a MaxPool's output, of its input.

    Runs one photo at a time and keeps only the histograms. (onnxruntime's calibrators keep all activations of all
    photos, run once per method, and at their default of 128 bins their entropy method equals min-max.)

    Args:
        proto: The float graph.
        photos: uint8 [H, W, 3] each.
        watch: Called with progress.

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
    """Return the graph with some layers in int8, serialized, without metadata.

    Args:
        proto: The float graph; not modified.
        layers: Names of the layers to quantize; see :func:`layers_of`.
        ranges: Range of each activation, computed from :func:`calibrate` by one of :data:`METHODS`.
    """
    chosen = {weight for layer, weight in layers_of(proto).items() if layer in layers}
    convolutions = [conv for conv in _convolutions(proto) if conv.input[1] in chosen]
    rounded = {conv.input[0] for conv in convolutions}
    stored = {tensor.name: tensor for tensor in proto.graph.initializer}
    reads_quantized = _reader_of_quantized(proto, chosen)
    parts: list[NodeProto | TensorProto] = []
    least = _least_scales(proto, convolutions, stored, ranges)
    for weight in dict.fromkeys(conv.input[1] for conv in convolutions):
        parts += _dequantized(weight, numpy_helper.to_array(stored[weight]), least[weight])
    for node in proto.graph.node:
        copy = NodeProto.FromString(node.SerializeToString())
        for i, name in enumerate(node.input):
            if name in chosen or (name in rounded and reads_quantized(node)):
                copy.input[i] = f"{name}_rounded"
        parts.append(copy)
        for name in rounded.intersection(node.output):
            scale = _activation_scale(proto, name, ranges)
            parts += _clipped_and_rounded(name, scale) if node.op_type == "Concat" else _rounded(name, name, scale)
    return _rebuilt(proto, parts)


def int8_weight(weight: F32, least: F32 | float = 0.0) -> tuple[I8, F32]:
    """Quantize a convolution's weights to int8, per output channel.

    Args:
        weight: float32 [O, I, h, w].
        least: Smallest scale of each channel, float32 [O].

    Returns:
        int8 [O, I, h, w], from -64 to 64, and the scales, float32 [O].
    """
    scales = _positive(np.maximum(np.abs(weight).max(axis=(1, 2, 3)) / np.float32(LARGEST_WEIGHT), least))
    return np.rint(weight / scales.reshape(-1, 1, 1, 1)).astype(np.int8), scales


def _positive(scales: Any) -> F32:
    """The scales, float32, with 1 in place of negligible ones: all values are then rounded to 0."""
    return np.where(scales > NEGLIGIBLE, scales, 1).astype(np.float32)


def _activation_scale(proto: ModelProto, name: str, ranges: Mapping[str, float]) -> F32:
    return _positive(np.float32(ranges[_source(proto, name)]) / np.float32(LARGEST))


def _least_scales(
    proto: ModelProto, convolutions: Sequence[NodeProto], stored: Mapping[str, TensorProto], ranges: Mapping[str, float]
) -> dict[str, F32]:
    """For each weight, the smallest scales of its channels, float32 [O], at which the bias fits an int32."""
    least: dict[str, F32] = {}
    for conv in convolutions:
        source, weight, *rest = conv.input
        channels = stored[weight].dims[0]
        bias = numpy_helper.to_array(stored[rest[0]]) if rest else np.zeros(channels, np.float32)
        needed = np.abs(bias) / (_activation_scale(proto, source, ranges) * np.float32(LARGEST_BIAS))
        least[weight] = np.maximum(least.get(weight, np.float32(0)), needed)
    return least


def _convolutions(proto: ModelProto) -> list[NodeProto]:
    """The convolutions whose weights are stored in the graph."""
    stored = {tensor.name for tensor in proto.graph.initializer}
    return [node for node in proto.graph.node if node.op_type == "Conv" and node.input[1] in stored]


def layers_of(proto: ModelProto) -> dict[str, str]:
    """The layers that can be quantized: each layer's name in the network, mapped to its weight's name in the graph.

    Raises:
        ModelError: There are none.
    """
    weights = [conv.input[1] for conv in _convolutions(proto)]
    if not weights:
        raise ModelError("no convolution with stored weights in the graph: there is nothing to quantize")
    return {weight.removeprefix("network.").removesuffix(".weight"): weight for weight in weights}


def _source(proto: ModelProto, name: str) -> str:
    """The tensor whose range this one shares: the input of the MaxPools that precede it, or the tensor itself."""
    producers = {output: node for node in proto.graph.node for output in node.output}
    while name in producers and producers[name].op_type == "MaxPool":
        name = producers[name].input[0]
    return name


def _reader_of_quantized(proto: ModelProto, chosen: Set[str]) -> Callable[[NodeProto], bool]:
    """Return a test whether a node reads quantized activations: all nodes do, except on the way to a float Conv."""

    def reads_quantized(node: NodeProto) -> bool:
        if node.op_type == "Conv":
            return node.input[1] in chosen
        if node.op_type == "MaxPool":
            return any(reads_quantized(other) for other in proto.graph.node if node.output[0] in other.input)
        return True

    return reads_quantized


def _dequantized(weight: str, values: F32, least: F32) -> Iterator[NodeProto | TensorProto]:
    """A quantized weight, from float32 [O, I, h, w], and the DequantizeLinear that produces ``{weight}_rounded``."""
    stored, scales = int8_weight(values, least)
    yield numpy_helper.from_array(stored, f"{weight}_int8")
    yield from _parameters(weight, scales)
    yield _linear("Dequantize", f"{weight}_int8", weight, f"{weight}_rounded", axis=0)


def _rounded(source: str, name: str, scale: F32) -> Iterator[NodeProto | TensorProto]:
    """The QDQ pair that produces ``{name}_rounded`` from a tensor."""
    yield from _parameters(name, scale)
    yield _linear("Quantize", source, name, f"{name}_int8")
    yield _linear("Dequantize", f"{name}_int8", name, f"{name}_rounded")


def _clipped_and_rounded(name: str, scale: F32) -> Iterator[NodeProto | TensorProto]:
    """The same, with a Clip before it; see the module docstring."""
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
    """The graph with these nodes instead, in order, and with added constants; unused constants are removed."""
    nodes = [part for part in parts if isinstance(part, NodeProto)]
    used = {name for node in nodes for name in node.input}
    constants = [part for part in (*proto.graph.initializer, *parts) if isinstance(part, TensorProto)]
    kept = [tensor for tensor in constants if tensor.name in used]
    graph = helper.make_graph(nodes, proto.graph.name, proto.graph.input, proto.graph.output, kept)
    model = helper.make_model(graph, opset_imports=proto.opset_import, ir_version=proto.ir_version)
    model.producer_name, model.producer_version = proto.producer_name, proto.producer_version
    return model.SerializeToString()  # type: ignore[no-any-return]


def _answers(graph: bytes, photos: Sequence[U8] | U8) -> Iterator[U8]:
    """The graph's output for each photo, uint8 [H, W]."""
    session = Session(graph)
    return (session.run([OUTPUT], photo)[0][0] for photo in photos)


def _change_from(graph: bytes, photos: Sequence[U8] | U8) -> Callable[[bytes], float]:
    """Return a function that measures the mean absolute change of another graph's output, in steps of 1/255.

    The output is rounded to whole steps, but the mean over many pixels resolves far smaller changes: the share of
    pixels that cross a rounding boundary is proportional to the change.
    """
    probes = photos[:: math.ceil(len(photos) / PROBES)]  # evenly spaced: photos sorted by name begin with one breed
    before = list(_answers(graph, probes))

    def change(other: bytes) -> float:
        pairs = zip(_answers(other, probes), before, strict=True)
        return float(np.mean([np.abs(after.astype(np.int16) - answer).mean() for after, answer in pairs]))

    return change


def _with_progress(what: str, items: Collection[str], tell: Watch) -> Iterator[str]:
    """Yield the items and report progress."""
    for done, item in enumerate(items):
        tell(what, done, len(items))
        yield item


def _best(verdicts: Mapping[str, Verdict]) -> str:
    """The calibration method with the smallest loss.

    A gain counts as no loss, and differences below a tenth of a point on a few hundred photos are noise: among such
    methods, the one whose output changes least is chosen.
    """
    return min(verdicts, key=lambda name: (round(max(0.0, verdicts[name].loss), 1), verdicts[name].change))
