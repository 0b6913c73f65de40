"""Draws and samplers of the release, with the random numbers that it took."""

import re

import numpy as np
import torch

from tests import golden_files
from tests.training.mebt.test_golden_networks import arithmetic_codes, make
from training.generation.draft_revise import DraftSettings, Draw, Grid, Published, race
from training.generation.noise import SequentialNoise
from training.mebt.extrapolation import extrapolate
from training.mebt.modes import PUBLISHED_MODES

STRATEGIES = {"maskgit": "confidence", "random": "random", "bootstrap": "bootstrap"}


def find(pattern, text):
    """Return the groups of a pattern's first match."""
    match = re.search(pattern, text)
    assert match is not None, text
    return match.groups()


class Recorded(SequentialNoise):
    """Random numbers of the release, and which arrays were taken."""

    def __init__(self, seed, num_videos):
        super().__init__(np.random.RandomState(seed), num_videos)
        self.taken = []

    def race(self, positions, num_codes, codes=None):
        self.taken.append(["E", *positions.shape, num_codes])
        return super().race(positions, num_codes, codes)

    def exponential(self, positions):
        self.taken.append(["E", *positions.shape])
        return super().exponential(positions)

    def normal(self, positions):
        self.taken.append(["N", *positions.shape])
        return super().normal(positions)

    def permutations(self, count):
        self.taken += [["P", count]] * self.num_videos
        return super().permutations(count)


@golden_files.entries("mebt", "sample_from_logits*")
def test_sample_from_logits(entry, golden):
    for case in entry:
        text, digits = find(r"round\((.*), ?(\d+)\)", case["logits"])
        logits = torch.from_numpy(np.round(golden_files.draws(text)[0], int(digits)).astype(np.float32))
        draw = Draw(case["temperature"], case["top_k"], case["top_p"] or 1.0)
        probabilities = draw.probabilities(logits)
        ids, chosen = race(probabilities, golden_files.normals(case["E"])[0])
        assert ids.tolist() == case["samples"]
        golden_files.check(chosen, case["prob_of_sample"])
        assert (probabilities > 0).sum(-1).flatten().tolist() == case["support"]


def draw_of(case, prefix=""):
    """Return how codes are drawn in a case: names such as "temperature" or "revise_t"."""
    temperature = case.get(f"{prefix}_t", case.get("temperature", 1.0) if prefix != "draft" else 1.0)
    top_k, top_p = (case.get(f"{prefix}_{name}" if prefix else name) for name in ("top_k", "top_p"))
    return Draw(temperature, top_k, top_p or 1.0)


def settings_of(case, schedule, num_targets):
    return DraftSettings(
        case["steps"],
        STRATEGIES[case.get("strategy", "maskgit")],
        case.get("schedule", schedule),
        case.get("ctemp", 1.0),
        case.get("ctemp_schedule", "linear"),
        draw_of(case),
        num_targets if case.get("edit") else None,
    )


def given_contexts(text, vocabulary, num_videos, count):
    """Return the grid of a description such as "positions 0..7, codes (3i+1) mod V over both samples"."""
    last = int(find(r"positions 0\.\.(\d+)", text)[0])
    codes = torch.zeros(num_videos, count, dtype=torch.int64)
    codes[:, : last + 1] = arithmetic_codes(text[text.index("(") :], vocabulary, (num_videos, last + 1))
    return Grid.given(codes, last + 1)


class Samplers:
    """The cases of an entry in order, as some continue where the one before has ended."""

    def __init__(self, entry, golden):
        self.golden, self.schedule = golden, entry["net"].get("schedule", "cosine")
        self.net, self.batch, self.before = entry["net"], entry["net"]["batch"], None
        self.network = make(self.net, golden)

    def use(self, case):
        """Change the network where a case has its own, described in words."""
        text = case.get("net")
        if text is not None:
            numbers = {name: int(find(rf"\b{name} (\d+)", text)[0]) for name in ("latents", "d", "H")}
            shape = [int(size) for size in find(r"shape ([\dx]+)", text)[0].split("x")]
            self.net = {**self.net, **numbers, "shape": shape, "modes": PUBLISHED_MODES}
            self.network = make(self.net, self.golden)
        self.batch = case.get("batch", self.batch)

    def run(self, case):
        """Return the codes, the contexts, the calls and the arrays of random numbers of a case."""
        self.use(case)
        calls, noise = [], Recorded(case["seed"], self.batch)
        count = self.network.num_positions

        def predict(query):
            calls.append([query.contexts.shape[1], query.targets.shape[1]])
            return self.network.predict(query)

        published = Published(predict, noise, legacy=True)
        grid = self.start(case, count)
        codes = None
        with torch.no_grad():
            if "total_length" in case:
                codes = self.extrapolate(case, published)
            elif "M" in case and "draft_steps" in case:
                grid = published.draft_parts(grid, case["draft_steps"], draw_of(case, "draft"))
                grid = self.revise(published, grid, case)
            elif "R" in case:
                grid = self.revise(published, grid, case)
            elif case["first_draws"][0][0] == "P":
                grid = published.draft_parts(grid, case["steps"], draw_of(case))
            else:
                grid = published.draft(grid, settings_of(case, self.schedule, grid.targets.shape[1]))
        self.before = grid
        return grid.codes if codes is None else codes, grid.contexts, calls, noise.taken

    def start(self, case, count):
        """Return the grid that a case begins with: given codes, those of the case before, or none."""
        text, (visible, _) = case.get("start", ""), case["calls_ctx_tgt"][0]
        if "context" in case:
            return given_contexts(case["context"], self.net["V"], self.batch, count)
        if text.startswith("(") and "total_length" not in case:
            return Grid.given(arithmetic_codes(text, self.net["V"], (self.batch, count)), 0)
        revises = "R" in case and "draft_steps" not in case
        continues = "steps" in case and "total_length" not in case and visible > 0
        return self.before if revises or continues else Grid.empty(self.batch, count)

    def revise(self, published, grid, case):
        """Revise all positions; a case of one round has its temperature by its own name."""
        draw = draw_of(case, "revise" if "M" in case else "")
        return published.revise(Grid.given(grid.codes, 0), case["R"], draw, case.get("M", 1))

    def extrapolate(self, case, published):
        t, h, w = self.net["shape"]
        start = arithmetic_codes(case["start"], self.net["V"], (self.batch, t, h, w))
        total, window, context = (case[name] // 4 for name in ("total_length", "step_size", "context_size"))
        settings = settings_of({**case, "edit": True}, self.schedule, (window - context) * h * w)
        return extrapolate(published, start, total, window, context, settings, legacy=True)


@golden_files.entries("mebt", "sampling*")
def test_samplers(entry, golden):
    samplers = Samplers(entry, golden)
    for case in entry["cases"]:
        codes, contexts, calls, taken = samplers.run(case)
        name = case["case"]
        assert calls == case["calls_ctx_tgt"], name
        assert len(taken) == case["draws"], name
        assert taken[: len(case["first_draws"])] == case["first_draws"], name
        assert codes.flatten().tolist() == case["tokens"], name
        order = case.get("context_order")
        if isinstance(order, dict):
            golden_files.check(contexts, order, where=name)
        elif order is not None:
            assert contexts.tolist() == order, name
