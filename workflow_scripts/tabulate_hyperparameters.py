"""Hyperparameters of squeeze and recover for each dataset (Table 6), as the presets resolve them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from wmdd_core.recovery import RecoverySettings
from wmdd_core.training import Schedule
from workflow_scripts.job import Job, run
from workflow_scripts.plain_tables import write_table

NAMES = {"sgd": "SGD", "adam": "Adam", "adamw": "AdamW", "barycenter": "Wasserstein barycenter"}

Setting = Callable[[Mapping], object]
"""What one line of the table reads from the settings of a step; None where there is no such thing."""

SQUEEZE: dict[str, Setting] = {
    "network": lambda s: s["architecture"],
    "optimizer": lambda s: s.get("optimizer"),
    "learning rate": lambda s: s.get("learning_rate"),
    "weight decay": lambda s: s.get("weight_decay"),
    "momentum": lambda s: s.get("momentum", Schedule.momentum if s.get("optimizer") == "sgd" else None),
    "batch size": lambda s: s.get("batch_size"),
    "scheduler": lambda s: "cosine decay" if "epochs" in s else None,
    "epochs": lambda s: s.get("epochs"),
    "smallest crop": lambda s: s.get("crop_scale_min"),
}
RECOVER: dict[str, Setting] = {
    "λ": lambda s: s.get("lambda_bn"),
    "form of the loss": lambda s: s.get("loss_form", RecoverySettings.loss_form),
    "optimizer": lambda s: "Adam",  # the loop's only one
    "learning rate": lambda s: s.get("learning_rate"),
    "β1, β2": lambda s: f"{RecoverySettings.beta1}, {RecoverySettings.beta2}",
    "batch size": lambda s: s.get("batch_size"),
    "scheduler": lambda s: "cosine decay",
    "iterations": lambda s: s.get("iterations"),
    "smallest crop": lambda s: s.get("crop_scale_min"),
    "largest shift": lambda s: s.get("roll"),
}


def text_of(value: object) -> str:
    """A setting as people write it; nothing where there is none."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:g}"
    return NAMES.get(value, str(value)) if isinstance(value, str) else str(value)


def build_rows(columns: list[dict], labels: Mapping[str, str]) -> list[dict[str, str]]:
    """One line a setting, one column a dataset."""

    def line(name: str, values: list[object]) -> dict[str, str]:
        return {"setting": name, **{key_of(c): text_of(v) for c, v in zip(columns, values, strict=True)}}

    rows = [line("resolution", [c["resolution"] for c in columns])]
    rows += [line(f"squeeze: {n}", [read(c["squeeze"]) for c in columns]) for n, read in SQUEEZE.items()]
    for method in columns[0]["recover"]:
        step = "recover" if len(columns[0]["recover"]) == 1 else f"recover {labels[method]}"
        rows += [
            line(f"{step}: {n}", [read(c["recover"][method]) for c in columns]) for n, read in RECOVER.items()
        ]
    return rows


def key_of(column: Mapping) -> str:
    """The CSV's name of a column: the dataset, with the preset where that has another name."""
    return column["title"] + ("" if column["preset"] == column["dataset"] else f" ({column['preset']})")


def file_of(preset: str) -> str:
    """Where a preset is written."""
    return "config.yaml" if preset == "default" else f"presets/{preset}.yaml"


def main(job: Job) -> None:
    columns = job.settings["columns"]
    rows = build_rows(columns, job.settings["labels"])
    shown = [["Setting", *map(key_of, columns)], *(list(row.values()) for row in rows)]
    sources = ", ".join(f"{key_of(c)} from {file_of(c['preset'])}" for c in columns)
    notes = [
        f"Read from the configuration as the workflow resolves it, nothing typed by hand: {sources}.",
        "Crop: smallest share of the area that a random crop keeps. Shift: largest cyclic shift of a view, in"
        " pixels. Learning rates decay to zero by a cosine, in squeeze per epoch, in recover per iteration.",
    ]
    write_table(job.output, rows, shown, job.settings["title"], notes)
    print(f"{len(rows)} settings of {len(columns)} datasets")


if __name__ == "__main__":
    run(main)
