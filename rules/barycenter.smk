"""The Wasserstein barycenter of each class's features: one job per class, or per block of classes."""


rule compute_barycenter:
    input:
        features=FEATURES,
        index=FEATURE_INDEX,
    output:
        barycenter=BARYCENTER,
    log:
        log_of("compute_barycenter", "{dataset}/{teacher}/{barycenter}/ipc{ipc}/class{block}"),
    benchmark:
        benchmark_of("compute_barycenter", "{dataset}/{teacher}/{barycenter}/ipc{ipc}/class{block}")
    conda:
        "../envs/wmdd.yaml"
    params:
        **step_params("compute_barycenter"),
    message:
        "Barycenter of class {wildcards.block} of {wildcards.dataset}, {wildcards.ipc} per class"
    shell:
        run_script("compute_barycenter")
