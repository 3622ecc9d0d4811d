"""The beam search of one image as one graph: `capexport.beam` inside an ONNX `Loop`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx

from capexport.artifact import Decoding
from capexport.export.loop import barred, loop_around, typed_value, vocabulary_size

# Rows are beams: one at the first step, `num_beams` from then on. Carried from step to step are
# - of each beam: its state, last token, log-probability (`sums`) and tokens (`said`);
# - of the best captions that have ended: their scores (minus infinity where there is none yet),
#   log-probabilities (`totals`), tokens (`ended`) and lengths (`sizes`).
# `TopK` takes the first of equal values, as the runtime does.
_GRAPH = """
<ir_version: {ir_version}, opset_import: ["": {opset}]>
beam_loop ({all_inputs}) => (int64[length] best_tokens, float best_total) {{
    {last_states}, last_token, last_sums, last_said, last_scores, last_totals, captions, lengths
        = Loop <body = step (
        int64 position, bool go_on, {states}, int64[rows] tokens, float[rows] sums,
        int64[rows, longest] said, float[beams] scores, float[beams] totals,
        int64[beams, longest] ended, int64[beams] sizes
    ) => (
        bool going, {kept_states}, int64[rows] next_tokens, float[rows] next_sums,
        int64[rows, longest] next_said, float[beams] next_scores, float[beams] next_totals,
        int64[beams, longest] next_ended, int64[beams] next_sizes
    ) {{
        logs = LogSoftmax <axis = 1> (logits)
        early = Less (position, min_tokens)
        excluded = Where (early, not_yet, never)
        allowed = Add (logs, excluded)
        before = Unsqueeze (sums, last_axis)
        together = Add (allowed, before)
        flat = Reshape (together, flat_shape)
        found = Size (flat)
        enough = Min (found, continuations)
        likeliest, places = TopK (flat, enough)
        parents = Div (places, width)
        words = Mod (places, width)
        lines = Gather (said, parents)
        word_column = Unsqueeze (words, last_axis)
        here = Equal (columns, position)
        extended = Where (here, word_column, lines)

        word_ends = Equal (word_column, end_tokens)
        any_end = Cast <to = 7> (word_ends)
        word_end = ReduceMax <keepdims = 0> (any_end, last_axis)
        is_end = Cast <to = 9> (word_end)
        at_limit = Equal (position, last_position)
        is_over = Or (is_end, at_limit)

        enough_scalar = Squeeze (enough)
        rank = Range (first_rank, enough_scalar, one)
        in_front = Less (rank, beams_scalar)
        counts = And (is_over, in_front)
        divisor = Gather (divisors, position)
        scored = Div (likeliest, divisor)
        new_scores = Where (counts, scored, nothing)
        position_after = Add (position, one)
        new_sizes = Sub (position_after, word_end)
        both_scores = Concat <axis = 0> (scores, new_scores)
        both_totals = Concat <axis = 0> (totals, likeliest)
        both_ended = Concat <axis = 0> (ended, extended)
        both_sizes = Concat <axis = 0> (sizes, new_sizes)
        next_scores, best = TopK (both_scores, beams)
        next_totals = Gather (both_totals, best)
        next_ended = Gather (both_ended, best)
        next_sizes = Gather (both_sizes, best)

        alive = Where (is_over, nothing, likeliest)
        as_many = Min (enough, beams)
        next_sums, chosen = TopK (alive, as_many)
        next_tokens = Gather (words, chosen)
        next_said = Gather (extended, chosen)
        rows = Gather (parents, chosen)
        {kept}
        hope = Gather (next_sums, first_rank)
        worst = Gather (next_scores, last_rank)
        reach = Gather (reachable, position)
        reached = Div (hope, reach)
        {going}
    }}> (max_tokens, yes, {first_states}, start_tokens, no_sum, no_words, no_scores, no_scores,
         no_captions, no_sizes)
    best_caption = Gather (captions, first_rank)
    length = Gather (lengths, first_axis)
    best_tokens = Slice (best_caption, first_axis, length)
    best_total = Gather (last_totals, first_rank)
}}
"""
# Whether the likeliest beam may yet become one of the best captions; `worst` is minus infinity
# until there are `num_beams` of them.
_GOING = """
    going = Greater (reached, worst)
"""
_GOING_EARLY = """
    missing = Equal (worst, nothing)
    living = Greater (hope, nothing)
    going = And (missing, living)
"""


def beam_graph(
    step: onnx.ModelProto, state: Mapping[str, str], decoding: Decoding
) -> onnx.ModelProto:
    """`beam_search` over `step` for one image, without a repetition penalty.

    Args:
        step, state: as of `loop_graph`.
    Returns:
        A graph of each state and the constant inputs, with a batch of one, to `best_tokens`, int64
        (length,), the best caption without its end token, and `best_total`, float32 (), its
        log-probability.
    """
    values = {node.name: node for node in (*step.graph.input, *step.graph.output)}
    constant = [v.name for v in step.graph.input if v.name not in ("tokens", *state)]
    inputs, outputs = list(state), list(state.values())
    excluded = barred(step, decoding.suppress_tokens, decoding.end_tokens)
    return loop_around(
        step,
        _GRAPH,
        {**_constants(decoding, vocabulary_size(step)), **excluded},
        all_inputs=", ".join(
            [typed_value(values[name], f"first_{name}", "one") for name in inputs]
            + [typed_value(values[name], name, "one") for name in constant]
        ),
        first_states=", ".join(f"first_{name}" for name in inputs),
        last_states=", ".join(f"last_{name}" for name in inputs),
        states=", ".join(typed_value(values[name], name, "rows") for name in inputs),
        kept_states=", ".join(
            typed_value(values[name], f"kept_{name}", "kept") for name in outputs
        ),
        kept="\n".join(f"kept_{name} = Gather ({name}, rows)" for name in outputs),
        going=_GOING_EARLY if decoding.early_stopping is True else _GOING,
    )


def _constants(decoding: Decoding, width: int) -> dict[str, Any]:
    beams, longest = decoding.num_beams, decoding.max_tokens
    lengths = range(1, longest + 1)
    divisors = np.array([length**decoding.length_penalty for length in lengths], np.float32)
    any_length = decoding.early_stopping == "never" and decoding.length_penalty > 0
    return {
        "max_tokens": np.int64(longest),
        "min_tokens": np.int64(decoding.min_tokens),
        "last_position": np.int64(longest - 1),
        "end_tokens": np.array(decoding.end_tokens or [-1]),
        "continuations": np.array([(1 + max(1, len(decoding.end_tokens))) * beams]),
        "beams": np.array([beams]),
        "beams_scalar": np.int64(beams),
        "width": np.int64(width),
        "columns": np.arange(longest)[None],
        "divisors": divisors,
        "reachable": np.full_like(divisors, divisors[-1]) if any_length else divisors,
        "flat_shape": np.array([-1]),
        "first_axis": np.array([0]),
        "last_axis": np.array([1]),
        "first_rank": np.int64(0),
        "last_rank": np.int64(beams - 1),
        "one": np.int64(1),
        "nothing": np.float32(-np.inf),
        "yes": np.bool_(True),
        "start_tokens": np.array([decoding.start_token]),
        "no_sum": np.zeros(1, np.float32),
        "no_words": np.zeros((1, longest), np.int64),
        "no_scores": np.full(beams, -np.inf, np.float32),
        "no_captions": np.zeros((beams, longest), np.int64),
        "no_sizes": np.zeros(beams, np.int64),
    }
