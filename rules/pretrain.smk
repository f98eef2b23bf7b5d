"""Squeeze: train a teacher on the real images."""


rule pretrain_teacher:
    input:
        description=DESCRIPTION,
        train=lambda w: real_images(w.dataset),
        test=IMAGES.replace("{split}", "test"),
        weights=weights_given,
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
    threads: decoders
    resources:
        local_gpu=local_gpu,
    params:
        **step_params("pretrain_teacher"),
        gpus=gpus_of_job,
        weights=weights_stamp,
    message:
        "Pretrain teacher {wildcards.teacher} on {wildcards.dataset}"
    shell:
        run_script("pretrain_teacher", "WMDD_GPUS={params.gpus} ")
