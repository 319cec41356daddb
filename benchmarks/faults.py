"""The faults of `benchmarks.mutants`: one wrong line each, in every kernel.

A line is wrong in the way that kernels are: a border, a mask, a tie, NaN, -0, a stride, one
element beyond a buffer, the order of reads and writes, a rounding.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path

KINDS = ("border", "mask", "ties", "NaN", "-0", "stride", "beyond", "order", "rounding")


@dataclass(frozen=True)
class Fault:
    """`old`, which occurs once in a function, becomes `new`.

    Attributes:
        kernel: name in `launch.KERNELS`, or "grid" for what several kernels share.
        file, function: stem in pointrend_triton/kernels, and whose text has `old`.
        tests: arguments of pytest, of the tests that are about this kernel.
    """

    kernel: str
    file: str
    function: str
    kind: str
    old: str
    new: str
    why: str
    tests: tuple[str, ...]

    @property
    def path(self) -> Path:
        """Of the file, from the root of the repository."""
        return Path("pointrend_triton", "kernels", f"{self.file}.py")

    def applied(self, root: Path) -> str:
        """The text of the file with the fault; ValueError where `old` is not there once."""
        text = (root / self.path).read_text()
        lines = text.splitlines(keepends=True)
        (node,) = (
            node
            for node in ast.walk(ast.parse(text))
            if isinstance(node, ast.FunctionDef) and node.name == self.function
        )
        before, inside = lines[: node.lineno - 1], lines[node.lineno - 1 : node.end_lineno]
        function = "".join(inside)
        if function.count(self.old) != 1:
            raise ValueError(
                f"{self.path}: {self.function} has {function.count(self.old)} times: {self.old}"
            )
        after = lines[node.end_lineno :]
        return "".join([*before, function.replace(self.old, self.new), *after])


def _of(kernel: str, function: str, tests: str, *faults: tuple[str, str, str, str]) -> list[Fault]:
    """Faults of a kernel in `file:function`; tests: of kernels/test_<tests>, what -k takes."""
    file, _, function = function.partition(":")
    stem, _, names = tests.partition(": ")
    chosen = (f"tests/kernels/test_{stem}.py", *(("-k", names) if names else ()))
    return [Fault(kernel, file, function, *fault, chosen) for fault in faults]


LINKS = "point_sample: backward or gradients or shared or one_cell or cells_list"
SUMS = "point_sample: gradients or shared or sums"
SORTED = "point_sample: shared or one_cell or cells_list"
UNSEEN = "compiled: interpreter_cannot"  # what shows in compiled code alone
SHORT = "select: not long and not points"
LONG = "select: long or configuration"
HEAD = "point_head: points or saved or strides or expanded or labels or finite or refine_cells"
# fmt: off
FAULTS = [
    *_of(
        "grid", "grid:position", "point_sample: forward or nowhere",
        ("border", "* 0.5 * (size - 1)", "* 0.5 * size", "aligned corners are a cell off"),
        ("border", "* size - 1.0) * 0.5", "* size) * 0.5", "cells are half a cell off"),
    ),
    *_of(
        "grid", "grid:linear_taps", "point_sample: forward or nowhere",
        ("border", "(low >= 0) & (low < size)", "(low > 0) & (low < size)",
         "the first cell is off the map"),
        ("beyond", "(low >= -1) & (low < size - 1)", "(low >= -1) & (low < size)",
         "the cell behind the last is read"),
        ("NaN", "tl.where(place > 0.0, place, 0.0)", "tl.where(place < 0.0, 0.0, place)",
         "NaN does not go to the first cell"),
    ),
    *_of(
        "grid", "grid:nearest_tap", "point_sample: forward or nowhere",
        ("ties", "((above == 0.5) & is_odd)", "(above == 0.5)", "halves go up"),
        ("beyond", "(nearest < size)", "(nearest <= size)", "the cell behind the last is read"),
        ("NaN", "tl.where(place > 0.0, place, 0.0)", "tl.where(place < 0.0, 0.0, place)",
         "NaN does not go to the first cell"),
    ),
    *_of(
        "grid", "grid:cell_centre", "select: centres",
        ("rounding", "step_x * 0.5 + (index % width).to(tl.float32) * step_x",
         "((index % width).to(tl.float32) + 0.5) * step_x", "a centre is rounded otherwise"),
        ("stride", "(index // width)", "(index % width)", "the row is the column"),
    ),
    *_of(
        "point_sample.forward", "point_sample:_forward", "point_sample",
        ("border", "(is_point & has_top & has_left)", "(is_point & has_top)",
         "the cell left of the map is read"),
        ("border", "(is_point & has_bottom & has_right)[None, :], other=0)",
         "(is_point & has_bottom & has_right)[None, :], other=1)", "the map is 1 beyond a corner"),
        ("stride", "taps += input_w", "taps += 1", "columns lie side by side"),
        ("stride", "coords + n * coords_n", "coords", "all maps have the first one's points"),
        ("mask", "channel < channels)[:, None]", "channel <= channels)[:, None]",
         "one channel more is written"),
        ("beyond", "mask=is_channel & is_point[None, :])", "mask=is_channel)",
         "points behind the last are written"),
    ),
    *_of(
        "point_sample.nearest", "point_sample:_forward", "point_sample: nearest or labels or ties",
        ("border", "nearest_tap(x, width, ALIGN, BORDER)", "nearest_tap(x, width, ALIGN, True)",
         "beyond the map is its border"),
        ("mask", "(is_point & has_row & has_column)", "(is_point & has_column)",
         "above the map is its first row"),
        ("stride", "nearest_tap(y, height, ALIGN, BORDER)", "nearest_tap(y, width, ALIGN, BORDER)",
         "rows are as many as columns"),
        ("rounding", "value = tl.load(source + cell[None, :], mask=mask, other=0)",
         "value = tl.load(source + cell[None, :], mask=mask, other=0).to(tl.float32)",
         "large labels are rounded"),
        ("beyond", "is_point, is_channel = point < num_points",
         "is_point, is_channel = point <= num_points", "a point behind the last is written"),
    ),
    *_of(
        "point_sample.link", "point_sample:_link", LINKS,
        ("beyond", "mask = tap < num_taps", "mask = tap <= num_taps",
         "the weight behind the last is written"),
        ("mask", 'mask=cell >= 0, sem="relaxed"', 'mask=mask, sem="relaxed"',
         "taps off the map are put before the first cell"),
        ("stride", "head + n * height * width", "head + n * height", "the maps' lists overlap"),
        ("order", "num_taps + tap, behind,", "num_taps + tap, tap,", "a tap leads to itself"),
    ),
    *_of(
        "point_sample.link", "point_sample:_taps", LINKS,
        ("border", "tl.where(is_bottom, has_bottom, has_top)", "has_top",
         "the row behind the last is linked"),
        ("stride", "row * width + column", "row * height + column", "rows are height wide"),
    ),
    *_of(
        "point_sample.cells", "point_sample:_cells", SORTED,
        ("beyond", "mask = tap < num_taps", "mask = tap <= num_taps",
         "the weight behind the last is written"),
        ("mask", "num_taps + tap, cell, mask=mask)", "num_taps + tap, cell)",
         "a whole block of cells is written"),
        ("stride", "coords += n * coords_n", "coords += n", "maps' points lie one number apart"),
        ("stride", "weights + n * num_taps + tap", "weights + tap",
         "all maps write the first one's weights"),
    ),
    *_of(
        "point_sample.link_sorted", "point_sample:_link_sorted", SORTED,
        ("beyond", "has_after = i < num_taps - 1", "has_after = i < num_taps",
         "the last list leads into the next map's"),
        ("border", "mask & (i > 0)", "mask & (i >= 0)",
         "a map's first list is taken for the last of the map before"),
        ("mask", "tl.where(is_same, after, -1), mask=mask)", "tl.where(is_same, after, -1))",
         "what lies behind the taps ends the list of the first"),
        ("ties", "mask=mask & (cell >= 0) & (cell != before)", "mask=mask & (cell >= 0)",
         "a list begins with its last tap"),
        ("order", "tl.where(is_same, after, -1)", "after", "a list leads into the next cell's"),
    ),
    *_of(
        "point_sample.backward", "point_sample:_backward", SUMS,
        ("beyond", "is_cell, is_channel = cell < num_cells",
         "is_cell, is_channel = cell <= num_cells", "a cell behind the last is written"),
        ("stride", "(tap // CORNERS).to(tl.int64) * grad_p", "(tap // CORNERS).to(tl.int64)",
         "points' gradients lie side by side"),
        ("stride", "head + n * head_n + cell", "head + cell",
         "all maps have the first one's lists"),
        ("mask", "next + n * next_n + tap, mask=is_tap, other=-1",
         "next + n * next_n + tap, mask=is_tap, other=0", "a list that has ended begins again"),
        ("rounding", "weight[None, :] * value.to(tl.float32)",
         "(weight[None, :] * value.to(tl.float32)).to(tl.float16).to(tl.float32)",
         "summands are rounded to half precision"),
    ),
    *_of(
        "select.short", "select:_order", SHORT,
        ("-0", "tl.where(bits == 0x80000000, 0, bits)", "tl.where(bits == 0, 0, bits)",
         "-0 is smaller than 0"),
        ("NaN", "(bits & 0x7FFFFFFF) > 0x7F800000", "(bits & 0x7FFFFFFF) >= 0x7F800000",
         "infinity is NaN"),
        ("NaN", "(bits & 0x7FFFFFFF) > 0x7F800000", "bits > 0xFFFFFFFE",
         "NaN of most bits is no more than its sign says"),
    ),
    *_of(
        "select.short", "select:_ranks", SHORT,
        ("ties", "(SPAN - 1 - index)", "index", "of equals the last is chosen"),
    ),
    *_of(
        "select.short", "select:_kth_largest", SHORT,
        ("mask", "tl.min(tl.where(valid, ranks, high))", "tl.min(ranks)",
         "what is no value is chosen too"),
        ("border", "(high - low + 1) >> 1", "(high - low) >> 1", "halving does not end"),
    ),
    *_of(
        "select.short", "select:_short_kernel", SHORT,
        ("stride", "indices += row * k", "indices += row * n", "rows lie n apart"),
        ("beyond", "_before(chosen.to(tl.int32))", "_before(1 - chosen.to(tl.int32))",
         "what is chosen is put behind what is not"),
    ),
    *_of(
        "select.points", "select:_points_kernel", "select: points",
        ("stride", "candidates += row * n * 2", "candidates += row * n",
         "rows of candidates overlap"),
        ("beyond", "inside = index < 2 * num_random", "inside = index <= 2 * num_random",
         "a number behind the last is written"),
        ("border", "if k > 0:", "if k > 1:", "a single candidate is left out"),
        ("order", "coords += 2 * k", "coords += k", "random points overwrite the chosen ones"),
        ("mask", "chosen = _ranks(scores, start + tile, n, BLOCK) >= low",
         "chosen = _ranks(scores, start + tile, n, BLOCK) > low", "the k-th is left out"),
    ),
    *_of(
        "select.histogram", "select:_histogram_kernel", LONG,
        ("mask", 'other=float("-inf")', "other=0.0", "beyond the row lie zeros"),
        ("beyond", "mask=index < n", "mask=index <= n", "a value behind the row is counted"),
        ("stride", "counters += row * (BINS + 1)", "counters += row * BINS",
         "rows of counters overlap"),
        ("border", "(order >> 23)", "(order >> 24)", "bins are twice as wide"),
    ),
    *_of(
        "select.histogram", "select:_histogram_kernel", "select: long_lists",
        ("order", "spans * (BLOCK * STEPS)", "spans * BLOCK", "values are counted twice"),
    ),
    *_of(
        "select.filter", "select:_filter_kernel", LONG,
        ("ties", "(from_top < k)", "(from_top <= k)", "the bin below the k-th one's is searched"),
        ("mask", "above = valid & (bins > kth_bin)", "above = bins > kth_bin",
         "beyond the row lie zeros"),
        ("border", "within = valid & (bins == kth_bin)", "within = valid & (bins >= kth_bin)",
         "what is written is listed too"),
        ("stride", "listed + row * n", "listed + row * k", "rows of the list overlap"),
        ("order", "tl.atomic_add(counters + BINS", "tl.atomic_max(counters + BINS",
         "programs write where others have written"),
        ("ties", "(SPAN - 1 - index)", "index", "of equals the last is chosen"),
    ),
    *_of(
        "select.finish", "select:_finish_kernel", LONG,
        ("beyond", "_kth_largest(ranks, lane < count, count, k - written)",
         "_kth_largest(ranks, lane < count, count, k)", "more than k are written"),
        ("mask", "_kth_largest(ranks, lane < count,", "_kth_largest(ranks, lane <= count,",
         "what is no rank is chosen too"),
        ("ties", "SPAN - 1 - (ranks & (SPAN - 1))", "ranks & (SPAN - 1)",
         "indices are counted from the end"),
    ),
    *_of(
        "select.finish", "select:_finish_kernel", "select: long_lists",
        ("border", "if count <= BLOCK:", "if count <= 2 * BLOCK:",
         "the end of a list is not looked at"),
        ("order", "written += total", "written = total",
         "what follows is written over what is there"),
    ),
    *_of(
        "select.finish", "select:_kth_listed", "select: long_lists",
        ("mask", "mask=start + lane < length, other=-1)",
         "mask=start + lane < length, other=high)", "beyond the list lie large ranks"),
    ),
    *_of(
        "uncertainty.double", "uncertainty:_double", "uncertainty: upsample or enlarges",
        ("beyond", "tl.minimum(known_x + 1, width - 1)", "known_x + 1",
         "the column behind the last is read"),
        ("beyond", "tl.minimum(y + 1, height - 1)", "(y + 1)", "the row behind the last is read"),
        ("border", "has_upper = inside & (y >= 0)", "has_upper = inside",
         "a row before the first is written"),
        ("border", "has_lower = inside & (y < height - 1)", "has_lower = inside",
         "a row behind the last is written"),
        ("order", "target += size * CLASSES", "target += size",
         "classes are written over each other"),
    ),
    *_of(
        "uncertainty.double", "uncertainty:_double", "uncertainty: upsample_of and not many",
        ("mask", 'tl.where(start + slot4 < C, value, float("-inf"))',
         "tl.where(start + slot4 < C, value, 0.0)", "a class that is none may win"),
        ("stride", "middle = known_x * (unit * stride_x)", "middle = known_x * unit",
         "columns lie side by side"),
    ),
    *_of(
        "uncertainty.double", "uncertainty:_columns", "uncertainty: upsample or enlarges",
        ("border", "tl.fma(before, 0.0625, centre)", "tl.fma(after, 0.0625, centre)",
         "the left half leans to the right"),
    ),
    *_of(
        "uncertainty.sampled", "uncertainty:_sampled", "uncertainty: sampled",
        ("border", "(has_upper & has_left)", "has_left", "a row above the map is read"),
        ("mask", 'tl.where(known, value, float("-inf"))', "tl.where(known, value, 0.0)",
         "a class that is none may be the largest"),
        ("stride", "lower = upper + stride_y", "lower = upper + width", "rows lie width apart"),
        ("stride", "base + (upper + stride_x)", "base + (upper + 1)", "columns lie side by side"),
        ("beyond", "score, inside)", "score)", "points behind the last are written"),
    ),
    *_of(
        "decode.resample", "decode:_low_tap", "decode",
        ("border", "tl.maximum(scale * (index.to(tl.float32) + 0.5) - 0.5, 0.0)",
         "scale * (index.to(tl.float32) + 0.5) - 0.5", "beyond the first cell a line goes on"),
    ),
    *_of(
        "decode.resample", "decode:_taps", "decode",
        ("beyond", "high = tl.minimum(low + 1, size - 1)", "high = low + 1",
         "the cell behind the last is read"),
        ("border", "tl.minimum(low + 1, between - 1)", "low + 1",
         "the cell behind the last of the middle size counts"),
    ),
    *_of(
        "decode.resample", "decode:_resample", "decode: lowest or strides or program",
        ("mask", 'tl.where(channel < C, value, float("-inf"))',
         "tl.where(channel < C, value, 0.0)", "a class that is none may win"),
        ("beyond", "lowest[None].to(labels.dtype.element_ty), inside)",
         "lowest[None].to(labels.dtype.element_ty))", "pixels behind the last are written"),
        ("stride", "plane = slot * (unit * stride_c)", "plane = slot * (unit * width * height)",
         "classes lie one map apart"),
        ("stride", "n = (row // to_height)", "n = (row // height)", "maps are as high as before"),
    ),
    *_of(
        "point_head.forward", "point_head:_gather", HEAD,
        ("border", "(has_top & has_left)", "has_top", "the cell left of the map is read"),
        ("mask", "real = (channel < CHANNELS)", "real = (channel <= CHANNELS)",
         "one channel more is sampled"),
        ("stride", "tap + stride_h + stride_w, mask", "tap + stride_h + 1, mask",
         "columns lie side by side"),
    ),
    *_of(
        "point_head.forward", "point_head:_predict", "point_head: labels or refine_cells",
        ("-0", "tl.where(value == 0, 0.0, value)", "tl.where(value == 1, 1.0, value)",
         "-0 is smaller than 0"),
        ("NaN", "tl.where(value != value, 0x7FFFFFFF, order)",
         "tl.where(value != value, 0, order)", "NaN is not the largest"),
        ("ties", "tl.min(tl.where(order == largest[:, None], out[None, :], 0x7FFFFFFF), 1)",
         "tl.max(tl.where(order == largest[:, None], out[None, :], 0), 1)",
         "of equals the last is the label"),
        ("beyond", "mask=valid[:, None] & (out < OUTPUTS)[None, :])", "mask=valid[:, None])",
         "padding is written behind the last logit"),
    ),
    *_of(
        "point_head.forward", "point_head:_point_head", HEAD,
        ("NaN", "tl.where((value < 0) | (column >= HIDDEN)[None, :], 0.0, value)",
         "tl.where((value > 0) & (column < HIDDEN)[None, :], value, 0.0)", "ReLU of NaN is 0"),
        ("beyond", "valid = p < points", "valid = p <= points",
         "the row behind the last is written"),
        ("stride", "coords += n * coords_n", "coords += 0 * coords_n",
         "all images have the first one's points"),
        ("order", "at + COARSE_SLOT, valid, CLASSES, CLASSES_PAD, 32,",
         "at, valid, CLASSES, CLASSES_PAD, 32,",
         "coarse logits are written over the fine features"),
    ),
    *_of(
        "point_head.dgrad", "point_head:_dgrad", "point_head: gradient",
        ("border", "tl.where(output <= 0, 0.0, value)", "tl.where(output < 0, 0.0, value)",
         "ReLU at 0 passes the gradient"),
        ("mask", "mask=valid[:, None] & (out < OUTPUTS)[None, :],", "mask=valid[:, None],",
         "outputs behind the last are read"),
        ("stride", "grad += n * grad_n + p.to(tl.int64) * grad_p",
         "grad += n * grad_n + p.to(tl.int64)", "points' gradients lie side by side"),
        ("beyond", "valid = p < points", "valid = p <= points",
         "the row behind the last is written"),
        ("order", "received = at[:, None] + (first + step)",
         "received = at[:, None] + (first - HIDDEN_PAD + step)",
         "a gradient is read before it is written"),
    ),
    *_of(
        "point_head.pack", "point_head:_pack_layer", "point_head: pack or strides",
        ("mask", "source < IN + COARSE, source < IN)", "source < IN + COARSE, source <= IN)",
         "the first coarse weight stands in the padding"),
        ("border", "real = row < OUT\n", "real = row <= OUT\n", "a row behind the last is read"),
        ("mask", "valid = row < OUT_PAD", "valid = row < OUT", "padding is not written"),
        ("stride", "(source * weight_in)", "source", "weights of an output lie side by side"),
        ("stride", "bias + row * bias_out", "bias + row", "biases lie side by side"),
        ("beyond", "mask=valid[:, None] & (column < PITCH)[None, :]", "mask=valid[:, None]",
         "columns behind the last are written"),
    ),
    *_of(
        "augment.augment", "augment:_taps", "augment",
        ("beyond", "tl.minimum(tl.maximum(low + 1, 0), size - 1)", "tl.maximum(low + 1, 0)",
         "the row behind a picture's last is read"),
    ),
    *_of(
        "augment.augment", "augment:_round", "augment: places",
        ("ties", "(value + 12582912.0) - 12582912.0", "tl.floor(value + 0.5)", "halves go up"),
    ),
    *_of(
        "augment.augment", "augment:_to_hsv", "augment",
        ("border", "tl.where(hue < 0, hue + 180, hue)", "tl.where(hue <= 0, hue + 180, hue)",
         "a hue of 0 is one of 180"),
    ),
    *_of(
        "augment.augment", "augment:_augment", "augment",
        ("border", "wa = tl.where(before == after, 2048, wa)", "wa = tl.where(x < 0, 2048, wa)",
         "a picture's last column has a part of its weight"),
        ("mask", "tl.load(nearest + nearest_x, inside, -1)",
         "tl.load(nearest + nearest_x, inside, 0)", "padding is of class 0"),
        ("beyond", "used_width - 1 - x", "used_width - x", "a flipped crop begins a column late"),
        ("beyond", "known = x < width", "known = x <= width", "a pixel behind the row is written"),
        ("stride", "image = images + at + 2 * n * plane", "image = images + at + n * plane",
         "an image has two planes"),
    ),
    *_of(
        "grid", "grid:linear_taps", "point_sample: nowhere",
        ("NaN", "tl.where(has_any, place - low, 0.0)", "place - low",
         "infinity has a weight, and it is NaN"),
    ),
    *_of(
        "decode.resample", "decode:keep", "decode: lowest or finite",
        ("ties", "(value > best)", "(value >= best)", "of equals the last is the label"),
        ("NaN", "((value > best) | (value != value))", "(value > best)", "NaN is no label"),
        ("NaN", "(best == best) & ((value > best)", "((value > best)", "the last NaN is the label"),
    ),
    *_of(
        "decode.resample", "decode:settle", "decode: lowest or finite",
        ("ties", "tl.min(tl.where(wins, label, C - 1), 0)", "tl.max(tl.where(wins, label, 0), 0)",
         "of equal rows the last is the label"),
        ("NaN", "tl.where(is_nan[None], best != best, best == top[None])", "best == top[None]",
         "among NaN the last class is the label"),
    ),
    *_of(
        "decode.resample", "decode:keep", UNSEEN,
        ("NaN", "tl.maximum(best, value, propagate_nan=tl.PropagateNan.ALL)",
         "tl.maximum(best, value)", "a number takes the place of NaN"),
    ),
    *_of(
        "uncertainty.sampled", "decode:keep", "uncertainty: sampled",
        ("ties", "tl.maximum(second, tl.minimum(best, value))", "tl.maximum(second, value)",
         "the largest is the second too"),
    ),
    *_of(
        "uncertainty.sampled", "decode:settle", "uncertainty: sampled",
        ("mask", "tl.where(slot == winner[None], second, best)", "second",
         "the best of other rows is no second"),
    ),
    *_of(
        "point_head.pack", "point_head:_operand", "point_head: tf32",
        ("rounding", "((bits + 0x1000) & -0x2000)", "(bits & -0x2000)", "operands are cut off"),
        ("NaN", "tl.where(value == value, rounded, value)", "rounded",
         "NaN of many bits becomes -0"),
    ),
    *_of(
        "point_head.forward", "point_head:_gather", "point_head: tf32",
        ("rounding", "value = _operand(value, at.dtype.element_ty, PRECISION)",
         "value = value.to(at.dtype.element_ty)", "features are left to be cut off"),
    ),
    *_of(
        "point_head.dgrad", "point_head:_dgrad", "point_head: tf32",
        ("rounding",
         "+ out)[None, :],\n            _operand(value, at.dtype.element_ty, PRECISION)",
         "+ out)[None, :],\n            value.to(at.dtype.element_ty)",
         "received gradients are left to be cut off"),
    ),
    *_of(
        "point_head.forward", "point_head:_point_head", UNSEEN,
        ("order", "tl.debug_barrier()\n\n    column", "\n    column",
         "features are read before all are written"),
        ("order", "tl.debug_barrier()\n\n    cell_x", "\n    cell_x",
         "a layer is read before all of it is written"),
    ),
    *_of(
        "point_head.dgrad", "point_head:_dgrad", UNSEEN,
        ("order", "tl.debug_barrier()  # its gradient is written", "# its gradient is written",
         "a gradient is read before all of it is written"),
    ),
]
# fmt: on
