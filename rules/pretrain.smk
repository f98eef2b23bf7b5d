"""Squeeze: train a teacher on the real images."""


def real_images(w):
    """The decoded training images, where the dataset keeps them; otherwise jobs read its files."""
    if entry("datasets", w.dataset, w.dataset).get("store_train"):
        return IMAGES.format(dataset=w.dataset, split="train")
    return []


@settings_for
def pretrain_teacher_settings(w):
    return {
        **entry("teachers", w.teacher, w.dataset),
        "flip": entry("datasets", w.dataset, w.dataset).get("flip", True),
        "seed": config["seed"],
    }


rule pretrain_teacher:
    input:
        description=DESCRIPTION,
        train=real_images,
        test=IMAGES.replace("{split}", "test"),
    output:
        checkpoint=TEACHER,
        metrics=TEACHER_METRICS,
        curve=TEACHER_CURVE,
    params:
        settings=settings_of("pretrain_teacher"),
        code=code_of("pretrain_teacher"),
        job=describe_job,
    log:
        log_of("pretrain_teacher", "{dataset}/{teacher}"),
    benchmark:
        benchmark_of("pretrain_teacher", "{dataset}/{teacher}")
    message:
        "Pretrain teacher {wildcards.teacher} on {wildcards.dataset}"
    shell:
        JOB
