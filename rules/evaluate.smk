"""Train students from scratch and test them on the real test set."""


def evaluate_student_input(w):
    files = {
        "description": DESCRIPTION.format(dataset=w.dataset),
        "test": IMAGES.format(dataset=w.dataset, split="test"),
        "images": DISTILLED.format(dataset=w.dataset, method=w.method, ipc=w.ipc),
    }
    if entry("recipes", w.recipe, w.dataset)["labels"] == "soft":
        place = {"dataset": w.dataset, "recipe": w.recipe, "method": w.method, "ipc": w.ipc}
        files |= {"labels": LABELS.format(**place), "labels_header": LABELS_HEADER.format(**place)}
    return files


@settings_for
def evaluate_student_settings(w):
    recipe = entry("recipes", w.recipe, w.dataset)
    return {
        "recipe": without(recipe, "label", "crop_scale_min", "cutmix", "teacher_mode"),
        "views": view_settings(w),
        "student": without(entry("students", w.student, w.dataset), "label"),
    }


rule evaluate_student:
    input:
        unpack(evaluate_student_input),
    output:
        evaluation=EVALUATION,
    wildcard_constraints:
        recipe=names(config["recipes"]),
        ipc=r"\d+",
    params:
        settings=settings_of("evaluate_student"),
        code=code_of("evaluate_student"),
        job=describe_job,
    log:
        log_of("evaluate_student", "{dataset}/{recipe}/{method}/ipc{ipc}/{student}/seed{seed}"),
    benchmark:
        benchmark_of("evaluate_student", "{dataset}/{recipe}/{method}/ipc{ipc}/{student}/seed{seed}")
    message:
        "Evaluate {wildcards.method} on {wildcards.dataset}, {wildcards.ipc} per class, {wildcards.student},"
        " seed {wildcards.seed}"
    shell:
        JOB


@settings_for
def evaluate_all_real_settings(w):
    return {
        "recipe": without(method_of(w), "kind", "label", "swept"),
        "flip": entry("datasets", w.dataset, w.dataset).get("flip", True),
        "student": without(entry("students", w.student, w.dataset), "label"),
        "seed": config["seed"],
    }


rule evaluate_all_real:
    input:
        description=DESCRIPTION,
        train=real_images,
        test=IMAGES.replace("{split}", "test"),
    output:
        evaluation=EVALUATION.replace("{recipe}", REAL["recipe"]).replace("{ipc}", REAL["ipc"]),
    wildcard_constraints:
        method=methods_of_kind("real"),
    params:
        settings=settings_of("evaluate_all_real"),
        code=code_of("evaluate_all_real"),
        job=describe_job,
    log:
        log_of("evaluate_all_real", "{dataset}/{method}/{student}/seed{seed}"),
    benchmark:
        benchmark_of("evaluate_all_real", "{dataset}/{method}/{student}/seed{seed}")
    message:
        "Train {wildcards.student} on all real images of {wildcards.dataset}, seed {wildcards.seed}"
    shell:
        JOB
