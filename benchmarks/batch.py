"""What `qconvert batch` gains: several jobs at once, nothing done twice, a lost worker made good, a
split calibration.

    python benchmarks/batch.py                          the 12 jobs convert examples/digits
    python benchmarks/batch.py mobilenet_v2_1.0_224     they convert real models, see common.py

Twelve jobs are four models with three range methods each (the same model four times if one is
given).
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
from common import CLASSIFIERS

DIGITS = Path(__file__).resolve().parents[1] / "examples" / "digits"
METHODS = ("MAX_MIN", "KL", "MSE")
METHOD = "full_quant_param.activation_quant_method"
SIZE = "data_preprocess_param.calibrate_size"
CLUSTER = """
import sys
from distributed import LocalCluster
if __name__ == "__main__":
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        pids = [nanny.pid for nanny in cluster.workers.values()]
        print(cluster.scheduler_address, *pids, flush=True)
        sys.stdin.read()
"""


def sources(folder: Path, names: list[str]) -> list[tuple[Path, Path]]:
    """Four pairs of model and config."""
    if names:
        pairs = [
            (CLASSIFIERS[name].path, CLASSIFIERS[name].config(folder, "FULL_QUANT", 100))
            for name in names
        ]
        return (pairs * 4)[:4]
    config = folder / "digits.cfg"
    config.write_text(
        "[common_quant_param]\nquant_type = FULL_QUANT\n[data_preprocess_param]\ncalibrate_size "
        "= 100\n"
        f"calibrate_path = image:'{DIGITS / 'calib'}'\ninput_type = IMAGE\nimage_to_format = GRAY\n"
        f"normalize_mean = [127.5]\nnormalize_std = [127.5]\n"
    )
    return [(DIGITS / "digits_cnn.onnx", config)] * 4


def write_manifest(folder: Path, names: list[str]) -> Path:
    """Twelve jobs; those of the same model differ in calibrate_size too, so that only three share a
    calibration.
    """
    path = folder / "jobs.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["model", "config", "output", METHOD, SIZE])
        for number, (model, config) in enumerate(sources(folder, names)):
            writer.writerows(
                (model, config, f"out/{number}_{m}.onnx", m, 100 - number) for m in METHODS
            )
    return path


def run(manifest: Path, *flags: str) -> tuple[float, float]:
    """Seconds and peak megabytes, summed over all processes, of a batch."""
    start, peak = time.perf_counter(), 0.0
    process = psutil.Popen(
        [sys.executable, "-m", "converter", "batch", str(manifest), "--quiet", *flags],
        stdout=subprocess.DEVNULL,
    )
    while process.poll() is None:
        peak = max(peak, memory(process))
        time.sleep(0.05)
    if process.returncode:
        raise RuntimeError((manifest.parent / "batch_summary.csv").read_text())
    return time.perf_counter() - start, peak


def memory(process: psutil.Process) -> float:
    """Megabytes of a process and those it started."""
    total = 0
    for each in (process, *process.children(recursive=True)):
        try:
            total += each.memory_info().rss
        except psutil.Error:
            continue
    return total / 1e6


def results(folder: Path) -> dict[str, str]:
    """The fingerprint of every output."""
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted((folder / "out").iterdir())
    }


def forget(folder: Path) -> None:
    """Takes away what a batch left."""
    for name in ("out", ".qconvert"):
        shutil.rmtree(folder / name, ignore_errors=True)


def statuses(folder: Path) -> dict[str, int]:
    """How many jobs ended in which way."""
    found = [row["status"] for row in json.loads((folder / "batch_summary.json").read_text())]
    return {status: found.count(status) for status in found}


def speed(folder: Path, manifest: Path) -> dict[str, str]:
    """One job after another against two at once, and runs again."""
    # One after another means separate commands: each uses all processors and calibrates for itself.
    rows = list(csv.DictReader(manifest.open()))
    alone, most = 0.0, 0.0
    for row in rows:
        single = folder / "single.csv"
        with single.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(row))
            writer.writeheader()
            writer.writerow(row)
        seconds, megabytes = run(single, "-j1")
        alone, most = alone + seconds, max(most, megabytes)
    expected = results(folder)
    print(f"12 jobs one after another, each alone: {alone:.1f} s, at most {most:.0f} MB")
    for jobs in (1, 2):
        forget(folder)
        seconds, megabytes = run(manifest, f"-j{jobs}")
        equal = results(folder) == expected
        gain = alone / seconds
        print(
            f"batch, {jobs} at once: {seconds:.1f} s, {gain:.2f}x as fast, at most "
            f"{megabytes:.0f} MB, equal: {equal}"
        )
    seconds, _ = run(manifest, "--resume")
    print(f"again, nothing changed: {seconds:.2f} s, {statuses(folder)}")
    text = manifest.read_text()
    manifest.write_text(text.replace("MSE,100", "PERCENTILE,100"))
    seconds, _ = run(manifest, "--resume")
    print(f"again, one job's settings changed: {seconds:.2f} s, {statuses(folder)}")
    manifest.write_text(text)
    return expected


def cluster(folder: Path, manifest: Path, expected: dict[str, str]) -> None:
    """All jobs on two workers of a local Dask cluster, one of which is killed after a third of the
    time.
    """
    script = folder / "cluster.py"
    script.write_text(CLUSTER)
    command = [sys.executable, str(script)]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ) as workers:
        assert workers.stdin and workers.stdout
        address, first, _ = workers.stdout.readline().split()
        forget(folder)
        quiet, _ = run(manifest, f"--scheduler={address}")
        print(f"Dask, 2 workers: {quiet:.1f} s, equal: {results(folder) == expected}")
        forget(folder)
        pid = os.fork()
        if not pid:
            time.sleep(quiet / 3)
            os.kill(int(first), signal.SIGKILL)
            os._exit(0)
        seconds, _ = run(manifest, f"--scheduler={address}")
        os.waitpid(pid, 0)
        print(
            f"Dask, one worker killed midway: {seconds:.1f} s, {statuses(folder)}, equal: "
            f"{results(folder) == expected}"
        )
        workers.stdin.close()


def split(folder: Path, names: list[str]) -> None:
    """One calibration of 1,000 samples, whole and in two parts at once."""
    model, config = sources(folder, names)[0]
    found = re.search(r"calibrate_path ?= ?(\w+):'(.*)'", config.read_text())
    assert found
    many = folder / "many"
    many.mkdir()
    files = sorted(Path(found[2]).iterdir())
    for number in range(1000):  # there may be fewer pictures: some are there more than once
        (many / f"{number}{files[number % len(files)].suffix}").symlink_to(
            files[number % len(files)]
        )
    header = (
        "model,config,output,common_quant_param.calibration_cache,common_quant_param.thread_num"
    )
    manifest, made = folder / "split.csv", []
    for parts in (1, 2):
        forget(folder)
        cache = folder / f"{parts}.npz"
        manifest.write_text(
            f"{header},{SIZE},data_preprocess_param.calibrate_path\n"
            f"{model},{config},out/split.onnx,{cache},1,1000,{found[1]}:'{many}'\n"
        )
        seconds, megabytes = run(manifest, "-j2", f"--calibration-parts={parts}")
        made.append((results(folder), hashlib.sha256(cache.read_bytes()).hexdigest()))
        print(f"1,000 samples in {parts} part(s): {seconds:.1f} s, at most {megabytes:.0f} MB")
    print(f"models equal: {made[0][0] == made[1][0]}, caches equal: {made[0][1] == made[1][1]}")


def main(names: list[str]) -> None:
    """Prints all figures."""
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        manifest = write_manifest(folder, names)
        expected = speed(folder, manifest)
        cluster(folder, manifest, expected)
        split(folder, names)


if __name__ == "__main__":
    main(sys.argv[1:])
