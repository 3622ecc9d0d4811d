"""`preprocess` as an ONNX graph: a photo's pixels to what the encoder takes, bit for bit.

The arithmetic is that of Pillow 13's `Image.resize` (libImaging/Resample.c): weights in double,
times 2^22 as integers, and rounded to bytes after each of the two axes.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper, parser

from capexport.preprocessing import ImageSpec

# What both axes have in common is computed for both at once: values of shape (2, 1, 1),
# (2, crop, 1) or (2, crop, taps), rows first. Only the pixels that the crop needs are ever touched.
# `photos` is always 1, but onnxruntime must not know: for a batch that it knows to be one it would
# compute the int8 encoder's last layers in float32, and differ from `Captioner`.
_GRAPH = """
<ir_version: {ir_version}, opset_import: ["": {opset}]>
head (uint8[height, width, 3] image) => (float[photos, 3, {crop}, {crop}] images) {{
    # How large Pillow would make the image, and how much of that the crop cuts off in front.
    size = Shape <start = 0, end = 2> (image)
    shortest = ReduceMin (size)
    divisor = Max (shortest, one)
    enlarged = Mul (size, shorter_edge)
    {resized}
    margin = Sub (resized, crop)
    margin_double = Cast <to = 11> (margin)
    middle_margin = Mul (margin_double, half)
    offset = Round (middle_margin)

    # Which pixels a pixel of the output is made of: places `low` up to `high`, around `centre`.
    size_double = Cast <to = 11> (size)
    resized_double = Cast <to = 11> (resized)
    ratio = Div (size_double, resized_double)
    scale = Unsqueeze (ratio, inner_axes)
    stretch = Max (scale, one_double)
    support = Mul (stretch, reach)
    sharpness = Div (one_double, stretch)
    start = Unsqueeze (offset, inner_axes)
    position = Add (start, positions)
    middle = Add (position, half)
    centre = Mul (middle, scale)
    below = Sub (centre, support)
    below_half = Add (below, half)
    below_whole = Cast <to = 7> (below_half)
    low = Max (below_whole, zero)
    above = Add (centre, support)
    above_half = Add (above, half)
    above_whole = Cast <to = 7> (above_half)
    edge = Unsqueeze (size, inner_axes)
    high = Min (above_whole, edge)
    count = Sub (high, low)
    most = ReduceMax <keepdims = 0> (count)
    tap = Range (zero, most, one)
    place = Add (low, tap)
    # Their weights: the kernel's values, divided by their sum.
    place_double = Cast <to = 11> (place)
    from_centre = Sub (place_double, centre)
    from_middle = Add (from_centre, half)
    scaled = Mul (from_middle, sharpness)
    distance = Abs (scaled)
    {weight}
    used = Less (tap, count)
    weight = Where (used, any_weight, zero_double)
    running = CumSum (weight, two)
    total = Gather <axis = 2> (running, last)
    share = Div (weight, total)
    # As whole numbers of 22 bits, in two parts (see the passes).
    large = Mul (share, whole)
    sign = Sign (large)
    rounding = Mul (sign, half)
    nearly = Add (large, rounding)
    factor = Cast <to = 7> (nearly)
    factor_double = Cast <to = 11> (factor)
    steps = Div (factor_double, step)
    whole_steps = Floor (steps)
    upper = Mul (whole_steps, step)
    lower = Sub (factor_double, upper)
    upper_column = Unsqueeze (upper, two_axis)
    upper_parts = Cast <to = 1> (upper_column)
    lower_column = Unsqueeze (lower, two_axis)
    lower_parts = Cast <to = 1> (lower_column)

    # The part of the image that the crop needs, and places within it.
    begin = ReduceMin <keepdims = 0> (low, inner_axes)
    end = ReduceMax <keepdims = 0> (high, inner_axes)
    extent = Sub (end, begin)
    furthest = Sub (extent, one)
    last_place = Unsqueeze (furthest, inner_axes)
    first_place = Unsqueeze (begin, inner_axes)
    within = Sub (place, first_place)
    source = Min (within, last_place)
    taps = ReduceMax <keepdims = 0> (count, inner_axes)

    # Pillow changes the width first, or the height of an image that loses more than twice as many
    # rows as columns. A pass changes the number of rows; for the width, the image is transposed.
    less = Sub (size, resized)
    rows_less = Gather (less, zero)
    columns_less = Gather (less, one)
    twice = Add (columns_less, columns_less)
    taller = Less (twice, rows_less)
    shrinks = Less (zero, rows_less)
    rows_first = And (taller, shrinks)
    first = Where (rows_first, zero, one)
    second = Sub (one, first)
    needed = Slice (image, begin, end)
    rows = Reshape (needed, flat_shape)
    lines = If (rows_first) <
        then_branch = by_rows () => (uint8[a, b] upright) {{
            upright = Identity (rows)
        }},
        else_branch = by_columns () => (uint8[c, d] sideways) {{
            sideways = Transpose <perm = [1, 0]> (rows)
        }}
    >
    first_extent = Gather (extent, first)
    first_lines = Unsqueeze (first_extent, zero_axis)
    first_shape = Concat <axis = 0> (first_lines, last)
    first_pixels = Reshape (lines, first_shape)
    {first_pass}
    across_shape = Where (rows_first, one_channel_shape, channels_shape)
    across = Reshape (first_resized, across_shape)
    turned_back = Transpose <perm = [1, 0]> (across)
    second_pixels = Reshape (turned_back, lines_shape)
    {second_pass}
    rows_pixels = Reshape (second_resized, rows_pixels_shape)
    columns_pixels = Reshape (second_resized, columns_pixels_shape)
    planes = If (rows_first) <
        then_branch = columns_in_front () => (uint8[3, {crop}, {crop}] from_columns) {{
            from_columns = Transpose <perm = [1, 2, 0]> (columns_pixels)
        }},
        else_branch = rows_in_front () => (uint8[3, {crop}, {crop}] from_rows) {{
            from_rows = Transpose <perm = [2, 0, 1]> (rows_pixels)
        }}
    >
    # A batch of one, normalized.
    photos = Min (divisor, one)
    batch_shape = Concat <axis = 0> (photos, planes_shape)
    batch = Expand (planes, batch_shape)
    numbers = Cast <to = 1> (batch)
    fractions = Div (numbers, white)
    centred = Sub (fractions, mean)
    images = Div (centred, std)
}}
"""
_RESIZED = {
    True: "resized = Div (enlarged, divisor)",
    False: "resized = Expand (shorter_edge, two_axis)",
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
# A pass over one of the two axes, the first of its pixels: as many output lines at once as
# `at_once` allows. A weight is multiplied in two parts, its last 7 bits and the others: the sums of
# each are whole numbers, or multiples of 128, that float32 holds exactly, in whatever order they
# are added (of up to 500 taps: an edge of 50,000 pixels).
_PASS = """
    {this}_taps = Gather (taps, {this})
    {this}_end = Unsqueeze ({this}_taps, zero_axis)
    {this}_uppers = Gather (upper_parts, {this})
    {this}_upper = Slice ({this}_uppers, zero_axis, {this}_end, two_axis)
    {this}_lowers = Gather (lower_parts, {this})
    {this}_lower = Slice ({this}_lowers, zero_axis, {this}_end, two_axis)
    {this}_sources = Gather (source, {this})
    {this}_source = Slice ({this}_sources, zero_axis, {this}_end, one_axis)
    {this}_width = Shape <start = 1> ({this}_pixels)
    {this}_cost = Mul ({this}_width, {this}_taps)
    {this}_fitting = Div (at_once, {this}_cost)
    {this}_clipped_count = Clip ({this}_fitting, one, crop)
    {this}_line_count = Squeeze ({this}_clipped_count)
    {this}_counted = Range (zero, {this}_line_count, one)
    {this}_rounds = Div (last_line, {this}_line_count)
    {this}_times = Add ({this}_rounds, one)
    {this}_stacked = Loop <body = {this}_some (
        int64 {this}_number, bool {this}_go_on
    ) => (bool {this}_going, uint8[lines, 1, values] {this}_bytes) {{
        {this}_going = Identity ({this}_go_on)
        {this}_from = Mul ({this}_number, {this}_line_count)
        {this}_wanted = Add ({this}_counted, {this}_from)
        {this}_line = Min ({this}_wanted, last_line)
        {this}_places = Gather ({this}_source, {this}_line)
        {this}_taken = Gather ({this}_pixels, {this}_places)
        {this}_wide = Cast <to = 1> ({this}_taken)
        {this}_upper_weights = Gather ({this}_upper, {this}_line)
        {this}_upper_float = MatMul ({this}_upper_weights, {this}_wide)
        {this}_upper_sum = Cast <to = 6> ({this}_upper_float)
        {this}_lower_weights = Gather ({this}_lower, {this}_line)
        {this}_lower_float = MatMul ({this}_lower_weights, {this}_wide)
        {this}_lower_sum = Cast <to = 6> ({this}_lower_float)
        {this}_sum = Add ({this}_upper_sum, {this}_lower_sum)
        {this}_rounded = Add ({this}_sum, half_a_byte)
        {this}_levels = Div ({this}_rounded, whole_int)
        {this}_clipped = Clip ({this}_levels, black, full)
        {this}_bytes = Cast <to = 2> ({this}_clipped)
    }}> ({this}_times, yes)
    {this}_stack_shape = Concat <axis = 0> (last, {this}_width)
    {this}_some_more = Reshape ({this}_stacked, {this}_stack_shape)
    {this}_resized = Slice ({this}_some_more, zero_axis, crop_axis)
"""

# What both texts name and no `ImageSpec` changes. A kernel leaves out some of it.
_NUMBERS: dict[str, Any] = {
    # Of pixels and axes.
    "zero": np.int64(0),
    "one": np.int64(1),
    "two": np.int64(2),
    "last": np.array([-1]),
    "zero_axis": np.array([0]),
    "one_axis": np.array([1]),
    "two_axis": np.array([2]),
    "inner_axes": np.array([1, 2]),
    "flat_shape": np.array([0, -1]),
    "at_once": np.int64(1 << 19),  # pixels that are held as float32
    # Of weights, in double.
    "zero_double": np.float64(0),
    "half": np.float64(0.5),
    "one_double": np.float64(1),
    "two_double": np.float64(2),
    "three_halves": np.float64(1.5),
    "five_halves": np.float64(2.5),
    "four": np.float64(4),
    "five": np.float64(5),
    "eight": np.float64(8),
    "minus_half": np.float64(-0.5),
    "step": np.float64(128),  # between a weight's two parts
    "whole": np.float64(1 << 22),  # what a pixel's weights add up to
    # Of sums and bytes.
    "whole_int": np.int32(1 << 22),
    "half_a_byte": np.int32(1 << 21),
    "black": np.int32(0),
    "full": np.int32(255),
    "white": np.float32(255),
    "yes": np.bool_(True),
}


def image_head(spec: ImageSpec, opset: int, ir_version: int) -> onnx.ModelProto:
    """A graph of `image`, uint8 (height, width, 3) in RGB, upright, to `images`, float32
    (1, 3, spec.crop, spec.crop): what `preprocess` makes of it.

    Images that `preprocess` refuses as too elongated are taken like any other.
    """
    model = parser.parse_model(
        _GRAPH.format(
            ir_version=ir_version,
            opset=opset,
            crop=spec.crop,
            resized=_RESIZED[spec.keep_aspect],
            weight=_KERNELS[spec.resample][1],
            first_pass=_PASS.format(this="first"),
            second_pass=_PASS.format(this="second"),
        )
    )
    used = {name for node in _nodes(model.graph) for name in node.input}
    model.graph.initializer.extend(
        numpy_helper.from_array(np.asarray(value), name)
        for name, value in {**_NUMBERS, **_from_spec(spec)}.items()
        if name in used
    )
    return model


def _nodes(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """Those of a graph and of the graphs within."""
    inner = [item.g for node in graph.node for item in node.attribute if item.HasField("g")]
    return [*graph.node, *(node for body in inner for node in _nodes(body))]


def _from_spec(spec: ImageSpec) -> dict[str, Any]:
    crop = spec.crop
    return {
        "shorter_edge": np.array([spec.resize]),
        "crop": np.int64(crop),
        "crop_axis": np.array([crop]),
        "last_line": np.int64(crop - 1),
        "positions": np.arange(crop, dtype=np.float64)[:, None],
        "reach": np.float64(_KERNELS[spec.resample][0]),
        "planes_shape": np.array([3, crop, crop]),
        "one_channel_shape": np.array([crop, -1]),
        "channels_shape": np.array([3 * crop, -1]),
        "lines_shape": np.array([-1, 3 * crop]),
        "rows_pixels_shape": np.array([crop, crop, 3]),
        "columns_pixels_shape": np.array([crop, 3, crop]),
        "mean": np.array(spec.mean, np.float32)[:, None, None],
        "std": np.array(spec.std, np.float32)[:, None, None],
    }
