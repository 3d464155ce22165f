"""The geometry of convolutions: the size of the result, and what is refused.

As in csrc/cpu/conv.h.
"""

import torch

_MOST_POSITIONS = 2**24  # of a kernel; each costs some bytes of a table
_LARGEST = 2**31 - 1


def output_size(size, kernel_size, stride, padding, dilation):
    """Height and width after a convolution (nn.Conv2d's formula)."""
    after = padding[-2:]  # of two integers the same, of four (bottom, right)
    return tuple(
        (size[i] + padding[i] + after[i] - dilation[i] * (kernel_size[i] - 1) - 1) // stride[i] + 1
        for i in (0, 1)
    )


def need(op: str, condition, wanted: str, have) -> None:
    """Refuse unless the condition holds, which may be one of symbolic sizes."""
    if condition is not True:
        torch._check(condition, lambda: f"{op}: expected {wanted}, got {have}")


def _integers(op: str, name: str, values, counts, least: int) -> None:
    right = len(values) in counts and min(values) >= least
    many = "two or four" if len(counts) > 1 else "two"
    have = f"({', '.join(map(str, values))})"
    need(op, right, f"{name} of {many} integers >= {least}", have)


def check_conv(op: str, a: dict, rows) -> None:
    """Refuse a geometry that has no result, and images that do not fit it.

    Args:
        op: The op, without namespace.
        a: Its arguments by name.
        rows: Output channels.

    Raises:
        RuntimeError: "op: expected <argument> <wanted>, got <have>".
    """
    kernel, stride, padding, dilation = (
        a[name] for name in ("kernel_size", "stride", "padding", "dilation")
    )
    _integers(op, "kernel_size", kernel, (2,), 1)
    _integers(op, "stride", stride, (2,), 1)
    _integers(op, "padding", padding, (2, 4), 0)
    _integers(op, "dilation", dilation, (2,), 1)
    few = kernel[0] * kernel[1] <= _MOST_POSITIONS
    need(op, few, "kernel_size of at most 2^24 positions", tuple(kernel))
    channels, *size = a["x"].shape[1:] if "x" in a else (a["channels"], a["height"], a["width"])
    _check_groups(op, a["groups"], channels, rows)
    for i in (0, 1):
        _check_side(
            op, size[i], padding[i] + padding[i - 2], dilation[i] * (kernel[i] - 1), kernel[i]
        )
    after = output_size(size, kernel, stride, padding, dilation)
    first = a["x"] if "x" in a else a["grad"]
    result = (first.shape[0], rows, *after)
    names = ("images", "out_channels", "output height", "output width")
    if "grad" in a:
        for i, name in enumerate(names):
            have = a["grad"].shape[i]
            need(op, have == result[i], f"grad.size({i}) = {name} = {result[i]}", have)
    if a.get("residual") is not None:
        for i in range(4):
            have, want = a["residual"].shape[i], result[i]
            need(op, have == want, f"residual.size({i}) = that of the result = {want}", have)


def _check_groups(op: str, groups, channels, rows) -> None:
    fits = channels % groups == 0 and rows % groups == 0 and (groups == 1 or groups <= rows)
    wanted = f"groups that divide in_channels = {channels} and out_channels = {rows}"
    need(op, fits, wanted, groups)


def _check_side(op: str, size, zeros: int, reach: int, kernel: int) -> None:
    """One axis: `zeros` of padding on both sides, `reach` from the first position to the last."""
    need(op, size >= 0, "height and width >= 0", size)
    need(op, size + zeros <= _LARGEST, "a padded input below 2^31", zeros)
    have = f"input size {size} with kernel_size {kernel}"
    need(op, size + zeros > reach, "an input at least as large as the kernel", have)
