"""The tolerance of every comparison of floats: twice the error that plain PyTorch makes."""


def assert_within(ours, theirs, exact):
    """max |ours - exact| <= 2 max |theirs - exact| + 1e-6 max |exact|.

    Args:
        ours: what is tested.
        theirs: plain PyTorch's answer in the same precision.
        exact: the fp64 answer.
    """
    assert ours.shape == theirs.shape == exact.shape
    if exact.numel() == 0:
        return
    exact = exact.double()
    limit = 2 * (theirs.double() - exact).abs().max() + 1e-6 * exact.abs().max()
    worst = (ours.double() - exact).abs().max()
    assert worst <= limit, f"off by {worst:.3g}, limit {limit:.3g}"
