"""`preprocess` as an ONNX graph: a photo's pixels to what the encoder takes, bit for bit.

The arithmetic is that of Pillow 13's `Image.resize` (libImaging/Resample.c): weights in double,
times 2^22 as integers, and rounded to bytes after each of the two axes.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import numpy_helper, parser

from capexport.preprocessing import ImageSpec

# What both axes have in common is computed for both at once: values of shape (2,), (2, crop) or
# (taps, 2, crop), rows first. Only the pixels that the crop needs are ever touched, and only those
# of one tap are wider than a byte.
_GRAPH = """
<ir_version: {ir_version}, opset_import: ["": {opset}]>
head (uint8[height, width, 3] image) => (float[1, 3, {crop}, {crop}] images) {{
    size = Shape <start = 0, end = 2> (image)
    shortest = ReduceMin (size)
    divisor = Max (shortest, one)
    enlarged = Mul (size, shorter_edge)
    {resized}
    margin = Sub (resized, crop)
    margin_double = Cast <to = 11> (margin)
    offset_double = Mul (margin_double, half)
    offset_even = Round (offset_double)
    offset = Unsqueeze (offset_even, last_axis)

    size_double = Cast <to = 11> (size)
    resized_double = Cast <to = 11> (resized)
    ratio = Div (size_double, resized_double)
    scale = Unsqueeze (ratio, last_axis)
    stretch = Max (scale, one_double)
    support = Mul (stretch, reach)
    sharpness = Div (one_double, stretch)
    position = Add (offset, positions)
    middle = Add (position, half)
    centre = Mul (middle, scale)
    below = Sub (centre, support)
    below_half = Add (below, half)
    below_whole = Cast <to = 7> (below_half)
    low = Max (below_whole, zero)
    above = Add (centre, support)
    above_half = Add (above, half)
    above_whole = Cast <to = 7> (above_half)
    edge = Unsqueeze (size, last_axis)
    high = Min (above_whole, edge)
    count = Sub (high, low)
    most = ReduceMax <keepdims = 0> (count)
    counted = Range (zero, most, one)
    tap = Unsqueeze (counted, tap_axes)
    place = Add (tap, low)
    place_double = Cast <to = 11> (place)
    from_centre = Sub (place_double, centre)
    from_middle = Add (from_centre, half)
    scaled = Mul (from_middle, sharpness)
    distance = Abs (scaled)
    {weight}
    used = Less (tap, count)
    weight = Where (used, any_weight, zero_double)
    running = CumSum (weight, zero)
    total = Gather <axis = 0> (running, minus_one)
    share = Div (weight, total)
    large = Mul (share, whole)
    sign = Sign (large)
    rounding = Mul (sign, half)
    rounded = Add (large, rounding)
    factor = Cast <to = 6> (rounded)

    begin = ReduceMin <keepdims = 0> (low, last_axis)
    end = ReduceMax <keepdims = 0> (high, last_axis)
    extent = Sub (end, begin)
    furthest = Sub (extent, one)
    last_place = Unsqueeze (furthest, last_axis)
    first_place = Unsqueeze (begin, last_axis)
    within = Sub (place, first_place)
    source = Min (within, last_place)
    taps = ReduceMax <keepdims = 0> (count, last_axis)

    less = Sub (size, resized)
    rows_less = Gather (less, zero)
    columns_less = Gather (less, one)
    twice = Add (columns_less, columns_less)
    taller = Less (twice, rows_less)
    shrinks = Less (zero, rows_less)
    rows_first = And (taller, shrinks)
    first = Where (rows_first, zero, one)
    second = Sub (one, first)
    region = If (rows_first) <
        then_branch = as_it_is () => (uint8[a, b, 3] upright) {{
            upright = Slice (image, begin, end)
        }},
        else_branch = turned () => (uint8[a, b, 3] sideways) {{
            needed = Slice (image, begin, end)
            sideways = Transpose <perm = [1, 0, 2]> (needed)
        }}
    >
    {first_pass}
    across = Transpose <perm = [1, 0, 2]> (first_bytes)
    {second_pass}
    pixels = If (rows_first) <
        then_branch = columns_in_front () => (uint8[3, c, d] channels) {{
            channels = Transpose <perm = [2, 1, 0]> (second_bytes)
        }},
        else_branch = rows_in_front () => (uint8[3, c, d] planes) {{
            planes = Transpose <perm = [2, 0, 1]> (second_bytes)
        }}
    >
    batch = Unsqueeze (pixels, zero_axis)
    numbers = Cast <to = 1> (batch)
    fractions = Div (numbers, white)
    centred = Sub (fractions, mean)
    images = Div (centred, std)
}}
"""
_RESIZED = {
    True: "resized = Div (enlarged, divisor)",
    False: "resized = Expand (shorter_edge, two)",
}
# The kernels of Pillow's BILINEAR and BICUBIC, and how far from their middle they reach.
_KERNELS = {
    "bilinear": (
        1,
        """
    slope = Sub (one_double, distance)
    any_weight = Max (slope, zero_double)
    """,
    ),
    "bicubic": (
        2,
        """
    near_a = Mul (distance, three_halves)
    near_b = Sub (near_a, five_halves)
    near_c = Mul (near_b, distance)
    near_d = Mul (near_c, distance)
    near = Add (near_d, one_double)
    far_a = Sub (distance, five)
    far_b = Mul (far_a, distance)
    far_c = Add (far_b, eight)
    far_d = Mul (far_c, distance)
    far_e = Sub (far_d, four)
    far_f = Mul (far_e, minus_half)
    outside = Less (distance, two_double)
    far = Where (outside, far_f, zero_double)
    is_near = Less (distance, one_double)
    any_weight = Where (is_near, near, far)
    """,
    ),
}
# One axis of the two, the first of `{pixels}`: tap by tap, all its output pixels at once.
_PASS = """
    {this}_taps = Gather (taps, {this})
    {this}_factor = Gather <axis = 1> (factor, {this})
    {this}_source = Gather <axis = 1> (source, {this})
    {this}_shape = Shape <start = 1> ({pixels})
    {this}_whole_shape = Concat <axis = 0> (crop_axis, {this}_shape)
    {this}_nothing = Expand (half_a_byte, {this}_whole_shape)
    {this}_sum = Loop <body = {this}_tap (
        int64 {this}_number, bool {this}_go_on, int32[c, b, 3] {this}_before
    ) => (bool {this}_going, int32[c, b, 3] {this}_after) {{
        {this}_going = Identity ({this}_go_on)
        {this}_lines = Gather ({this}_source, {this}_number)
        {this}_taken = Gather <axis = 0> ({pixels}, {this}_lines)
        {this}_wide = Cast <to = 6> ({this}_taken)
        {this}_weights = Gather ({this}_factor, {this}_number)
        {this}_weight = Unsqueeze ({this}_weights, tap_axes_behind)
        {this}_part = Mul ({this}_wide, {this}_weight)
        {this}_after = Add ({this}_before, {this}_part)
    }}> ({this}_taps, yes, {this}_nothing)
    {this}_levels = Div ({this}_sum, whole_int)
    {this}_clipped = Clip ({this}_levels, black, full)
    {this}_bytes = Cast <to = 2> ({this}_clipped)
"""


def image_head(spec: ImageSpec, opset: int, ir_version: int) -> onnx.ModelProto:
    """A graph of `image`, uint8 (height, width, 3) in RGB, upright, to `images`, float32
    (1, 3, spec.crop, spec.crop): what `preprocess` makes of it.

    Images that `preprocess` refuses as too elongated are taken like any other.
    """
    reach, weight = _KERNELS[spec.resample]
    model = parser.parse_model(
        _GRAPH.format(
            ir_version=ir_version,
            opset=opset,
            crop=spec.crop,
            resized=_RESIZED[spec.keep_aspect],
            weight=weight,
            first_pass=_PASS.format(this="first", pixels="region"),
            second_pass=_PASS.format(this="second", pixels="across"),
        )
    )
    used = {name for node in _nodes(model.graph) for name in node.input}
    model.graph.initializer.extend(
        numpy_helper.from_array(np.asarray(value), name)
        for name, value in _constants(spec, reach).items()
        if name in used
    )
    return model


def _nodes(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """Those of a graph and of the graphs within."""
    inner = [item.g for node in graph.node for item in node.attribute if item.HasField("g")]
    return [*graph.node, *(node for body in inner for node in _nodes(body))]


def _constants(spec: ImageSpec, reach: int) -> dict[str, object]:
    double, byte = np.float64, 1 << 22
    return {
        "shorter_edge": np.array([spec.resize]),
        "crop": np.int64(spec.crop),
        "crop_axis": np.array([spec.crop]),
        "positions": np.arange(spec.crop, dtype=double),
        "zero": np.int64(0),
        "one": np.int64(1),
        "minus_one": np.int64(-1),
        "two": np.array([2]),
        "last_axis": np.array([1]),
        "zero_axis": np.array([0]),
        "tap_axes": np.array([1, 2]),
        "tap_axes_behind": np.array([1, 2]),
        "zero_double": double(0),
        "half": double(0.5),
        "one_double": double(1),
        "two_double": double(2),
        "three_halves": double(1.5),
        "five_halves": double(2.5),
        "four": double(4),
        "five": double(5),
        "eight": double(8),
        "minus_half": double(-0.5),
        "reach": double(reach),
        "whole": double(byte),
        "whole_int": np.int32(byte),
        "half_a_byte": np.int32(byte // 2),
        "black": np.int32(0),
        "full": np.int32(255),
        "yes": np.bool_(True),
        "white": np.float32(255),
        "mean": np.array(spec.mean, np.float32)[:, None, None],
        "std": np.array(spec.std, np.float32)[:, None, None],
    }
