"""Recipes parse, name existing options, presets and files, and work at tiny scale, also when repeated."""

import functools
import http.server
import importlib
import json
import os
import re
import subprocess
import sys
import threading
import tomllib

import iscc_samples
import pytest
import yaml
from click.testing import CliRunner

from tests.test_docs import commands_of, options_of
from training.longvideogan.presets import STAGES

RECIPES = ["demo", "labdoom", "labdoom_results", "shootout", "own_videos", "horseback_8gpu"]
SCRIPTS = "train_lres|train_sres|generate|calc_metrics"


def shell_lines(text):
    """Return the commands of a shell script: comments left out, continued lines joined."""
    return re.sub(r"^\s*#.*$", "", text.replace("\\\n", " "), flags=re.MULTILINE).splitlines()


def bash(repo, script, cwd=None, **variables):
    """Run a piece of shell with the recipes' functions, where `python` is this one."""
    path = f"{os.path.dirname(sys.executable)}:{os.environ['PATH']}"
    return subprocess.run(
        ["bash", "-c", script],
        cwd=cwd or repo,
        env={**os.environ, "PATH": path, **variables},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize("name", [*RECIPES, "common", "entrypoint"])
def test_it_parses(repo, name):
    subprocess.run(["bash", "-n", str(repo / f"runs/{name}.sh")], check=True)


@pytest.mark.parametrize("name", RECIPES)
def test_its_header_states_time_disk_memory_and_resuming(repo, name):
    head = re.match(r"(#.*\n)+", (repo / f"runs/{name}.sh").read_text())
    assert head is not None
    for word in ("Time: ", "Disk: ", "Memory: ", "goes on", f"runs/{name}.sh"):
        assert word in head.group(), f"runs/{name}.sh does not tell {word}"


@pytest.mark.parametrize("name", RECIPES)
def test_every_option_that_it_gives_exists(repo, name):
    found = 0
    for line in shell_lines((repo / f"runs/{name}.sh").read_text()):
        match = re.search(rf"\b(?:python -m ([\w.]+)|({SCRIPTS})\.py)\s(.*)", line)
        if match and "value_of" not in line:
            known = options_of(importlib.import_module(match[1] or match[2]).main)
            for option in re.findall(r"(?<![\w-])--[a-z][\w-]*", match[3]):
                assert option in known, f"runs/{name}.sh: {match[1] or match[2]} has no option {option}"
                found += 1
    assert found > {"demo": -1, "labdoom_results": 10, "shootout": 12}.get(name, 15)


@pytest.mark.parametrize("name", ["labdoom", "own_videos"])
def test_options_in_its_text_exist(repo, name):
    commands = ("train_lres", "train_sres", "dataset_tools.make_dataset_from_videos")
    known = {option for command in commands for option in options_of(importlib.import_module(command).main)}
    comments = re.findall(r"#(.*)$", (repo / f"runs/{name}.sh").read_text(), re.MULTILINE)
    named = {option for text in comments for option in re.findall(r"(?<![\w-])--[a-z][\w-]*", text)}
    assert named <= known, named - known


def test_presets_that_recipes_begin_with_exist(repo):
    lres, sres = STAGES["longvideogan-lres"], STAGES["longvideogan-sres"]
    for name in ("labdoom", "own_videos"):
        text = (repo / f"runs/{name}.sh").read_text()
        for preset in re.findall(r"PRESET(?:=|:-)([\w-]+)", text):
            assert preset in lres and preset in sres
    for name in ("horseback", "biking"):
        assert f"{name}-lres" in lres and f"{name}-sres" in sres


def test_commands_of_the_cluster_files_pass_a_dry_run(repo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    slurm = re.findall(r"^# {3}(sbatch .*)$", (repo / "runs/slurm.sbatch").read_text(), re.MULTILINE)
    sky = (repo / "runs/sky.yaml").read_text()
    trains = [yaml.safe_load(sky)["envs"]["TRAIN"], *re.findall(r'--env TRAIN="([^"]+)"', sky)]
    text = "\n".join([*slurm, *(f"python {train}" for train in trains)])
    found = commands_of(f"```bash\n{text}\n```")
    assert len(found) == 4
    for module, arguments in found:
        result = CliRunner().invoke(importlib.import_module(module).main, [*arguments, "--dry-run"])
        assert result.exit_code == 0, result.output


def test_what_was_done_is_done_again_only_if_the_command_is_another(repo, tmp_path):
    script = f"""source runs/common.sh
        once {tmp_path}/done/step bash -c 'echo a >> {tmp_path}/log'
        once {tmp_path}/done/step bash -c 'echo a >> {tmp_path}/log'
        once {tmp_path}/done/step bash -c 'echo b >> {tmp_path}/log'
        once {tmp_path}/done/fails false || true
        once {tmp_path}/done/other false"""
    done = bash(repo, script)
    assert done.returncode == 1 and "Done before (delete" in done.stdout
    assert (tmp_path / "log").read_text() == "a\nb\n"
    assert not (tmp_path / "done/other").exists()


def test_the_network_of_a_run_is_its_best_or_last_and_never_one_on_the_way(repo, tmp_path):
    older, run_dir = (tmp_path / f"{index:05d}-mine-4batch-1accum" for index in range(2))
    for run, steps, age in ((older, 5, 100), (run_dir, 20, 10)):
        (run / "checkpoints").mkdir(parents=True)
        (run / "checkpoints/ckpt-00000005-G-ema.pkl").touch()
        (run / "options.json").write_text(json.dumps({"steps": steps}))
        os.utime(run / "options.json", (1e9 - age, 1e9 - age))
    ask = f"source runs/common.sh; LRES=$(network_of {tmp_path}); echo $LRES"
    unfinished = bash(repo, ask)
    assert unfinished.returncode == 1 and unfinished.stdout == ""
    assert "has not come to step 20 yet; run the same command again" in unfinished.stderr
    (run_dir / "checkpoints/ckpt-00000020-G-ema.pkl").touch()
    assert bash(repo, ask).stdout.strip() == str(run_dir / "checkpoints/ckpt-00000020-G-ema.pkl")
    (run_dir / "best.json").write_text(json.dumps({"checkpoint": "checkpoints/ckpt-00000005-G-ema.pkl"}))
    assert bash(repo, ask).stdout.strip() == str(run_dir / "checkpoints/ckpt-00000005-G-ema.pkl")


def test_ranks_are_put_before_the_script(repo):
    ask = "source runs/common.sh; ranks echo train_lres.py --batch=4"
    assert bash(repo, ask).stdout == "python train_lres.py --batch=4\n"
    several = bash(repo, ask, NPROC="8").stdout
    assert several == "torchrun --standalone --nproc_per_node=8 train_lres.py --batch=4\n"


def test_own_videos_wants_a_folder(repo, tmp_path):
    for arguments in ("", tmp_path / "absent"):
        done = bash(repo, f"bash runs/own_videos.sh {arguments}")
        assert done.returncode == 2 and "Give the folder of your videos" in done.stderr


def test_paths_are_those_of_the_folder_where_a_recipe_is_called(repo, tmp_path):
    (tmp_path / "clips").mkdir()
    done = bash(repo, f"bash {repo}/runs/own_videos.sh clips", tmp_path, PRESET="huge")
    assert "Give the folder" not in done.stderr and "'huge' is unknown" in done.stderr
    script = f"source {repo}/runs/common.sh; from_caller clips; echo; from_caller /data/clips"
    assert bash(repo, script, tmp_path).stdout == f"{tmp_path}/clips\n/data/clips"


@pytest.mark.slow
def test_own_videos_refuses_what_cannot_be_before_anything_is_made(repo, tmp_path):
    for variables, message in [
        ({"SRES_SIZE": "100x200"}, "the nearest is 256, such as 144x256"),
        ({"PRESET": "huge"}, "'huge' is unknown"),
    ]:
        data = tmp_path / "data"
        done = bash(repo, f"bash runs/own_videos.sh {tmp_path}", DATA=str(data), **{"PRESET": "toy", **variables})
        assert done.returncode != 0 and message in done.stderr, done.stderr
        assert "Traceback" not in done.stderr and not data.exists()


def test_the_entry_point_finds_scripts_modules_and_programs(repo, tmp_path):
    entry = f"bash {repo}/runs/entrypoint.sh"
    (tmp_path / "mine.py").write_text("import sys; print(sys.argv[1:])")
    assert "train_lres.py" in bash(repo, f"{entry}", tmp_path).stdout
    assert bash(repo, f"{entry} mine.py 'a b'", tmp_path).stdout == "['a b']\n"
    assert bash(repo, f"{entry} -m json.tool --help", tmp_path).stdout.startswith("usage:")
    assert bash(repo, f"{entry} echo 'a  b'", tmp_path).stdout == "a  b\n"
    done = bash(repo, f"{entry} calc_metrics.py --help", tmp_path)
    assert done.stdout.startswith("Usage: calc_metrics.py"), done.stderr


def test_the_container_copies_what_there_is_and_installs_what_is_pinned(repo):
    text = (repo / "runs/Dockerfile").read_text()
    for line in re.findall(r"^COPY (.*) \S+$", text, re.MULTILINE):
        assert all((repo / name).exists() for name in line.split())
    (extras,) = re.findall(r"--constraint constraints.txt --editable '\.\[([\w,]+)\]'", text)
    project = tomllib.loads((repo / "pyproject.toml").read_text())
    pinned = {line.split("==")[0].lower() for line in (repo / "constraints.txt").read_text().splitlines()}
    for extra in extras.split(","):
        wanted = project["project"]["optional-dependencies"][extra]
        assert {re.split(r"[>=]", line)[0].lower() for line in wanted} <= pinned
    packages = project["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    assert f"mkdir {' '.join(packages)} " in text
    assert re.search(r"^USER \d+:\d+$", text, re.MULTILINE)


# ----------------------------------------------------------------------------
# For real: two steps, a few clips, and then the same command for three.

TINY = {
    "PRESET": "toy",
    "SEEDS": "0",
    "LEN": "16",
    "METRICS": "fvd2_16f",
    "THREADS": "1",
    "SRES_STEPS": "2",
    "LRES_OPTIONS": "--device=cpu --batch=2 --sample-steps=0",
    "SRES_OPTIONS": "--device=cpu --batch=2 --sample-steps=0",
}


def cook(repo, command, outdir, **variables):
    """Run a recipe to step 2 of the low-resolution stage, then to step 3, and check what is there."""
    said = ""
    for num_steps in (2, 3):
        environment = {**TINY, "OUT": str(outdir), "LRES_STEPS": str(num_steps), **variables}
        done = bash(repo, command, **environment)
        assert done.returncode == 0, done.stdout + done.stderr
        said = done.stdout
        assert f"Finished {num_steps} steps" in said and "== The videos are in" in said
    assert "goes on at step 2 of 3" in said and "goes on at step 2 of 2" in said
    assert {path.name for path in (outdir / "videos").iterdir()} >= {"seed=0_len=16_sres.mp4", "seed=0_len=16_lres.mp4"}
    lines = [json.loads(line) for line in (outdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["metric"] for line in lines] == ["fvd2_16f"] * 2
    assert "ckpt-00000003" in lines[-1]["lres_path"]
    again = bash(repo, command, **{**TINY, "OUT": str(outdir), "LRES_STEPS": "3", **variables})
    assert (
        again.returncode == 0
        and "Done before" in again.stdout
        and len((outdir / "metrics.jsonl").read_text().splitlines()) == 2
    )
    return said


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_labdoom_and_published_recipes_run(repo, tmp_path):
    data = tmp_path / "labdoom"
    clips = {"CLIPS": "2", "VAL_CLIPS": "2", "FRAMES": "48"}
    said = cook(repo, "bash runs/labdoom.sh", tmp_path / "out", DATA=str(data), **clips)
    assert said.count("Rendering clips") == 0

    # A last run with other options, and the evidence: all checkpoints, the second stage, short filters.
    environment = {**TINY, **clips, "DATA": str(data), "OUT": str(tmp_path / "out"), "LRES_STEPS": "3"}
    environment |= {"LRES_LAST_STEPS": "1", "LRES_LAST_OPTIONS": "--g-lr=0.001"}
    done = bash(repo, "bash runs/labdoom.sh", **environment)
    assert done.returncode == 0 and "Finished 1 steps" in done.stdout, done.stdout + done.stderr
    environment |= {"EVERY": "1", "ABLATION_STEPS": "3", "SIDE": "2", "LONG_SIDE": "2", "LONG_FRAMES": "20"}
    for _ in range(2):
        done = bash(repo, "bash runs/labdoom_results.sh", **environment, VIDEO_FRAMES="24")
        assert done.returncode == 0, done.stdout + done.stderr
        results = {path.name: path for path in (tmp_path / "out/results").iterdir()}
        assert {"curve.png", "full-size.png", "filters.png", "short-filters.jsonl"} <= results.keys()
        lines = {name: results[f"{name}.jsonl"].read_text().splitlines() for name in ("lres-last", "sres", "bicubic")}
        assert [len(lines[name]) for name in lines] == [4, 4, 4]

    # The frames in published form, which has no dataset.json, from a server of ours and with two ranks.
    www = tmp_path / "www"
    for size in ("0018x0032", "0072x0128"):
        (www / size).mkdir(parents=True)
        (www / size / "partition_0000.zip").symlink_to(data / "train" / size / "partition_0000.zip")
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(www))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        variables = {"URL": f"http://127.0.0.1:{server.server_port}", "DATA": str(tmp_path / "published")}
        variables |= {"LRES_PRESET": "toy", "SRES_PRESET": "toy", "NPROC": "2", "OMP_NUM_THREADS": "1"}
        said = cook(repo, "bash runs/horseback_8gpu.sh", tmp_path / "out2", **variables)
        server.shutdown()
    assert "2 ranks" in said and "assuming 30 frames per second" in said


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_own_videos_recipe_runs(repo, tmp_path):
    """From another folder, on a video with cuts beside one that cannot be decoded; then with one more video."""
    (video,) = [path for path in iscc_samples.videos() if path.name == "demo.mp4"]
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "walk.mp4").symlink_to(video)
    (tmp_path / "videos" / "broken.mp4").write_bytes(video.read_bytes()[:50_000])
    recipe = f"cd {tmp_path} && bash {repo}/runs/own_videos.sh videos"
    options = {"DATASET_OPTIONS": "--split-shots --trim-start=20 --trim-end=36", "PARTITIONS": "2", "DATA": "data"}
    said = cook(repo, recipe, tmp_path / "out", **options)
    assert (tmp_path / "data/clips.png").is_file() and "2 of 2 partitions were made before" in said
    description = json.loads((tmp_path / "data/dataset.json").read_text())
    assert description["fps"] == 24 and any(
        "broken" in line for part in description["partitions"].values() for line in part["skipped"]
    )
    (tmp_path / "videos" / "again.mp4").symlink_to(video)
    done = bash(repo, recipe, **{**TINY, **options, "OUT": str(tmp_path / "out"), "LRES_STEPS": "4"})
    assert done.returncode == 0 and "Finished 4 steps" in done.stdout, done.stdout + done.stderr
    groups = {name.split("/")[0] for name in json.loads((tmp_path / "data/manifest.json").read_text())["clips"]}
    assert groups == {"again", "walk"}
