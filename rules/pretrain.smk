"""Squeeze: train a teacher on the real images."""


def gpus_of_job(wildcards, resources):
    """GPUs that share each batch of a teacher: one, unless Slurm (`gpu`) or the user gives the rule more.

    On one machine: `--set-resources pretrain_teacher:local_gpu=2`. Snakemake never compares a parameter
    that reads `resources`: the number changes no result but for rounding.
    """
    return max(1, resources.get("gpu", 0), resources.get("local_gpu", 0))


rule pretrain_teacher:
    input:
        description=DESCRIPTION,
        train=real_images,
        test=IMAGES.replace("{split}", "test"),
    output:
        checkpoint=TEACHER,
        metrics=TEACHER_METRICS,
        curve=TEACHER_CURVE,
    log:
        log_of("pretrain_teacher", "{dataset}/{teacher}"),
    benchmark:
        benchmark_of("pretrain_teacher", "{dataset}/{teacher}")
    conda:
        "../envs/wmdd.yaml"
    resources:
        local_gpu=local_gpu,
    params:
        settings=settings_of("pretrain_teacher"),
        code=code_of("pretrain_teacher"),
        job=describe_job,
        gpus=gpus_of_job,
    message:
        "Pretrain teacher {wildcards.teacher} on {wildcards.dataset}"
    shell:
        "WMDD_GPUS={params.gpus} " + run_script("pretrain_teacher")
