"""Soft labels: the teacher's outputs on every view that a student will see."""


def view_settings(w):
    """What the views of a recipe look like; shared by labelling and training."""
    recipe = entry("recipes", w.recipe, w.dataset)
    return {
        "crop_scale_min": recipe.get("crop_scale_min", 0.08),
        "cutmix": recipe.get("cutmix", False),
        "flip": entry("datasets", w.dataset, w.dataset).get("flip", True),
        "seed": config["seed"],
    }


@settings_for
def relabel_images_settings(w):
    recipe = entry("recipes", w.recipe, w.dataset)
    mode = recipe.get("teacher_mode", "eval")
    return {
        "views": view_settings(w),
        "epochs": recipe["epochs"],
        "teacher_mode": mode,
        # The batch reaches the labels through the teacher's BatchNorm alone.
        **(pick(recipe, "batch_size") if mode == "batch" else {}),
    }


rule relabel_images:
    input:
        description=DESCRIPTION,
        images=DISTILLED,
        teacher=lambda w: TEACHER.format(dataset=w.dataset, teacher=labeller_of(w)),
    output:
        labels=LABELS,
        header=LABELS_HEADER,
    params:
        settings=settings_of("relabel_images"),
        code=code_of("relabel_images"),
        job=describe_job,
    log:
        log_of("relabel_images", "{dataset}/{recipe}/{method}/ipc{ipc}"),
    benchmark:
        benchmark_of("relabel_images", "{dataset}/{recipe}/{method}/ipc{ipc}")
    message:
        "Relabel {wildcards.method} on {wildcards.dataset}, {wildcards.ipc} per class, recipe {wildcards.recipe}"
    shell:
        JOB
