"""Detect the cuts between the shots of a video, frame by frame during decoding."""

import collections
from typing import Any

import numpy as np

# Frames are compared at about this width: enough to detect cuts, while fine noise and compression are averaged out.
_WIDTH = 128
# Minimum length of a shot in seconds; a second cut that soon after the first is ignored.
_MIN_SHOT_SEC = 0.5
# A cut changes hue, saturation and brightness together this many times as much as the adjacent frames do, and at least
# this much (of 255), which is what PySceneDetect takes; its ratio of 3 misses cuts between moving shots.
_RATIO = 2.0
_MIN_CHANGE = 15.0
# Hue and saturation of dark frames also jump at key frames of the compression. A cut changes the colours at least this
# share of what two unrelated parts of a frame differ, and at least this much (of 255).
_UNRELATED_SHARE = 0.5
_MIN_COLOR_CHANGE = 1.0
_WINDOW = 2  # number of frames on either side that a change is compared with
# Footage converted to a higher rate repeats frames, which would make motion look like a cut; up to this many
# consecutive repeats are skipped. A repeated frame changes less than this (of 255).
_MAX_REPEATS = 4
_REPEAT_CHANGE = 0.5


class ShotDetector:
    """Detect hard cuts: frames that differ from the previous one much more than the adjacent frames do.

    Fast camera motion, which changes many consecutive frames, is no cut; nor are fades and dissolves, flashes of one or
    two frames, and cuts within the first or last two frames. `sensitivity` 1 is the default; higher values find more
    cuts, and more false ones. PySceneDetect's AdaptiveDetector compares hue, saturation and brightness; memory is that
    of a few small frames. Raises ValueError if the package is missing.
    """

    def __init__(self, fps: float, sensitivity: float = 1.0) -> None:
        try:
            import scenedetect
            from scenedetect.detectors import AdaptiveDetector
        except ImportError as error:
            raise ValueError(
                "finding shots needs the package scenedetect-headless; install it with: pip install 'longtake[shots]' "
                "(in a checkout: pip install -e '.[shots]')"
            ) from error
        self._new_timecode: Any = scenedetect.FrameTimecode
        self._fps = float(fps)
        self._detector = AdaptiveDetector(
            adaptive_threshold=_RATIO / sensitivity,
            min_content_val=_MIN_CHANGE / sensitivity,
            min_scene_len=0,
            window_width=_WINDOW,
        )
        self._sensitivity = sensitivity
        self._min_frames = max(1, round(_MIN_SHOT_SEC * fps))
        # The frames compared last: when a cut is found, up to three before it, its own, and the window after it.
        self._recent = collections.deque[np.ndarray](maxlen=2 * _WINDOW + 2)
        self._num_frames = self._num_repeats = 0
        self._cuts: list[int] = []

    def add(self, frame: np.ndarray) -> None:
        """Add the next frame: uint8 (H, W, 3) RGB."""
        import cv2  # a dependency of PySceneDetect

        number = self._num_frames
        self._num_frames += 1
        height, width = frame.shape[:2]
        if width > _WIDTH:
            size = (_WIDTH, max(1, round(height * _WIDTH / width)))
            frame = cv2.resize(frame, size, interpolation=cv2.INTER_AREA)
        if self._recent and self._num_repeats < _MAX_REPEATS and _change(self._recent[-1], frame) < _REPEAT_CHANGE:
            self._num_repeats += 1
            return
        self._num_repeats = 0
        self._recent.append(frame)
        bgr = np.ascontiguousarray(frame[..., ::-1])
        for cut in self._detector.process_frame(self._new_timecode(number, self._fps), bgr):
            is_late = cut.frame_num - (self._cuts[-1] if self._cuts else 0) >= self._min_frames
            if is_late and self._is_cut():
                self._cuts.append(cut.frame_num)

    def _is_cut(self) -> bool:
        """Return whether the recent frames hold a cut, rather than a flash or a change of hue and saturation alone."""
        earlier, *_, before, at, _, after = self._recent
        change = _change(before, at)
        least = max(_UNRELATED_SHARE * min(_contrast(before), _contrast(at)), _MIN_COLOR_CHANGE) / self._sensitivity
        # After a flash of one or two frames the scene continues.
        return change >= least and min(_change(before, after), _change(earlier, at)) > 0.5 * change

    def finish(self) -> list[int]:
        """Return the numbers of the frames that begin a new shot, ascending; never 0. Call after the last frame."""
        return self._cuts


def _change(one: np.ndarray, other: np.ndarray) -> float:
    """Return the mean difference of two frames of one size."""
    return float(np.abs(one.astype(np.int16) - other).mean())


def _contrast(frame: np.ndarray) -> float:
    """Return the mean difference of the halves of a frame, side by side or one above the other, whichever is less.

    Black bars are on both sides, or above and below, and do not count.
    """
    height, width = frame.shape[:2]
    return min(_change(frame, np.roll(frame, height // 2, axis=0)), _change(frame, np.roll(frame, width // 2, axis=1)))
