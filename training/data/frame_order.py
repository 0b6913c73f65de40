"""Order frames by the numbers in their names, and divide them where they do not follow one another.

order_frames(["t0.png", "t0.25.png", "t0.5.png"])          # [["t0.png", "t0.25.png", "t0.5.png"]]
order_frames(["0.png", "1.png", "50.png", "51.png"])       # [["0.png", "1.png"], ["50.png", "51.png"]]
"""

import collections
import itertools
import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import PurePath

Number = int | Fraction
Texts = tuple[str, ...]
Numbers = tuple[Number, ...]

_WHOLE = re.compile(r"([0-9]+)")
# 0.25, but not a part of 2026.01.31.
_DECIMAL = re.compile(r"((?<![0-9.])[0-9]+\.[0-9]+(?!\.?[0-9])|[0-9]+)")
_JUMP = 1.5  # a step this much longer than the usual one is a gap; clocks in names are not exact
# After how many steps a number of dates, times and other counters begins anew while the one before it goes on.
_ROLLOVERS = (12, 24, 28, 29, 30, 31, 60, *(10**digits for digits in range(2, 10)))


def natural_key(name: str) -> tuple[list[str | int], str]:
    """Return a sort key that compares the numbers in names by value: 2.png comes before 10.png.

    Zero-padded numbers sort as plain text does.
    """
    parts = _WHOLE.split(name)
    return [int(part) if index % 2 else part for index, part in enumerate(parts)], name


def order_frames(names: Sequence[str]) -> list[list[str]]:
    """Return names of image files in order, as runs of successive frames.

    Names that differ in their numbers alone are a series. Its numbers may be decimals and negative. It is divided where
    a step is longer than the usual one. Names without numbers are one run in alphabetical order. Raises `ValueError`
    with two names if they have the same number, or if their order is not clear.
    """
    whole = _series(names, _WHOLE)
    if not any(re.search(r"[0-9]\.[0-9]", PurePath(name).stem) for name in names):
        return _divide(whole)[0]
    decimal = _series(names, _DECIMAL)
    if len(decimal) < len(whole):  # some names have a dot where others have none: 0, 0.5, 1
        return _divide(decimal)[0]
    try:
        runs, num_odd = _divide(decimal)
    except ValueError:  # as decimals, 0.1 and 0.10 are one number
        return _divide(whole)[0]
    other_runs, other_odd = _divide(whole)
    orders = [[name for run in found for name in run] for found in (runs, other_runs)]
    if orders[0] != orders[1] and (len(runs), num_odd) == (len(other_runs), other_odd):
        first, second = next(pair for pair in zip(*orders, strict=True) if pair[0] != pair[1])
        raise ValueError(
            f"{first} and {second} have numbers that may be decimals or not, which gives two orders: name the frames "
            "000000.png, 000001.png and so on"
        )
    return min(((len(runs), num_odd, 0), runs), ((len(other_runs), other_odd, 1), other_runs))[1]


def _series(names: Sequence[str], pattern: re.Pattern[str]) -> dict[Texts, list[tuple[Numbers, str]]]:
    """Return numbers and names, sorted, by the texts around the numbers that the pattern matches."""
    series: dict[Texts, list[tuple[Numbers, str]]] = collections.defaultdict(list)
    for texts, numbers, name in _with_signs([(*_parse(name, pattern), name) for name in names]):
        series[texts].append((numbers, name))
    return {texts: sorted(members) for texts, members in series.items()}


def _divide(series: Mapping[Texts, list[tuple[Numbers, str]]]) -> tuple[list[list[str]], int]:
    """Return the runs of successive frames, and how many steps are far shorter than the usual one."""
    if all(len(members) == 1 for members in series.values()):
        return [sorted((name for ((_, name),) in series.values()), key=natural_key)], 0
    divided = [_runs(members) for members in series.values()]
    runs = [run for found, _ in divided for run in found]
    return sorted(runs, key=lambda run: natural_key(run[0])) if len(series) > 1 else runs, sum(
        odd for _, odd in divided
    )


def _parse(name: str, pattern: re.Pattern[str]) -> tuple[Texts, Numbers]:
    parts = pattern.split(PurePath(name).stem.lower())
    numbers = (Fraction(part) if "." in part else int(part) for part in parts[1::2])
    return tuple(parts[::2]), tuple(numbers)


def _with_signs(parsed: list[tuple[Texts, Numbers, str]]) -> list[tuple[Texts, Numbers, str]]:
    """Take a dash for a sign where other names lack it, or where nothing precedes it; else it separates."""
    known = {texts for texts, _, _ in parsed}
    signed = []
    for texts, numbers, name in parsed:
        for place in range(len(numbers)):
            without = (*texts[:place], texts[place].removesuffix("-"), *texts[place + 1 :])
            if texts != without and (without in known or (place == 0 and texts[0] == "-")):
                texts, numbers = without, (*numbers[:place], -numbers[place], *numbers[place + 1 :])
        signed.append((texts, numbers, name))
    return signed


def _runs(members: list[tuple[Numbers, str]]) -> tuple[list[list[str]], int]:
    """Divide a sorted series into runs of successive frames; see `_divide`."""
    steps = []  # for each frame but the first: which number changes first, and by how much
    for (numbers, name), (following, next_name) in itertools.pairwise(members):
        if numbers == following:
            raise ValueError(f"{name} and {next_name} have the same number: remove or rename one of them")
        place = next(place for place, number in enumerate(numbers) if number != following[place])
        steps.append((place, following[place] - numbers[place]))
    runs = [[members[0][1]]]
    if not steps:
        return runs, 0
    counts = collections.Counter(place for place, _ in steps)
    counter = max(counts, key=lambda place: (counts[place], place))  # the number that counts frames
    usual = sorted(step for place, step in steps if place == counter)[(counts[counter] - 1) // 2]
    for (place, step), (numbers, _), (following, name) in zip(steps, members, members[1:], strict=False):
        if place == counter:
            follows = step <= _JUMP * usual
        else:
            period = numbers[counter] + usual - following[counter]
            follows = place > counter or (step == 1 and any(abs(period - other) < usual for other in _ROLLOVERS))
        if follows:
            runs[-1].append(name)
        else:
            runs.append([name])
    return runs, sum(place == counter and step * _JUMP < usual for place, step in steps)
