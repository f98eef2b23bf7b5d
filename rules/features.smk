"""Embed every real image, and measure BatchNorm statistics, in one pass."""


rule extract_features:
    input:
        description=DESCRIPTION,
        train=lambda w: real_images(w.dataset),
        teacher=TEACHER,
    output:
        features=FEATURES,
        index=FEATURE_INDEX,
        statistics=BN_STATISTICS,
    log:
        log_of("extract_features", "{dataset}/{teacher}"),
    benchmark:
        benchmark_of("extract_features", "{dataset}/{teacher}")
    conda:
        "../envs/wmdd.yaml"
    threads: decoders
    resources:
        local_gpu=local_gpu,
    params:
        **step_params("extract_features"),
    message:
        "Extract features of {wildcards.dataset} with teacher {wildcards.teacher}"
    shell:
        run_script("extract_features")
