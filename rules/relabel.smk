"""Soft labels: the teacher's outputs on every view that a student will see."""


rule relabel_images:
    input:
        description=DESCRIPTION,
        images=DISTILLED,
        teacher=lambda w: TEACHER.format(dataset=w.dataset, teacher=labeller_of(w.dataset)),
    output:
        labels=LABELS,
        header=LABELS_HEADER,
    log:
        log_of("relabel_images", "{dataset}/{recipe}/{method}/ipc{ipc}"),
    benchmark:
        benchmark_of("relabel_images", "{dataset}/{recipe}/{method}/ipc{ipc}")
    conda:
        "../envs/wmdd.yaml"
    resources:
        local_gpu=local_gpu,
    params:
        **step_params("relabel_images"),
    message:
        "Relabel {wildcards.method} on {wildcards.dataset}, {wildcards.ipc} per class, recipe {wildcards.recipe}"
    shell:
        run_script("relabel_images")
