"""Command line: measure stages, write JSON and Markdown, print the table."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

RESNET = {"architecture": "resnet18"}
SMALL, LARGE = {**RESNET, "resolution": 64}, {**RESNET, "resolution": 224}
TINY = {"architecture": "convnet", "resolution": 16}
FLOAT32, BFLOAT16 = {"bfloat16": False}, {"bfloat16": True}

# Stage → size → [(target ratio, sizes)]: `cpu` takes a minute or two a line on two cores, `gpu` is the
# paper's scale, `tiny` shows that it works.
SIZES = {
    "features": {
        "tiny": [(None, {**TINY, "images": 64, "classes": 4})],
        "cpu": [(0.5, {"architecture": "convnet", "resolution": 32, "images": 10_000, "classes": 10})],
        "gpu": [(0.5, {**RESNET, "resolution": 32, "images": 10_000, "classes": 10})],
    },
    "barycenter": {
        "tiny": [(None, {"points": 100, "dimension": 16, "atoms": 5})],
        "cpu": [(1.0, {"points": 1300, "dimension": 512, "atoms": m}) for m in (10, 50, 100)],
        "gpu": [(1.0, {"points": 1300, "dimension": 512, "atoms": m}) for m in (10, 50, 100)],
    },
    "recover": {
        "tiny": [(None, {**TINY, "classes": 2, "ipc": 3, "iterations": 2})],
        "cpu": [
            (0.8, {**SMALL, "classes": 10, "ipc": 10, "iterations": 1, **FLOAT32}),
            (0.55, {**SMALL, "classes": 10, "ipc": 10, "iterations": 1, **BFLOAT16}),
            (0.8, {**LARGE, "classes": 1, "ipc": 10, "iterations": 2, **FLOAT32}),
            (0.55, {**LARGE, "classes": 1, "ipc": 10, "iterations": 2, **BFLOAT16}),
        ],
        "gpu": [
            (0.5, {**SMALL, "classes": 10, "ipc": 10, "iterations": 200, **BFLOAT16}),
            (0.5, {**LARGE, "classes": 1, "ipc": 10, "iterations": 200, **BFLOAT16}),
            (0.5, {**LARGE, "classes": 10, "ipc": 10, "iterations": 500, **BFLOAT16}),
            (0.5, {**LARGE, "classes": 10, "ipc": 10, "iterations": 200, **FLOAT32}),
        ],
    },
    "relabel": {
        "tiny": [(None, {**TINY, "images": 12, "epochs": 2})],
        "cpu": [(0.5, {**SMALL, "images": 100, "epochs": 3, **p}) for p in (FLOAT32, BFLOAT16)],
        "gpu": [(0.5, {**SMALL, "images": 100, "epochs": 300, **BFLOAT16})],
    },
    "evaluate": {
        "tiny": [(None, {**TINY, "images": 12, "epochs": 2, "test": 20})],
        "cpu": [(0.5, {**SMALL, "images": 100, "epochs": 2, "test": 50, **p}) for p in (FLOAT32, BFLOAT16)],
        "gpu": [(0.2, {**SMALL, "images": 100, "epochs": 300, "test": 50, **BFLOAT16})],
    },
}
OTHERS = ("startup", "limits", "scaling")


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("stage", nargs="+", choices=[*SIZES, *OTHERS])
    parser.add_argument("--size", choices=("tiny", "cpu", "gpu"), default="cpu")
    parser.add_argument("--row", type=int, action="append", help="only this line of a stage, from 0")
    parser.add_argument("--images", metavar="FOLDER", help="a folder of class folders, for features")
    parser.add_argument("--count", type=int, help="images to embed, for features")
    parser.add_argument("--epochs", type=int, help="for relabel and evaluate")
    parser.add_argument("--test", type=int, help="test images, for evaluate")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: that of the size")
    parser.add_argument("--output", type=Path, default=Path("results/performance"))
    given = parser.parse_args()
    for stage in given.stage:
        globals()[f"run_{stage}" if stage in OTHERS else "run_stage"](stage, given)


def run_stage(stage: str, given: argparse.Namespace) -> None:
    from benchmarks.compare import build_lines, compare, notes_of, write_json
    from workflow_scripts.plain_tables import as_markdown

    device = given.device or ("cuda" if given.size == "gpu" else "cpu")
    if stage == "barycenter":
        device = "cpu"  # both sides compute without PyTorch
    compared = []
    rows = SIZES[stage][given.size]
    for number in given.row or range(len(rows)):
        target, sizes = rows[number]
        if stage == "features" and given.images:
            sizes = {**sizes, "root": str(Path(given.images).expanduser())}
        if stage == "features" and given.count:
            sizes = {**sizes, "images": given.count}
        for key in ("epochs", "test"):
            if key in sizes and getattr(given, key):
                sizes = {**sizes, key: getattr(given, key)}
        compared.append(
            compare(stage, sizes, device=device, threads=given.threads, repeats=given.repeats, target=target)
        )
    name = "-".join([stage, given.size, *map(str, given.row or [])])
    write_json(given.output / f"{name}.json", compared)
    text = as_markdown(build_lines(compared), stage.capitalize(), notes_of(compared))
    (given.output / f"{name}.md").write_text(text, encoding="utf-8")
    print(text)


def run_startup(_stage: str, given: argparse.Namespace) -> None:
    from benchmarks.startup import measure_startup

    write(given.output / "startup", *measure_startup(given.repeats))


def run_limits(_stage: str, given: argparse.Namespace) -> None:
    from benchmarks.limits import measure_limits

    write(given.output / "limits", *measure_limits(given.output, given.threads))


def run_scaling(_stage: str, given: argparse.Namespace) -> None:
    from benchmarks.scaling import measure_scaling

    write(given.output / "scaling", *measure_scaling(given.threads, given.size == "tiny", given.output))


def write(path: Path, figures: dict, text: str) -> None:
    """Figures as JSON, text as Markdown, and on the screen."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.with_suffix(".json").write_text(json.dumps(figures, indent=1) + "\n")
    path.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
