"""Find where one shot of a video ends and the next begins, frame by frame as they are decoded."""

import collections
from typing import Any

import numpy as np

# Frames are compared at about this width: enough for what a cut changes, and fine noise and compression average out.
_WIDTH = 128
# No shot is shorter than this, so a second cut that soon after the first is passed over. In seconds.
_MIN_SHOT_SEC = 0.5
# A cut changes brightness this many times as much as the frames around it do, and at least this much (of 255). Hue and
# saturation, which PySceneDetect weighs in by default, are left out: in dark or strongly coloured footage they jump at
# each key frame of the compression, and half of the cuts found were false.
_RATIO = 2.0
_MIN_CHANGE = 15.0
_WINDOW = 2  # frames on either side that a change is compared with
# Footage brought to a higher rate repeats frames; motion would look like a cut beside them, so up to this many in a row
# are left out. A repeated frame changes less than this (of 255).
_MAX_REPEATS = 4
_REPEAT_CHANGE = 0.5


class ShotDetector:
    """Finds hard cuts: frames that differ from the one before much more than the frames around them do.

    So fast motion of the camera, which changes many frames in a row, is no cut; nor are fades and dissolves, which
    spread a change over several frames, nor flashes of one or two frames, nor cuts within the first or last two frames.
    `sensitivity` 1 is the default; more finds more cuts, and more false ones. PySceneDetect's AdaptiveDetector does the
    comparing; memory is that of a few small frames. ValueError if the package is missing.
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
            min_scene_len=max(1, round(_MIN_SHOT_SEC * fps)),
            window_width=_WINDOW,
            luma_only=True,
        )
        # The frames last compared: up to a cut found, the one before it, and the window after it.
        self._recent = collections.deque[np.ndarray](maxlen=_WINDOW + 2)
        self._num_frames = self._num_repeats = 0
        self._cuts: list[int] = []

    def add(self, frame: np.ndarray) -> None:
        """Take the next frame: uint8 (H, W, 3) RGB."""
        import cv2  # comes with PySceneDetect

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
            before, at, *_, after = self._recent
            if _change(before, after) > 0.5 * _change(before, at):  # else a flash, after which all is as before
                self._cuts.append(cut.frame_num)

    def finish(self) -> list[int]:
        """The numbers of the frames that begin a new shot, ascending; never 0. Call after the last frame."""
        return self._cuts


def _change(one: np.ndarray, other: np.ndarray) -> float:
    """The mean difference of two frames of one size."""
    return float(np.abs(one.astype(np.int16) - other).mean())
