"""Check units, whose mistakes change a metric more than any model does: range, channel order, axes, size, frame rate.

A certain mistake is a `ValueError` that names the remedy; a probable one becomes a warning of one sentence.
"""

import numpy as np

from training.contract import Size
from training.data.arrays import check_array as check_array
from training.data.frames import check_rate as check_rate
from training.data.frames import is_same_rate

FEWEST_COMPARABLE = 256  # below, the bias of a small sample (it falls as 1 / N) outweighs differences of models
FEWEST_FOR_COLOURS = 8  # items a side, below which colours are not compared


def check_sizes(real: Size, fake: Size, real_name: str, fake_name: str) -> None:
    """Raise `ValueError` unless both sides have frames of one size."""
    if real == fake:
        return
    remedy = "measure at one size, since a difference in sharpness would be taken for one in quality"
    if real == fake[::-1]:
        remedy = "height and width of one side are exchanged, so rotate or transpose it"
    raise ValueError(
        f"the frames of {real_name} are {real[0]}x{real[1]}, those of {fake_name} {fake[0]}x{fake[1]}: {remedy}"
    )


def check_same_rate(real: float | None, fake: float | None, real_name: str, fake_name: str) -> None:
    """Raise ValueError if both frame rates are known and differ: the same motion would be of another speed."""
    if real is not None and fake is not None and not is_same_rate(real, fake):
        raise ValueError(
            f"{real_name} has {real:g} frames a second, {fake_name} {fake:g}, so their motion cannot be compared: "
            f"give --fps={min(real, fake):g}, at which video files are then read"
        )


def check_range(colours: np.ndarray, name: str) -> None:
    """Raise `ValueError` if no pixel of existing footage is above 1; rows are mean red, green, blue and maximum."""
    if len(colours) and colours[:, 3].max() <= 1:
        raise ValueError(
            f"no pixel of {name} that was read is above 1, so it was saved from values in [0, 1]: save "
            "(x * 255).round().astype(np.uint8)"
        )


def colour_warning(real: np.ndarray, fake: np.ndarray, real_name: str, fake_name: str) -> str | None:
    """Return a warning if the colours of both sides, rows of mean red, green, blue and maximum, suggest a mistake."""
    if min(len(real), len(fake)) < FEWEST_FOR_COLOURS:
        return None
    balance = [side[:, 0] - side[:, 2] for side in (real, fake)]
    gap = abs(balance[0].mean() - balance[1].mean())
    error = np.sqrt(sum(side.var() / len(side) for side in balance))
    mirrored = abs(balance[0].mean() + balance[1].mean())
    if gap > max(5, 6 * error) and mirrored < gap / 4:
        return (
            f"red and blue seem to be exchanged in one of {real_name} and {fake_name} (red exceeds blue by "
            f"{balance[0].mean():.0f} and by {balance[1].mean():.0f}); frames are red, green, blue, so if OpenCV wrote "
            "one side, save x[..., ::-1]"
        )
    highest = real[:, 3].max(), fake[:, 3].max()
    if min(highest) <= 128 and max(highest) > 200:
        dark = real_name if highest[0] < highest[1] else fake_name
        return (
            f"no pixel of {dark} that was read is above {min(highest):.0f}, while the other side reaches "
            f"{max(highest):.0f}: if its values were in another range, save x * 127.5 + 128 of those in [-1, 1]"
        )
    return None


def size_warning(name: str, num_real: int, num_fake: int) -> str | None:
    """Return a warning if a side is too small a sample."""
    fewest = min(num_real, num_fake)
    if fewest >= FEWEST_COMPARABLE:
        return None
    return (
        f"{name} was measured on {fewest} clips; below {FEWEST_COMPARABLE} the size of the sample decides the value "
        "more than the quality of the video, so compare it only with values of the same number of clips"
    )


def repeat_warning(name: str, num_different: int, num_items: int) -> str | None:
    """Return a warning if there are fewer different clips than are measured."""
    if num_different >= num_items:
        return None
    return (
        f"{name} has only {num_different} different clips of this length, so some of the {num_items} measured are the "
        f"same ones: take a metric of at most {num_different}"
    )
