"""Train students from scratch and test them on the real test set."""


rule evaluate_student:
    input:
        unpack(evaluate_student_input),
    output:
        evaluation=EVALUATION,
    log:
        log_of("evaluate_student", "{dataset}/{recipe}/{method}/ipc{ipc}/{student}/seed{seed}"),
    benchmark:
        benchmark_of("evaluate_student", "{dataset}/{recipe}/{method}/ipc{ipc}/{student}/seed{seed}")
    wildcard_constraints:
        recipe=names(config["recipes"]),
        ipc=r"\d+",
    conda:
        "../envs/wmdd.yaml"
    resources:
        local_gpu=local_gpu,
    params:
        **step_params("evaluate_student"),
    message:
        "Evaluate {wildcards.method} on {wildcards.dataset}, {wildcards.ipc} per class, {wildcards.student},"
        " seed {wildcards.seed}"
    shell:
        run_script("evaluate_student")


rule evaluate_all_real:
    input:
        description=DESCRIPTION,
        train=lambda w: real_images(w.dataset),
        test=IMAGES.replace("{split}", "test"),
    output:
        evaluation=EVALUATION.replace("{recipe}", REAL["recipe"]).replace("{ipc}", REAL["ipc"]),
    log:
        log_of("evaluate_all_real", "{dataset}/{method}/{student}/seed{seed}"),
    benchmark:
        benchmark_of("evaluate_all_real", "{dataset}/{method}/{student}/seed{seed}")
    wildcard_constraints:
        method=methods_of_kind("real"),
    conda:
        "../envs/wmdd.yaml"
    threads: decoders
    resources:
        local_gpu=local_gpu,
    params:
        **step_params("evaluate_all_real"),
    message:
        "Train {wildcards.student} on all real images of {wildcards.dataset}, seed {wildcards.seed}"
    shell:
        run_script("evaluate_all_real")
